"""Files that are whole, old or new, whenever they are read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock


def write_whole(file: Path, content: bytes) -> None:
    """Write aside, flush to the disk and rename; the folder is made where it is missing.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # A leading dot and another ending keep whoever reads the folder away from what is being written.
    aside = file.with_name(f".{file.name}.{os.getpid()}.aside")
    try:
        with aside.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, file)
        _flush_names(file.parent)
    finally:
        aside.unlink(missing_ok=True)


def _flush_names(folder: Path) -> None:
    """A name is on the disk when its folder is."""
    names = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(names)
    finally:
        os.close(names)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, nobody else who asks is in that folder; it is made where it is missing. The kernel lets others in when
    the process dies.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield
