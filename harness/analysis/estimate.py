"""One comparison of one figure, judged, as tables, claims, plots and sentences show it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from harness.analysis.stats import Verdict
from harness.analysis.undecided import Unit
from harness.metrics import FIGURES

Basis = Literal["exact", "repeats", "visits", "steps", "stories", "passages", "questions", "rounds", "trials"]


@dataclass(frozen=True)
class Member:
    """One of the pairs of a comparison, and the keys by whose values it differs from the others."""

    context: str
    """precision=bf16"""
    estimate: Estimate


@dataclass(frozen=True)
class Estimate:
    """One comparison of one figure, on the scale that people read."""

    metric: str
    value: float
    """Ratio to the reference, or difference from it in nats; of several pairs their mean."""
    low: float | None
    high: float | None
    """Interval that holds with those of all comparisons of its family, at 95 %; null where the pairs give none."""
    n: int
    """Pairs (repeats; stories for losses)."""
    basis: Basis
    """What the interval is over."""
    p: float | None
    """Adjusted over the family."""
    verdict: Verdict
    seeds: int | None = None
    """Seeds under which the texts were seen; null where the figure is of no texts."""
    detectable: float | None = None
    """The smallest true difference that this comparison shows with 80 % power, in nats or as a share of the ratio; null
    for exact figures and where there is no interval."""
    needed: int | None = None
    """How many of `unit` would decide it; null where it is decided."""
    unit: Unit | None = None
    members: tuple[Member, ...] = ()
    """Of several pairs, each for itself."""

    @property
    def reversed(self) -> Estimate:
        """The reference compared with the other."""
        swapped: dict[str, Verdict] = {"better": "worse", "worse": "better", "lower": "higher", "higher": "lower"}
        ratio = FIGURES[self.metric].scale == "ratio"

        def turned(value: float) -> float:
            return (1 / value if value else math.inf) if ratio else -value

        low, high = (None if end is None else turned(end) for end in (self.high, self.low))
        verdict = swapped.get(self.verdict, self.verdict)
        return replace(self, value=turned(self.value), low=low, high=high, verdict=verdict)

    @property
    def within(self) -> str:
        """What `same` means: within 1 %, within 0.01 nats."""
        metric = FIGURES[self.metric]
        return f"{metric.negligible:.0%}" if metric.scale == "ratio" else f"{metric.negligible:g} nats"

    @property
    def text(self) -> str:
        """The verdict in words."""
        return f"same within {self.within}" if self.verdict == "same" else self.verdict
