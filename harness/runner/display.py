"""The protocol of progress displays."""

from __future__ import annotations

from typing import Protocol

from harness.record import Job, Record


class Display(Protocol):
    """Shows a run as it proceeds."""

    def begin(self, total: int, skipped: int, visits: int = 0, visit_seconds: float = 0.0) -> None:
        """The run starts: `total` trials to run, `skipped` recorded before, and so many timing visits, each of which
        times for `visit_seconds`.
        """

    def trial(self, number: int, job: Job) -> None:
        """A trial or a visit starts."""

    def event(self, kind: str, value: object) -> None:
        """The running trial reports a phase or a step."""

    def retried(self, record: Record) -> None:
        """An attempt failed, and another one follows."""

    def finished(self, record: Record) -> None:
        """A trial or a visit ended."""

    def interrupted(self) -> None:
        """The user asked to stop; the running trial is finished first."""

    def waiting(self, count: int) -> None:
        """All that is left is `count` trials that other runners are running."""

    def child_display(self) -> Display:
        """A display for a trial that runs at the same time; its methods are called from another thread."""
        ...
