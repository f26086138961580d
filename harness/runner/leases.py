"""Which runner runs which trial, where several share a results folder: a lease for each, renewed while it runs."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from harness._util.files import locked, write_whole
from harness._util.processes import ProcessIdentity

RENEW_SECONDS = 5.0
"""How often a lease is renewed."""
EXPIRES_SECONDS = 60.0
"""A lease that was not renewed for this long is free; that of a dead process of this machine is free at once."""


class _Holder(ProcessIdentity):
    """The runner that holds a lease."""

    runner: str
    """Random: one process may have several runners, one after another."""


class Leases:
    """The leases of one results folder, as one runner takes them.

    Args:
        folder: the grid's results.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "leases"
        self._me = _Holder(runner=uuid.uuid4().hex, **ProcessIdentity.current().model_dump())

    def take(self, trial_id: str) -> bool:
        """Hold the lease of a trial, unless another runner does.

        Raises:
            OSError: the folder cannot be written.
        """
        file = self._file(trial_id)
        with locked(self._folder):
            if self._is_held_by_another(file):
                return False
            write_whole(file, self._me.model_dump_json().encode())
            return True

    def stale(self) -> list[Path]:
        """Files of leases that no runner holds any more: their runners were killed."""
        return [file for file in sorted(self._folder.glob("*.json")) if not self._is_held_by_another(file)]

    def none_held(self) -> bool:
        """Whether no runner holds a lease."""
        return len(self.stale()) == len(list(self._folder.glob("*.json")))

    @contextlib.contextmanager
    def held(self, trial_id: str) -> Iterator[None]:
        """Renew a lease that was taken, and give it back at the end."""
        file, done = self._file(trial_id), threading.Event()

        def renew() -> None:
            while not done.wait(RENEW_SECONDS):
                with contextlib.suppress(OSError):  # a disk that is full or gone for a moment
                    os.utime(file)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)

    def _file(self, trial_id: str) -> Path:
        return self._folder / f"{trial_id}.json"

    def _is_held_by_another(self, file: Path) -> bool:
        try:
            holder = _Holder.model_validate_json(file.read_bytes())
            age = self._now() - file.stat().st_mtime
        except (OSError, ValidationError):
            return False
        if holder.runner == self._me.runner:
            return False
        alive = holder.is_alive()
        return age < EXPIRES_SECONDS if alive is None else alive

    def _now(self) -> float:
        """By the clock of the file system, which stamps the renewals of other machines too."""
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:
            return os.stat(file.name).st_mtime
