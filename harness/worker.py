"""The child's front door: a job comes in as JSON, progress and a record go out as JSON."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from harness import environment, half_matmul, ranks, trial
from harness.results import Job


def main(job: str, options: dict[str, Any], connection: Connection) -> None:
    """Run one job and send what becomes of it. Leaves with the runner, should that die first.

    Args:
        job: a `Job` as JSON.
        options: `folder` for adapters, `trust_remote_code`; `seat`, fields of an `environment.Seat`, where others are
            at work beside.
        connection: gets `[kind, value]` in JSON: phases, steps, and the record last.
    """
    # An interrupt is for the runner: it decides whether this trial is finished or stopped.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()  # a crash says where

    def watch() -> None:
        threading.Thread(target=_leave_with, args=(connection,), daemon=True).start()

    watch()
    if options.get("seat") is not None:
        seat = environment.Seat(**options["seat"])
        seat.take()
        torch.set_num_threads(seat.threads or len(seat.cores))
    half_matmul.install()

    def tell(kind: str, value: Any) -> None:
        connection.send_bytes(json.dumps([kind, value]).encode())

    folder = Path(options["folder"]) if options.get("folder") else None
    asked = Job.model_validate_json(job)
    how: dict[str, Any] = {"folder": folder, "trust_remote_code": options["trust_remote_code"], "tell": tell}
    record = trial.run(asked, **how) if asked.spec.num_processes == 1 else ranks.run(asked, watch, **how)
    tell("record", record.model_dump(mode="json"))
    # Everything is said. An orderly end would spend a second on tearing down what the kernel frees at once.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _leave_with(connection: Connection) -> None:
    """The runner never sends; the end of its side means that it is gone, and nobody wants this trial."""
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
