"""How a worker ended that left no record, and what of it is worth another try."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

from harness.results import Record

WORKER_LOST = "WorkerExit"
"""Kind of error of a worker that left without a word."""
_FROM_OUTSIDE = {"SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGXCPU"}
"""A program that crashes gets others, and gets them again."""


def is_transient(record: Record, *, timeouts: bool) -> bool:
    """Whether another try may well end otherwise.

    Args:
        record: of the trial.
        timeouts: whether the same is believed of one that took too long.
    """
    if record.status == "timeout":
        return timeouts
    return (record.status == "killed" and record.error_type in _FROM_OUTSIDE) or record.error_type == WORKER_LOST


def oom_kills() -> tuple[int, ...]:
    """How often the kernel has ended a process for want of memory: in the control group, and on the machine, as far as
    either is readable.
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
    """Most that a living process has held in memory; null where the system does not say."""
    match = re.search(r"^VmHWM:\s+(\d+) kB$", _text(Path(f"/proc/{pid}/status")), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def silent_end(code: int | None, kills_before: tuple[int, ...], log: Path) -> dict[str, Any]:
    """Fields of a record: what a worker died of.

    Args:
        code: how it left; below zero: the signal; null: it never began.
        kills_before: `oom_kills` when it was last seen alive.
        log: what it printed.
    """
    if code is None:
        return {
            "status": "failed",
            "error_type": WORKER_LOST,
            "error": "the server that workers are forked from was lost",
        }
    if code >= 0:
        error = f"the worker left with {code}: {_last_line(log)}"
        return {"status": "failed", "error_type": WORKER_LOST, "error": error}
    name = signal.Signals(-code).name
    if name == "SIGKILL" and any(now > then for now, then in zip(oom_kills(), kills_before, strict=True)):
        error = "the machine ran out of memory, and the kernel ended the worker"
        return {"status": "oom", "error_type": "HostOutOfMemory", "error": error}
    return {"status": "killed", "error_type": name, "error": f"the worker was ended by {name}"}


def _last_line(log: Path) -> str:
    lines = _text(log).strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
