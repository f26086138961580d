"""A grid, from its first pending trial to its last record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.environment import resolve_device
from harness.grids.grid import Grid, Trial
from harness.launch.launcher import Launcher
from harness.predict.prediction import NO_PREDICTIONS, Predictions
from harness.record import NO_CONTENTS, Contents, Record, Status
from harness.results.store import Store
from harness.runner.display import Display
from harness.runner.execution import Policy
from harness.runner.identity import lease_id, place_in_grid, possible_ids, version_of
from harness.runner.interrupts import interrupts
from harness.runner.visits import MOST_FURTHER_BLOCKS, lacking, stages, timed_trials, to_come, with_references
from harness.runner.workers import GridWorkers

_DEFAULT_POLICY = Policy()
_MOST_BARREN = 2
"""Blocks in a row without any visit that counts, after which the machine is taken to stay busy."""


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
    untimed: tuple[str, ...] = ()
    """Labels of trials that ended well and have too few timing visits that count."""
    failed_visits: Mapping[str, Record] = field(default_factory=dict)
    """By label of such a trial, its latest visit that failed."""
    visits: int = 0
    """Timing visits that were made and count."""
    visits_left: int = 0
    """Timing visits to come, where the time was up or an interrupt ended the run before its end."""
    asked: bool = False
    """Whether Ctrl-C was pressed, be anything left or not."""
    over: bool = False
    """Whether Ctrl-C or the time lets nothing more begin, be anything left or not."""

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C stopped it before its end."""
        return self.asked and bool(self.left or self.untimed)


def pending(grid: Grid, store: Store, launcher: Launcher, rerun: frozenset[Status] = frozenset()) -> list[Trial]:
    """Trials of a grid without a record in the launcher's environments, or with one whose status is to be run again."""
    done = store.completed()

    def is_done(trial: Trial) -> bool:
        statuses = [done[each] for each in possible_ids(trial, launcher) if each in done]
        return any(status not in rerun for status in statuses)

    return [trial for trial in grid.trials if not is_done(trial)]


def unfinished(grid: Grid, store: Store, launcher: Launcher) -> tuple[int, int]:
    """How many trials of a grid are not recorded, and how many timing visits are to come."""
    timed = timed_trials(grid) if grid.timing.visits else []
    untrained = pending(grid, store, launcher)
    return len(untrained), to_come(lacking(timed, grid.timing, store, launcher, untrained), timed)


def kept_apart(trials: Iterable[Trial], store: Store, launcher: Launcher) -> list[str]:
    """What is recorded of these trials with other contents behind the same names, a line for each kind."""
    columns = ["trial_id", "spec_id", "environment_id", "twin", "started_at", "data_fingerprint", "base_fingerprint"]
    rows = sorted(store.read("trials", columns).to_pylist(), key=lambda row: row["started_at"])
    recorded = {(row["spec_id"], row["environment_id"], row["twin"]): Contents.of_row(row) for row in rows}
    counts: Counter[str] = Counter()
    for trial in trials:
        for environment in launcher.environments(resolve_device(trial.spec.device)):
            before = recorded.get((trial.spec.id, environment.id, trial.twin), trial.contents)
            names = " and ".join(trial.contents.changed(before, trial.spec))
            if names and before == NO_CONTENTS:
                counts["were recorded before contents were fingerprinted"] += 1
            elif names:
                counts[f"are recorded with other content of {names} (changed since)"] += 1
    return [f"{n} trials {what}; they are kept apart and measured anew" for what, n in counts.items()]


def recorded(grid: Grid, store: Store, launcher: Launcher) -> list[dict[str, Any]]:
    """Rows of a grid's trials in the launcher's environments, in the grid's order: how each ended."""
    columns = ["trial_id", "label", "repeat", "status", "log"]
    rows = {row["trial_id"]: row for row in store.read("trials", columns).to_pylist()}
    return [rows[each] for trial in grid.trials for each in possible_ids(trial, launcher) if each in rows]


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
    """Train what is pending, as many trials at the same time as the launcher has workers; keep each record as it ends.

    Speeds are timed apart, in blocks of short visits between the repeats and after them (`visits.stages`): each block
    visits every trial once, in random order. Trials whose visits were disturbed are visited again at the end.

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
    store.rename(
        {
            each: place_in_grid(trial) | {"folder": trial.spec.folder}
            for trial in grid.trials
            for each in possible_ids(trial, launcher)
        }
    )
    devices = {resolve_device(trial.spec.device) for trial in grid.trials}
    here = {each.id for device in devices for each in launcher.environments(device)}
    store.describe(grid.about, here, version_of(grid))
    chosen = trials[:limit]
    timed = timed_trials(grid) if grid.timing.visits and len(chosen) == len(trials) else []
    timing = grid.timing
    due = lacking(timed, timing, store, launcher, chosen)
    display.begin(len(chosen), len(grid.trials) - len(trials), to_come(due, timed), timing.seconds)
    visits = 0
    workers = GridWorkers(grid, store, launcher, policy, predictions, started)
    with interrupts(display.interrupted) as interrupt:

        def is_over() -> bool:
            return interrupt.asked or _is_past(until)

        def time_block() -> bool:
            """One more block; false: nothing is due, or the machine was never quiet."""
            nonlocal visits
            due = lacking(timed, grid.timing, store, launcher)
            if not due or is_over():
                return False
            counting = workers.time(with_references(due, timed, store, launcher), display, interrupt, is_over)
            visits += counting
            return counting > 0

        for repeats, blocks in stages(1 + max(trial.repeat for trial in grid.trials), grid.timing.visits):
            workers.train([t for t in chosen if t.repeat in repeats], display, interrupt, is_over)
            for _ in range(blocks):
                time_block()
        further = grid.timing.visits + MOST_FURTHER_BLOCKS
        barren = 0
        for _ in range(further):
            barren = 0 if time_block() else barren + 1
            if barren == _MOST_BARREN:
                break
    store.compact()
    over = is_over()
    untimed = tuple(trial.label for trial in lacking(timed, grid.timing, store, launcher))
    visits_left = unfinished(grid, store, launcher)[1] if over else 0
    done = {lease_id(record, launcher) for record in workers.records}
    by_others = len(workers.recorded_by_others - done)
    left = len(trials) - len(done) - by_others
    failed = {label: workers.failed_visits[label] for label in untimed if label in workers.failed_visits}
    return Summary(
        tuple(workers.records),
        len(grid.trials) - len(trials),
        left,
        by_others,
        untimed,
        failed,
        visits,
        visits_left,
        interrupt.asked,
        over,
    )


def _is_past(moment: float | None) -> bool:
    return moment is not None and time.monotonic() > moment
