"""Several trials at the same time: one thread for each worker, and a lease for each trial."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import random
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from harness.environment import DeviceType, Placement, resolve_device
from harness.grids.grid import Grid, Trial
from harness.launch.launcher import Launcher
from harness.predict.prediction import Predictions
from harness.record import Job, Record, Visit
from harness.results.store import Store
from harness.runner import visits
from harness.runner.display import Display
from harness.runner.execution import ExecutionContext, Policy, execute, visit
from harness.runner.identity import lease_id, place_in_grid, possible_ids
from harness.runner.interrupts import Interrupt
from harness.runner.leases import Leases
from harness.runner.loss_before import RecordedLosses

_LOOK_SECONDS = 0.5
"""How often an idle runner looks whether another one has finished or died."""

Work = Callable[[Display, Placement | None, Callable[[], bool]], None]
"""What one worker does: with this display, on this part of the machine, until another worker has failed."""


def run_workers(launcher: Launcher, device_type: DeviceType, display: Display, work: Work) -> None:
    """Call `work` once for each worker of a launcher: in a thread each, or in this one where there is only one.

    Raises:
        InputError: the machine has no capacity for the workers.
        KeyboardInterrupt: interrupted twice; what was running is stopped.
    """
    placements = launcher.placements(device_type)
    if len(placements) == 1:
        work(display, placements[0], lambda: False)
        return
    failed = threading.Event()

    def one(own_display: Display, placement: Placement | None) -> None:
        try:
            work(own_display, placement, failed.is_set)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(len(placements)) as threads:
        displays = [display, *(display.child_display() for _ in placements[1:])]
        running = [threads.submit(one, *each) for each in zip(displays, placements, strict=True)]
        try:
            while wait(running, _LOOK_SECONDS).not_done:
                pass  # a signal that the kernel gave to another thread is handled here, once this one wakes
        except KeyboardInterrupt:
            while wait(running, 0.1).not_done:  # one may only be starting
                launcher.stop()
            raise
    for each in running:
        each.result()


class GridWorkers:
    """The workers of one runner: each takes trials of the grid until none is left."""

    def __init__(
        self,
        grid: Grid,
        store: Store,
        launcher: Launcher,
        policy: Policy,
        predictions: Predictions,
        started: dict[str, dt.datetime],
    ) -> None:
        self.records: list[Record] = []
        """Of the trials that were trained."""
        self.recorded_by_others: set[str] = set()
        """Ids of trials that other runners recorded meanwhile."""
        self.failed_visits: dict[str, Record] = {}
        """Of each trial's label, its latest visit that failed."""
        self._grid, self._store, self._launcher, self._started = grid, store, launcher, started
        self._policy, self._predictions = policy, predictions
        self._numbers = itertools.count(1)
        self._block = 0
        self._losses_before = RecordedLosses()

    def train(
        self, trials: Sequence[Trial], display: Display, interrupt: Interrupt, is_over: Callable[[], bool]
    ) -> None:
        """Train by each trial once.

        Raises:
            KeyboardInterrupt: interrupted twice.
            OSError: a record cannot be kept.
        """

        def recorded(trial: Trial) -> bool:
            return any(map(self._recorded_since, possible_ids(trial, self._launcher)))

        def one(job: Job, context: ExecutionContext) -> None:
            self.records.append(execute(job, context))

        self._run(trials, None, recorded, one, (display, interrupt, is_over))

    def time(
        self, due: Mapping[Trial, int], display: Display, interrupt: Interrupt, is_over: Callable[[], bool]
    ) -> int:
        """One block of timing visits, in random order: one of each trial.

        Args:
            due: the trials, with how many visits each lacks.
            display: shows progress.
            interrupt: whether Ctrl-C was pressed.
            is_over: lets none begin any more.

        Returns:
            How many of them count.

        Raises:
            KeyboardInterrupt: interrupted twice.
            OSError: the steps cannot be kept.
        """
        timing = self._grid.timing
        # In microseconds: runners that share a folder begin theirs within a second of one another.
        self._block = max(self._block + 1, time.time_ns() // 1000)
        order = random.Random(f"{self._grid.name}/{self._block}").sample(list(due), len(due))
        enough = {t: lacks + visits.undisturbed(t, self._store, self._launcher) for t, lacks in due.items()}

        visited = set[Trial]()

        def has_enough(trial: Trial) -> bool:
            if trial in visited:  # by another worker of this runner
                return True
            # The baseline is in every block, also where other runners time it meanwhile in theirs: the others are
            # compared with it within the block.
            is_reference = trial.baseline or trial.twin
            return not is_reference and visits.undisturbed(trial, self._store, self._launcher) >= enough[trial]

        counting: list[Record] = []

        def one(job: Job, context: ExecutionContext) -> None:
            record, _ = visit(job, context, timing.visits)
            if record.status != "ok":
                self.failed_visits[record.label] = record
            elif not record.disturbed:
                counting.append(record)

        baselines = visits.references(self._grid, self._store, self._launcher)

        def visit_of(trial: Trial) -> Visit:
            visited.add(trial)
            reference = baselines.get(trial.baseline_id or "")
            return Visit(block=self._block, seconds=timing.seconds, reference=reference)

        self._run(order, visit_of, has_enough, one, (display, interrupt, is_over))
        return len(counting)

    def _run(
        self,
        trials: Sequence[Trial],
        visit_of: Callable[[Trial], Visit] | None,
        is_done: Callable[[Trial], bool],
        one: Callable[[Job, ExecutionContext], None],
        control: tuple[Display, Interrupt, Callable[[], bool]],
    ) -> None:
        """Run a job of each trial that is not done by somebody else."""
        if not trials:
            return
        display, interrupt, is_over = control

        def work(own_display: Display, placement: Placement | None, has_failed: Callable[[], bool]) -> None:
            context = ExecutionContext(
                self._store,
                self._launcher,
                own_display,
                self._policy,
                self._predictions,
                placement,
                interrupt,
                self._losses_before,
            )
            waiting_display = own_display if self._launcher.workers == 1 else None
            leased = _LeasedTrials(self._store, self._launcher, is_done, waiting_display)
            # Closed at once, whatever happens: the lease of a stopped trial is given back.
            with contextlib.closing(leased.take(trials, lambda: has_failed() or is_over())) as turns:
                try:
                    for trial in turns:
                        place = place_in_grid(trial)
                        place |= trial.contents.columns
                        planned = None if visit_of is None else visit_of(trial)
                        job = Job(grid=self._grid.name, spec=trial.spec, twin=trial.twin, visit=planned, **place)
                        context.display.trial(next(self._numbers), job)
                        one(job, context)
                finally:
                    if visit_of is None:
                        self.recorded_by_others |= leased.done_by_others

        run_workers(self._launcher, resolve_device(trials[0].spec.device), display, work)

    def _recorded_since(self, trial_id: str) -> bool:
        """Whether a record is there that was not when this run began."""
        row = self._store.row(trial_id, ["started_at"])
        return row is not None and row["started_at"] != self._started.get(trial_id)


class _LeasedTrials:
    """The trials that one worker takes, while other workers and other runners take theirs."""

    def __init__(
        self, store: Store, launcher: Launcher, is_done: Callable[[Trial], bool], display: Display | None
    ) -> None:
        self.done_by_others: set[str] = set()
        self._launcher, self._is_done, self._display = launcher, is_done, display
        self._leases = Leases(store.folder)

    def take(self, trials: Sequence[Trial], is_over: Callable[[], bool]) -> Generator[Trial, None, None]:
        """Trials that nobody else runs, one by one, each leased until the next one is asked for.

        Those that others are running come last, in case their runners die. It ends when all are done.
        """
        left = list(trials)
        while left:
            busy = []
            for trial in left:
                if is_over():
                    return
                identity = lease_id(trial, self._launcher)
                if not self._leases.take(identity):
                    busy.append(trial)
                    continue
                with self._leases.held(identity):
                    # Records are written before their leases are given back: one that is not there now is not coming.
                    if self._is_done(trial):
                        self.done_by_others.add(identity)
                    else:
                        yield trial
            if len(busy) == len(left):  # nothing moved
                if self._display is not None:
                    self._display.waiting(len(busy))
                time.sleep(_LOOK_SECONDS)
            left = busy
