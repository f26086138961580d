"""Trials in the runner's own process, one after another: for a debugger. What kills one kills the runner."""

from __future__ import annotations

import contextlib
from pathlib import Path

from harness.errors import InputError
from harness.launch.attempt import Attempt, OnEvent
from harness.private import withheld
from harness.results import Record


class InlineLauncher:
    """No process, no timeout, no log but of failures. Use as a context manager."""

    workers = 1

    def __enter__(self) -> InlineLauncher:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, attempt: Attempt, on_event: OnEvent) -> Record:
        """Run one job to its record, here and now.

        Raises:
            InputError: it asks for what only other processes give.
            KeyboardInterrupt: passed on from `on_event` or the terminal.
        """
        from harness import half_matmul, trial  # torch in this process is what is asked for

        job, options, log = attempt.job, attempt.options, attempt.log
        if job.spec.num_processes > 1:
            raise InputError(f"num_processes {job.spec.num_processes} takes processes of its own; use --engine local")
        log.parent.mkdir(parents=True, exist_ok=True)
        half_matmul.install()
        folder = Path(options["folder"]) if options.get("folder") else None
        with log.open("w") as file, contextlib.redirect_stderr(file):
            record = trial.run(job, folder=folder, trust_remote_code=options["trust_remote_code"], tell=on_event)
        log.write_text(withheld(log.read_text()))
        return record

    def stop(self) -> None:
        """Nothing runs beside the one that asks."""

    def seats(self, count: int, device_type: str) -> list[None]:
        """One.

        Raises:
            InputError: more are asked for.
        """
        if count > 1:
            raise InputError(f"--workers {count} takes processes of their own; use --engine local")
        return [None]
