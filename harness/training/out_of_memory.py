"""Recognises errors that mean out of memory, on every device and in every library's words."""

from __future__ import annotations

import errno
import re

import torch

from harness._util.units import GIB, MIB
from harness.training.live_tensors import OutOfBudget
from harness.training.memory import MemoryMeter

# CUDA's runtime and driver, ROCm, PyTorch's CPU allocator, cuBLAS and its like (no memory for a workspace), and mmap.
_MESSAGES = re.compile(
    r"out of memory|can't allocate memory|OutOfMemory|(?:CUBLAS|CUDNN|CUSPARSE|CUSOLVER|CUFFT)_STATUS_ALLOC_FAILED"
    r"|std::bad_alloc|Unable to allocate"
)
_REQUESTED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(B|bytes|KiB|MiB|GiB)")
_UNITS = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": MIB, "GiB": GIB}


def out_of_memory(error: BaseException, meter: MemoryMeter) -> dict[str, int | None] | None:
    """Lower bound of the memory that the trial needs, if `error` means out of memory; else null.

    Returns:
        `oom_reached_bytes` and `oom_requested_bytes`, each null where it is unknown.
    """
    if isinstance(error, OutOfBudget):
        return {"oom_reached_bytes": error.reached, "oom_requested_bytes": error.requested}
    text = str(error)
    if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or _has_known_message(error, text)):
        return None
    match = _REQUESTED.search(text)
    requested = int(float(match.group(1)) * _UNITS[match.group(2)]) if match else None
    return {"oom_reached_bytes": meter.peak() or None, "oom_requested_bytes": requested}


def _has_known_message(error: BaseException, text: str) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _MESSAGES.search(text) is not None
