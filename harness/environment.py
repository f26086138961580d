"""Where a trial ran: hardware and versions, read without importing torch or touching CUDA.

Two rows are comparable when their environment ids are equal.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict

from harness import __version__

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")

# Without these instructions PyTorch multiplies 16-bit matrices in plain loops (half_matmul.py).
NATIVE_HALF = {"avx512bw", "avx512_fp16", "amx_bf16", "bf16", "asimdhp"}
HalfMatmul = Literal["amx", "avx512_bf16", "native", "fp32-blocks"]


class Environment(BaseModel):
    """Hardware and versions of one machine, as they bear on the figures."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

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

    @property
    def id(self) -> str:
        """Eight hex digits of the hash of all fields."""
        text = json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def version(package: str) -> str | None:
    """Installed version, or null."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def cards() -> tuple[dict[str, Any], ...]:
    """CUDA cards that this process may use, from NVML: name, memory_bytes, driver, index. Empty without a driver."""
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
        indices = list(range(pynvml.nvmlDeviceGetCount()))
        if visible is not None and all(part.strip().isdigit() for part in visible.split(",")):
            indices = [i for i in map(int, visible.split(",")) if i in indices]
        found = []
        for index in indices:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            found.append(
                {
                    "index": index,
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


@functools.cache
def current(device_type: Literal["cpu", "cuda"]) -> Environment:
    """The environment of this process for trials on that device."""
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
