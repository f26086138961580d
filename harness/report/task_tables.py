"""Table of the scores of tasks."""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis import words
from harness.analysis.estimate import Estimate
from harness.analysis.measurements import Measurements
from harness.analysis.task_scores import Score
from harness.report.tables import Cell, Table


def scores(of: Sequence[Score], m: Measurements) -> Table:
    """Each task's score by technique, before training and after it, and its difference from the baseline's."""
    headings = ("Task", "Technique", "Questions", "Before", "After", "Standard error", "Against the baseline", "over")
    rows = [
        (
            Cell(f"{each.task} ({each.metric})"),
            Cell(str(m.configs.at[each.config, "label"])),
            Cell(f"{each.items}", each.items),
            _mean(each.before),
            _mean(each.after),
            _mean(each.error),
            _difference(each.difference),
            Cell(words.MISSING if each.difference is None else words.pairs(each.difference)),
        )
        for each in of
    ]
    note = (
        "Share of the questions that are answered rightly, by lm-evaluation-harness: the answer that the model finds "
        "likeliest. Standard errors are over questions. Differences are paired by question and repeat, with intervals "
        "over questions and seeds that hold for all of a task at once at 95 %; those of one seed are over questions "
        "alone, and say nothing of other seeds."
    )
    return Table("tasks", "Scores of tasks", headings, tuple(rows), note, tuple(each.config for each in of))


def _difference(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell(words.MISSING)
    if estimate.low == estimate.high == 0:  # no width is no certainty: another question may be answered differently
        return Cell("every score is the same", 0.0)
    return Cell(words.effect_and_word(estimate), estimate.value)


def _mean(value: float) -> Cell:
    return Cell(words.MISSING if value != value else f"{value:.3f}", None if value != value else value)
