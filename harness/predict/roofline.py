"""Step time from a step's operations and a device's rates. No torch.

Roofline model: Williams, Waterman and Patterson, CACM 52(4), 2009. The bound applies per operation, since an eager step
runs one kernel after another: the slower of its arithmetic and its memory traffic.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from harness._util.units import show_scientific


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Work(_Frozen):
    """Equal operations of a step."""

    dtype: str | None
    """Type of the operands of a matrix product or attention (`float32`, `tf32` where fp32 is rounded to TensorFloat-32,
    `bfloat16`, …); null for everything else."""
    flops: int
    """Floating-point operations of one call; a multiply and an add are two."""
    moved_bytes: int
    """Bytes that one call reads and writes, each operand once."""
    calls: int
    """Calls in a step."""


class Rates(_Frozen):
    """Highest rates of a device."""

    flops_per_second: dict[str, float]
    """By type of the operands."""
    bytes_per_second: float
    """Read and written by a large copy."""
    call_seconds: float
    """Time of the smallest operation."""
    concurrent: bool
    """Whether operations are queued while others compute (CUDA)."""

    def describe(self) -> str:
        """The rates in one line."""
        rates = ", ".join(f"{name} {show_scientific(rate)} FLOP/s" for name, rate in self.flops_per_second.items())
        return f"{rates}, {show_scientific(self.bytes_per_second)} B/s, {self.call_seconds * 1e6:.1f} µs a call"


def roofline_seconds(work: Sequence[Work], rates: Rates) -> float:
    """A step's time with each operation at the device's rate: a lower bound where the rates are a data sheet's; where
    they are measured, other shapes may run faster.

    A type without a rate (the device has no product of it, as Turing of bf16) computes at that of fp32.
    """
    by_type = rates.flops_per_second
    of_others = by_type.get("float32", max(by_type.values()))
    return sum(
        w.calls * max(w.flops / by_type.get(w.dtype or "", of_others), w.moved_bytes / rates.bytes_per_second)
        for w in work
    )


def predicted_seconds(work: Sequence[Work], rates: Rates) -> float:
    """`roofline_seconds` with the overhead of calls: a CPU waits for each, CUDA only when its queue is empty."""
    calls = sum(w.calls for w in work) * rates.call_seconds
    bound = roofline_seconds(work, rates)
    return max(bound, calls) if rates.concurrent else bound + calls
