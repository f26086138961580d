"""Trials in processes of their own on this machine, forked from a server that has imported everything once."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from multiprocessing import connection, forkserver
from typing import Any

from harness import environment
from harness.launch import endings
from harness.launch.attempt import Attempt, OnEvent
from harness.launch.logs import Log, print_to
from harness.results import Phase, Record


def measure(job: str, options: dict[str, Any], channel: connection.Connection) -> None:
    """What a child does: one measured fine-tuning."""
    from harness import worker  # the runner never imports torch; the fork server has

    worker.main(job, options, channel)


class LocalLauncher:
    """One process at a time. Use as a context manager: the fork server starts on entry.

    Args:
        child: what each process does with its job (JSON), its options and the connection that it answers on.
        preload: module that the fork server imports once.
    """

    def __init__(
        self,
        child: Callable[[str, dict[str, Any], connection.Connection], None] = measure,
        preload: str = "harness.launch.preload",
    ) -> None:
        self._child = child
        self._preload = preload
        self._context = multiprocessing.get_context("forkserver")
        self._running: set[Any] = set()
        """Processes."""
        self._starting = threading.Lock()

    def __enter__(self) -> LocalLauncher:
        # Asking for cards through NVML keeps CUDA untouched, without which no fork could use it.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as NVML counts them
        self._context.set_forkserver_preload([self._preload])
        forkserver.ensure_running()
        return self

    def __exit__(self, *error: object) -> None:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # no public way to end it before the process

    def run(self, attempt: Attempt, on_event: OnEvent) -> Record:
        """Run one job to its record, whatever kills it.

        Raises:
            KeyboardInterrupt: passed on from `on_event` or the terminal; the process is killed first.
        """
        started_at = dt.datetime.now(dt.UTC)
        vigil = _Vigil(attempt.timeout, attempt.stall)
        with Log(attempt.log) as output:
            record, code = self._watched(attempt, output, vigil, on_event)
        if record is not None:
            return record
        outcome = vigil.time_is_up() or endings.silent_end(code, vigil.kills, attempt.log)
        seconds = (dt.datetime.now(dt.UTC) - started_at).total_seconds()
        return Record.of(
            attempt.job,
            environment=environment.current(environment.resolve_device(attempt.job.spec.device)),
            phase=vigil.phase,
            started_at=started_at,
            metrics={"trial_seconds": seconds, "peak_process_bytes": vigil.held},
            **outcome,
        )

    def seats(self, count: int, device_type: str) -> list[environment.Seat]:
        """This machine divided among so many workers.

        Raises:
            InputError: it has no room for them.
        """
        return environment.seats(count, device_type)

    def stop(self) -> None:
        """End what is running now."""
        for process in [*self._running]:
            with contextlib.suppress(OSError):  # it has ended
                os.kill(process.pid, signal.SIGKILL)

    def _watched(
        self, attempt: Attempt, output: Log, vigil: _Vigil, on_event: OnEvent
    ) -> tuple[Record | None, int | None]:
        """The record that the worker left, or how it left without one."""
        ours, theirs = self._context.Pipe()
        arguments = (self._child, output.theirs, attempt.job.model_dump_json(), attempt.options, theirs)
        process = self._context.Process(target=_begin, args=arguments, daemon=True)
        try:
            with self._starting, main_module_hidden():
                process.start()
        except (EOFError, OSError):  # the server has died; the next trial starts another
            theirs.close()
            ours.close()
            return None, None
        self._running.add(process)
        vigil.begin(process.pid or 0)
        theirs.close()
        output.hand_over()
        try:
            for kind, value in _events(ours, process, vigil):
                if kind == "record":
                    return Record.model_validate(value), None
                vigil.hear(kind, value)
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


_LOOK_SECONDS = 0.25
"""How often a worker is looked at while it says nothing."""
_STEP: frozenset[Phase] = frozenset({"forward", "backward", "optimizer"})
_SERVER_LOST = 255
"""What multiprocessing takes for the exit code of a process whose fork server has died; it may live."""


class _Vigil:
    """Watches over a worker: where it is, what it holds, whether its time is up."""

    def __init__(self, timeout: float | None, stall: float | None) -> None:
        self.phase: Phase = "start"
        self.held: int | None = None
        self.kills = endings.oom_kills()
        self._timeout, self._stall = timeout, stall
        self._pid = 0
        self._began = self._heard = self._looked = math.inf

    def begin(self, pid: int) -> None:
        """The worker is there. Before the first one, its server imports everything; that is not its time."""
        self._pid = pid
        self._began = self._heard = self._looked = time.monotonic()

    def hear(self, kind: str, value: Any) -> None:
        """The worker has said something."""
        self._heard = time.monotonic()
        if kind == "phase":
            self.phase = value

    def look(self) -> None:
        """See what it holds, and how often the kernel has ended a process so far: what comes later may be this one."""
        if time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._looked = time.monotonic()
            self.held = endings.peak_process_bytes(self._pid) or self.held
            self.kills = endings.oom_kills()

    def time_is_up(self) -> dict[str, Any] | None:
        """What a record says of it; null where it is not."""
        now = time.monotonic()
        if self._timeout is not None and now - self._began >= self._timeout:
            return {"status": "timeout", "error_type": "Timeout", "error": f"stopped after {self._timeout:g} s"}
        if self._stall is not None and self.phase in _STEP and now - self._heard >= self._stall:
            said = f"stopped: it gave no sign of life for {self._stall:g} s within a step"
            return {"status": "timeout", "error_type": "Stall", "error": said}
        return None


def _begin(
    child: Callable[[str, dict[str, Any], connection.Connection], None],
    output: connection.Connection,
    job: str,
    options: dict[str, Any],
    channel: connection.Connection,
) -> None:
    print_to(output)
    child(job, options, channel)


def _events(channel: connection.Connection, process: Any, vigil: _Vigil) -> Iterator[tuple[str, Any]]:
    """What the worker says, until it ends or its time is up."""
    while vigil.time_is_up() is None:
        vigil.look()
        ready = connection.wait([channel, process.sentinel], _LOOK_SECONDS)
        # The pipe before the end: a worker may have said its last words and gone.
        if channel in ready:
            try:
                yield tuple(json.loads(channel.recv_bytes()))
            except (EOFError, OSError):
                process.join(5)
                return
        elif ready:
            process.join(5)
            return


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
    """A child would import the runner's main module again; it needs nothing from it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
