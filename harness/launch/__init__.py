"""Runs the trials of a grid, each through a launcher, and keeps every record."""

from __future__ import annotations

import datetime as dt
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from harness import environment
from harness.grid import Grid, Trial
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


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    records: tuple[Record, ...]
    skipped: int
    """Trials that had been recorded before."""
    left: int
    """Trials that were not reached."""


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

    An interrupt lets the running trial finish; a second one stops it. What was recorded stays.

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
    trials = pending(grid, store, rerun)
    store.rename({_id(trial): _place(trial) for trial in grid.trials})
    store.describe(grid.about)
    skipped = len(grid.trials) - len(trials)
    todo = trials[:limit]
    display.begin(len(todo), skipped)
    records: list[Record] = []
    with interrupts(display.interrupted) as asked_to_stop:
        for number, trial in enumerate(todo, start=1):
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
            if asked_to_stop():
                break
    store.compact()
    return Summary(tuple(records), skipped, len(trials) - len(records))


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


@contextmanager
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
