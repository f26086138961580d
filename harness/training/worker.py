"""Entry point of a worker process: a job in JSON comes in, progress and a record in JSON go out."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from harness import environment
from harness.environment import DeviceType, Environment, Placement
from harness.record import Job
from harness.training import half_matmul, processes, trial


def main(job: str, options: Mapping[str, Any], connection: Connection) -> None:
    """Run one job and send its record; ends at once if the runner dies.

    Args:
        job: a `Job` as JSON.
        options: `launch.launcher.WorkerOptions`.
        connection: receives `[kind, value]` in JSON: phases, steps, and the record last.
    """
    # The runner alone handles interrupts: it decides whether this trial is finished or stopped.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()  # a crash prints its stack

    def exit_with_runner() -> None:
        threading.Thread(target=_exit_at_eof, args=(connection,), daemon=True).start()

    exit_with_runner()
    parsed = Job.model_validate_json(job)
    device_type = environment.resolve_device(parsed.spec.device)
    half_matmul.install()

    def send(kind: str, value: Any) -> None:
        connection.send_bytes(json.dumps([kind, value]).encode())

    arguments: dict[str, Any] = {
        "environment": _place(options["placement"], device_type),
        "folder": Path(options["folder"]),
        "trust_remote_code": options["trust_remote_code"],
        "losses_before": options.get("losses_before", {}),
        "on_progress": send,
    }
    if parsed.spec.num_processes == 1:
        record = trial.run(parsed, **arguments)
    else:
        record = processes.run(parsed, exit_with_runner, **arguments)
    send("record", record.model_dump(mode="json"))
    # A regular exit would spend a second on what the kernel frees at once.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _place(fields: dict[str, Any] | None, device_type: DeviceType) -> Environment:
    """Apply a `Placement` to this process; returns its environment."""
    if fields is None:
        return environment.current(device_type)
    placement = Placement(**fields)
    placement.apply()
    torch.set_num_threads(placement.threads or len(placement.cores))
    return environment.current(device_type).placed(placement)


def _exit_at_eof(connection: Connection) -> None:
    """The runner never sends: end of file means that it is dead."""
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
