"""What a launcher is asked for: one attempt at a job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.results import Job

OnEvent = Callable[[str, Any], None]
"""Told phases and steps as they happen, by kind and value."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a job."""

    job: Job
    """What to do."""
    options: dict[str, Any]
    """See `worker.main`."""
    log: Path
    """File for what it prints."""
    timeout: float | None = None
    """Seconds after which it is stopped; null: none."""
    stall: float | None = None
    """The same within a step, from one sign of life to the next."""
