"""Words for the sizes of effects, and the format of figures. Reports print these thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow

from harness.analysis import stats
from harness.analysis.estimate import Estimate
from harness.metrics import FIGURES
from harness.results.schema import SCHEMAS

MISSING = "–"
NOT_MEASURED = "not measured"
_MOST_SHOWN = 6
"""Pairs of one comparison."""
_BANDS: dict[str, tuple[tuple[float, str], ...]] = {
    "memory": (
        (0.5, "very high savings"),
        (0.75, "high savings"),
        (0.9, "medium savings"),
        (1 / 1.01, "small savings"),
        (1.01, "negligible"),
        (1.1, "slightly more"),
        (math.inf, "more"),
    ),
    "speed": (
        (0.67, "much slower"),
        (0.9, "slower"),
        (1 / 1.02, "slightly slower"),
        (1.02, "negligible"),
        (1.1, "slightly faster"),
        (1.5, "faster"),
        (math.inf, "much faster"),
    ),
    "loss": (
        (-0.05, "better"),
        (-0.01, "slightly better"),
        (0.01, "negligible"),
        (0.05, "slight loss"),
        (0.2, "moderate loss"),
        (math.inf, "noticeable loss"),
    ),
    "score": (
        (-0.05, "worse"),
        (-0.01, "slightly worse"),
        (0.01, "negligible"),
        (0.05, "slightly better"),
        (math.inf, "better"),
    ),
}
"""Upper bound of each band (ratio to the reference; nats for the loss), and its word."""
_SIDES = {
    "memory": ("less", "more"),
    "speed": ("slower", "faster"),
    "loss": ("better", "worse"),
    "score": ("worse", "better"),
}
"""What is below and above no effect."""
_MOST_DIGITS = 4
"""Of the ends of an interval."""


def word(estimate: Estimate) -> str:
    """The word for an estimate: the size of a significant difference, else the verdict."""
    if estimate.verdict in ("not distinguishable", "same", "depends"):
        return estimate.text
    group = FIGURES[estimate.metric].group
    if is_negligible(estimate):
        return f"negligibly {_SIDES[group][estimate.value > _no_effect(estimate)]}"
    return next(word for bound, word in _BANDS[group] if estimate.value <= bound)


def is_negligible(estimate: Estimate) -> bool:
    """Whether its size is no more than negligible, be it significant or not."""
    least, most = negligible_range(estimate.metric)
    return least <= estimate.value <= most


def is_better(estimate: Estimate) -> bool:
    """Whether it is better than the baseline by more than noise, and by more than is negligible."""
    return estimate.verdict == "better" and not is_negligible(estimate)


def negligible_range(metric: str) -> tuple[float, float]:
    """The ratios, or the differences, that are no more than negligible."""
    declared = FIGURES[metric]
    most = declared.negligible
    return (1 / (1 + most), 1 + most) if declared.scale == "ratio" else (-most, most)


def _no_effect(estimate: Estimate) -> float:
    return 1.0 if FIGURES[estimate.metric].scale == "ratio" else 0.0


def thresholds(*, scores: bool = False) -> list[str]:
    """What each word means: a line each for memory, speed and loss, and for scores of tasks where there are any."""
    lines = []
    for group, bands in _BANDS.items():
        if group == "score" and not scores:
            continue
        unit = {"loss": " nats", "score": ""}.get(group, "×")
        bounded = [f"{word} up to {_bound(bound, group)}{unit}" for bound, word in bands[:-1]]
        lines.append(f"{group}: {', '.join(bounded)}, {bands[-1][1]} beyond")
    return lines


def _bound(bound: float, group: str) -> str:
    return f"{bound:+g}".replace("-", "−") if group in ("loss", "score") else f"{bound:.3g}"


def looks(alpha: float) -> str:
    """Why figures are judged at another level than is said, in a sentence; empty where they are not."""
    if alpha == stats.ALPHA:
        return ""
    return (
        f"Rows were looked at up to {round(stats.ALPHA / alpha)} times to see whether more were needed: each look, "
        f"this page too, judges a figure at {1 - alpha:.2%}; together they hold at {1 - stats.ALPHA:.0%}."
    )


def figure(metric: str, value: float | None) -> str:
    """A figure in the unit that people read."""
    return MISSING if value is None or math.isnan(value) else FIGURES[metric].show(value)


def effect(estimate: Estimate | None) -> str:
    """Size and interval: ×0.75; ×0.63 (0.60–0.66); +0.014 (−0.020 to +0.048)."""
    if estimate is None:
        return MISSING
    if estimate.verdict == "depends":  # no average of what is not the same
        return of_members(estimate)
    if FIGURES[estimate.metric].scale == "ratio":
        interval = _interval(estimate, "–", 2, _ratio)
        return f"×{_ratio(estimate.value, 3 if 0.99 < estimate.value < 1.01 else 2)}{interval}"
    return _signed(estimate.value) + _interval(estimate, " to ", 3, _signed)


def of_members(estimate: Estimate) -> str:
    """The size of each pair, with what it differs in: ×0.61 (precision=bf16); ×1.06 (precision=fp32)."""
    return _joined([f"{effect(member.estimate)} ({member.context})" for member in estimate.members])


def _joined(members: list[str], between: str = "; ") -> str:
    more = len(members) - _MOST_SHOWN
    return between.join(members[:_MOST_SHOWN]) + (f"{between}and {more} more" if more > 0 else "")


def _interval(estimate: Estimate, between: str, digits: int, show: Callable[[float, int], str]) -> str:
    low, high = estimate.low, estimate.high
    if low is None or high is None or (estimate.basis == "exact" and high - low < 5e-4):
        return ""  # or all pairs agree
    nearest = low if low > _no_effect(estimate) else high if high < _no_effect(estimate) else None
    if nearest is not None and estimate.verdict != "same":  # what excludes no effect must not seem to reach it
        while digits < _MOST_DIGITS and round(nearest, digits) == _no_effect(estimate):
            digits += 1
    return f" ({show(low, digits)}{between}{show(high, digits)})"


def _ratio(value: float, digits: int) -> str:
    """0.75, 1.004; two digits that count of those below a tenth, and three from a hundred on."""
    if 0.001 <= value < 0.095:
        return f"{value:.2g}"
    return f"{value:.{digits}f}" if value < 100 else f"{value:.3g}"


def _signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def effect_and_word(estimate: Estimate | None) -> str:
    """Size, interval and word, for one cell; of several pairs, those of each too."""
    if estimate is None:
        return MISSING
    if estimate.verdict == "depends":
        members = [f"{effect(m.estimate)} {word(m.estimate)} ({m.context})" for m in estimate.members]
        return f"depends: {_joined(members)}"
    each = _joined([effect(replace(m.estimate, low=None, high=None)) for m in estimate.members], ", ")
    return f"{effect(estimate)} {word(estimate)}" + (f" (mean of {each})" if each else "")


def pairs(estimate: Estimate) -> str:
    """What the interval is over: 3 repeats, 8 stories × 3 seeds, 64 passages, one seed, 1 repeat, over its steps."""
    several = {"exact": "repeats", "steps": "repeats"}.get(estimate.basis, estimate.basis)
    one = "story" if several == "stories" else several.removesuffix("s")
    counted = f"{estimate.n} {one if estimate.n == 1 else several}"
    if estimate.seeds is not None:
        return f"{counted}, one seed" if estimate.seeds == 1 else f"{counted} × {estimate.seeds} seeds"
    if estimate.basis == "steps":
        return f"{counted}, over its steps"
    return f"{counted}, exact" if estimate.basis == "exact" else counted


def detectable(estimate: Estimate) -> str:
    """The smallest detectable difference: 4.1%, 0.02 nats."""
    if estimate.detectable is None:
        return MISSING
    metric = FIGURES[estimate.metric]
    if metric.scale == "ratio":
        return percent(estimate.detectable)
    return f"{estimate.detectable:.2g}" + " nats" * (metric.group == "loss")


def level(key: str, value: Any) -> str:
    """A level of a key; whole numbers are floats in a column that has unknown ones too."""
    kind = SCHEMAS["trials"].field(key).type
    return f"{value:.0f}" if pyarrow.types.is_integer(kind) and isinstance(value, float) else str(value)


def percent(value: float) -> str:
    """Two digits of a percentage, and none after the point: 4.1%, 17%, 170%."""
    return f"{100 * value:.2g}%" if value < 0.995 else f"{100 * value:.0f}%"


def could_be_seen(estimate: Estimate) -> str:
    """Of a comparison that is not distinguishable, what it could have shown, and what would decide it: ±0.06 nats at 64
    stories, one seed; 150 stories (val_set_size) would decide; empty where it is decided, or nothing is known.
    """
    if estimate.verdict != "not distinguishable" or estimate.detectable is None:
        return ""
    decided = what_decides(estimate)
    decided = "" if decided == MISSING else f"; {decided} would decide"
    return f"±{detectable(estimate)} at {pairs(estimate)}{decided}"


def what_decides(estimate: Estimate) -> str:
    """What would decide a comparison that is not distinguishable, in total: 150 stories (val_set_size), 9 visits."""
    if estimate.basis == "exact":  # some repeats hold more and some less: no more of them would change that
        return MISSING
    if estimate.detectable is None:
        return "a second story" if estimate.seeds is not None else "a second visit"
    if estimate.needed is None:
        return MISSING
    if estimate.unit == "times":
        stories, seeds = (estimate.needed * (number or 1) for number in (estimate.n, estimate.seeds))
        return f"{stories:,} stories (val_set_size) and {seeds:,} seeds (repeats)"
    keys = {"stories": " (val_set_size)", "seeds": " (repeats)"}
    unit = estimate.unit or estimate.basis
    return f"{estimate.needed:,} {unit}{keys.get(unit, '')}"
