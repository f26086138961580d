"""The lesson's tables, filled with what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas

from harness.claims import Contrast, LessonTable, lesson
from harness.metrics import COMPONENTS, METRICS, show_bytes
from harness.report import words
from harness.report.measurements import Estimate, Measurements, labels
from harness.report.words import MISSING, NOT_MEASURED, effect_and_word, figure

HEADLINE = ("peak_memory_bytes", "tokens_per_second", "eval_loss")
"""The three figures that every technique is judged by: memory, speed, loss."""


@dataclass(frozen=True)
class Cell:
    """Text, and the number that it is sorted by."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of the report."""

    id: str
    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    configs: tuple[int, ...] = ()
    """The configuration of each row, where a row is one."""


@dataclass(frozen=True)
class Comparison:
    """Every configuration against the baseline, figure by figure."""

    measurements: Measurements
    estimates: dict[str, dict[int, Estimate]]
    """By metric, then configuration."""
    means: pandas.DataFrame
    """By configuration, the mean of each figure over its repeats; of a baseline over both of its runs."""

    def of(self, metric: str, config: int) -> Estimate | None:
        """The estimate, or null where it was not measured."""
        return self.estimates[metric].get(config)

    @cached_property
    def shown(self) -> list[int]:
        """Measured configurations in the report's order, the baseline's second run apart."""
        m = self.measurements
        there = set(m.configs.index[m.configs["measured"] & ~m.configs["twin"]])
        return [config for config in order(m) if config in there]

    def mean(self, config: Any) -> dict[str, float]:
        """The figures of a configuration, by metric; empty where none was measured."""
        return self._rows.get(config, {})

    @cached_property
    def _rows(self) -> dict[int, dict[str, float]]:
        return {int(config): row for config, row in zip(self.means.index, self.means.to_dict("records"), strict=True)}  # type: ignore[misc]


def compare(measurements: Measurements) -> Comparison:
    """Compare every configuration with the baseline in memory, speed and loss; each figure is one family."""
    pairs = measurements.against_baseline()
    ok = measurements.trials[measurements.trials["status"] == "ok"]
    return Comparison(
        measurements,
        {metric: measurements.compare(pairs, metric) for metric in HEADLINE},
        ok.groupby("stands_for")[list(METRICS)].mean().combine_first(ok.groupby("config")[list(METRICS)].mean()),
    )


def all_tables(comparison: Comparison) -> list[Table]:
    """In the order of the page."""
    m = comparison.measurements
    return [
        techniques(comparison),
        components(comparison),
        bytes_per_parameter(comparison),
        *(_lesson_table(table, m) for table in lesson().tables),
        batch_and_sequence(comparison),
        effective_batch(comparison),
        learnt(comparison),
    ]


# ------------------------------------------------------------------------------------ every configuration


def techniques(comparison: Comparison, most: int | None = None) -> Table:
    """One row per configuration: its figures, and each beside the baseline's.

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
        ("Technique", "Peak memory", "against baseline", "Tokens/s", "against baseline", "Eval loss",
         "against baseline", "Repeats"),
        tuple(rows),
        "Ratios and differences are to the baseline of the same repeat, with their 95 % intervals. Memory is exact.",
        tuple(configs),
    )  # fmt: skip


def order(m: Measurements) -> list[int]:
    """The baseline and its second run first, then factor by factor, levels in their natural order."""
    keys = pandas.DataFrame(
        {
            "group": (~m.configs["baseline"]).astype(int) + (~(m.configs["baseline"] | m.configs["twin"])).astype(int),
            "factor": m.configs["factor"].fillna(""),
            "number": pandas.to_numeric(m.configs["level"], errors="coerce"),
            "label": m.configs["label"],
        }
    )
    return keys.sort_values(["group", "factor", "number", "label"], kind="stable").index.tolist()


def _technique(comparison: Comparison, config: int, row: Any) -> tuple[Cell, ...]:
    label = str(row["label"])
    if row["status"] != "ok":
        label += f" ({failure(row)})"
    cells = [Cell(label)]
    for metric in HEADLINE:
        mean = comparison.mean(config).get(metric)
        estimate = comparison.of(metric, config)
        cells.append(Cell(figure(metric, mean), mean))
        if estimate is not None:
            cells.append(Cell(effect_and_word(estimate), estimate.value))
        elif row["twin"]:
            cells.append(Cell("the noise between two equal runs" if metric == "tokens_per_second" else MISSING))
        else:
            cells.append(Cell(MISSING))
    return (*cells, Cell(str(row["repeats"]), float(row["repeats"])))


def failure(row: Any) -> str:
    """How a trial ended, and what an out-of-memory says of the need."""
    if row["status"] == "skipped":
        return f"skipped, predicted to need {show_bytes(row['predicted_peak_memory_bytes'])}"
    note = f"{row['status']} in {row['phase']}"
    reached, requested = row["oom_reached_bytes"], row["oom_requested_bytes"]
    if pandas.notna(reached):
        note += f", needs at least {show_bytes(reached + (requested if pandas.notna(requested) else 0))}"
    return note


def components(comparison: Comparison) -> Table:
    """The peak of each configuration, split into what holds it."""
    rows = []
    configs = comparison.shown
    for config, label in zip(configs, labels(comparison.measurements, configs), strict=True):
        means = comparison.mean(config)
        peak, weights = means["peak_memory_bytes"], means["memory_weights_bytes"]
        cells = [Cell(label)]
        for component in COMPONENTS:
            size = means[f"memory_{component}_bytes"]
            share = f" ({size / peak:.0%})" if size > 0 and peak > 0 else ""
            cells.append(Cell(figure("peak_memory_bytes", size) + share, size))
        ratio = peak / weights if weights > 0 else None
        cells += [
            Cell(figure("peak_memory_bytes", peak), peak),
            Cell(MISSING if ratio is None or pandas.isna(ratio) else f"{ratio:.2f}", ratio),
        ]
        rows.append(tuple(cells))
    headings = ("Technique", *(c.capitalize() for c in COMPONENTS), "Peak", "Peak ÷ weights")
    note = "Live tensors at the moment of the peak; activations are everything that is none of the others."
    return Table("components", "Memory usage breakdown", headings, tuple(rows), note, tuple(configs))


_MOST_COLUMNS = 8
_LESSON_BYTES = {"weights": "2", "gradients": "2", "optimizer": "4 to 8", "activations": "variable", "total": "8 to 12"}


def bytes_per_parameter(comparison: Comparison) -> Table:
    """Full fine-tuning in bytes per parameter, beside the rule of thumb for 16-bit weights."""
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
    headings = ("Bytes per parameter", "lesson, 16 bit", *labels(m, full))
    note = "" if full else "Full fine-tuning was not measured."
    return Table("bytes-per-parameter", "What full fine-tuning holds", headings, tuple(rows), note)


# ------------------------------------------------------------------------------------ the lesson's rows


def _lesson_table(table: LessonTable, m: Measurements) -> Table:
    """Each row's two conditions in memory, speed and loss, beside the lesson's words; each figure is one family."""
    pairs = [m.pairs(row) for row in table.rows]
    every = pandas.concat([found.assign(comparison=number) for number, found in enumerate(pairs)])
    estimates = {metric: m.compare(every, metric) for metric in HEADLINE}
    rows = []
    for number, row in enumerate(table.rows):
        cells = [Cell(row.name), Cell(compared(m, pairs[number]))]
        for metric, said in zip(HEADLINE, (row.memory, row.speed, row.loss), strict=True):
            estimate = estimates[metric].get(number)
            cells.append(Cell(effect_and_word(estimate), estimate.value) if estimate else Cell(NOT_MEASURED))
            cells.append(Cell(said or MISSING))
        found = (estimates[metric].get(number) for metric in HEADLINE)
        over = dict.fromkeys(words.pairs(estimate) for estimate in found if estimate is not None)
        rows.append((*cells, Cell("; ".join(over) or MISSING)))
    headings = ("Technique", "Compared", "Memory", "lesson", "Speed", "lesson", "Loss", "lesson", "Over")
    return Table(table.id, table.title, headings, tuple(rows))


def compared(m: Measurements, found: pandas.DataFrame) -> str:
    """What stands beside what: `precision=fp32 → baseline`."""
    if found.empty:
        return NOT_MEASURED
    first = found[["reference", "config"]].head(3).to_numpy().tolist()
    shown = "; ".join(" → ".join(labels(m, pair)) for pair in first)
    return shown if len(found) <= 3 else f"{shown}; and {len(found) - 3} more"


# ------------------------------------------------------------------------------------ batch and sequence


def batch_and_sequence(comparison: Comparison) -> Table:
    """Micro-batch at equal effective batch, and sequence length: each level's figures."""
    micro = Contrast(
        compare={"micro_batch_size": (None, None)},
        free=("gradient_accumulation_steps",),
        hold=("effective_batch_size",),
    )
    length = Contrast(compare={"sequence_length": (None, None)})
    rows = [
        *_level_rows(comparison, micro, "micro_batch_size", "micro-batch"),
        *_level_rows(comparison, length, "sequence_length", "sequence length"),
    ]
    headings = ("Level", "Peak memory", "Activations", "Tokens/s", "Seconds a step", "Eval loss")
    note = "Micro-batches are compared at equal effective batch."
    return Table("batch-sequence", "Batch size and sequence length", headings, tuple(rows), note)


def _level_rows(comparison: Comparison, contrast: Contrast, key: str, name: str) -> Iterable[tuple[Cell, ...]]:
    configs = comparison.measurements.family(contrast).sort_values(key)
    metrics = ("peak_memory_bytes", "memory_activations_bytes", "tokens_per_second", "step_seconds_median", "eval_loss")
    row: Any
    for config, row in configs.iterrows():
        means = comparison.mean(config)
        yield (Cell(f"{name} {row[key]}", float(row[key])), *(Cell(figure(x, means[x]), means[x]) for x in metrics))


def effective_batch(comparison: Comparison) -> Table:
    """Micro-batch × accumulation × processes, and what came of it."""
    keys = ("micro_batch_size", "gradient_accumulation_steps", "num_processes")
    configs = comparison.measurements.family(Contrast(compare=dict.fromkeys(keys, (None, None))))
    rows = []
    row: Any
    for config, row in configs.sort_values(["effective_batch_size", *keys]).iterrows():
        means = comparison.mean(config)
        rows.append(
            (
                *(Cell(str(row[key]), float(row[key])) for key in keys),
                Cell(str(row["effective_batch_size"]), float(row["effective_batch_size"])),
                *(Cell(figure(x, means[x]), means[x]) for x in ("optimizer_steps", *HEADLINE)),
            )
        )
    headings = ("Micro-batch", "Accumulation", "Processes", "Effective batch", "Optimizer steps", "Peak memory",
                "Tokens/s", "Eval loss")  # fmt: skip
    note = "Effective batch = micro-batch × accumulation × processes."
    return Table("effective-batch", "Effective batch size", headings, tuple(rows), note)


# ------------------------------------------------------------------------------------ after training


def learnt(comparison: Comparison) -> Table:
    """What training did to the loss on held-out stories and on general text, and how large the adapter is."""
    m = comparison.measurements
    changes = {metric: m.learnt(metric, comparison.shown) for metric in ("eval_loss", "forgetting")}
    configs = [c for c in comparison.shown if any(c in found for found in changes.values())]
    rows = []
    for config, label in zip(configs, labels(m, configs), strict=True):
        means = comparison.mean(config)
        cells = [Cell(label)]
        for metric, before in (("eval_loss", "eval_loss_before"), ("forgetting", "general_loss_before")):
            estimate = changes[metric].get(config)
            cells += [
                Cell(figure(before, means[before]), means[before]),
                Cell(f"{words.effect(estimate)} {estimate.said}", estimate.value) if estimate else Cell(NOT_MEASURED),
                Cell(words.pairs(estimate) if estimate else MISSING),
            ]
        cells += [Cell(figure(x, means[x]), means[x]) for x in ("forgetting", "adapter_bytes", "adapter_share")]
        rows.append(tuple(cells))
    headings = ("Technique", "Held-out stories, before", "Change per story", "over", "General text, before",
                "Change per passage", "over", "Forgetting", "Adapter", "share of the base")  # fmt: skip
    note = (
        "Nats per token, with 95 % intervals over the texts, each of which counts once; forgetting is the change of "
        "the general text's loss when each token counts once. It is measured where measure_forgetting is true."
    )
    return Table("learnt", "What was learnt and what was forgotten", headings, tuple(rows), note, tuple(configs))
