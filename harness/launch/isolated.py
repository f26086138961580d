"""One function in a process of its own: its memory is freed with it, and what kills it kills nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from harness._util.messages import first_line
from harness.errors import InputError
from harness.launch import fork_server


def run_isolated(
    function: Callable[..., Any], *arguments: Any, on_progress: Callable[[Any], None] | None = None
) -> Any:
    """What `function` returns.

    Args:
        function: of a module; it imports torch within itself.
        arguments: that can be pickled, as its result.
        on_progress: called with what `function` reports; it is then given a last argument to report with.

    Raises:
        InputError: it refused its input, or its process ended early.
    """
    context = fork_server.start()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_call, args=(theirs, function, arguments, on_progress is not None), daemon=True
    )  # fmt: skip
    with fork_server.main_module_hidden():
        process.start()
    theirs.close()
    try:
        kind, value = ours.recv()
        while kind == "progress":
            if on_progress is not None:
                on_progress(value)
            kind, value = ours.recv()
    except EOFError:
        process.join()
        raise InputError(_early_end(process.exitcode)) from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if kind == "error":
        raise InputError(value)
    return value


def _early_end(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        return f"the worker process was ended by {name}{hint}"
    return f"the worker process exited with code {code}"


def _call(channel: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], reports: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the runner
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # progress bars and warnings of libraries
        os.dup2(nowhere, stream)
    if reports:
        arguments = (*arguments, lambda value: channel.send(("progress", value)))
    try:
        channel.send(("ok", function(*arguments)))
    except Exception as error:  # one line for the user, whatever it is
        channel.send(("error", _describe(error)))


def _describe(error: Exception) -> str:
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return f"out of memory: {first_line(error)}"
    return first_line(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
