"""Where a trial ran: hardware and versions, read without importing torch or touching CUDA.

Two rows are comparable when their environment ids are equal.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict

from harness import __version__
from harness.errors import InputError

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")

# Without these instructions PyTorch multiplies 16-bit matrices in plain loops (half_matmul.py).
NATIVE_HALF = {"avx512bw", "avx512_fp16", "amx_bf16", "bf16", "asimdhp"}
HalfMatmul = Literal["amx", "avx512_bf16", "native", "fp32-blocks"]


class Environment(BaseModel):
    """Hardware and versions of one machine, as they bear on the figures."""

    # Rows of a later version may say more.
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    device_type: Literal["cpu", "cuda"]
    """Where tensors live."""
    device_name: str
    """Name of the card, or of the processor."""
    device_memory_bytes: int
    """Memory of the card, or of the machine (the container's limit where there is one) in whole GiB."""
    driver: str | None
    """NVIDIA driver version."""
    cpu_name: str
    """Processor."""
    cpu_cores: int
    """Cores this process may use."""
    system: str
    """Operating system and architecture."""
    python: str
    """Python version, minor release."""
    half_matmul: HalfMatmul
    """How a CPU multiplies 16-bit matrices: its own instructions (the two fastest by name: they sum in orders of their
    own, at speeds of their own), or harness's blocks of fp32."""
    versions: dict[str, str | None]
    """Versions of the packages that measure and are measured; null: not installed."""
    neighbours: int = 0
    """Most trials that ran at the same time on this machine; the cores are a share of it then."""

    @property
    def id(self) -> str:
        """Eight hex digits of the hash of all fields; trials that ran alone have that from before there were others."""
        alone = {"neighbours"} if self.neighbours == 0 else set()
        text = json.dumps(self.model_dump(exclude=alone), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def at(self, seat: Seat) -> Environment:
        """That of a worker of this machine."""
        return self.model_copy(update={"cpu_cores": seat.threads or len(seat.cores), "neighbours": seat.neighbours})


@dataclass(frozen=True)
class Seat:
    """What one of several workers has of a machine."""

    cores: tuple[int, ...]
    """Numbers of the cores that it may use."""
    card: str | None
    """Its card, as CUDA_VISIBLE_DEVICES names it; null: as it is, or none."""
    neighbours: int
    """Other seats."""
    threads: int | None = None
    """So many cores are meant, where they are not its own; null: all of them."""

    def take(self) -> None:
        """Keep this process to the seat. Before CUDA is touched: which cards there are is asked once."""
        global _seat
        os.sched_setaffinity(0, self.cores)
        if self.card is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.card
        _seat = self


_seat: Seat | None = None
"""Of this process, if it is one of several workers."""
_seats = 1
"""Into so many this process divides the machine, if it is a runner."""
_nodes: tuple[Environment, ...] = ()
"""Where the trials of this runner run, if it is elsewhere."""


def seats(count: int, device_type: str) -> list[Seat]:
    """The machine divided among so many workers: a card each, and as many cores.

    Raises:
        InputError: there are fewer cards or cores, or the cards differ.
    """
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise InputError(f"{count} workers, and {len(cores)} cores; give --workers {len(cores)} at most")
    own: list[str | None] = [None] * count
    if device_type == "cuda":
        there = cards()
        if count > len(there):
            raise InputError(f"{count} workers, and {len(there)} cards; give --workers {max(1, len(there))} at most")
        kinds = {(card["name"], card["memory_bytes"]) for card in there[:count]}
        if len(kinds) > 1:
            said = ", ".join(sorted(name for name, _ in kinds))
            raise InputError(
                f"the cards differ ({said}), and so would their figures; name like ones in CUDA_VISIBLE_DEVICES"
            )
        own = [card["token"] for card in there[:count]]
    share = len(cores) // count
    return [Seat(tuple(cores[k * share : (k + 1) * share]), own[k], count - 1) for k in range(count)]


@contextlib.contextmanager
def divided(count: int) -> Iterator[None]:
    """Within, `current` is the environment of one of so many workers."""
    global _seats
    former, _seats = _seats, count
    try:
        yield
    finally:
        _seats = former


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
    except Exception:  # no package, no driver, no card: each means that there is none to use
        return ()
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        tokens = [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
        if visible is not None:
            tokens = [t for t in (token.strip() for token in visible.split(",")) if t in tokens or not t.isdigit()]
        found = []
        for token in tokens:
            try:
                number = token.isdigit()
                handle = (pynvml.nvmlDeviceGetHandleByIndex if number else pynvml.nvmlDeviceGetHandleByUUID)(
                    int(token) if number else token
                )
            except pynvml.NVMLError:  # there is no card of that name
                continue
            found.append(
                {
                    "token": token,
                    "name": _text(pynvml.nvmlDeviceGetName(handle)),
                    "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                    "driver": driver,
                }
            )
        return tuple(found)
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def resolve_device(asked: str) -> Literal["cpu", "cuda"]:
    """`auto` is CUDA where torch was built for it and a card is there."""
    if asked == "auto":
        return "cuda" if cards() and "+cpu" not in (version("torch") or "+cpu") else "cpu"
    return "cuda" if asked == "cuda" else "cpu"


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


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


def current(device_type: Literal["cpu", "cuda"]) -> Environment:
    """The environment of this process, or of its workers, for trials on that device."""
    if _nodes:
        return _nodes[0]
    here = _current(device_type)
    if _seat is not None:
        return here.at(_seat)
    return here if _seats == 1 else here.model_copy(
        update={"cpu_cores": here.cpu_cores // _seats, "neighbours": _seats - 1}
    )  # fmt: skip


def possible(device_type: Literal["cpu", "cuda"]) -> tuple[Environment, ...]:
    """Those that a trial of this runner may find itself in."""
    return _nodes or (current(device_type),)


@contextlib.contextmanager
def elsewhere(nodes: tuple[Environment, ...]) -> Iterator[None]:
    """Within, trials run in these environments, not in this machine's."""
    global _nodes
    former, _nodes = _nodes, nodes
    try:
        yield
    finally:
        _nodes = former


@functools.cache
def _current(device_type: Literal["cpu", "cuda"]) -> Environment:
    info = _cpuinfo()
    cpu_name = info.get("model name") or platform.processor() or platform.machine()
    # Kernels reserve a little more or less at each boot; the machine is the same.
    memory = round(_memory_bytes() / 2**30) * 2**30
    card = cards()[0] if device_type == "cuda" and cards() else None
    return Environment(
        device_type=device_type,
        device_name=card["name"] if card else cpu_name,
        device_memory_bytes=card["memory_bytes"] if card else memory,
        driver=card["driver"] if card else None,
        cpu_name=cpu_name,
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        python=".".join(platform.python_version_tuple()[:2]),
        half_matmul="native" if device_type == "cuda" else half_matmul(),
        versions={"harness": __version__, **{name: version(name) for name in PACKAGES}},
    )
