"""Signals that stop a run: the first Ctrl-C lets the running trial finish, the second stops it, as SIGTERM does."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

_AT_ONCE = (signal.SIGTERM, signal.SIGHUP)
"""A scheduler or a container kills what is left a few seconds after the first; a terminal has gone with the second."""


class Interrupt:
    """What the user has asked for so far."""

    def __init__(self) -> None:
        self.asked = False
        """Finish what is running, and start nothing."""
        self.at_once = False
        """Stop."""


@contextlib.contextmanager
def interrupts(on_first: Callable[[], None]) -> Iterator[Interrupt]:
    """Within, the first interrupt is remembered and the second raises `KeyboardInterrupt`.

    SIGTERM and SIGHUP are answered as before, with the interrupt told that it is at once; where nothing handles them
    they end the process, or are ignored, as ever.
    """
    interrupt = Interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            interrupt.at_once = True
            raise KeyboardInterrupt
        interrupt.asked = True
        on_first()

    def handle_at_once(number: int, frame: FrameType | None) -> None:
        interrupt.asked = interrupt.at_once = True
        former = formers[signal.Signals(number)]
        if callable(former):
            former(number, frame)

    formers = {number: signal.getsignal(number) for number in _AT_ONCE}
    handlers = {signal.SIGINT: handle} | {n: handle_at_once for n, former in formers.items() if callable(former)}
    replaced = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield interrupt
    finally:
        for number, former in replaced.items():
            signal.signal(number, former)
