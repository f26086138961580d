"""Runs the trials of a grid, each through a launcher, and keeps every record."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import errno
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from harness import environment
from harness.grid import Grid, Trial
from harness.launch.attempt import Attempt, OnEvent
from harness.launch.endings import is_transient
from harness.launch.leases import Leases
from harness.prediction import NOTHING_EXPECTED, Expected
from harness.results import DISK_FULL, Job, Record, Status, Store, trial_id

STALL_SECONDS = 1800.0
"""A worker that gave no sign of life for so long within a step hangs."""


class Launcher(Protocol):
    """Runs one job at a time to its record."""

    def run(self, attempt: Attempt, on_event: OnEvent) -> Record:
        """Run a job in a process of its own; the record says how it ended. Several may run at once."""
        ...

    def stop(self) -> None:
        """End what is running now."""

    def seats(self, count: int, device_type: str) -> Sequence[environment.Seat | None]:
        """This machine divided among so many workers; nulls where they work elsewhere."""
        ...


class Display(Protocol):
    """Shows a run as it goes."""

    def begin(self, total: int, skipped: int) -> None:
        """The run starts: so many trials to do, so many done before."""

    def trial(self, number: int, job: Job) -> None:
        """A trial starts."""

    def event(self, kind: str, value: Any) -> None:
        """The running trial says a phase or a step."""

    def retried(self, record: Record) -> None:
        """An attempt came to nothing, and there is another one."""

    def finished(self, record: Record) -> None:
        """A trial ended."""

    def interrupted(self) -> None:
        """The user asked to stop; the running trial is finished first."""

    def waiting(self, count: int) -> None:
        """Nothing is left but so many trials that other runners are doing."""

    def beside(self) -> Display:
        """The display of another trial at the same time; its methods are called from another thread."""
        ...


@dataclass(frozen=True)
class Policy:
    """How trials are run."""

    timeout: float | None = None
    """Seconds that a trial may take; null: any."""
    stall: float | None = STALL_SECONDS
    """Seconds that it may give no sign of life within a step; null: any."""
    retries: int = 0
    """So many more attempts where the worker was killed or lost: what may well end otherwise."""
    retry_timeouts: bool = False
    """Whether one that took too long gets them too."""
    trust_remote_code: bool = False
    """Let models from the hub run their own code."""
    skip_infeasible: bool = False
    """Record what is predicted not to fit without starting it."""
    workers: int = 1
    """So many trials at the same time, each with its share of the machine."""


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    records: tuple[Record, ...]
    skipped: int
    """Trials that had been recorded before."""
    left: int
    """Trials that were not reached."""
    elsewhere: int = 0
    """Trials that other runners recorded meanwhile."""


def pending(grid: Grid, store: Store, rerun: frozenset[Status] = frozenset()) -> list[Trial]:
    """Trials of a grid without a record here, or with one whose status shall be run again."""
    done = store.completed()

    def is_done(trial: Trial) -> bool:
        statuses = [done[i] for i in _ids(trial) if i in done]
        return any(status not in rerun for status in statuses)

    return [trial for trial in grid.trials if not is_done(trial)]


def _ids(trial: Trial | Record) -> list[str]:
    """The trial's ids in the environments that it may find itself in."""
    where = environment.possible(environment.resolve_device(trial.spec.device))
    return [trial_id(trial.spec, each, twin=trial.twin) for each in where]


def _id(trial: Trial | Record) -> str:
    """The first of them, which its lease goes by."""
    return _ids(trial)[0]


def _place(trial: Trial) -> dict[str, Any]:
    """Where a trial stands in its grid."""
    return {name: getattr(trial, name) for name in ("label", "factor", "level", "repeat", "baseline_id")}


def run_grid(
    grid: Grid,
    store: Store,
    launcher: Launcher | None,
    display: Display,
    policy: Policy = Policy(),
    *,
    rerun: frozenset[Status] = frozenset(),
    limit: int | None = None,
    until: float | None = None,
    expected: Expected = NOTHING_EXPECTED,
) -> Summary:
    """Run what is pending, one trial after another, each kept as soon as it ends.

    Several runners may do so in one folder at once: each trial is done by one of them. An interrupt lets the running
    trial finish; a second one stops it. What was recorded stays.

    Args:
        grid: validated trials.
        store: where records are kept.
        launcher: runs each trial; null where none is pending.
        display: shows it.
        policy: how they are run.
        rerun: statuses of recorded trials that are run again.
        limit: most trials to run now; null: all.
        until: moment of `time.monotonic` after which none begins; null: none.
        expected: what was predicted, kept beside what is measured.

    Raises:
        KeyboardInterrupt: interrupted twice.
        OSError: a record cannot be kept.
    """
    with environment.divided(policy.workers):
        marks = store.marks()
        trials = pending(grid, store, rerun)
        store.rename({each: _place(trial) for trial in grid.trials for each in _ids(trial)})
        store.describe(grid.about)
        skipped = len(grid.trials) - len(trials)
        todo = trials[:limit]
        display.begin(len(todo), skipped)
        team = _Team(grid, store, launcher, policy, expected, marks)
        with interrupts(display.interrupted) as interrupt:
            team.work(todo, display, interrupt, lambda: interrupt.asked or _is_past(until))
        store.compact()
        done = {_id(record) for record in team.records}
        elsewhere = len(team.elsewhere - done)
        return Summary(tuple(team.records), skipped, len(trials) - len(done) - elsewhere, elsewhere)


class _Team:
    """The workers of one runner: each takes trials as a runner of its own would, until none is left."""

    def __init__(
        self,
        grid: Grid,
        store: Store,
        launcher: Launcher | None,
        policy: Policy,
        expected: Expected,
        marks: dict[str, dt.datetime],
    ) -> None:
        self.records: list[Record] = []
        self.elsewhere: set[str] = set()
        """Ids of trials that somebody else recorded."""
        self._grid, self._store, self._launcher, self._marks = grid, store, launcher, marks
        self._policy, self._expected = policy, expected
        self._numbers = itertools.count(1)

    def work(self, todo: list[Trial], display: Display, interrupt: Interrupt, is_over: Callable[[], bool]) -> None:
        """Do the trials.

        Raises:
            KeyboardInterrupt: interrupted twice.
            OSError: a record cannot be kept.
        """
        if not todo:
            return

        def one(shown: Display, seat: environment.Seat | None, has_failed: Callable[[], bool]) -> None:
            self._one(todo, shown, seat, interrupt, lambda: has_failed() or is_over())

        device_type = environment.resolve_device(todo[0].spec.device)
        side_by_side(self._policy.workers, self._launcher, device_type, display, one)

    def _one(
        self,
        todo: Sequence[Trial],
        display: Display,
        seat: environment.Seat | None,
        interrupt: Interrupt,
        is_over: Callable[[], bool],
    ) -> None:
        shares = _Shares(self._store, self._marks, display if self._policy.workers == 1 else None)
        # Closed at once, whatever happens: the lease of the trial that was stopped is given back.
        with contextlib.closing(shares.take(todo, is_over)) as turns:
            try:
                for trial in turns:
                    job = Job(grid=self._grid.name, spec=trial.spec, twin=trial.twin, **_place(trial))
                    display.trial(next(self._numbers), job)
                    assert self._launcher is not None  # noqa: S101 - the caller's promise
                    at = Situation(self._store, self._launcher, display, self._policy, self._expected, seat, interrupt)
                    self.records.append(execute(job, at))
            finally:
                self.elsewhere |= shares.elsewhere


_LOOK_SECONDS = 0.5
"""How often a runner with nothing else to do looks whether another one has finished or died."""

Work = Callable[[Display, environment.Seat | None, Callable[[], bool]], None]
"""What a worker does: shown here, in this seat, until another one has failed."""


def side_by_side(count: int, launcher: Launcher | None, device_type: str, display: Display, work: Work) -> None:
    """So many workers at the same time, in threads; a single one in this thread, with the whole machine. Without a
    launcher there is nothing that could be at the same time.

    Raises:
        KeyboardInterrupt: interrupted twice; what was running is stopped.
    """
    if count == 1 or launcher is None:
        work(display, None, lambda: False)
        return
    seats = launcher.seats(count, device_type)
    failed = threading.Event()

    def one(shown: Display, seat: environment.Seat | None) -> None:
        try:
            work(shown, seat, failed.is_set)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(count) as threads:
        shown = [display, *(display.beside() for _ in seats[1:])]
        running = [threads.submit(one, *each) for each in zip(shown, seats, strict=True)]
        try:
            while wait(running, _LOOK_SECONDS).not_done:
                pass  # a signal that another thread was given is handled here, once this one wakes
        except KeyboardInterrupt:
            while wait(running, 0.1).not_done:  # one may only be starting
                launcher.stop()
            raise
    for each in running:
        each.result()


def _is_past(moment: float | None) -> bool:
    return moment is not None and time.monotonic() > moment


class _Shares:
    """One runner's share of the trials of a results folder."""

    def __init__(self, store: Store, marks: dict[str, dt.datetime], display: Display | None) -> None:
        self.elsewhere: set[str] = set()
        self._store, self._marks, self._display = store, marks, display
        self._leases = Leases(store.folder)

    def take(self, trials: Sequence[Trial], asked_to_stop: Callable[[], bool]) -> Generator[Trial, None, None]:
        """The trials that nobody else does, one by one, each leased until the next is asked for.

        Those that others are doing come last, should their runners die; it ends when all are recorded.
        """
        left = list(trials)
        while left:
            busy = []
            for trial in left:
                if asked_to_stop():
                    return
                if not self._leases.take(_id(trial)):
                    busy.append(trial)
                    continue
                with self._leases.held(_id(trial)):
                    # Records are kept before their leases are given back: what is not there now is nobody's.
                    if any(map(self._recorded_since, _ids(trial))):
                        self.elsewhere.add(_id(trial))
                    else:
                        yield trial
            if len(busy) == len(left):  # nothing moved
                if self._display is not None:
                    self._display.waiting(len(busy))
                time.sleep(_LOOK_SECONDS)
            left = busy

    def _recorded_since(self, trial_id: str) -> bool:
        """Whether a record is there that was not when this run began."""
        mark = self._store.mark(trial_id)
        return mark is not None and mark != self._marks.get(trial_id)


def log_path(store: Store, job: Job, attempt: int = 1) -> Path:
    """Where an attempt's output goes."""
    here = environment.current(environment.resolve_device(job.spec.device))
    name = trial_id(job.spec, here, twin=job.twin)
    return store.folder / "logs" / (f"{name}.log" if attempt == 1 else f"{name}.attempt-{attempt}.log")


@dataclass(frozen=True)
class Situation:
    """What a job is executed with."""

    store: Store
    launcher: Launcher
    display: Display
    policy: Policy = Policy()
    expected: Expected = NOTHING_EXPECTED
    seat: environment.Seat | None = None
    """Where several trials share the machine."""
    interrupt: Interrupt = field(default_factory=lambda: Interrupt())


def execute(job: Job, at: Situation) -> Record:
    """Run one job and keep its record, with what was predicted for it.

    Raises:
        KeyboardInterrupt: interrupted twice.
        OSError: the record cannot be kept, or there was no room for what the trial writes.
    """
    reason = at.expected.infeasible(job.spec) if at.policy.skip_infeasible else None
    if reason is not None:
        record = at.expected.skipped(job, reason, started_at=dt.datetime.now(dt.UTC))
    else:
        record = at.expected.beside(_attempted(job, at))
    at.store.write(record)
    at.display.finished(record)
    return record


def _attempted(job: Job, at: Situation) -> Record:
    """The record of the last attempt: the first from which something came, or the last that there may be."""
    store, policy = at.store, at.policy
    options = {"folder": str(store.folder / "adapters"), "trust_remote_code": policy.trust_remote_code}
    if at.seat is not None:
        options["seat"] = dataclasses.asdict(at.seat)
    number = 1
    while True:
        log = log_path(store, job, number)
        record = at.launcher.run(Attempt(job, options, log, policy.timeout, policy.stall), at.display.event)
        if at.interrupt.at_once:  # what was stopped has no end of its own
            raise KeyboardInterrupt
        if record.error_type == DISK_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(store.folder))
        log_name = str(log.relative_to(store.folder)) if record.status != "ok" and log.exists() else None
        record = record.model_copy(update={"attempt": number, "log": log_name})
        last = number > policy.retries or at.interrupt.asked
        if last or not is_transient(record, timeouts=policy.retry_timeouts):
            return record
        at.display.retried(record)
        number += 1


class Interrupt:
    """What the user has asked for with Ctrl-C so far."""

    def __init__(self) -> None:
        self.asked = False
        """Once: finish what is running, and begin nothing."""
        self.at_once = False
        """Twice: stop."""


@contextlib.contextmanager
def interrupts(on_first: Callable[[], None]) -> Iterator[Interrupt]:
    """Within, the first interrupt is remembered and the second raises. Yields what is remembered."""
    interrupt = Interrupt()

    def handle(number: int, frame: Any) -> None:
        if interrupt.asked:
            interrupt.at_once = True
            raise KeyboardInterrupt
        interrupt.asked = True
        on_first()

    former = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, former)
