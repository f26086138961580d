"""The fork server: a process that has imported torch and transformers once; trials are forked from it in a moment.

The one place that starts it and sets its environment. It belongs to multiprocessing, which has one per process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import types
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import ForkServerContext
from typing import Any

from harness.errors import InputError
from harness.sources import home

PRELOAD = "harness.launch.preload"
"""Module that the server imports once."""
_QUIET = "harness.launch.quiet"

_MOST_SOCKET_BYTES = 107
"""Longest path of a Unix socket in Linux."""
_SOCKET_NAME = "/pymp-12345678/listener-12345678"
"""How multiprocessing names a socket below the folder for temporary files."""
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - each folder made there is new, and its owner's alone


def start(preload: str = PRELOAD) -> ForkServerContext:
    """The server's context; it is started where it does not run yet.

    Args:
        preload: what it imports, where it is started here.

    Raises:
        InputError: no folder that can be written has a path short enough for its socket.
    """
    # Asking for cards through NVML keeps CUDA uninitialised; a process that has initialised it cannot fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order in which NVML counts cards
    home.name_folders_for_libraries()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_QUIET, preload])
    _shorten_socket_paths()
    resource_tracker.ensure_running()  # the server would start it, and that lets interrupts through again
    with _interrupts_blocked():
        forkserver.ensure_running()
    return context


def _shorten_socket_paths() -> None:
    """Have multiprocessing keep its sockets in another folder where their paths would be too long (`TMPDIR`)."""
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual + _SOCKET_NAME)) <= _MOST_SOCKET_BYTES:
        return
    for folder in _SHORT_FOLDERS:
        tempfile.tempdir = folder
        try:
            util.get_temp_dir()  # made once, and removed when this process ends
            return
        except OSError:
            continue
        finally:
            tempfile.tempdir = usual
    raise InputError(
        f"TMPDIR {usual} is too long for sockets, and none of {', '.join(_SHORT_FOLDERS)} can be written; "
        f"set TMPDIR to a folder with at most {_MOST_SOCKET_BYTES - len(_SOCKET_NAME)} bytes in its path"
    )


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started within never receive an interrupt, from their first moment on: it is for the runner alone."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def stop() -> None:
    """Stop the server at once, though it may still be importing; processes that it has forked go on."""
    # Python 3.11 to 3.14: there is no public way to stop it before this process ends.
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
    """Start processes within: a child would import the runner's main module again, and needs nothing from it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
