"""Adds repeats while a comparison is undecided, and only for its configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from harness.analysis import loading, stats
from harness.environment import Environment
from harness.grids.grid import Grid


def until_decided(
    grid_of: Callable[[int], Grid],
    least: int,
    most: int,
    run: Callable[[Grid], bool],
    folder: Path,
    here: Sequence[Environment] = (),
) -> set[str]:
    """Run a grid with more and more repeats until every comparison is decided or the limit is reached.

    Repeated looks inflate the error rate, so each look is tested at `ALPHA` divided by their number (Bonferroni).

    Args:
        grid_of: the grid with this number of repeats.
        least: repeats of every trial.
        most: limit of the repeats.
        run: executes a grid; false: stop.
        folder: where its rows are.
        here: environments that its trials may be recorded under, see `loading.load`.

    Returns:
        Labels of the undecided configurations.
    """
    looks = most - least + 1
    undecided: set[str] = set()
    for repeats in range(least, most + 1):
        grid = grid_of(repeats)
        if not run(grid.only(undecided) if undecided else grid):
            break
        measurements = loading.load(folder, baseline_ids={t.baseline_id for t in grid.trials}, here=here)
        undecided = measurements.undecided(stats.ALPHA / looks)
        if not undecided:
            break
    return undecided
