"""A trial over several processes: spawns the ranks, collects their records and combines them into one."""

from __future__ import annotations

import contextlib
import datetime as dt
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NoReturn

from torch.multiprocessing.spawn import start_processes

from harness.metrics import METRICS
from harness.record import Job, Record
from harness.training import distributed, trial

_GRACE_SECONDS = 5.0
"""For the other ranks to end by themselves, once one has failed."""
_BY_PRECEDENCE = ("oom", "diverged", "did_not_train", "failed", "ok")
"""Statuses of ranks; the first of those that occur is the trial's."""


def run(job: Job, on_start: Callable[[], None], **options: Any) -> Record:
    """Execute a job in `num_processes` processes. If a rank dies without a record, this process ends the same way.

    Args:
        job: what to do.
        on_start: called first in each process.
        options: of `trial.run`; rank 0 alone reports progress and saves.
    """
    world_size = job.spec.num_processes
    # Private API of multiprocessing (Python 3.11): a daemonic process may not start others, and workers are daemonic. A
    # public way to allow it would replace this.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(world_size)]
        arguments = (job, Path(folder) / "rendezvous", [sender for _, sender in pipes], on_start, options)
        context = start_processes(_run_rank, arguments, world_size, join=False, start_method="fork")
        for _, sender in pipes:
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes], context.processes)
        finally:
            for process in context.processes:
                process.kill()
            for process in context.processes:
                process.join()


def _run_rank(
    rank: int,
    job: Job,
    store: Path,
    senders: list[connection.Connection],
    on_start: Callable[[], None],
    options: dict[str, Any],
) -> None:
    """One rank: its record goes to its sender."""
    for sender in senders[:rank] + senders[rank + 1 :]:
        sender.close()  # a receiver sees the end of file once nobody else holds the sender
    on_start()
    environment = options["environment"]
    if rank > 0:
        options = options | {"folder": None, "on_progress": lambda kind, value: None}
    started_at = dt.datetime.now(dt.UTC)
    try:
        distributed.init_process_group(environment.device_type, rank, job.spec.num_processes, store)
        record = trial.run(job, **options)
    except Exception as error:  # the rendezvous failed
        traceback.print_exc()
        failure = {"phase": "start", "error_type": type(error).__name__, "error": trial.one_line(error)}
        record = Record.of(job, environment=environment, status="failed", started_at=started_at, **failure)
    senders[rank].send_bytes(record.model_dump_json().encode())
    os._exit(0)  # destroying the process group would wait for the other ranks


def _collect(receivers: list[connection.Connection], processes: list[Any]) -> Record:
    """The combined record, or that of the rank whose failure made the others fail."""
    records: dict[int, Record] = {}
    deadline = float("inf")
    while len(records) < len(receivers) and time.monotonic() < deadline:
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in records]
        for ready in connection.wait(waiting, min(_GRACE_SECONDS, max(0.0, deadline - time.monotonic()))):
            rank = receivers.index(ready)  # type: ignore[arg-type]  # one of them
            try:
                records[rank] = Record.model_validate_json(receivers[rank].recv_bytes())
            except EOFError:
                _die_like(processes[rank])
            if records[rank].status != "ok":
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    worst = min(records.values(), key=lambda record: _BY_PRECEDENCE.index(record.status))
    return worst if worst.status != "ok" else combine([records[rank] for rank in range(len(receivers))])


def _die_like(process: Any) -> NoReturn:
    """End this process as a rank ended: by the same signal or exit code, which the runner classifies."""
    process.join()
    for other in multiprocessing.active_children():
        other.kill()
    code = process.exitcode or 0
    with contextlib.suppress(OSError):
        os.write(2, f"\nprocess {process.name} ended with exit code {code}\n".encode())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code or 1)


def combine(records: Sequence[Record]) -> Record:
    """The first rank's record, with each figure as its metric combines those of several processes."""
    first = records[0]
    metrics = {name: _combined(name, records) for name in first.metrics}
    return first.model_copy(update={"metrics": metrics})


def _combined(name: str, records: Sequence[Record]) -> float | int | None:
    figures = [record.metrics.get(name) for record in records]
    known = [figure for figure in figures if figure is not None]
    match METRICS[name].across_processes:
        case "heaviest":
            peaks = [record.metrics.get("peak_memory_bytes") or 0 for record in records]
            return figures[peaks.index(max(peaks))]
        case "highest":
            return max(known, default=None)
        case "sum" if len(known) == len(records):
            return sum(known)
    return figures[0]
