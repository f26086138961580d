"""A trial over several processes: starts them, hears each out, and makes one record of theirs."""

from __future__ import annotations

import contextlib
import datetime as dt
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any, NoReturn

from torch.multiprocessing.spawn import start_processes

from harness import distributed, environment, trial
from harness.metrics import METRICS
from harness.results import Job, Record

_GRACE_SECONDS = 5.0
"""For the others to leave by themselves, when one has failed: what holds them up is that one."""
_TELLING = ("oom", "diverged", "did_not_train", "failed", "ok")
"""Statuses of processes, that which says most of the trial first."""
_OF_THE_HEAVIEST = {"peak_memory_bytes", *(name for name in METRICS if name.startswith("memory_"))}
_MOST = {"peak_load_bytes", "peak_evaluate_bytes", "peak_reserved_bytes", "peak_process_bytes", "card_temperature",
         "throttled_share"}  # fmt: skip


def run(job: Job, begin: Callable[[], None], **options: Any) -> Record:
    """Execute a job in as many processes as its spec says. Where one dies without a word, so does this one, alike.

    Args:
        job: what to do.
        begin: called in each process first.
        options: of `trial.run`; only the first process tells.
    """
    count = job.spec.num_processes
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # a daemon may start none
    with tempfile.TemporaryDirectory() as folder:
        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(count)]
        arguments = (job, Path(folder) / "meeting", [theirs for _, theirs in pipes], begin, options)
        started = start_processes(_one, arguments, count, join=False, start_method="fork")
        for _, theirs in pipes:
            theirs.close()
        try:
            return _heard([ours for ours, _ in pipes], started.processes)
        finally:
            for process in started.processes:
                process.kill()
            for process in started.processes:
                process.join()


def _one(
    number: int,
    job: Job,
    meeting: Path,
    pipes: list[connection.Connection],
    begin: Callable[[], None],
    options: dict[str, Any],
) -> None:
    """What each process does."""
    for pipe in pipes[:number] + pipes[number + 1 :]:
        pipe.close()  # that another one's end is nobody's any more shall be seen
    begin()
    device_type = environment.resolve_device(job.spec.device)
    if number > 0:
        options = options | {"folder": None, "tell": lambda kind, value: None}
    started_at = dt.datetime.now(dt.UTC)
    try:
        distributed.join(device_type, number, job.spec.num_processes, meeting)
        record = trial.run(job, **options)
    except Exception as error:  # they have not met
        traceback.print_exc()
        said = {
            "status": "failed",
            "phase": "start",
            "error_type": type(error).__name__,
            "error": trial.one_line(error),
        }
        record = Record.of(job, environment=environment.current(device_type), started_at=started_at, **said)
    pipes[number].send_bytes(record.model_dump_json().encode())
    os._exit(0)  # an orderly end would wait for the others


def _heard(pipes: list[connection.Connection], processes: list[Any]) -> Record:
    """The record of all, or of the first that failed."""
    records: dict[int, Record] = {}
    until = float("inf")
    while len(records) < len(pipes) and time.monotonic() < until:
        left = [pipe for number, pipe in enumerate(pipes) if number not in records]
        for ready in connection.wait(left, min(_GRACE_SECONDS, max(0.0, until - time.monotonic()))):
            number = pipes.index(ready)  # type: ignore[arg-type]  # one of them
            try:
                records[number] = Record.model_validate_json(pipes[number].recv_bytes())
            except EOFError:  # what the others say then is that it has gone
                _die_like(processes[number])
            if records[number].status != "ok":
                until = min(until, time.monotonic() + _GRACE_SECONDS)
    # What is wrong with one makes the others fail, in words of their own.
    worst = min(records.values(), key=lambda record: _TELLING.index(record.status))
    return worst if worst.status != "ok" else _together([records[number] for number in range(len(pipes))])


def _die_like(process: Any) -> NoReturn:
    """Leave as a process has that left without a word: the runner knows what to make of it."""
    process.join()
    for other in multiprocessing.active_children():
        other.kill()
    code = process.exitcode or 0
    with contextlib.suppress(OSError):
        os.write(2, f"\nprocess {process.name} left with {code}\n".encode())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code or 1)


def _together(records: list[Record]) -> Record:
    """The first one's record, in which speeds are those of all already, with the memory of the heaviest process."""
    first = records[0]
    heaviest = max(records, key=lambda record: record.metrics.get("peak_memory_bytes") or 0)
    figures = dict(first.metrics)
    figures |= {name: heaviest.metrics[name] for name in _OF_THE_HEAVIEST if name in heaviest.metrics}
    for name in _MOST & figures.keys():
        figures[name] = max((r.metrics[name] for r in records if r.metrics.get(name) is not None), default=None)  # type: ignore[type-var]  # none is null
    joules = [r.metrics["joules_per_token"] for r in records if r.metrics.get("joules_per_token") is not None]
    if len(joules) == len(records):  # each of its own card, over everybody's tokens
        figures["joules_per_token"] = sum(joules)  # type: ignore[arg-type]  # none is null
    return first.model_copy(update={"metrics": figures})
