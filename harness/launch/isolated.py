"""One piece of work in a process of its own: what it takes goes with it, and what kills it kills nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from harness.errors import InputError
from harness.launch.local import main_module_hidden


def context() -> Any:
    """Processes that are forked from a server which has imported everything once."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["harness.launch.preload"])
    forkserver.ensure_running()
    return found


def isolated(work: Callable[..., Any], *arguments: Any, hear: Callable[[Any], None] | None = None) -> Any:
    """What `work` returns.

    Args:
        work: a function of a module, which imports torch within itself.
        arguments: that can be pickled, as its result.
        hear: called with what `work` says as it goes; it is given a last argument then, to say it with.

    Raises:
        InputError: it refused, or did not come back.
    """
    made = context()
    ours, theirs = made.Pipe(duplex=False)
    process = made.Process(target=_answer, args=(theirs, work, arguments, hear is not None), daemon=True)
    with main_module_hidden():
        process.start()
    theirs.close()
    try:
        kind, said = ours.recv()
        while kind == "said":
            if hear is not None:
                hear(said)
            kind, said = ours.recv()
    except EOFError:
        process.join()
        raise InputError(_unheard(process.exitcode)) from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if kind == "error":
        raise InputError(said)
    return said


def _unheard(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        return f"the process that did it was ended by {name}{hint}"
    return f"the process that did it left with {code}"


def _answer(channel: Connection, work: Callable[..., Any], arguments: tuple[Any, ...], is_heard: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the runner
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries' bars and warnings; what matters is in the answer
        os.dup2(nowhere, stream)
    if is_heard:
        arguments = (*arguments, lambda said: channel.send(("said", said)))
    try:
        channel.send(("ok", work(*arguments)))
    except Exception as error:  # one line for the user, whatever it is
        first = next(iter(str(error).strip().splitlines()), "")
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
            first = f"out of memory: {first}"
        elif not isinstance(error, InputError):
            first = f"{type(error).__name__}: {first}"
        channel.send(("error", first))
