"""Trials in processes of their own on this machine, forked from a server that has imported everything once."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from harness import environment
from harness.results import Job, Phase, Record

OnEvent = Callable[[str, Any], None]


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

    def __enter__(self) -> LocalLauncher:
        # Asking for cards through NVML keeps CUDA untouched, without which no fork could use it.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._context.set_forkserver_preload([self._preload])
        forkserver.ensure_running()
        return self

    def __exit__(self, *error: object) -> None:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # no public way to end it before the process

    def run(self, job: Job, options: dict[str, Any], *, timeout: float | None, on_event: OnEvent) -> Record:
        """Run one job to its record, whatever kills it.

        Args:
            job: what to do.
            options: see `worker.main`.
            timeout: seconds after which the process is killed; null: none.
            on_event: told phases and steps as they happen.

        Raises:
            KeyboardInterrupt: passed on from `on_event` or the terminal; the process is killed first.
        """
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=self._child, args=(job.model_dump_json(), options, theirs), daemon=True)
        started_at, deadline = dt.datetime.now(dt.UTC), None if timeout is None else time.monotonic() + timeout
        with main_module_hidden():
            process.start()
        theirs.close()
        phase: Phase = "start"
        try:
            for kind, value in _events(ours, process, deadline):
                if kind == "record":
                    return Record.model_validate(value)
                if kind == "phase":
                    phase = value
                on_event(kind, value)
            return _silent_end(job, process, phase, started_at, timeout, Path(options["log"]))
        finally:
            process.kill()
            process.join()
            ours.close()


def _events(channel: connection.Connection, process: Any, deadline: float | None) -> Iterator[tuple[str, Any]]:
    """What the worker says, until it ends or its time is up."""
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = connection.wait([channel, process.sentinel], left)
        if not ready:
            return
        # The pipe before the end: a worker may have said its last words and gone.
        if channel in ready:
            try:
                yield tuple(json.loads(channel.recv_bytes()))
            except (EOFError, OSError):
                process.join(5)
                return
        else:
            return


def _silent_end(
    job: Job, process: Any, phase: Phase, started_at: dt.datetime, timeout: float | None, log: Path
) -> Record:
    """The record of a worker that did not leave one."""
    seconds = (dt.datetime.now(dt.UTC) - started_at).total_seconds()
    if timeout is not None and process.exitcode is None and seconds >= timeout:
        outcome = {"status": "timeout", "error_type": "Timeout", "error": f"stopped after {timeout:g} s"}
    else:
        process.join(5)
        code = process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            outcome = {"status": "killed", "error_type": name, "error": f"the worker was ended by {name}"}
        else:
            last = _last_line(log)
            outcome = {"status": "failed", "error_type": "WorkerExit", "error": f"the worker left with {code}: {last}"}
    device = environment.resolve_device(job.spec.device)
    return Record.of(
        job,
        environment=environment.current(device),
        phase=phase,
        started_at=started_at,
        metrics={"trial_seconds": seconds},
        **outcome,
    )


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1][:300] if lines else "it printed nothing"


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
    """A child would import the runner's main module again; it needs nothing from it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
