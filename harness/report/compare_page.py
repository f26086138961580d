"""The page of results that are compared with each other: versions of the software, machines, days."""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis import words
from harness.analysis.compare_runs import RunComparison, RunPair
from harness.metrics import HEADLINE, METRICS
from harness.report.front import Column, Group, Line, with_unit
from harness.report.page import SIGNS, render
from harness.report.scale import mark, scale_of
from harness.report.summary import MOST_ROWS
from harness.report.tables import Cell, Table, run_comparison


def html(reference: str, comparisons: Sequence[tuple[str, RunComparison]]) -> str:
    """The page of one or several results, each against the same reference.

    Args:
        reference: the folder of what the others are compared with.
        comparisons: each with the folder that it is of.
    """
    columns = tuple(_column(metric, comparisons) for metric in HEADLINE)
    groups = tuple(
        Group(folder, tuple(_line(number, pair, columns) for pair in each.pairs))
        for number, (folder, each) in enumerate(comparisons)
    )
    (_, first), *others = comparisons
    return render(
        "compare.html.j2",
        title=f"{len(comparisons)} results against {reference}" if others else first.title,
        reference=reference,
        warnings=[
            f"{folder}: {text}" if others else text
            for folder, each in comparisons
            for text in (each.unpaired, each.warning)
            if text is not None
        ],
        columns=columns,
        groups=groups,
        tables=[
            table
            for number, (folder, each) in enumerate(comparisons)
            for table in _tables(number, each, f": {folder}" if others else "")
        ],
        signs=SIGNS,
        missing=words.MISSING,
        most_rows=MOST_ROWS,
        memory={},
        opened={},
    )


def _column(metric: str, comparisons: Sequence[tuple[str, RunComparison]]) -> Column:
    estimates = (pair.estimates.get(metric) for _, each in comparisons for pair in each.pairs)
    ends = [(e.value, e.low, e.high) for e in estimates if e is not None]
    return Column(METRICS[metric].heading, scale_of(ends, ratio=METRICS[metric].scale == "ratio"))


def _line(number: int, pair: RunPair, columns: Sequence[Column]) -> Line:
    estimates = (pair.estimates.get(metric) for metric in HEADLINE)
    marks = (
        None if estimate is None else mark(estimate, column.scale)
        for estimate, column in zip(estimates, columns, strict=True)
    )
    figures = tuple(with_unit(metric, pair.second[metric]) for metric in HEADLINE)
    return Line(f"{number}:{pair.label}", pair.label, None, tuple(marks), figures)


def _tables(number: int, comparison: RunComparison, after: str) -> list[Table]:
    """What differs between the two environments, and the figures."""
    rows = tuple(tuple(map(Cell, names)) for names in comparison.environments)
    differs = Table(
        f"environment-{number}",
        f"What differs between the two environments{after}",
        ("Environment", "reference", "compared"),
        rows,
        "" if rows else "Both ran in the same environment.",
    )
    figures = run_comparison(comparison)
    return [
        Table(f"figures-{number}", f"Figures{after}", figures.headings, figures.rows),
        differs,
    ]
