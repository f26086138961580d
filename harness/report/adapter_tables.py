"""Tables of methods of adapters: a card of each, and the learning rates that were found before."""

from __future__ import annotations

import json

from harness._util.units import show_seconds
from harness.analysis import words
from harness.analysis.comparison import Comparison
from harness.record import Tuned
from harness.report.tables import Cell, Table, effect_cell, figure_cell, headings_of
from harness.spec.keys import FULL, LORA

_OF_ADAPTERS = (
    "trainable_parameters", "adapter_bytes", "adapter_seconds", "peak_memory_bytes", "tokens_per_second", "eval_loss",
    "forgetting",
)  # fmt: skip
"""Figures of a method's card."""


def compares_methods(comparison: Comparison) -> bool:
    """Whether adapters of several methods were measured."""
    m = comparison.measurements
    return len({*m.configs.loc[comparison.shown, "adapter"]} - {FULL}) > 1


def adapters(comparison: Comparison) -> Table:
    """A card of each adapter: what it is, holds, takes and learns, beside its loss against the baseline's."""
    m = comparison.measurements
    rows = []
    for config in comparison.shown:
        row = m.configs.loc[config]
        if row["adapter"] == FULL:
            continue
        means = comparison.mean(config)
        figures = [figure_cell(metric, means.get(metric)) for metric in _OF_ADAPTERS]
        options = json.loads(row["adapter_options"]) if isinstance(row["adapter_options"], str) else []
        size = f"rank {row['lora_r']}" if row["adapter"] == LORA else ", ".join(f"{k} {v}" for k, v in options)
        effect = effect_cell(comparison.of("eval_loss", config))
        described = (Cell(str(row["label"])), Cell(size or words.MISSING), Cell(f"{row['learning_rate']:g}"))
        rows.append((*described, *figures, effect))
    return Table(
        "adapters",
        "Adapters",
        ("Adapter", "Size", "Learning rate", *headings_of(_OF_ADAPTERS), "Loss against baseline"),
        tuple(rows),
        "Means of all repeats. Start-up is the time to make the adapter over the loaded base. Trained parameters are "
        f"those that the optimizer changes: frozen parts of an adapter are in its memory alone. {_by_loss(comparison)}",
    )


def _by_loss(comparison: Comparison) -> str:
    """Which adapters have another loss than the baseline, and of which none was seen that would have been."""
    labels = comparison.measurements.configs["label"]
    judged = {str(labels[each]): of for each in comparison.shown if (of := comparison.of("eval_loss", each))}
    parts = []
    for verdict, text in (("better", "Lower loss than"), ("worse", "Higher loss than"), ("same", "As low a loss as")):
        those = [label for label, estimate in judged.items() if estimate.verdict == verdict]
        parts += [f"{text} the baseline: {', '.join(those)}."] if those else []
    open_ones = {label: each for label, each in judged.items() if each.verdict == "not distinguishable"}
    if open_ones:
        seen = max(open_ones.values(), key=lambda estimate: estimate.detectable or 0.0)
        could = f", though {words.detectable(seen)} would have been seen" if seen.detectable else ""
        parts.append(f"Not distinguishable from it: {', '.join(open_ones)}{could}.")
    return " ".join(parts)


def learning_rates(tuned: Tuned) -> Table:
    """The loss of each configuration at each learning rate that was tried before the comparison, and the one chosen."""
    tried = sorted({rate for each in tuned.rates for rate in each.losses}, key=float)
    rows = []
    for each in tuned.rates:
        losses = [figure_cell("eval_loss", each.losses[rate]) if rate in each.losses else Cell("") for rate in tried]
        edge = ", the last one tried" if each.at_edge else ""
        rows.append((Cell(each.label), *losses, Cell(f"{each.rate:g}{edge}", each.rate)))
    return Table(
        "rates",
        "Learning rates before the comparison",
        ("Technique", *tried, "Chosen"),
        tuple(rows),
        f"Loss in nats on stories that nothing here is compared on. {_counts(tuned)} rates for each, {tuned.trials} "
        f"trainings of {show_seconds(tuned.seconds)} in all, whose rows are in results/{tuned.results}. "
        "The lowest or highest rate chosen: a better one may lie beyond.",
    )


def _counts(tuned: Tuned) -> str:
    """How many rates each configuration had."""
    return " or ".join(map(str, sorted({len(each.losses) for each in tuned.rates})))
