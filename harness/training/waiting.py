"""How long this process waited while the machine worked for others: the kernel's own counters."""

from __future__ import annotations

import os
from pathlib import Path

_LEAST_SECONDS = 0.002
"""Waiting that counts for nothing: a switch between threads takes as long."""
_LEAST_SHARE = 0.1
"""Fraction of a step's seconds, summed over threads, that counts for nothing: threads that hand work to each other wait
for 1 to 2 % on a quiet virtual machine, for 3 to 7 % on one whose kernel reclaims memory and whose host takes 1 %, and
for a third or more next to a process that keeps one of two cores busy."""
_THREADS = Path("/proc/self/task")
_STAT = Path("/proc/stat")


class Waiting:
    """Seconds that this process waited, in steps.

    Run delay: how long each of its threads was ready to run and had no processor (Linux, `schedstat`). Steal: how long
    the virtual machine was ready to run on these processors and the host ran others (`/proc/stat`, in ticks of 10 ms).
    """

    def __init__(self) -> None:
        self._delays = _run_delays()
        self._steal = _steal()

    def since_last(self) -> float | None:
        """Seconds waited since the last call, over all threads; null where the kernel does not say."""
        before, self._delays = self._delays, _run_delays()
        stolen, self._steal = self._steal, _steal()
        if self._delays is None or before is None:
            return None
        waited = sum(delay - before.get(thread, 0) for thread, delay in self._delays.items())
        return max(0.0, waited / 1e9 + (self._steal - stolen) / os.sysconf("SC_CLK_TCK"))


def is_disturbed(waited: float | None, seconds: float) -> bool:
    """Whether a step of so many seconds waited too long to count. Unknown waiting is none."""
    return waited is not None and waited > max(_LEAST_SECONDS, _LEAST_SHARE * seconds)


def _run_delays() -> dict[str, int] | None:
    """Nanoseconds by thread."""
    delays = {}
    try:
        for thread in os.listdir(_THREADS):
            try:
                delays[thread] = int((_THREADS / thread / "schedstat").read_bytes().split()[1])
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                continue
    except (OSError, IndexError, ValueError):
        return None
    return delays or None


def _steal() -> int:
    """Ticks of the processors that this process may run on; 0 where the kernel does not say."""
    try:
        own = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        rows = [line.split() for line in _STAT.read_text().splitlines() if line.startswith("cpu")]
        return sum(int(row[8]) for row in rows if row[0] in own)
    except (OSError, IndexError, ValueError, AttributeError):
        return 0
