"""What this device can compute and move at its best: matrix products by type, a large copy, the smallest call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from harness.roofline import Rates

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_WARM_CALLS = 2
_CALLS = 2_000


def measure(device: torch.device, *, seconds: float = 1.5) -> Rates:
    """Measure the device for about `seconds` for each type, and as long for a copy.

    The best of several runs counts: the rates are bounds, and whatever disturbs a run makes it slower.

    Args:
        device: it should be idle.
        seconds: for each figure.
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 2048
    rates = {}
    for dtype in _TYPES:
        rate = _product_rate(dtype, size, device, seconds)
        if rate is not None:
            rates[str(dtype).removeprefix("torch.")] = rate
    source = torch.ones(2**28 if cuda else 2**26, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    bandwidth = moved / _best(lambda: target.copy_(source), device, seconds)
    return Rates(
        flops_per_second=rates,
        bytes_per_second=bandwidth,
        call_seconds=_call_seconds(device),
        concurrent=cuda,
    )


def _product_rate(dtype: torch.dtype, size: int, device: torch.device, seconds: float) -> float | None:
    """FLOP/s of a square product; null where the device has none of this type."""
    a = torch.ones(size, size, device=device).to(dtype)
    b = a.T.contiguous().T  # as a linear layer has its weights
    product: Callable[[], Any] = (lambda: torch._int_mm(a, b)) if dtype is torch.int8 else (lambda: a @ b)
    try:
        return 2 * size**3 / _best(product, device, seconds)
    except RuntimeError:
        return None


def _best(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Least seconds of one run; at least one after the warm ones, however long it takes."""
    for _ in range(_WARM_CALLS):
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
    """Seconds that the host needs for the smallest operation, among many."""
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
