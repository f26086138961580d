"""Finds a learning rate for each configuration before the comparison (`tune_first`), and shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from harness._util.terminal import plain
from harness.cli.console import out
from harness.grids.grid import Grid

if TYPE_CHECKING:
    from harness.launch.launcher import Launcher
    from harness.record import Status, Tuned
    from harness.results.store import Store
    from harness.runner.grid_run import Summary


def planned_rates(
    grid: Grid, trainings: Grid, store: Store, launcher: Launcher, statuses: frozenset[Status], limit: int | None = None
) -> tuple[Tuned | None, int]:
    """Print the trainings that come before a comparison.

    Args:
        grid: whose rates are looked for.
        trainings: of `learning_rates.grid_of_rates`.
        store: for these trainings.
        launcher: that would make them.
        statuses: of trainings that would be made again.
        limit: most trainings that a run would make; null: all.

    Returns:
        The rates where all of them are recorded, else null; and how many are to run.
    """
    from harness.runner import grid_run, learning_rates

    left = len(grid_run.pending(trainings, store, launcher, statuses))
    recorded = f", {left} of them to run" if left < len(trainings.trials) else ""
    if limit is not None and limit < left:
        recorded = f", {left} of them to run, {limit} now"
    out.print(f"before them, {len(trainings.trials)} trainings find the learning rates{recorded}", highlight=False)
    return None if left else learning_rates.tuned(grid, trainings, store, launcher), left


def find_rates(
    grid: Grid, trainings: Grid, store: Store, launcher: Launcher, run: Callable[[Grid, Store], Summary]
) -> Tuned | None:
    """Train what is not recorded yet of each configuration at each rate, and choose; null: it was interrupted.

    Args:
        grid: whose rates are looked for.
        trainings: of `learning_rates.grid_of_rates`, with contents.
        store: for these trainings.
        launcher: that makes them.
        run: runs a grid into a store.
    """
    from harness.runner import learning_rates

    rates = "" if grid.rates is None else grid.rates.text
    out.print(f"learning rates first: {len(trainings.trials)} trainings at {rates}", highlight=False)
    if run(trainings, store).left:
        out.print("the comparison begins once all of them are done; go on with the same command", highlight=False)
        return None
    tuned = learning_rates.tuned(grid, trainings, store, launcher)
    for each in tuned.rates:
        if all(loss is None for loss in each.losses.values()):
            out.print(f"[yellow]{plain(each.label)}: no training ended well; its own rate stays[/]", highlight=False)
            continue
        failed = [rate for rate, loss in each.losses.items() if loss is None]
        if failed:
            rates = ", ".join(failed)
            out.print(f"[yellow]{plain(each.label)}: no loss at {rates}, whose training did not end well[/]")
        edge = " (the last one tried: a better one may lie beyond)" if each.at_edge else ""
        out.print(f"{plain(each.label)}: {each.rate:g}{edge}", highlight=False, soft_wrap=True)
    return tuned
