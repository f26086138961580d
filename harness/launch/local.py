"""Trials in processes of this machine, forked from a server that has imported everything once."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from typing import Self

from harness import environment
from harness.environment import DeviceType, Environment, Placement
from harness.launch import exit_status, fork_server
from harness.launch.launcher import Attempt, OnEvent, WorkerOptions
from harness.launch.logs import Log, print_to
from harness.launch.watchdog import LOOK_SECONDS, Watchdog
from harness.record import Record

Child = Callable[[str, WorkerOptions, connection.Connection], None]
"""What a process does with its job (JSON), its options and the connection that it reports on."""

_SERVER_LOST = 255
"""Exit code that multiprocessing reports for a process whose fork server has died; it may still run."""


def measure(job: str, options: WorkerOptions, channel: connection.Connection) -> None:
    """What a trial's process does: one measured fine-tuning."""
    from harness.training import worker  # the runner never imports torch; the fork server has

    worker.main(job, options, channel)


class LocalLauncher:
    """A process for each trial. The fork server starts with the first one.

    Args:
        workers: trials at the same time, each on a part of the machine.
        child: what each process does.
        preload: module that the fork server imports once.
    """

    def __init__(self, workers: int = 1, *, child: Child = measure, preload: str = fork_server.PRELOAD) -> None:
        self.workers = workers
        self._child, self._preload = child, preload
        self._running: set[ForkServerProcess] = set()
        self._starting = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        fork_server.stop()

    def environments(self, device_type: DeviceType) -> tuple[Environment, ...]:
        """That of a worker of this machine."""
        here = environment.current(device_type)
        if self.workers > 1:
            part = {"cpu_cores": here.cpu_cores // self.workers, "concurrent_trials": self.workers - 1}
            here = here.model_copy(update=part)
        return (here,)

    def placements(self, device_type: DeviceType) -> Sequence[Placement | None]:
        """A part of the machine for each worker; a single one has all of it.

        Raises:
            InputError: there are more workers than cores or cards.
        """
        return [None] if self.workers == 1 else environment.divide_machine(self.workers, device_type)

    def run(self, attempt: Attempt, on_event: OnEvent) -> Record:
        """Run one job to its record, whatever kills it.

        Raises:
            KeyboardInterrupt: passed on from `on_event` or the terminal; the process is killed first.
        """
        started_at = dt.datetime.now(dt.UTC)
        watchdog = Watchdog(attempt.timeout, attempt.stall)
        with Log(attempt.log) as output:
            record, code = self._watched(attempt, output, watchdog, on_event)
        if record is not None:
            return record
        outcome = watchdog.expired() or exit_status.classify_exit(code, watchdog.oom_kills_before, attempt.log)
        seconds = (dt.datetime.now(dt.UTC) - started_at).total_seconds()
        return Record.of(
            attempt.job,
            environment=_environment_of(attempt),
            phase=watchdog.phase,
            started_at=started_at,
            metrics={"trial_seconds": seconds, "peak_process_bytes": watchdog.peak_process_bytes},
            **outcome._asdict(),
        )

    def stop(self) -> None:
        """Stop every trial that is running."""
        for process in [*self._running]:
            if process.pid is not None:
                with contextlib.suppress(OSError):  # it has ended
                    os.kill(process.pid, signal.SIGKILL)

    def _watched(
        self, attempt: Attempt, output: Log, watchdog: Watchdog, on_event: OnEvent
    ) -> tuple[Record | None, int | None]:
        """The record that the worker sent, or its exit code where it sent none."""
        with self._starting:
            context = fork_server.start(self._preload)
        ours, theirs = context.Pipe()
        arguments = (self._child, output.theirs, attempt.job.model_dump_json(), attempt.options, theirs)
        process = context.Process(target=_begin, args=arguments, daemon=True)
        try:
            with self._starting, fork_server.main_module_hidden():
                process.start()
        except (EOFError, OSError):  # the server has died; the next trial starts another one
            theirs.close()
            ours.close()
            return None, None
        self._running.add(process)
        watchdog.begin(process.pid or 0)
        theirs.close()
        output.hand_over()
        try:
            for kind, value in _events(ours, process, watchdog):
                if kind == "record":
                    return Record.model_validate(value), None
                watchdog.record_event(kind, value)
                on_event(kind, value)
            return None, process.exitcode
        finally:
            self._running.discard(process)
            process.kill()
            process.join()
            if process.exitcode == _SERVER_LOST and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            ours.close()


def _environment_of(attempt: Attempt) -> Environment:
    """Where an attempt runs, as its worker would have recorded it."""
    here = environment.current(environment.resolve_device(attempt.job.spec.device))
    placement = attempt.options["placement"]
    return here if placement is None else here.placed(Placement(**placement))


def _begin(
    child: Child, output: connection.Connection, job: str, options: WorkerOptions, channel: connection.Connection
) -> None:
    print_to(output)
    child(job, options, channel)


def _events(
    channel: connection.Connection, process: ForkServerProcess, watchdog: Watchdog
) -> Iterator[tuple[str, object]]:
    """What the worker reports, until it ends or its time is up."""
    while watchdog.expired() is None:
        watchdog.look()
        ready = connection.wait([channel, process.sentinel], LOOK_SECONDS)
        # The pipe before the end: a worker may have sent its record and gone.
        if channel in ready:
            try:
                kind, value = json.loads(channel.recv_bytes())
            except (EOFError, OSError):
                process.join(5)
                return
            yield kind, value
        elif ready:
            process.join(5)
            return
