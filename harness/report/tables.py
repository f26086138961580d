"""Tables of a report, in the shapes of the lesson's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas

from harness.analysis import longer, words
from harness.analysis.compare_runs import RunComparison
from harness.analysis.comparison import (
    BATCH_FACTORS,
    EFFECTIVE_BATCH,
    MICRO_BATCH,
    SEQUENCE_LENGTH,
    Comparison,
    describe_pairs,
    failure,
    order,
    row_name,
)
from harness.analysis.estimate import Estimate
from harness.analysis.words import MISSING, NOT_MEASURED, effect_and_word, figure
from harness.grids.claims import Contrast, LessonTable, lesson
from harness.grids.document import MATCHED_WITHIN
from harness.metrics import COMPONENTS, HEADLINE, METRICS
from harness.spec.keys import FULL


@dataclass(frozen=True)
class Cell:
    """Text, and the number to sort by."""

    text: str
    value: float | None = None
    verdict: str = ""
    """Of an effect."""
    note: str = ""
    """In small print: what an undecided comparison could have shown."""


@dataclass(frozen=True)
class Table:
    """A table of the report."""

    id: str
    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    configs: tuple[int, ...] = ()
    """The configuration of each row, where rows are configurations."""
    keys: tuple[str, ...] = ()
    """Of each row's configuration, in the page."""

    def __post_init__(self) -> None:
        if self.configs and not self.keys:
            object.__setattr__(self, "keys", tuple(map(str, self.configs)))


def figure_cell(metric: str, value: float | None) -> Cell:
    """A figure."""
    return Cell(figure(metric, value), value)


def effect_cell(estimate: Estimate | None, missing: str = MISSING) -> Cell:
    """An effect with its interval and word."""
    if estimate is None:
        return Cell(missing)
    value = None if estimate.verdict == "depends" else estimate.value
    return Cell(effect_and_word(estimate), value, estimate.verdict, words.could_be_seen(estimate))


def headings_of(metrics: Iterable[str]) -> tuple[str, ...]:
    """The headings of metrics."""
    return tuple(METRICS[metric].heading for metric in metrics)


def all_tables(comparison: Comparison) -> list[Table]:
    """All tables of the comparison, in the order of the page."""
    return [
        techniques(comparison),
        components(comparison),
        bytes_per_parameter(comparison),
        *(_lesson_table(table, comparison) for table in lesson().tables),
        batch_and_sequence(comparison),
        effective_batch(comparison),
        learnt(comparison),
        not_decided(comparison),
    ]


def techniques(comparison: Comparison, most: int | None = None) -> Table:
    """One row per configuration: its figures, each with its effect against the baseline.

    Args:
        comparison: what is shown.
        most: rows; null: all.
    """
    m = comparison.measurements
    configs = order(m)[:most]
    about = [
        "label",
        "status",
        "phase",
        "twin",
        "repeats",
        "oom_reached_bytes",
        "oom_requested_bytes",
        "predicted_peak_memory_bytes",
    ]
    described = m.configs.loc[configs, about].to_dict("records")
    rows = [_technique(comparison, config, row) for config, row in zip(configs, described, strict=True)]
    return Table(
        "techniques",
        "Techniques against the baseline",
        ("Technique", "Acts on", *(text for x in headings_of(HEADLINE) for text in (x, "against baseline")), "Repeats"),
        tuple(rows),
        "Ratios and differences are to the baseline of the same repeat, where it ran twice to the mean of both runs. "
        "Intervals hold all at once at 95 %, over all comparisons of the figure on this page. Memory is exact: of "
        "several repeats the highest, with the range of its ratio where they differ.",
        tuple(configs),
    )


def _technique(comparison: Comparison, config: int, row: Any) -> tuple[Cell, ...]:
    label = str(row["label"])
    if row["status"] != "ok":
        label += f" ({failure(row)})"
    label += _unmatched(comparison, config)
    part = comparison.measurements.acts_on[config]
    cells = [Cell(label), Cell(MISSING if part is None else part.value)]
    for metric in HEADLINE:
        mean = comparison.mean(config).get(metric)
        estimate = comparison.of(metric, config)
        cells.append(figure_cell(metric, mean))
        noise = row["twin"] and metric == "tokens_per_second" and pandas.notna(mean)
        cells.append(effect_cell(estimate, "the noise between two equal runs" if noise else MISSING))
    return (*cells, Cell(str(row["repeats"]), float(row["repeats"])))


def _unmatched(comparison: Comparison, config: int) -> str:
    """What is said of a configuration that the grid should have made as large as the baseline, and is not."""
    m = comparison.measurements
    if m.match is None or m.baseline is None or m.configs.loc[config, "adapter"] == FULL:
        return ""
    own, wanted = (comparison.mean(each).get(m.match) for each in (config, m.baseline))
    if not own or not wanted or abs(own / wanted - 1) <= MATCHED_WITHIN:
        return ""
    return f" ({own / wanted:.2g}× the {METRICS[m.match].label}, unmatched)"


def components(comparison: Comparison) -> Table:
    """The peak of each configuration by component."""
    rows = []
    configs = comparison.shown
    for config, label in zip(configs, comparison.measurements.labels(configs), strict=True):
        means = comparison.mean(config)
        peak, weights = means["peak_memory_bytes"], means["memory_weights_bytes"]
        cells = [Cell(label)]
        for component in COMPONENTS:
            size = means[f"memory_{component}_bytes"]
            percentage = f" ({size / peak:.0%})" if size > 0 and peak > 0 else ""
            cells.append(Cell(figure("peak_memory_bytes", size) + percentage, size))
        ratio = peak / weights if weights > 0 else None
        cells += [
            figure_cell("peak_memory_bytes", peak),
            Cell(MISSING if ratio is None or pandas.isna(ratio) else f"{ratio:.2f}", ratio),
        ]
        rows.append(tuple(cells))
    headings = ("Technique", *(c.capitalize() for c in COMPONENTS), "Peak", "Peak ÷ weights")
    note = "Live tensors at the moment of the peak; activations are everything else."
    return Table("components", "Memory usage breakdown", headings, tuple(rows), note, tuple(configs))


_MOST_COLUMNS = 8
_LESSON_BYTES = {"weights": "2", "gradients": "2", "optimizer": "4 to 8", "activations": "variable", "total": "8 to 12"}


def bytes_per_parameter(comparison: Comparison) -> Table:
    """Full fine-tuning in bytes per parameter, against the rule of thumb for 16-bit weights."""
    m = comparison.measurements
    adapters = m.configs.loc[comparison.shown, "adapter"]
    full = adapters.index[adapters == "none"].tolist()[:_MOST_COLUMNS]
    rows = []
    for component in ("weights", "gradients", "optimizer", "activations", "total"):
        name = "peak_memory_bytes" if component == "total" else f"memory_{component}_bytes"
        cells = [Cell(component.capitalize()), Cell(_LESSON_BYTES[component])]
        for config in full:
            means = comparison.mean(config)
            value = means[name] / means["total_parameters"]
            cells.append(Cell(MISSING if pandas.isna(value) else f"{value:.2f}", value))
        rows.append(tuple(cells))
    headings = ("Bytes per parameter", "lesson, 16 bit", *m.labels(full))
    note = "Lesson: the tutorial whose claims are judged here (docs/lesson.md); below, its words for each technique."
    note += "" if full else " Full fine-tuning was not measured."
    return Table("bytes-per-parameter", "What full fine-tuning holds", headings, tuple(rows), note)


def _lesson_table(table: LessonTable, comparison: Comparison) -> Table:
    """Each row's effect on memory, speed and loss, with the lesson's word for it."""
    judgement = comparison.judgement
    rows = []
    for row in table.rows:
        name = row_name(table, row)
        cells = [Cell(row.name), Cell(describe_pairs(comparison.measurements, judgement.measured(name, HEADLINE)))]
        of_row = [judgement.contrast(metric, name) for metric in HEADLINE]
        for estimate, lesson_word in zip(of_row, (row.memory, row.speed, row.loss), strict=True):
            cells.append(effect_cell(estimate, NOT_MEASURED))
            cells.append(Cell(lesson_word or MISSING))
        over = dict.fromkeys(words.pairs(estimate) for estimate in of_row if estimate is not None)
        rows.append((*cells, Cell("; ".join(over) or MISSING)))
    headings = ("Technique", "Compared", "Memory", "lesson", "Speed", "lesson", "Loss", "lesson", "Over")
    return Table(table.id, table.title, headings, tuple(rows))


def batch_and_sequence(comparison: Comparison) -> Table:
    """Micro-batch at equal effective batch, and sequence length: each level's figures."""
    rows = [
        *_level_rows(comparison, MICRO_BATCH, "micro_batch_size", "micro-batch"),
        *_level_rows(comparison, SEQUENCE_LENGTH, "sequence_length", "sequence length"),
    ]
    headings = ("Level", *headings_of(_LEVEL_METRICS))
    note = "Micro-batches are compared at equal effective batch."
    return Table("batch-sequence", "Batch size and sequence length", headings, tuple(rows), note)


_LEVEL_METRICS = (
    "peak_memory_bytes",
    "memory_activations_bytes",
    "tokens_per_second",
    "step_seconds_median",
    "eval_loss",
)


def _level_rows(comparison: Comparison, contrast: Contrast, key: str, name: str) -> Iterable[tuple[Cell, ...]]:
    configs = comparison.measurements.family(contrast).dropna(subset=[key]).sort_values(key)
    row: Any
    for config, row in configs.iterrows():
        means = comparison.mean(config)
        yield (
            Cell(f"{name} {words.level(key, row[key])}", float(row[key])),
            *(figure_cell(x, means[x]) for x in _LEVEL_METRICS),
        )


def effective_batch(comparison: Comparison) -> Table:
    """Micro-batch × accumulation × processes, with each configuration's figures."""
    configs = comparison.measurements.family(EFFECTIVE_BATCH)
    metrics = ("optimizer_steps", *HEADLINE)
    rows = []
    row: Any
    factors = [*BATCH_FACTORS, "effective_batch_size"]
    for config, row in configs.dropna(subset=factors).sort_values(["effective_batch_size", *BATCH_FACTORS]).iterrows():
        means = comparison.mean(config)
        rows.append(
            (
                *(Cell(words.level(key, row[key]), float(row[key])) for key in factors),
                *(figure_cell(x, means[x]) for x in metrics),
            )
        )
    headings = ("Micro-batch", "Accumulation", "Processes", "Effective batch", *headings_of(metrics))
    note = "Effective batch = micro-batch × accumulation × processes."
    return Table("effective-batch", "Effective batch size", headings, tuple(rows), note)


def learnt(comparison: Comparison) -> Table:
    """Change of the loss by training, on held-out stories and on general text, and the size of the adapter."""
    m = comparison.measurements
    changes = comparison.learnt
    configs = [c for c in comparison.shown if any(c in estimates for estimates in changes.values())]
    sizes = ("adapter_bytes", "adapter_share")
    rows = []
    for config, label in zip(configs, m.labels(configs), strict=True):
        means = comparison.mean(config)
        cells = [Cell(label)]
        for metric, before in (("eval_loss", "eval_loss_before"), ("forgetting", "general_loss_before")):
            estimate = changes[metric].get(config)
            cells += [
                figure_cell(before, means[before]),
                Cell(f"{words.effect(estimate)} {estimate.text}", estimate.value) if estimate else Cell(NOT_MEASURED),
                Cell(words.pairs(estimate) if estimate else MISSING),
            ]
        cells += [figure_cell(x, means[x]) for x in sizes]
        rows.append(tuple(cells))
    headings = ("Technique", "Held-out stories, before", "Change", "over", "General text, before", "Forgetting", "over",
                *headings_of(sizes))  # fmt: skip
    note = (
        "Nats per token, each of which counts once, with intervals over texts and seeds that hold all at once at 95 %. "
        "Forgetting is measured where measure_forgetting is true."
    )
    return Table("learnt", "What was learnt and what was forgotten", headings, tuple(rows), note, tuple(configs))


def not_decided(comparison: Comparison) -> Table:
    """Comparisons with the baseline that are not distinguishable, and what would decide each."""
    m = comparison.measurements
    undecided = {metric: comparison.undecided(metric) for metric in HEADLINE}
    labels = m.configs["label"].astype(str).to_dict()
    rows = [
        (
            Cell(f"{labels[config]} against the baseline"),
            Cell(METRICS[metric].label),
            Cell(words.effect(estimate), estimate.value),
            Cell(words.detectable(estimate), estimate.detectable),
            Cell(words.what_decides(estimate)),
        )
        for metric, estimates in undecided.items()
        for config, estimate in estimates.items()
    ]
    headings = ("Comparison", "Figure", "Estimate", "Smallest detectable difference", "What would decide it")
    note = (
        "A true difference of the smallest detectable size is called one in 80 % of such runs, over all comparisons of "
        "its figure. What would decide it: in total, for a difference of the estimated size, or for that of no effect."
    )
    there = longer.stories_in_all(m)
    lacking = {estimate.unit for estimates in undecided.values() for estimate in estimates.values()}
    if lacking & {"stories", "times"} and not math.isnan(there):
        note += f" The data has {there:,.0f} stories."
    return Table("not-decided", "Not decided", headings, tuple(rows), note if rows else "Every comparison is decided.")


def detectable_differences(comparison: Comparison) -> str:
    """The range of the smallest detectable differences of undecided comparisons, in a line; empty without any."""
    parts = []
    for metric in HEADLINE:
        known = sorted(
            (e for e in comparison.undecided(metric).values() if e.detectable is not None),
            key=lambda e: e.detectable or 0.0,
        )
        if known:
            ends = dict.fromkeys(words.detectable(e) for e in (known[0], known[-1]))
            parts.append(f"{METRICS[metric].label} {' to '.join(ends)} ({len(known)})")
    return f"not decided, by the smallest detectable difference: {', '.join(parts)}" if parts else ""


def run_comparison(comparison: RunComparison) -> Table:
    """The figures of two runs, and the second against the first."""
    rows = []
    for pair in comparison.pairs:
        cells = [Cell(pair.label)]
        for metric in HEADLINE:
            estimate = pair.estimates.get(metric)
            cells += [figure_cell(metric, run[metric]) for run in (pair.first, pair.second)]
            cells.append(effect_cell(estimate))
        rows.append(tuple(cells))
    columns = [(f"{heading}, first", "second", "second against first") for heading in headings_of(HEADLINE)]
    headings = ("Technique", *(text for column in columns for text in column))
    return Table("runs", comparison.title, headings, tuple(rows))
