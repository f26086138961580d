"""Where a trial ran: hardware and versions, read without importing torch or touching CUDA.

Two rows are comparable when their environment ids are equal.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from harness import __version__
from harness._util.units import GIB, show_bytes
from harness.errors import InputError

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")

# Without these instructions PyTorch multiplies 16-bit matrices in plain loops (half_matmul.py).
NATIVE_HALF = {"avx512bw", "avx512_fp16", "amx_bf16", "bf16", "asimdhp"}
HalfMatmul = Literal["amx", "avx512_bf16", "native", "fp32-blocks"]
DeviceType = Literal["cpu", "cuda"]

_FORMER_NAME = "neighbours"
"""Of `concurrent_trials`, in rows of earlier versions."""


class Environment(BaseModel):
    """Hardware and versions of one machine, as they bear on the figures."""

    # Rows of a later version may have further fields.
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, use_attribute_docstrings=True)

    device_type: DeviceType
    """Where tensors are kept."""
    device_name: str
    """Name of the card, or of the processor."""
    device_memory_bytes: int
    """Memory of the card, or of the machine (the container's limit where there is one) in whole GiB."""
    driver: str | None
    """NVIDIA driver version."""
    cpu_name: str
    """Processor, as it names itself."""
    cpu_model: str | None = None
    """Its family and model in numbers, since virtual machines name all processors of a maker alike; null: unknown, or a
    row of an earlier version."""
    cpu_cores: int
    """Cores this process may use."""
    system: str
    """Operating system and architecture."""
    python: str
    """Python version, minor release."""
    half_matmul: HalfMatmul
    """How a CPU multiplies 16-bit matrices: its own instructions (the two fastest by name: each sums in an order and at
    a speed of its own), or harness's blocks of fp32."""
    versions: dict[str, str | None]
    """Versions of the measured packages; null: not installed."""
    concurrent_trials: int = Field(default=0, validation_alias=AliasChoices("concurrent_trials", _FORMER_NAME))
    """Other trials that may run on this machine at the same time; each then has a part of the cores."""

    @property
    def id(self) -> str:
        """Eight hex digits of the hash of all fields."""
        fields = self.model_dump(exclude={"concurrent_trials"})
        if self.cpu_model is None:  # as of the rows before it was recorded
            del fields["cpu_model"]
        if self.concurrent_trials:  # ids of the first rows were made without it, later ones under its former name
            fields[_FORMER_NAME] = self.concurrent_trials
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def processor(self) -> str:
        """Name and model of the processor."""
        return f"{self.cpu_name} ({self.cpu_model})" if self.cpu_model else self.cpu_name

    @property
    def cores(self) -> str:
        """Their number, with its unit."""
        return f"{self.cpu_cores} CPU core{'s' * (self.cpu_cores != 1)}"

    @property
    def summary(self) -> str:
        """Hardware and versions in one line."""
        products = {"fp32-blocks": "in blocks of fp32", "amx": "by AMX", "avx512_bf16": "by AVX-512"}
        how = products.get(self.half_matmul) if self.device_type == "cpu" else None
        device = self.processor if self.device_type == "cpu" else self.device_name
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        return (
            f"{device}, {show_bytes(self.device_memory_bytes)}, {self.cores}"
            f"{f', 16-bit products {how}' if how else ''}; {versions}"
        )

    def placed(self, placement: Placement) -> Environment:
        """The environment of a worker with this placement."""
        cores = placement.threads or len(placement.cores)
        return self.model_copy(update={"cpu_cores": cores, "concurrent_trials": placement.concurrent_trials})


@dataclass(frozen=True)
class Placement:
    """The part of a machine that one of several workers may use."""

    cores: tuple[int, ...]
    """Numbers of the cores that it may run on."""
    card: str | None
    """Its card, as CUDA_VISIBLE_DEVICES names it; null: any, or none."""
    concurrent_trials: int
    """Other workers of the machine."""
    threads: int | None = None
    """Cores that it should use, where `cores` are shared with others; null: all of them."""

    def apply(self) -> None:
        """Restrict this process to it. Call before CUDA is initialised, which reads the visible cards once."""
        os.sched_setaffinity(0, self.cores)
        if self.card is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.card


def divide_machine(workers: int, device_type: DeviceType) -> list[Placement]:
    """An equal part of this machine for each worker: a card, and as many cores.

    Raises:
        InputError: there are fewer cards or cores than workers, or the cards differ.
    """
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        raise InputError(f"{workers} workers, and {len(cores)} cores; give --workers {len(cores)} at most")
    tokens: list[str | None] = [None] * workers
    if device_type == "cuda":
        visible = cards()
        if workers > len(visible):
            most = max(1, len(visible))
            raise InputError(f"{workers} workers, and {len(visible)} cards; give --workers {most} at most")
        models = {(card["name"], card["memory_bytes"]) for card in visible[:workers]}
        if len(models) > 1:
            names = ", ".join(sorted(name for name, _ in models))
            raise InputError(
                f"the cards differ ({names}), and so would their figures; name equal ones in CUDA_VISIBLE_DEVICES"
            )
        tokens = [card["token"] for card in visible[:workers]]
    each = len(cores) // workers
    return [Placement(tuple(cores[k * each : (k + 1) * each]), tokens[k], workers - 1) for k in range(workers)]


def version(package: str) -> str | None:
    """Installed version, or null."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def cards() -> tuple[dict[str, Any], ...]:
    """CUDA cards that this process may use, from NVML: name, memory_bytes, driver, and the token that names it in
    CUDA_VISIBLE_DEVICES. Empty without a driver.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return ()
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # without the package, the driver or a card there is none to use
        return ()
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        tokens = [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
        if visible is not None:
            tokens = [t for t in (token.strip() for token in visible.split(",")) if t in tokens or not t.isdigit()]
        visible_cards = []
        for token in tokens:
            try:
                number = token.isdigit()
                handle = (pynvml.nvmlDeviceGetHandleByIndex if number else pynvml.nvmlDeviceGetHandleByUUID)(
                    int(token) if number else token
                )
            except pynvml.NVMLError:  # no card has that name
                continue
            visible_cards.append(
                {
                    "token": token,
                    "name": _text(pynvml.nvmlDeviceGetName(handle)),
                    "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                    "driver": driver,
                }
            )
        return tuple(visible_cards)
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def resolve_device(asked: str) -> DeviceType:
    """`auto` is CUDA where torch was built for it and a card is there."""
    if asked == "auto":
        return "cuda" if cards() and "+cpu" not in (version("torch") or "+cpu") else "cpu"
    return "cuda" if asked == "cuda" else "cpu"


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _cpu_model(info: dict[str, str]) -> str | None:
    """Of /proc/cpuinfo, whose fields have other names on x86 than on ARM."""
    for names in (("cpu family", "model"), ("CPU implementer", "CPU part")):
        if all(name in info for name in names):
            return ", ".join(f"{name.removeprefix('cpu ').removeprefix('CPU ')} {info[name]}" for name in names)
    return None


def _memory_bytes() -> int:
    total = psutil.virtual_memory().total
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


@functools.cache
def half_matmul() -> HalfMatmul:
    """Whether this CPU has instructions for 16-bit matrix products that PyTorch uses."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    if "amx_bf16" in flags:
        return "amx"
    if "avx512_bf16" in flags:
        return "avx512_bf16"
    # An unknown processor keeps PyTorch's own kernels.
    return "native" if not flags or flags & NATIVE_HALF else "fp32-blocks"


def missing_for_compiler(
    device_type: DeviceType, asked: str = "torch_compile", instead: str = "torch_compile: false"
) -> str | None:
    """What `asked` needs to compile code and this machine lacks, and what to use `instead`; null: nothing."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    # As torch (2.13) looks for them.
    names = ["CXX", "g++"] if device_type == "cpu" else ["CC", "gcc", "clang"]
    compilers = [os.environ.get(names[0], names[1]), *names[2:]]
    if not any(map(shutil.which, compilers)):
        what = f"a compiler ({' or '.join(compilers)}, or what {names[0]} names)"
    elif not header.is_file():
        what = f"Python's headers ({header})"
    elif device_type == "cuda" and importlib.util.find_spec("triton") is None:
        what = "the package triton"
    else:
        return None
    return f"{asked} needs {what}, which is not here; install it, or use {instead}"


@functools.cache
def current(device_type: DeviceType) -> Environment:
    """The environment of this process, for trials on that device."""
    info = _cpuinfo()
    cpu_name = info.get("model name") or platform.processor() or platform.machine()
    # Kernels reserve a little more or less at each boot; the machine is the same.
    memory = round(_memory_bytes() / GIB) * GIB
    card = cards()[0] if device_type == "cuda" and cards() else None
    return Environment(
        device_type=device_type,
        device_name=card["name"] if card else cpu_name,
        device_memory_bytes=card["memory_bytes"] if card else memory,
        driver=card["driver"] if card else None,
        cpu_name=cpu_name,
        cpu_model=_cpu_model(info),
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        python=".".join(platform.python_version_tuple()[:2]),
        half_matmul="native" if device_type == "cuda" else half_matmul(),
        versions={"harness": __version__, **{name: version(name) for name in PACKAGES}},
    )
