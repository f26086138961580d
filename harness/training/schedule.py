"""Which of its steps a timing visit takes next, and when it has enough."""

from __future__ import annotations

from collections.abc import Iterator

_MOST_DISTURBED = 3.0
"""Disturbed steps may take so many times the seconds that a visit asks for, and as long as its rounds, in all."""


class VisitSchedule:
    """Rounds over a visit's steps. A disturbed step is taken again; rounds go on until the undisturbed steps took long
    enough, or the disturbed ones too long.

    Args:
        steps: different steps of a round.
        seconds: least seconds of undisturbed steps.
    """

    def __init__(self, steps: int, seconds: float) -> None:
        self._steps, self._least = steps, seconds
        self._pending = list(range(steps))
        self._quiet = self._disturbed = 0.0
        self._disturbed_steps = 0

    def __iter__(self) -> Iterator[int]:
        while not self.is_complete and not self._is_hopeless():
            yield self._pending[0]

    def record(self, step: int, seconds: float, *, disturbed: bool) -> None:
        """How long a step took."""
        self._pending.remove(step)
        if disturbed:
            self._disturbed += seconds
            self._disturbed_steps += 1
            self._pending.append(step)
        else:
            self._quiet += seconds
        if not self._pending and self._quiet < self._least:
            self._pending = list(range(self._steps))

    @property
    def is_complete(self) -> bool:
        """Whether each step was undisturbed equally often, and all of them together for long enough."""
        return not self._pending

    def _is_hopeless(self) -> bool:
        return self._disturbed > _MOST_DISTURBED * self._least and self._disturbed_steps >= 2 * self._steps
