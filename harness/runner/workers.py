"""Several trials at the same time: one thread for each worker, and a lease for each trial."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from harness.environment import DeviceType, Placement, resolve_device
from harness.grids.grid import Grid, Trial
from harness.launch.launcher import Launcher
from harness.predict.prediction import Predictions
from harness.record import Job, Record
from harness.results.store import Store
from harness.runner.display import Display
from harness.runner.execution import ExecutionContext, Policy, execute
from harness.runner.identity import lease_id, place_in_grid, possible_ids
from harness.runner.interrupts import Interrupt
from harness.runner.leases import Leases

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
        self.recorded_by_others: set[str] = set()
        """Ids of trials that other runners recorded meanwhile."""
        self._grid, self._store, self._launcher, self._started = grid, store, launcher, started
        self._policy, self._predictions = policy, predictions
        self._numbers = itertools.count(1)

    def run(self, trials: Sequence[Trial], display: Display, interrupt: Interrupt, is_over: Callable[[], bool]) -> None:
        """Run the trials.

        Raises:
            KeyboardInterrupt: interrupted twice.
            OSError: a record cannot be kept.
        """
        if not trials:
            return

        def work(own_display: Display, placement: Placement | None, has_failed: Callable[[], bool]) -> None:
            context = ExecutionContext(
                self._store, self._launcher, own_display, self._policy, self._predictions, placement, interrupt
            )
            self._work(trials, context, lambda: has_failed() or is_over())

        run_workers(self._launcher, resolve_device(trials[0].spec.device), display, work)

    def _work(self, trials: Sequence[Trial], context: ExecutionContext, is_over: Callable[[], bool]) -> None:
        display = context.display if self._launcher.workers == 1 else None
        leased = _LeasedTrials(self._store, self._launcher, self._started, display)
        # Closed at once, whatever happens: the lease of a stopped trial is given back.
        with contextlib.closing(leased.take(trials, is_over)) as turns:
            try:
                for trial in turns:
                    job = Job(grid=self._grid.name, spec=trial.spec, twin=trial.twin, **place_in_grid(trial))
                    context.display.trial(next(self._numbers), job)
                    self.records.append(execute(job, context))
            finally:
                self.recorded_by_others |= leased.recorded_by_others


class _LeasedTrials:
    """The trials that one worker takes, while other workers and other runners take theirs."""

    def __init__(
        self, store: Store, launcher: Launcher, started: dict[str, dt.datetime], display: Display | None
    ) -> None:
        self.recorded_by_others: set[str] = set()
        self._store, self._launcher, self._started, self._display = store, launcher, started, display
        self._leases = Leases(store.folder)

    def take(self, trials: Sequence[Trial], is_over: Callable[[], bool]) -> Generator[Trial, None, None]:
        """Trials that nobody else runs, one by one, each leased until the next one is asked for.

        Those that others are running come last, in case their runners die. It ends when all are recorded.
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
                    if any(map(self._recorded_since, possible_ids(trial, self._launcher))):
                        self.recorded_by_others.add(identity)
                    else:
                        yield trial
            if len(busy) == len(left):  # nothing moved
                if self._display is not None:
                    self._display.waiting(len(busy))
                time.sleep(_LOOK_SECONDS)
            left = busy

    def _recorded_since(self, trial_id: str) -> bool:
        """Whether a record is there that was not when this run began."""
        mark = self._store.start_time(trial_id)
        return mark is not None and mark != self._started.get(trial_id)
