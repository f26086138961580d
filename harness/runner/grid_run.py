"""A grid, from its first pending trial to its last record."""

from __future__ import annotations

import time
from dataclasses import dataclass

from harness.grids.grid import Grid, Trial
from harness.launch.launcher import Launcher
from harness.predict.prediction import NO_PREDICTIONS, Predictions
from harness.record import Record, Status
from harness.results.store import Store
from harness.runner.display import Display
from harness.runner.execution import Policy
from harness.runner.identity import lease_id, place_in_grid, possible_ids
from harness.runner.interrupts import interrupts
from harness.runner.workers import GridWorkers

_DEFAULT_POLICY = Policy()


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    records: tuple[Record, ...]
    skipped: int
    """Trials that had been recorded before."""
    left: int
    """Trials that were not reached."""
    by_others: int = 0
    """Trials that other runners recorded meanwhile."""


def pending(grid: Grid, store: Store, launcher: Launcher, rerun: frozenset[Status] = frozenset()) -> list[Trial]:
    """Trials of a grid without a record in the launcher's environments, or with one whose status is to be run again."""
    done = store.completed()

    def is_done(trial: Trial) -> bool:
        statuses = [done[each] for each in possible_ids(trial, launcher) if each in done]
        return any(status not in rerun for status in statuses)

    return [trial for trial in grid.trials if not is_done(trial)]


def run_grid(
    grid: Grid,
    store: Store,
    launcher: Launcher,
    display: Display,
    policy: Policy = _DEFAULT_POLICY,
    *,
    rerun: frozenset[Status] = frozenset(),
    limit: int | None = None,
    until: float | None = None,
    predictions: Predictions = NO_PREDICTIONS,
) -> Summary:
    """Run what is pending, as many trials at the same time as the launcher has workers; keep each record as it ends.

    Several runners may do so in one folder at once: each trial is run by one of them. An interrupt lets the running
    trials finish; a second one stops them. What was recorded stays.

    Args:
        grid: validated trials.
        store: where records are kept.
        launcher: runs each trial.
        display: shows progress.
        policy: how trials are run.
        rerun: statuses of recorded trials that are run again.
        limit: most trials to run now; null: all.
        until: moment of `time.monotonic` after which none begins; null: none.
        predictions: what was predicted; kept with what is measured.

    Raises:
        KeyboardInterrupt: interrupted twice.
        OSError: a record cannot be kept.
    """
    started = store.start_times()
    trials = pending(grid, store, launcher, rerun)
    store.rename({each: place_in_grid(trial) for trial in grid.trials for each in possible_ids(trial, launcher)})
    store.describe(grid.about)
    chosen = trials[:limit]
    display.begin(len(chosen), len(grid.trials) - len(trials))
    workers = GridWorkers(grid, store, launcher, policy, predictions, started)
    with interrupts(display.interrupted) as interrupt:
        workers.run(chosen, display, interrupt, lambda: interrupt.asked or _is_past(until))
    store.compact()
    done = {lease_id(record, launcher) for record in workers.records}
    by_others = len(workers.recorded_by_others - done)
    left = len(trials) - len(done) - by_others
    return Summary(tuple(workers.records), len(grid.trials) - len(trials), left, by_others)


def _is_past(moment: float | None) -> bool:
    return moment is not None and time.monotonic() > moment
