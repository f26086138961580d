"""Who runs which trial, where several runners share a results folder: a lease for each, kept fresh while it runs."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from harness.files import locked, write_whole

BEAT_SECONDS = 5.0
"""How often a lease is made fresh."""
EXPIRES_SECONDS = 60.0
"""A lease that was not made fresh for so long is nobody's; on the holder's own machine a dead holder's is at once."""


class _Holder(BaseModel):
    """Who holds a lease."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runner: str
    host: str
    pid: int
    started: float
    """Of the process, since process ids come round again."""


class Leases:
    """The leases of one results folder, as one runner takes them.

    Args:
        folder: the grid's results.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "leases"
        self._me = _Holder(
            runner=uuid.uuid4().hex,
            host=_here(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
        )

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
        """Files of leases that nobody holds any more: what killed runners left."""
        return [file for file in sorted(self._folder.glob("*.json")) if not self._is_held_by_another(file)]

    def nobody_works(self) -> bool:
        """Whether no runner holds any lease."""
        return len(self.stale()) == len(list(self._folder.glob("*.json")))

    @contextlib.contextmanager
    def held(self, trial_id: str) -> Iterator[None]:
        """Keep a lease that was taken fresh within, and give it back at the end."""
        file, done = self._file(trial_id), threading.Event()

        def beat() -> None:
            while not done.wait(BEAT_SECONDS):
                with contextlib.suppress(OSError):  # a disk that is full or gone for a moment
                    os.utime(file)

        thread = threading.Thread(target=beat, daemon=True)
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
        if holder.host == self._me.host:
            return _lives(holder)
        return age < EXPIRES_SECONDS

    def _now(self) -> float:
        """By the clock of the file system, which other machines' beats are stamped by too."""
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:
            return os.stat(file.name).st_mtime


def _here() -> str:
    """This machine since it was started, and the name space in which its process ids mean something."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    known = boot.read_text().strip() if boot.exists() else ""
    spaces = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {known} {os.readlink(spaces) if spaces.is_symlink() else ''}".strip()


def _lives(holder: _Holder) -> bool:
    try:
        return abs(psutil.Process(holder.pid).create_time() - holder.started) < 1.0
    except psutil.Error:
        return False
