"""Measures the highest rates of a device: matrix products by type, a large copy, the smallest call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from harness.predict.roofline import Rates

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_WARMUP_CALLS = 2
_CALLS = 2_000


def measure(device: torch.device, *, seconds: float = 1.5) -> Rates:
    """Measure each rate for about `seconds`.

    The fastest of several runs counts: the rates are bounds, and disturbances only slow a run down.

    Args:
        device: should be idle.
        seconds: for each rate.
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 2048
    rates = {}
    for dtype in _TYPES:
        rate = _product_rate(dtype, size, device, seconds)
        if rate is not None:
            rates[str(dtype).removeprefix("torch.")] = rate
    if cuda and torch.cuda.get_device_capability(device) >= (8, 0):
        torch.backends.cuda.matmul.allow_tf32 = True
        rates["tf32"] = _product_rate(torch.float32, size, device, seconds) or rates["float32"]
        torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.ones(2**28 if cuda else 2**26, device=device)
    target = torch.empty_like(source)
    moved_bytes = 2 * source.numel() * source.element_size()
    bandwidth = moved_bytes / _best(lambda: target.copy_(source), device, seconds)
    return Rates(
        flops_per_second=rates,
        bytes_per_second=bandwidth,
        call_seconds=_call_seconds(device),
        concurrent=cuda,
    )


def _product_rate(dtype: torch.dtype, size: int, device: torch.device, seconds: float) -> float | None:
    """FLOP/s of a square product; null where the device has no product of this type."""
    a = torch.ones(size, size, device=device).to(dtype)
    b = a.T.contiguous().T  # the layout of a linear layer's weights
    # Private API of torch (2.13): there is no public int8 product that runs on CPU and CUDA.
    product: Callable[[], Any] = (lambda: torch._int_mm(a, b)) if dtype is torch.int8 else (lambda: a @ b)
    try:
        return 2 * size**3 / _best(product, device, seconds)
    except RuntimeError:
        return None


def _best(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest run; one run after the warm-up at least, however long it takes."""
    for _ in range(_WARMUP_CALLS):
        run()
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        _synchronise(device)
        began = time.perf_counter()
        run()
        _synchronise(device)
        best = min(best, time.perf_counter() - began)
    return best


def _call_seconds(device: torch.device) -> float:
    """Host seconds of the smallest operation, averaged over many."""
    one = torch.ones(1, device=device)
    best = float("inf")
    for _ in range(3):
        _synchronise(device)
        began = time.perf_counter()
        for _ in range(_CALLS):
            torch.add(one, one)
        best = min(best, (time.perf_counter() - began) / _CALLS)
    return best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
