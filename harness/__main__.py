"""Entry point of `harness` and `python -m harness`: a signal to stop ends with one line, from the first moment on."""

from __future__ import annotations

import gc
import signal
import sys

TYPE_CHECKING = False  # typing would be imported before an interrupt can be handled
if TYPE_CHECKING:
    from types import FrameType

_INTERRUPTED = 130
_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; what a scheduler, a container or a shutdown sends first; a terminal that is closed."""
_IMPORT, _TEXT = "<frozen importlib._bootstrap>", "<string>"
"""Names of code that imports, and of code that was given as text."""
_LOOK_AGAIN_SECONDS = 0.02
_asked_by: int = signal.SIGINT
"""The last signal that asked to stop."""


def main() -> None:
    """Run the command that the arguments name."""
    code: int | str | None = 0
    gc.set_threshold(50_000, 20, 50)  # a report makes millions of cells and no circles, which are looked for in vain
    try:
        for number in (*_TO_STOP, signal.SIGALRM):
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, _on_interrupt)
        sys.unraisablehook = _on_unraisable
        from harness.cli.app import main as command

        command()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except SystemExit as end:  # typer ends an interrupted command with the same code
        code = end.code
    for number in (*_TO_STOP, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)  # what is left takes a moment, and has nothing more to lose
    if code == _INTERRUPTED:
        import contextlib

        with contextlib.suppress(OSError):  # of a terminal that was closed
            sys.stderr.write("harness: stopped; what was finished is kept, and the same command goes on from there\n")
        code = 128 + _asked_by
    sys.exit(code)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt`, whichever signal asks to stop, but not where it goes wrong.

    Libraries that are being imported lose it, or answer it with errors of their own; after one within a text that is
    evaluated, Python ends by the signal, whatever handles it.
    """
    global _asked_by
    if number != signal.SIGALRM:
        _asked_by = number
    while frame is not None and frame.f_code is not main.__code__:
        if frame.f_code.co_filename in (_IMPORT, _TEXT):
            _interrupt_soon()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _on_unraisable(what: sys.UnraisableHookArgs) -> None:
    """An interrupt that came where nothing can be raised, as in a finaliser, comes again."""
    if what.exc_type is KeyboardInterrupt:
        _interrupt_soon()
    else:
        sys.__unraisablehook__(what)


def _interrupt_soon() -> None:
    signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN_SECONDS)


if __name__ == "__main__":
    main()
