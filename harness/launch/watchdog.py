"""Watches a worker from outside: its phase, its memory, and whether its time is up."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import cast

from harness.launch import exit_status
from harness.launch.exit_status import Outcome
from harness.record import Phase

LOOK_SECONDS = 0.25
"""How often a worker without events is looked at."""
_DYING_SECONDS = 5.0
"""How long a worker that the kernel has ended may still look alive: it gives its memory back first."""
_STEP_PHASES: frozenset[Phase] = frozenset({"forward", "backward", "optimizer"})


class Watchdog:
    """What is known of a worker from outside.

    Args:
        timeout: seconds that it may take; null: any.
        stall: seconds without an event within a step; null: any.
    """

    def __init__(self, timeout: float | None, stall: float | None) -> None:
        self.phase: Phase = "start"
        self.peak_process_bytes: int | None = None
        self._oom_kills = deque([(-math.inf, exit_status.oom_kills())])
        self._timeout, self._stall = timeout, stall
        self._pid = 0
        self._began = self._last_event = self._last_look = math.inf

    def begin(self, pid: int) -> None:
        """The worker has started. Before the first one the fork server imports everything; that does not count."""
        self._pid = pid
        self._began = self._last_event = self._last_look = time.monotonic()

    def record_event(self, kind: str, value: object) -> None:
        """The worker has reported something."""
        self._last_event = time.monotonic()
        if kind == "phase":
            self.phase = cast(Phase, value)

    def look(self) -> None:
        """Read its memory and the kernel's count of killed processes: a later kill may be this worker's."""
        now = time.monotonic()
        if now - self._last_look >= LOOK_SECONDS:
            self._last_look = now
            self.peak_process_bytes = exit_status.peak_process_bytes(self._pid) or self.peak_process_bytes
            self._oom_kills.append((now, exit_status.oom_kills()))
            while self._oom_kills[1][0] <= now - _DYING_SECONDS:
                self._oom_kills.popleft()

    @property
    def oom_kills_before(self) -> tuple[int, ...]:
        """By the kernel, when the worker was certainly alive: some seconds before it was last looked at."""
        return self._oom_kills[0][1]

    def expired(self) -> Outcome | None:
        """The outcome, where its time is up."""
        now = time.monotonic()
        if self._timeout is not None and now - self._began >= self._timeout:
            return Outcome("timeout", "Timeout", f"stopped after {self._timeout:g} s")
        if self._stall is not None and self.phase in _STEP_PHASES and now - self._last_event >= self._stall:
            return Outcome("timeout", "Stall", f"stopped: it gave no sign of life for {self._stall:g} s within a step")
        return None
