"""The fork server: a process that has imported torch and transformers once; trials are forked from it in a moment.

The one place that starts it and sets its environment. It belongs to multiprocessing, which has one per process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import types
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

PRELOAD = "harness.launch.preload"
"""Module that the server imports once."""


def start(preload: str = PRELOAD) -> ForkServerContext:
    """The server's context; it is started where it does not run yet.

    Args:
        preload: what it imports, where it is started here.
    """
    # Asking for cards through NVML keeps CUDA uninitialised; a process that has initialised it cannot fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order in which NVML counts cards
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    forkserver.ensure_running()
    return context


def stop() -> None:
    """Stop the server; processes that it has forked go on."""
    # Python 3.11 to 3.14: there is no public way to stop it before this process ends.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
    """Start processes within: a child would import the runner's main module again, and needs nothing from it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
