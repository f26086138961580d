"""The comparisons of a report: every configuration against the baseline, the lesson's rows, and the claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import pandas

from harness._util.units import show_bytes
from harness.analysis import inference, words
from harness.analysis.estimate import Estimate
from harness.analysis.inference import ModelPair
from harness.analysis.judgement import Judgement
from harness.analysis.measurements import Measurements
from harness.analysis.words import NOT_MEASURED
from harness.grids.claims import Claim, Contrast, LessonTable, Row, lesson
from harness.metrics import COMPONENTS, HEADLINE, METRICS
from harness.spec.datasets import Part

MICRO_BATCH = Contrast(
    compare={"micro_batch_size": (None, None)},
    free=("gradient_accumulation_steps",),
    hold=("effective_batch_size",),
)
"""Micro-batch sizes at equal effective batch."""
SEQUENCE_LENGTH = Contrast(compare={"sequence_length": (None, None)})
"""Sequence lengths, everything else equal."""
BATCH_FACTORS = ("micro_batch_size", "gradient_accumulation_steps", "num_processes")
"""Their product is the effective batch."""
EFFECTIVE_BATCH = Contrast(compare=dict.fromkeys(BATCH_FACTORS, (None, None)))
"""Any factor of the effective batch, everything else equal."""


@dataclass(frozen=True)
class Comparison:
    """The estimates of every configuration against the baseline, and those of everything else that is compared."""

    measurements: Measurements
    judgement: Judgement
    claims: tuple[Claim, ...]
    """Those that are judged."""
    estimates: dict[str, dict[int, Estimate]]
    """Against the baseline, by metric, then configuration."""
    of_models: dict[tuple[str, ModelPair], Estimate]
    """Trained models against each other, see `inference.judge`."""
    means: pandas.DataFrame
    """By configuration, the mean of each figure over its repeats, the highest of exact memory (see `figures`). A
    baseline's second run has its own."""

    def of(self, metric: str, config: int) -> Estimate | None:
        """The estimate, or null where it was not measured."""
        return self.estimates[metric].get(config)

    def undecided(self, metric: str) -> dict[int, Estimate]:
        """Estimates that are not distinguishable from the baseline's, by configuration."""
        return {config: e for config, e in self.estimates[metric].items() if e.verdict == "not distinguishable"}

    @cached_property
    def learnt(self) -> dict[str, dict[int, Estimate]]:
        """Change of the loss by training of each shown configuration, on held-out stories and on general text."""
        return {metric: self.measurements.learnt(metric, self.shown) for metric in ("eval_loss", "forgetting")}

    @cached_property
    def shown(self) -> list[int]:
        """Measured configurations in the report's order, without the baseline's second run."""
        m = self.measurements
        measured = set(m.configs.index[m.configs["measured"] & ~m.configs["twin"]])
        return [config for config in order(m) if config in measured]

    @cached_property
    def speeds(self) -> pandas.Series:
        """Tokens per second of each configuration for one that is compared with others: the baseline's mean times the
        ratio to it in the same blocks, as speeds of other hours are those of another machine; its own mean where there
        is no ratio.
        """
        own: pandas.Series = self.means["tokens_per_second"].copy()
        of_baseline = own.get(self.measurements.baseline)
        if of_baseline is not None and of_baseline > 0:
            for config, estimate in self.estimates["tokens_per_second"].items():
                own[config] = of_baseline * estimate.value
        return own

    def mean(self, config: Any) -> dict[str, float]:
        """The figures of a configuration, by metric; empty where none was measured."""
        return self._rows.get(config, {})

    @cached_property
    def _rows(self) -> dict[int, dict[str, float]]:
        return {int(config): row for config, row in zip(self.means.index, self.means.to_dict("records"), strict=True)}  # type: ignore[misc]


def row_name(table: LessonTable, row: Row) -> str:
    """The contrast of a row of the lesson's tables in `Judgement`."""
    return f"{table.id}: {row.name}"


def claim_name(claim: Claim) -> str:
    """The contrast of a claim in `Judgement`."""
    return f"claim {claim.id}"


def compare(
    m: Measurements,
    claims: Sequence[Claim] | None = None,
    further: Mapping[str, tuple[pandas.DataFrame, Sequence[str]]] = MappingProxyType({}),
) -> Comparison:
    """Judge every comparison of a report; those of a figure are one family, with the error rate `m.alpha`.

    Args:
        m: what was measured.
        claims: null: the grid's own and the lesson's.
        further: contrasts that are judged with them, as `Judgement` takes them.
    """
    judged = (*m.claims, *lesson().claims) if claims is None else tuple(claims)
    against = m.against_baseline()
    contrasts: dict[str, tuple[pandas.DataFrame, Sequence[str]]] = {
        row_name(table, row): (m.pairs(row), HEADLINE) for table in lesson().tables for row in table.rows
    }
    contrasts |= {
        claim_name(claim): (m.pairs(claim), (claim.metric,))
        for claim in judged
        if claim.compare and not claim.is_about_inference
    }
    judgement = Judgement(m, against, {**contrasts, **further}, m.alpha)
    estimates = {
        metric: {
            config: estimate
            for config in map(int, against["config"])
            if (estimate := judgement.pair(metric, int(m.baseline or 0), config)) is not None
        }
        for metric in HEADLINE
    }
    means = figures(m.trials[m.trials["status"] == "ok"], "config")
    return Comparison(m, judgement, judged, estimates, inference.judge(m, judged), means)


def figures(trials: pandas.DataFrame, by: str) -> pandas.DataFrame:
    """Each figure over repeats: their mean, and of exact memory the highest, as the repeat that holds most must fit.

    Parts of the peak are those of the highest peak, so that they add up to it.

    Args:
        trials: those that ended well.
        by: column of the configuration.
    """
    grouped = trials.groupby(by)
    table: pandas.DataFrame = grouped[list(METRICS)].mean()
    highest = [name for name, metric in METRICS.items() if metric.exact and metric.group == "memory"]
    table[highest] = grouped[highest].max()
    heaviest = trials.sort_values("peak_memory_bytes", ascending=False, kind="stable").drop_duplicates(by)
    parts = [f"memory_{component}_bytes" for component in COMPONENTS]
    table[parts] = heaviest.set_index(by)[parts]
    return table


def order(m: Measurements) -> list[int]:
    """The baseline and its second run first, then by what techniques act on, factor by factor, levels in their natural
    order.
    """
    parts = list(Part)
    keys = pandas.DataFrame(
        {
            "group": (~m.configs["baseline"]).astype(int) + (~(m.configs["baseline"] | m.configs["twin"])).astype(int),
            "part": [len(parts) if part is None else parts.index(part) for part in m.acts_on.values()],
            "factor": m.configs["factor"].fillna(""),
            "number": pandas.to_numeric(m.configs["level"], errors="coerce"),
            "label": m.configs["label"],
        }
    )
    return keys.sort_values(["group", "part", "factor", "number", "label"], kind="stable").index.tolist()


def differences(m: Measurements, configs: Sequence[int]) -> list[str]:
    """What each configuration differs in from the baseline: lora_r: 8, precision: nf4."""
    watched = m.configs["watched"]
    return [
        ", ".join(f"{key}: {words.level(key, value)}" for key, value in keys.items())
        or ("nothing that was seen" if watched[config] else "the baseline")
        for config, keys in zip(configs, m.differing_keys(configs), strict=True)
    ]


def failure(row: Any) -> str:
    """How a trial ended; for out of memory, the lower bound on what it needs."""
    if row["status"] == "skipped":
        predicted = row["predicted_peak_memory_bytes"]
        return f"skipped, predicted to need {show_bytes(predicted)}" if pandas.notna(predicted) else "skipped"
    note = f"{row['status']} in {row['phase']}"
    reached, requested = row["oom_reached_bytes"], row["oom_requested_bytes"]
    if pandas.notna(reached):
        note += f", needs at least {show_bytes(reached + (requested if pandas.notna(requested) else 0))}"
    return note


def describe_pairs(m: Measurements, pairs: pandas.DataFrame) -> str:
    """The labels of compared configurations: `precision=fp32 → baseline`."""
    if pairs.empty:
        return NOT_MEASURED
    first = pairs[["reference", "config"]].head(3).to_numpy().tolist()
    shown = "; ".join(" → ".join(m.labels(pair)) for pair in first)
    return shown if len(pairs) <= 3 else f"{shown}; and {len(pairs) - 3} more"
