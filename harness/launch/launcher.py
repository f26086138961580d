"""The `Launcher` protocol, and what a launcher is given: one attempt at a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, Self, TypedDict

from harness.environment import DeviceType, Environment, Placement
from harness.record import Job, Record

OnEvent = Callable[[str, object], None]
"""Called with each `phase` (its name) and each `step` (done, total)."""


class WorkerOptions(TypedDict):
    """What a worker needs besides its job; plain JSON values, since it crosses processes and machines."""

    folder: str
    """Where adapters are kept."""
    trust_remote_code: bool
    """Let models from the hub run their own code."""
    placement: dict[str, Any] | None
    """Fields of the `Placement`; null: the whole machine."""
    losses_before: NotRequired[dict[str, dict[str, Any]]]
    """Recorded `LossesBefore` of the same untrained model, by the id of the environment that they were measured in."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a job."""

    job: Job
    """What to do."""
    options: WorkerOptions
    """How."""
    log: Path
    """File for what the trial prints."""
    timeout: float | None = None
    """Seconds after which it is stopped; null: none."""
    stall: float | None = None
    """Seconds without an event within a step after which it is stopped; null: none."""


class Launcher(Protocol):
    """Runs jobs, each to its record. A context manager: outside of it nothing runs."""

    @property
    def workers(self) -> int:
        """Most jobs at the same time."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def environments(self, device_type: DeviceType) -> tuple[Environment, ...]:
        """Environments that a trial on that device may run in; one, unless machines of a cluster differ."""
        ...

    def placements(self, device_type: DeviceType) -> Sequence[Placement | None]:
        """What each worker may use of this machine; null: all of it, or a part of another machine.

        Raises:
            InputError: there are more workers than this machine has capacity for.
        """
        ...

    def run(self, attempt: Attempt, on_event: OnEvent) -> Record:
        """Run one job to its record, whatever becomes of it. Called from several threads at once.

        Raises:
            KeyboardInterrupt: passed on from `on_event` or the terminal; the job is stopped first.
        """
        ...

    def stop(self) -> None:
        """Stop every job that is running."""
        ...
