"""Adds visits or repeats while a comparison is undecided, whichever decides it, and only for its configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from harness.analysis import loading
from harness.analysis.comparison import Comparison, compare
from harness.analysis.estimate import Estimate
from harness.environment import Environment
from harness.grids.grid import Grid

Undecided = Mapping[str, Mapping[str, Estimate | None]]
"""Estimates that are not distinguishable, by metric and label; null: of a figure that is measured there is none."""


def until_decided(
    grid_of: Callable[[int], Grid],
    least: int,
    most: int,
    run: Callable[[Grid], bool],
    folder: Path,
    here: Sequence[Environment] = (),
) -> Undecided | None:
    """Run a grid with more and more visits and repeats until no more of them decides anything, or their limit.

    Visits decide speeds. Repeats decide those losses whose seeds differ too much; the others need more stories, which
    is another grid. Repeated looks inflate the error rate, so each look is tested at `ALPHA` divided by their number
    (Bonferroni). The number is kept with the rows, which every later report judges so too.

    Args:
        grid_of: the grid with this number of repeats.
        least: repeats of every trial.
        most: limit of the visits and of the repeats.
        run: executes a grid; false: stop.
        folder: where its rows are.
        here: environments that its trials may be recorded under, see `loading.load`.

    Returns:
        What the last look left undecided of the grid's configurations; null where it was stopped before that look.
    """
    repeats, visits = least, grid_of(least).timing.visits
    looks = 1 + max(most - repeats, most - visits if visits else 0)
    first = grid = replace(grid_of(least), looks=looks)
    undecided: Undecided = {}
    versions = [first]
    while versions:
        if not all(run(version) for version in versions):
            return None
        measurements = loading.load(folder, here=here)
        undecided = _undecided(first, compare(measurements))
        versions = []
        of_speed = _labels(undecided, lambda e: e.basis == "visits")
        if of_speed and 0 < visits < most:
            visits += 1
            # Of the first repeats, all of which are recorded: it trains nothing.
            versions.append(replace(first.only(of_speed), timing=replace(first.timing, visits=visits)))
        of_loss = _labels(undecided, lambda e: e.unit in ("seeds", "times"))
        if of_loss and repeats < most:
            repeats += 1
            grid = replace(grid_of(repeats), looks=looks)
            versions.append(grid.only(of_loss))
    return undecided


def _undecided(grid: Grid, comparison: Comparison) -> Undecided:
    """Speeds and losses of a grid's configurations that are not distinguishable from the baseline's, or not compared.

    The folder may have others, of levels that were not asked for or are no longer in the file: none of them is run.
    """
    m = comparison.measurements
    labels = {trial.label for trial in grid.trials if not (trial.baseline or trial.twin)}
    is_measured = {"tokens_per_second": grid.timing.visits > 0, "eval_loss": bool(m.trials["eval_loss"].notna().any())}
    undecided = {}
    for metric, measured in is_measured.items():
        estimates = comparison.estimates[metric]
        known = dict(zip(m.labels(estimates), estimates.values(), strict=True))
        open_ = {label for label, each in known.items() if each.verdict == "not distinguishable"}
        missing = labels - known.keys() if measured else set()
        undecided[metric] = {label: known.get(label) for label in sorted(labels & open_ | missing)}
    return undecided


def _labels(undecided: Undecided, chosen: Callable[[Estimate], bool]) -> set[str]:
    """Labels of the configurations with a chosen estimate."""
    return {
        label
        for estimates in undecided.values()
        for label, estimate in estimates.items()
        if estimate is not None and chosen(estimate)
    }
