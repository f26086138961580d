"""Processes of this machine and of others: which one wrote something, and whether it is alive."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

_CLOCK_TOLERANCE = 1.0
"""Seconds between two readings of one process's start."""


class ProcessIdentity(BaseModel):
    """Identity of a process among all machines and over reboots and reused process ids."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str
    """See `host_id`."""
    pid: int
    started: float
    """Seconds since the boot, which no change of the clock moves: process ids are used again."""

    @classmethod
    def current(cls) -> ProcessIdentity:
        """This process."""
        return cls(host=host_id(), pid=os.getpid(), started=_started(os.getpid()))

    def is_alive(self) -> bool | None:
        """Whether the process runs; null for one of another machine."""
        if self.host not in (host_id(), socket.gethostname()):
            return None
        try:
            return abs(_started(self.pid) - self.started) < _CLOCK_TOLERANCE
        except psutil.Error:
            return False


def _started(pid: int) -> float:
    """Seconds since the boot, of which psutil has the sum with the moment of the boot, by the clock of now."""
    return psutil.Process(pid).create_time() - psutil.boot_time()


def host_id() -> str:
    """This machine since it was booted, and the name space in which its process ids are valid."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    booted = boot.read_text().strip() if boot.exists() else ""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {booted} {os.readlink(namespace) if namespace.is_symlink() else ''}".strip()
