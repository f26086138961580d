"""The log of a trial: what it prints, in a file of limited size, without secrets."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections import deque
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from harness._util.redact import redact
from harness._util.units import MIB

MOST_BYTES = MIB
"""Of a trial's log. Of a longer one the beginning and the end are kept, half of this each."""
_MOST_LINE = 2**16
"""A longer line is split."""
_LONGEST_SECRET = 2**12


class Log:
    """A file for a process's output, which arrives through a pipe that this process reads: the file is complete when
    the other process dies, and a full disk stops no trial. Use as a context manager.

    Args:
        file: replaced where it exists.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._ours, self.theirs = Pipe(duplex=False)
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Log:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.hand_over()
        self._thread.join(1.0)  # a process that the other one has started may hold the pipe open

    def hand_over(self) -> None:
        """Close the writing end here, once the other process has its own: the log ends with that process."""
        self.theirs.close()

    def _keep(self) -> None:
        with self._ours, contextlib.ExitStack() as stack:
            out: io.BufferedIOBase | None = None
            with contextlib.suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                out = stack.enter_context(self._file.open("wb", buffering=0))  # type: ignore[assignment]  # raw is enough
            for piece in _limited(_lines(self._ours.fileno())):
                if out is not None:
                    with contextlib.suppress(OSError):  # what does not fit is lost; the pipe is drained all the same
                        out.write(piece)


def _lines(pipe: int) -> Iterator[bytes]:
    """Whole lines as they come, until the other end is closed."""
    begun = b""
    while chunk := os.read(pipe, _MOST_LINE):
        whole, end, begun = (begun + chunk).rpartition(b"\n")
        if end:
            yield whole + end
        if len(begun) > _MOST_LINE:  # split without cutting a secret in two
            text = redact(begun.decode(errors="replace")).encode(errors="replace")
            yield text[:-_LONGEST_SECRET]
            begun = text[-_LONGEST_SECRET:]
    if begun:
        yield begun


def _limited(lines: Iterator[bytes]) -> Iterator[bytes]:
    """The first and the last lines, without secrets."""
    capacity = MOST_BYTES // 2
    tail: deque[bytes] = deque()
    held = left_out = 0
    for line in lines:
        text = redact(line.decode(errors="replace")).encode(errors="replace")
        if not tail and len(text) <= capacity:
            capacity -= len(text)
            yield text
            continue
        tail.append(text)
        held += len(text)
        while held > MOST_BYTES // 2:
            left_out += len(tail[0])
            held -= len(tail.popleft())
    if left_out:
        yield f"\n[{left_out} bytes left out]\n\n".encode()
    yield from tail


def print_to(pipe: Connection) -> None:
    """Redirect this process's output to a log."""
    for stream in (1, 2):
        os.dup2(pipe.fileno(), stream)
    pipe.close()
