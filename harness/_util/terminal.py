"""Text made safe for a terminal: foreign text, and what its encoding does not have."""

from __future__ import annotations

import codecs
import io
import unicodedata

from rich.markup import escape

_IN_ASCII = {
    "×": "x", "÷": "/", "−": "-", "–": "-", "—": "-", "…": "...", "→": "->", "±": "+-", "≥": ">=", "≤": "<=",
    "“": '"', "”": '"', "‘": "'", "’": "'", "µ": "u", "°": "deg", "·": "*", "•": "*", "─": "-", "━": "-",
}  # fmt: skip


def printable(text: str) -> str:
    """Text of a dataset, a model or results, without control characters."""
    if text.isprintable():  # most is
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def plain(text: str) -> str:
    """`printable`, with rich's markup escaped."""
    return escape(printable(text))


def print_anything(*streams: object) -> None:
    """Have streams print what their encoding lacks in ASCII, where they would raise `UnicodeEncodeError`."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_IN_ASCII_NAME)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """How a codec goes on after characters that it cannot encode."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_nearest, error.object[error.start : error.end])), error.end


def _nearest(character: str) -> str:
    """A sign by its ASCII one, a letter without its accents, anything else as `?`."""
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return _IN_ASCII.get(character) or letters or ("*" if unicodedata.category(character) == "So" else "?")


_IN_ASCII_NAME = "harness-in-ascii"
codecs.register_error(_IN_ASCII_NAME, _in_ascii)
