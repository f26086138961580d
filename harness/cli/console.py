"""Where commands print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console

out = Console(emoji=False)  # a label may say :boom:
err = Console(stderr=True, emoji=False)


@contextlib.contextmanager
def stdout_for_data() -> Iterator[None]:
    """Within, everything that `out` prints goes to stderr."""
    out.stderr = True
    try:
        yield
    finally:
        out.stderr = False


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within, `out` prints nothing; errors are printed as ever."""
    out.quiet = True
    try:
        yield
    finally:
        out.quiet = False
