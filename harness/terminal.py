"""Text of others on its way to a terminal."""

from __future__ import annotations

from rich.markup import escape


def printable(text: str) -> str:
    """What a data set, a model or somebody's rows say, with nothing in it that steers a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def plain(text: str) -> str:
    """`printable`, and none of it markup of rich's."""
    return escape(printable(text))
