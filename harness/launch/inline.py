"""Trials in the runner's own process, one after another: for a debugger. What kills a trial kills the runner."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self, TextIO

from harness import environment
from harness._util.redact import redact
from harness.environment import DeviceType, Environment, Placement
from harness.errors import InputError
from harness.launch.launcher import Attempt, OnEvent
from harness.record import Record


class InlineLauncher:
    """Runs trials in the calling process: no timeout, and a log of errors alone."""

    workers = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def environments(self, device_type: DeviceType) -> tuple[Environment, ...]:
        """This process's."""
        return (environment.current(device_type),)

    def placements(self, device_type: DeviceType) -> Sequence[Placement | None]:
        """The whole machine."""
        return [None]

    def run(self, attempt: Attempt, on_event: OnEvent) -> Record:
        """Run one job to its record, here and now.

        Raises:
            InputError: the job needs further processes.
            KeyboardInterrupt: passed on from `on_event` or the terminal.
        """
        from harness.training import half_matmul, trial  # torch in this process is what is asked for

        job, options, log = attempt.job, attempt.options, attempt.log
        if job.spec.num_processes > 1:
            raise InputError(f"num_processes {job.spec.num_processes} takes processes of its own; use --engine local")
        log.parent.mkdir(parents=True, exist_ok=True)
        half_matmul.install()
        (here,) = self.environments(environment.resolve_device(job.spec.device))
        with log.open("w", encoding="utf-8", errors="replace") as file, _errors_to(file):
            record = trial.run(
                job,
                environment=here,
                folder=Path(options["folder"]),
                trust_remote_code=options["trust_remote_code"],
                losses_before=options.get("losses_before", {}),
                on_progress=on_event,
            )
        log.write_text(redact(log.read_text("utf-8", "replace")), encoding="utf-8")
        return record

    def stop(self) -> None:
        """Nothing runs besides the caller."""


@contextlib.contextmanager
def _errors_to(file: TextIO) -> Iterator[None]:
    """Within, what goes to stderr goes to a file: tracebacks, and the warnings of libraries in C++ too."""
    sys.stderr.flush()
    terminal = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        with contextlib.redirect_stderr(file):
            yield
    finally:
        file.flush()
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
