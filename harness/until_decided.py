"""Repeats for as long as a comparison is open, and only for those that are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness import stats
from harness.grid import Grid
from harness.report import measurements


def until_decided(
    grid_of: Callable[[int], Grid], least: int, most: int, run: Callable[[Grid], bool], folder: Path
) -> set[str]:
    """Run a grid with more and more repeats until each comparison is decided, or the limit is reached.

    Who looks several times finds a difference by chance more often; each look therefore has its share of
    the 5 % (Bonferroni over the looks).

    Args:
        grid_of: the grid with so many repeats.
        least: repeats that every trial has.
        most: repeats that no trial passes.
        run: executes a grid; false: stop.
        folder: where its rows are.

    Returns:
        Labels of the configurations that are still open.
    """
    looks = most - least + 1
    still_open: set[str] = set()
    for repeats in range(least, most + 1):
        grid = grid_of(repeats)
        if not run(grid.only(still_open) if still_open else grid):
            break
        found = measurements.load(folder, baseline_ids={t.baseline_id for t in grid.trials})
        still_open = found.undecided(stats.ALPHA / looks)
        if not still_open:
            break
    return still_open
