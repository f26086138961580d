"""Scores of tasks: of each technique, with their standard errors, and their differences from the baseline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import pandas

from harness.analysis.comparison import Comparison
from harness.analysis.estimate import Estimate

METRIC = "task_score"


@dataclass(frozen=True)
class Score:
    """Of one configuration on one task."""

    task: str
    config: int
    metric: str
    """What a question's score is."""
    items: int
    """Questions."""
    before: float
    """Mean before training; NaN where it was not measured."""
    after: float
    """Mean after training, over questions and repeats."""
    error: float
    """Standard error of `after` over questions; NaN for one."""
    difference: Estimate | None
    """From the baseline, paired by question and repeat; null for the baseline."""


def scores(comparison: Comparison) -> list[Score]:
    """Scores by task, then configuration in the report's order; the differences of a task are one family."""
    m = comparison.measurements
    ok = m.trials.loc[m.trials["status"] == "ok", "config"].rename("config")
    items = m.items.join(ok, on="trial", how="inner")
    measured = []
    for task, of_task in items.groupby("task", sort=True):
        differences = m.estimates(m.text_effects(m.against_baseline(), METRIC, of_task.drop(columns="config")), METRIC)
        for config in comparison.shown:
            own = of_task[of_task["config"] == config]
            if len(own):
                measured.append(_score(str(task), config, own, differences.get(config)))
    return measured


def _score(task: str, config: int, own: pandas.DataFrame, difference: Estimate | None) -> Score:
    of_items = own.groupby("story")["loss"].mean()
    error = of_items.std(ddof=1) / numpy.sqrt(len(of_items)) if len(of_items) > 1 else numpy.nan
    return Score(
        task, config, str(own["metric"].iloc[0]), len(of_items), float(own["before"].mean()), float(of_items.mean()),
        float(error), difference,
    )  # fmt: skip
