"""Runs the trials of a grid, each through a launcher, and keeps every record."""

from __future__ import annotations

import contextlib
import datetime as dt
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from harness import environment
from harness.grid import Grid, Trial
from harness.launch.leases import Leases
from harness.prediction import NOTHING_EXPECTED, Expected
from harness.results import Job, Record, Status, Store, trial_id


class Launcher(Protocol):
    """Runs one job at a time to its record."""

    def run(
        self, job: Job, options: dict[str, Any], *, timeout: float | None, on_event: Callable[[str, Any], None]
    ) -> Record:
        """Run a job in a process of its own; the record says how it ended."""
        ...


class Display(Protocol):
    """Shows a run as it goes."""

    def begin(self, total: int, skipped: int) -> None:
        """The run starts: so many trials to do, so many done before."""

    def trial(self, number: int, job: Job) -> None:
        """A trial starts."""

    def event(self, kind: str, value: Any) -> None:
        """The running trial says a phase or a step."""

    def finished(self, record: Record) -> None:
        """A trial ended."""

    def interrupted(self) -> None:
        """The user asked to stop; the running trial is finished first."""

    def waiting(self, count: int) -> None:
        """Nothing is left but so many trials that other runners are doing."""


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
        status = done.get(_id(trial))
        return status is not None and status not in rerun

    return [trial for trial in grid.trials if not is_done(trial)]


def _id(trial: Trial) -> str:
    """The trial's id in this environment."""
    here = environment.current(environment.resolve_device(trial.spec.device))
    return trial_id(trial.spec, here, twin=trial.twin)


def _place(trial: Trial) -> dict[str, Any]:
    """Where a trial stands in its grid."""
    return {name: getattr(trial, name) for name in ("label", "factor", "level", "repeat", "baseline_id")}


def run_grid(
    grid: Grid,
    store: Store,
    launcher: Launcher | None,
    display: Display,
    *,
    timeout: float | None = None,
    rerun: frozenset[Status] = frozenset(),
    limit: int | None = None,
    trust_remote_code: bool = False,
    expected: Expected = NOTHING_EXPECTED,
    skip_infeasible: bool = False,
) -> Summary:
    """Run what is pending, one trial after another, each kept as soon as it ends.

    Several runners may do so in one folder at once: each trial is done by one of them. An interrupt lets the running
    trial finish; a second one stops it. What was recorded stays.

    Args:
        grid: validated trials.
        store: where records are kept.
        launcher: runs each trial; null where none is pending.
        display: shows it.
        timeout: seconds that a trial may take; null: any.
        rerun: statuses of recorded trials that are run again.
        limit: most trials to run now; null: all.
        trust_remote_code: let models from the hub run their own code.
        expected: what was predicted, kept beside what is measured.
        skip_infeasible: record what is predicted not to fit without starting it.

    Raises:
        KeyboardInterrupt: interrupted twice.
        OSError: a record cannot be kept.
    """
    marks = store.marks()
    trials = pending(grid, store, rerun)
    store.rename({_id(trial): _place(trial) for trial in grid.trials})
    store.describe(grid.about)
    skipped = len(grid.trials) - len(trials)
    todo = trials[:limit]
    display.begin(len(todo), skipped)
    records: list[Record] = []
    shares = _Shares(store, marks, display)
    # Closed at once, whatever happens: the lease of the trial that was stopped is given back.
    with (
        interrupts(display.interrupted) as asked_to_stop,
        contextlib.closing(shares.take(todo, asked_to_stop)) as turns,
    ):
        for number, trial in enumerate(turns, start=1):
            job = Job(grid=grid.name, spec=trial.spec, twin=trial.twin, **_place(trial))
            display.trial(number, job)
            assert launcher is not None  # noqa: S101 - the caller's promise
            record = execute(
                job,
                store,
                launcher,
                display,
                timeout=timeout,
                trust_remote_code=trust_remote_code,
                expected=expected,
                skip_infeasible=skip_infeasible,
            )
            records.append(record)
    shares.compact()
    return Summary(tuple(records), skipped, len(trials) - len(records) - shares.elsewhere, shares.elsewhere)


_LOOK_SECONDS = 0.5
"""How often a runner with nothing else to do looks whether another one has finished or died."""


class _Shares:
    """One runner's share of the trials of a results folder."""

    def __init__(self, store: Store, marks: dict[str, dt.datetime], display: Display) -> None:
        self.elsewhere = 0
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
                with self._leases.lock():
                    taken = self._leases.take(_id(trial))
                if not taken:
                    busy.append(trial)
                    continue
                with self._leases.held(_id(trial)):
                    # Records are kept before their leases are given back: what is not there now is nobody's.
                    if self._recorded_since(_id(trial)):
                        self.elsewhere += 1
                    else:
                        yield trial
            if len(busy) == len(left):  # nothing moved
                self._display.waiting(len(busy))
                time.sleep(_LOOK_SECONDS)
            left = busy

    def compact(self) -> None:
        """Make one part of many, unless a runner is at work that may be writing one of them."""
        with self._leases.lock():
            if self._leases.nobody_works():
                self._store.compact()

    def _recorded_since(self, trial_id: str) -> bool:
        """Whether a record is there that was not when this run began."""
        mark = self._store.mark(trial_id)
        return mark is not None and mark != self._marks.get(trial_id)


def log_path(store: Store, job: Job) -> Path:
    """Where a trial's output goes."""
    return store.folder / "logs" / f"{job.spec.id}{'-twin' * job.twin}.log"


def execute(
    job: Job,
    store: Store,
    launcher: Launcher,
    display: Display,
    *,
    timeout: float | None = None,
    trust_remote_code: bool = False,
    expected: Expected = NOTHING_EXPECTED,
    skip_infeasible: bool = False,
) -> Record:
    """Run one job and keep its record, with what was predicted for it.

    With `skip_infeasible` a trial that is predicted not to fit is recorded as skipped, and not started.

    Raises:
        KeyboardInterrupt: interrupted twice.
        OSError: the record cannot be kept.
    """
    options = {
        "folder": str(store.folder / "adapters"),
        "log": str(log_path(store, job)),
        "trust_remote_code": trust_remote_code,
    }
    reason = expected.infeasible(job.spec) if skip_infeasible else None
    if reason is not None:
        record = expected.skipped(job, reason, started_at=dt.datetime.now(dt.UTC))
    else:
        record = expected.beside(launcher.run(job, options, timeout=timeout, on_event=display.event))
    store.write(record)
    display.finished(record)
    return record


@contextlib.contextmanager
def interrupts(on_first: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Within, the first interrupt is remembered and the second raises. Yields what asks for the first."""
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        on_first()

    former = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, former)
