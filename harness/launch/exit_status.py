"""How a worker ended that left no record, and which ends are worth another attempt."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import NamedTuple

from harness.record import Record, Status

WORKER_LOST = "WorkerExit"
"""Error type of a worker that ended without a record."""
_SIGNALS_FROM_OUTSIDE = {"SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGXCPU"}
"""A program that crashes ends by others, and would again."""


class Outcome(NamedTuple):
    """Fields of a record that say how a trial ended."""

    status: Status
    error_type: str
    error: str


def is_transient(record: Record, *, timeouts: bool) -> bool:
    """Whether another attempt may end differently.

    Args:
        record: of the trial.
        timeouts: whether one that took too long counts.
    """
    if record.status == "timeout":
        return timeouts
    killed = record.status == "killed" and record.error_type in _SIGNALS_FROM_OUTSIDE
    return killed or record.error_type == WORKER_LOST


def oom_kills() -> tuple[int, ...]:
    """How many processes the kernel has killed because memory ran out: in the control group, and on the machine, as far
    as either is readable.
    """
    groups = [line.split(":", 2) for line in _text(Path("/proc/self/cgroup")).splitlines()]
    files = [Path("/proc/vmstat")]
    for _, controllers, path in groups:
        if controllers == "":
            files.append(Path(f"/sys/fs/cgroup{path}/memory.events"))
        elif controllers == "memory":
            files.append(Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control"))
    # A container sees its own group as the root.
    files += [Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control")]
    return tuple(int(match.group(1)) if (match := _OOM_KILL.search(_text(file))) else 0 for file in files)


_OOM_KILL = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def peak_process_bytes(pid: int) -> int | None:
    """Peak resident memory of a living process; null where the system does not say."""
    match = re.search(r"^VmHWM:\s+(\d+) kB$", _text(Path(f"/proc/{pid}/status")), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def classify_exit(code: int | None, kills_before: tuple[int, ...], log: Path) -> Outcome:
    """What a worker without a record died of.

    Args:
        code: its exit code; below zero: the signal; null: it never began.
        kills_before: `oom_kills` when it was certainly alive.
        log: what it printed.
    """
    if code is None:
        return Outcome("failed", WORKER_LOST, "the server that workers are forked from was lost")
    if code >= 0:
        return Outcome("failed", WORKER_LOST, f"the worker exited with code {code}: {_last_line(log)}")
    name = signal.Signals(-code).name
    if name == "SIGKILL" and any(now > then for now, then in zip(oom_kills(), kills_before, strict=True)):
        return Outcome("oom", "HostOutOfMemory", "the machine ran out of memory, and the kernel ended the worker")
    return Outcome("killed", name, f"the worker was ended by {name}")


def _last_line(log: Path) -> str:
    lines = _text(log).strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
