"""The least time of a training step: its operations against what a device can compute and move. No torch.

Roofline model: Williams, Waterman and Patterson, CACM 52(4), 2009. Here each operation has a bound of its own, the
slower of its arithmetic and its memory traffic, since an eager step runs one kernel after another.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from harness.metrics import show_scientific


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Work(_Frozen):
    """Alike operations of a step."""

    dtype: str | None
    """What a matrix product or an attention multiplies (`float32`, `bfloat16`, …); null for everything else."""
    flops: int
    """Floating-point operations of one call; a multiply and an add are two."""
    moved_bytes: int
    """Bytes that one call reads and writes, each operand once."""
    calls: int
    """How many of them a step makes."""


class Rates(_Frozen):
    """What a device was measured to do at its best."""

    flops_per_second: dict[str, float]
    """By the type that is multiplied."""
    bytes_per_second: float
    """Read and written by a large copy."""
    call_seconds: float
    """What the smallest operation takes."""
    concurrent: bool
    """Whether operations are queued while others compute (CUDA)."""

    def said(self) -> str:
        """The rates in a line."""
        rates = ", ".join(f"{name} {show_scientific(rate)} FLOP/s" for name, rate in self.flops_per_second.items())
        return f"{rates}, {show_scientific(self.bytes_per_second)} B/s, {self.call_seconds * 1e6:.1f} µs a call"


def least_seconds(work: Sequence[Work], rates: Rates) -> float:
    """Seconds that a step needs at least: each operation at the device's full rate.

    A type that was not measured (the device has no product of it) computes at the fastest one that was.
    """
    fastest = max(rates.flops_per_second.values())
    return sum(
        w.calls
        * max(w.flops / rates.flops_per_second.get(w.dtype or "", fastest), w.moved_bytes / rates.bytes_per_second)
        for w in work
    )


def expected_seconds(work: Sequence[Work], rates: Rates) -> float:
    """The same with what each call costs besides: a CPU waits for it, CUDA only where the queue runs dry."""
    calls = sum(w.calls for w in work) * rates.call_seconds
    least = least_seconds(work, rates)
    return max(least, calls) if rates.concurrent else least + calls
