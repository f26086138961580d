"""Ctrl-C: the first lets the running trial finish, the second stops it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


class Interrupt:
    """What the user has asked for with Ctrl-C so far."""

    def __init__(self) -> None:
        self.asked = False
        """Once: finish what is running, and start nothing."""
        self.at_once = False
        """Twice: stop."""


@contextlib.contextmanager
def interrupts(on_first: Callable[[], None]) -> Iterator[Interrupt]:
    """Within, the first interrupt is remembered and the second raises `KeyboardInterrupt`."""
    interrupt = Interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            interrupt.at_once = True
            raise KeyboardInterrupt
        interrupt.asked = True
        on_first()

    former = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, former)
