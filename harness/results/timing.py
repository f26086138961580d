"""Speeds from the steps that timing visits recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import pandas

from harness.record import TIMED_FIGURES, Step

LEAST_STEPS = 3
"""Undisturbed steps of a visit that counts: each of its different steps once."""
_MAKE = ["samples", "tokens", "supervised_tokens", "padded_tokens"]
"""Steps that agree in these do the same work."""
STEP_COLUMNS = ["block", "disturbed", "seconds", "reference_seconds", *_MAKE]
"""What speeds are computed from."""


def counting_steps(steps: pandas.DataFrame, keys: Sequence[str]) -> pandas.DataFrame:
    """The undisturbed steps of visits that have enough of them.

    Args:
        steps: `STEP_COLUMNS` and `keys`, a row per step; steps of training have no block.
        keys: what identifies a visit.
    """
    quiet = steps[steps["block"].notna() & ~steps["disturbed"].astype(bool) & (steps["seconds"] > 0)]
    counts = quiet.groupby(list(keys))["seconds"].transform("size")
    counting: pandas.DataFrame = quiet[counts >= LEAST_STEPS]
    return counting


def speeds(counting: pandas.DataFrame, keys: Sequence[str]) -> pandas.DataFrame:
    """`TIMED_FIGURES` of each group of steps.

    A group's tokens per second are the tokens of its different steps divided by their mean seconds: how often each was
    taken does not count.

    Args:
        counting: from `counting_steps`.
        keys: what identifies a group.

    Returns:
        A row for each group, indexed by the keys.
    """
    by = list(keys)
    different = counting.groupby([*by, *_MAKE], sort=False)["seconds"].mean().reset_index()
    sums = different.groupby(by, sort=False)[["seconds", *_MAKE]].sum()
    seconds = counting.groupby(by, sort=False)["seconds"]
    rates = {name: sums[name.removesuffix("_per_second")] / sums["seconds"] for name in TIMED_FIGURES[:4]}
    percentiles = {"step_seconds_median": seconds.median(), "step_seconds_p95": seconds.quantile(0.95)}
    return pandas.DataFrame(rates | percentiles)


def reference_seconds(counting: pandas.DataFrame, keys: Sequence[str]) -> pandas.Series:
    """Mean seconds of the baseline's steps that were taken in turn with those of each group; nan where none were.

    Every visit takes the same steps of the baseline, each as often as the others.

    Args:
        counting: from `counting_steps`.
        keys: what identifies a group.
    """
    means: pandas.Series = counting.groupby(list(keys), sort=False)["reference_seconds"].mean()
    return means


def row_figures(steps: Sequence[Step]) -> dict[str, float | int | None]:
    """The figures of a trial's row that follow from the steps of all its visits, enough or not."""
    table = pandas.DataFrame([step.model_dump(include={*STEP_COLUMNS}) for step in steps], columns=STEP_COLUMNS)
    counting = counting_steps(table, ["block"])
    timed = table[table["block"].notna()]
    figures: dict[str, Any] = dict.fromkeys(TIMED_FIGURES)
    if len(counting):
        figures |= {str(name): float(x) for name, x in speeds(counting.assign(all=0), ["all"]).iloc[0].items()}
    return figures | {
        "timed_steps": len(counting),
        "timed_visits": int(counting["block"].nunique()),
        "disturbed_steps": int(numpy.sum(timed["disturbed"])),
    }
