"""Foreign text made safe for a terminal."""

from __future__ import annotations

from rich.markup import escape


def printable(text: str) -> str:
    """Text of a dataset, a model or results, without control characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def plain(text: str) -> str:
    """`printable`, with rich's markup escaped."""
    return escape(printable(text))
