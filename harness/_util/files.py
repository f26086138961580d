"""Atomic writes of files and folders, and locks of folders."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock

_OLD_SECONDS = 3600.0


def write_whole(file: Path, content: bytes) -> None:
    """Write a file aside, flush it to the disk and rename it into place. Missing folders are made.

    Raises:
        OSError: it cannot be written; the earlier file is kept.
    """
    write_all_whole({file: content})


def write_all_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files as `write_whole` does, but rename them when all are on the disk: where it is full, none is replaced.

    Args:
        contents: by file, in the order in which they are renamed.

    Raises:
        OSError: one cannot be written, which it names; the earlier files are kept.
    """
    # A leading dot and another ending: readers of the folder skip it.
    asides = {file: file.with_name(f".{file.name}.{os.getpid()}.aside") for file in contents}
    try:
        for file, content in contents.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            _write_flushed(asides[file], content, meant_for=file)
        for file, aside in asides.items():
            os.replace(aside, file)
        for folder in {file.parent for file in contents}:
            _flush_names(folder)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


def _write_flushed(aside: Path, content: bytes, *, meant_for: Path) -> None:
    try:
        with aside.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:  # of a full disk Python (3.11) does not say which file it was
        raise OSError(error.errno, error.strerror, str(meant_for)) from None


@contextlib.contextmanager
def folder_aside(parent: Path, name: str | Callable[[Path], str], *, exist_ok: bool = False) -> Iterator[Path]:
    """A path to make a folder at, which is then renamed into place; whatever happens, nothing is left aside.

    Args:
        parent: where the folder goes; made where it is missing.
        name: its name there, or a function that names it once it is filled.
        exist_ok: a folder of that name has the same content, and stays.

    Raises:
        OSError: the folder is missing or cannot be renamed.
    """
    parent.mkdir(parents=True, exist_ok=True)
    aside = parent / f".{name if isinstance(name, str) else 'unnamed'}.{uuid.uuid4().hex[:8]}.aside"
    try:
        yield aside
        target = parent / (name if isinstance(name, str) else name(aside))
        if not (exist_ok and target.is_dir()):
            os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_unfinished(parent: Path, name: str) -> None:
    """Remove what processes that were killed have left of a folder from `folder_aside`, and nothing that one fills."""
    aside = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.aside")
    for entry in parent.iterdir() if parent.is_dir() else ():
        if aside.fullmatch(entry.name) and is_old(entry):
            shutil.rmtree(entry, ignore_errors=True)


def is_old(entry: Path) -> bool:
    """Whether no process can be writing it any more: its names last changed more than an hour ago."""
    try:
        return time.time() - entry.stat().st_mtime > _OLD_SECONDS
    except FileNotFoundError:
        return False


def _flush_names(folder: Path) -> None:
    """Flush a folder: a renamed file is on the disk when its folder is."""
    names = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(names)
    finally:
        os.close(names)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing. The kernel frees it when the process dies.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield
