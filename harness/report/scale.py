"""Places estimates on a line: the small pictures of a page, drawn by its style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.analysis import words
from harness.analysis.estimate import Estimate

_PAD = 0.05
"""Of the scale, on each side of what it shows."""
_MOST_TICKS = 5


@dataclass(frozen=True)
class Scale:
    """A line from `low` to `high`, which are ratios on a logarithmic scale, or differences."""

    low: float
    high: float
    ratio: bool

    def at(self, value: float) -> float:
        """Where a value is, in percent of the line; what is beyond its ends is at them."""
        low, high, value = (math.log(max(x, 1e-9)) if self.ratio else x for x in (self.low, self.high, value))
        return round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 2)

    @property
    def no_effect(self) -> float:
        """Where no effect is, in percent."""
        return self.at(1.0 if self.ratio else 0.0)

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Round values on the line: where they are, and how they are written."""
        return tuple((self.at(value), f"{value:g}".replace("-", "−")) for value in self.values)

    @property
    def values(self) -> list[float]:
        """Round values on the line."""
        return _ratios(self.low, self.high) if self.ratio else _differences(self.low, self.high)


@dataclass(frozen=True)
class Mark:
    """An estimate on a scale."""

    text: str
    """Size, interval and word."""
    verdict: str
    at: float
    """Percent of the line."""
    low: float | None
    """Ends of the interval; null: it has none."""
    high: float | None
    goes_on: bool
    """The interval ends beyond the line."""

    @property
    def width(self) -> float | None:
        """Of the interval."""
        return None if self.low is None or self.high is None else round(self.high - self.low, 2)


def mark(estimate: Estimate, scale: Scale) -> Mark:
    """Where an estimate is on a scale."""
    low, high = (None if end is None else scale.at(end) for end in (estimate.low, estimate.high))
    goes_on = any(end is not None and not scale.low <= end <= scale.high for end in (estimate.low, estimate.high))
    return Mark(words.effect_and_word(estimate), estimate.verdict, scale.at(estimate.value), low, high, goes_on)


def scale_of(values: Sequence[tuple[float, float | None, float | None]], *, ratio: bool, effects: bool = True) -> Scale:
    """A scale that holds no effect and all values; of their intervals as much as the values take at most, once more on
    each side, as a few wide ones would press everything else together.

    Args:
        values: estimates, each with the ends of its interval.
        ratio: whether they are ratios.
        effects: whether they are effects; else figures, of which none is no effect.
    """

    def on_line(value: float) -> float:
        return math.log(max(value, 1e-9)) if ratio else value

    finite = [each for each in values if math.isfinite(each[0])]
    points = [*[0.0] * (effects or not finite), *(on_line(value) for value, _, _ in finite)]
    ends = [on_line(end) for _, *both in finite for end in both if end is not None and math.isfinite(end)]
    least, most = min(points), max(points)
    span = max(most - least, 0.02 if effects else 0.1 * abs(most), 1e-9)
    low = max(min([least, *ends]), least - span) - _PAD * span
    high = min(max([most, *ends]), most + span) + _PAD * span
    return Scale(math.exp(low), math.exp(high), ratio) if ratio else Scale(low, high, ratio)


def _ratios(low: float, high: float) -> list[float]:
    """1, and round ratios on both of its sides."""
    if high / low < 2.5:
        return [1 + each for each in _differences(low - 1, high - 1)]
    steps = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    within = [step for step in steps if low <= step <= high]
    return within if len(within) <= _MOST_TICKS + 1 else [step for step in within if math.log10(step) % 1 == 0]


def _differences(low: float, high: float) -> list[float]:
    """0, and round multiples on both of its sides."""
    rough = (high - low) / (_MOST_TICKS - 1)
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(s * magnitude for s in (1, 2, 5, 10) if s * magnitude >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(number * step, 10) for number in range(first, last + 1)]
