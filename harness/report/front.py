"""The first screen of a report: the three answers, one picture of all techniques, and what fits in how much memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas

from harness._util.units import counted
from harness.analysis import recommend, words
from harness.analysis.comparison import Comparison
from harness.analysis.measurements import Measurements
from harness.metrics import HEADLINE, METRICS
from harness.report.scale import Mark, Scale, mark, scale_of

MOST_LINES = 40
"""Techniques in the picture; the table has them all."""
_ANSWERS = {"peak_memory_bytes": "Least memory", "tokens_per_second": "Fastest", "eval_loss": "Lowest loss"}


@dataclass(frozen=True)
class Card:
    """One of the answers: the best technique by one figure, and what it trades."""

    title: str
    technique: str
    """Empty where none is better than the baseline by more than noise."""
    figure: str
    """With its unit."""
    effect: str
    """Against the baseline; empty where nothing is compared."""
    trades: tuple[str, ...]
    """What it does to the other two figures, a text each."""

    @property
    def sentence(self) -> str:
        """The answer in a line."""
        if not self.technique:
            return f"{self.title}: {self.figure}."
        trades = f" ({'; '.join(self.trades)})" if self.trades else ""
        return f"{self.title}: {self.technique}, {self.effect or self.figure}{trades}."


@dataclass(frozen=True)
class Line:
    """A technique in the picture."""

    key: str
    """Of its rows in the page."""
    technique: str
    memory: int | None
    """Bytes that it needs."""
    marks: tuple[Mark | None, ...]
    """Of memory, speed and loss; null: not measured."""
    figures: tuple[str, ...]
    """The same figures as they were measured."""


@dataclass(frozen=True)
class Group:
    """Techniques that act on the same part of a training."""

    heading: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Column:
    """A figure of the picture."""

    title: str
    scale: Scale


@dataclass(frozen=True)
class Front:
    """The content of the first screen."""

    about: str
    """Machine, model, data and size of the experiment."""
    cards: tuple[Card, ...]
    columns: tuple[Column, ...]
    groups: tuple[Group, ...]
    left_out: int
    """Techniques that the picture does not show."""
    choices: tuple[recommend.Choice, ...]
    """What to take with how much memory."""
    memory: Mapping[str, int]
    """Bytes that each configuration needs, by the key of its rows."""
    grid: str
    """That the answers are of, where there are several; else empty."""

    @property
    def lines(self) -> list[Line]:
        """All techniques of the picture."""
        return [line for group in self.groups for line in group.lines]


def front(comparisons: Mapping[str, Comparison], choices: Sequence[recommend.Choice]) -> Front:
    """The first screen of a report.

    Args:
        comparisons: one, or those of several grids, by what their keys begin with. The answers are those of the first.
        choices: what to take with how much memory, see `recommend.by_memory`.
    """
    first = next(iter(comparisons.values()))
    shown = {
        prefix: [config for config in each.shown if config != each.measurements.baseline][:MOST_LINES]
        for prefix, each in comparisons.items()
        if each.measurements.baseline is not None
    }
    columns = tuple(Column(METRICS[metric].heading, _scale(comparisons, metric, shown)) for metric in HEADLINE)
    groups = [
        group
        for prefix, configs in shown.items()
        for group in _groups(comparisons[prefix], configs, columns, prefix, named=len(comparisons) > 1)
    ]
    grid = first.measurements.name if len(comparisons) > 1 else ""
    others = {
        prefix: sum(config != each.measurements.baseline for config in each.shown)
        for prefix, each in comparisons.items()
    }
    return Front(
        about=_about([each.measurements for each in comparisons.values()]),
        cards=cards(first, grid),
        columns=columns,
        groups=tuple(groups),
        left_out=sum(others[prefix] - len(configs) for prefix, configs in shown.items()),
        choices=tuple(choices),
        memory={
            f"{prefix}{config}": size
            for prefix, each in comparisons.items()
            for config, size in recommend.needed_bytes(each.measurements).items()
        },
        grid=grid,
    )


def about(m: Measurements) -> str:
    """Model, data, machine and size of the experiment, in one line."""
    ok = m.trials[m.trials["status"] == "ok"]
    parts = [_few(m.configs["base_model"]), _few(m.trials["datasets"].map(_datasets)), _machine(m), _size(m)]
    steps = ok["optimizer_steps"].dropna()
    if len(steps):
        parts.append(f"{_range(steps)} optimizer steps")
    if len(m.stories):
        by_trial = m.stories.groupby("trial")
        tokens = int(by_trial["tokens"].sum().max())
        counts = by_trial["story"].nunique()
        noun = "story" if counts.max() == 1 else "stories"
        parts.append(f"{_range(counts)} held-out {noun} ({tokens:,} tokens)")
    return " · ".join(parts)


def _about(measurements: Sequence[Measurements]) -> str:
    """The same of several grids, shorter."""
    if len(measurements) == 1:
        return about(measurements[0])
    models = pandas.concat([m.configs["base_model"] for m in measurements])
    grids = ", ".join(f"{m.name} ({_size(m)})" for m in measurements)
    return " · ".join([_few(models), _few(pandas.Series([_machine(m) for m in measurements])), grids])


def _machine(m: Measurements) -> str:
    name = str(m.environment["device_name"])
    cores = m.environment["cpu_cores"]
    return f"{name}, {cores} core{'s' * (cores != 1)}" if m.environment["device_type"] == "cpu" else name


def _size(m: Measurements) -> str:
    configurations = len(m.configs[~m.configs["twin"]])
    return f"{counted(configurations, 'configuration')}, {counted(len(m.trials), 'trial')}"


def _datasets(recorded: str) -> str:
    return ", ".join(str(each.get("path")) for each in json.loads(recorded))


def _few(values: pandas.Series) -> str:
    """The values, at most two of them."""
    different = list(dict.fromkeys(str(value) for value in values.dropna()))
    return ", ".join(different[:2]) + (f" and {len(different) - 2} more" if len(different) > 2 else "")


def _range(values: pandas.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


# ------------------------------------------------------------------------------------ answers


def cards(comparison: Comparison, grid: str = "") -> tuple[Card, ...]:
    """The best by each of memory, speed and loss that was measured, if it is better by more than noise and more than
    negligibly, with its effects on the two others.

    Args:
        comparison: of the report.
        grid: that they are of, where there are several.
    """
    known = (metric for metric in HEADLINE if metric in comparison.means and comparison.means[metric].notna().any())
    made = (_card(comparison, metric) for metric in known)
    return tuple(replace(card, title=f"{card.title} ({grid})") if grid else card for card in made)


def _card(comparison: Comparison, metric: str) -> Card:
    m, wanted = comparison.measurements, METRICS[metric].better
    failed = recommend.failed_repeats(m)
    if not any(comparison.estimates.values()):
        values = comparison.means.loc[[c for c in comparison.shown if c not in failed], metric].dropna()
        if values.empty:
            return Card(_ANSWERS[metric], "", "not measured", "", ())
        best: Any = values.idxmin() if wanted == "lower" else values.idxmax()
        title = _ANSWERS[metric] if METRICS[metric].exact else f"{_ANSWERS[metric]}, not compared"
        return Card(title, m.labels([best])[0], with_unit(metric, values[best]), "", ())
    compared = comparison.estimates[metric]
    if not compared:
        return Card(_ANSWERS[metric], "", "none can be compared with the baseline", "", ())
    better = {c: e for c, e in compared.items() if words.is_better(e)}
    if better and better.keys() <= failed.keys():
        return Card(_ANSWERS[metric], "", "none that ended well under every seed is better than the baseline", "", ())
    better = {c: e for c, e in better.items() if c not in failed}
    if not better:
        return Card(_ANSWERS[metric], "", f"none is better than the baseline{_detectable(comparison, metric)}", "", ())
    best = min(better, key=lambda c: better[c].value * (1 if wanted == "lower" else -1))
    others = ((other, comparison.of(other, best)) for other in HEADLINE if other != metric)
    return Card(
        _ANSWERS[metric],
        m.labels([best])[0],
        with_unit(metric, comparison.mean(best).get(metric)),
        words.effect(better[best]),
        tuple(f"{METRICS[x].group} {words.effect_and_word(e)}" for x, e in others if e is not None),
    )


def _detectable(comparison: Comparison, metric: str) -> str:
    """The difference that would have been seen of each, where each was compared."""
    undecided = comparison.undecided(metric).values()
    measured = {c for c in comparison.shown if not pandas.isna(comparison.mean(c).get(metric))}
    left = measured - comparison.estimates[metric].keys() - {comparison.measurements.baseline}
    if left or not undecided or any(e.detectable is None for e in undecided):
        return ""
    most = max(undecided, key=lambda e: e.detectable or 0.0)
    return f"; a difference of {words.detectable(most)} would have been seen of each"


def with_unit(metric: str, value: float | None) -> str:
    """A figure with its unit."""
    unit = METRICS[metric].unit
    text = words.figure(metric, value)
    return text if unit == "B" or text == words.MISSING else f"{text} {unit}"


# ------------------------------------------------------------------------------------ the picture


def _scale(comparisons: Mapping[str, Comparison], metric: str, shown: Mapping[str, Sequence[int]]) -> Scale:
    """One that holds the estimates of all."""
    estimates = (comparisons[prefix].of(metric, config) for prefix, configs in shown.items() for config in configs)
    ends = [(e.value, e.low, e.high) for e in estimates if e is not None]
    return scale_of(ends, ratio=METRICS[metric].scale == "ratio")


def _groups(
    comparison: Comparison, configs: Sequence[int], columns: Sequence[Column], prefix: str, *, named: bool
) -> Iterable[Group]:
    """By what techniques act on, in the order of the tables; within a group by their memory, the least first."""
    m = comparison.measurements
    needed = recommend.needed_bytes(m)
    parts: dict[str, list[int]] = {}
    for config in configs:
        parts.setdefault((m.acts_on[config] or "").capitalize(), []).append(config)

    def size(config: int) -> float:
        value = comparison.mean(config).get("peak_memory_bytes", math.nan)
        return math.inf if math.isnan(value) else value

    for part, members in parts.items():
        heading = ": ".join(filter(None, (m.name if named else "", part)))
        lines = (_line(comparison, c, columns, prefix, needed.get(c)) for c in sorted(members, key=size))
        yield Group(heading, tuple(lines))


def _line(comparison: Comparison, config: int, columns: Sequence[Column], prefix: str, memory: int | None) -> Line:
    marks = []
    for metric, column in zip(HEADLINE, columns, strict=True):
        estimate = comparison.of(metric, config)
        marks.append(None if estimate is None else mark(estimate, column.scale))
    means = comparison.mean(config)
    figures = tuple(with_unit(metric, means.get(metric)) for metric in HEADLINE)
    (label,) = comparison.measurements.labels([config])
    return Line(f"{prefix}{config}", label, memory, tuple(marks), figures)
