"""Rows of JSON text: a line each, a list of them, or an object with one such list."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from harness._util.messages import first_line
from harness.sources.cells import brief

CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialog")
"""Columns of a chat's turns, the first that is there."""
_TURN_KEYS = ({"role", "content"}, {"from", "value"})


def read(text: str, *, as_lines: bool) -> Iterator[dict[str, Any]]:
    """Rows of a text, whichever of the three it holds.

    Args:
        text: of a file.
        as_lines: its name says that each line is a row, so that a single object is one; else it is none.

    Raises:
        ValueError: it is malformed.
        RecursionError: it is nested too deeply.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Split only at newlines: U+2028 and the like may be part of a JSON string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        return
    if _are_rows(lines, as_lines):
        yield from _of_lines(lines)
        return
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if as_lines or error.msg == "Extra data":
            yield from _of_lines(lines)  # it says which line is none
        raise
    yield from _of_document(document)


def _are_rows(lines: list[tuple[int, str]], as_lines: bool) -> bool:
    """Whether each line is a row, by the first of them."""
    try:
        first = json.loads(lines[0][1])
    except json.JSONDecodeError:
        return False
    if len(lines) > 1:
        return isinstance(first, dict) or as_lines
    return as_lines and not isinstance(first, list)


def _of_lines(lines: list[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
        except ValueError as error:  # a number of thousands of digits
            raise ValueError(f"line {number}: {first_line(error)}") from None
        yield _as_row(row, f"line {number}")


def _of_document(document: Any) -> Iterator[dict[str, Any]]:
    """Rows of a list, or of an object's one list of them."""
    rows = _rows_within(document) if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise ValueError(f"it holds {brief(document)}, not a list of rows")
    yield from (_as_row(row, f"row {n}") for n, row in enumerate(rows, start=1))


def _rows_within(document: dict[str, Any]) -> list[Any] | None:
    """The list of rows that an object holds; null: it holds none."""
    lists = _lists_of_rows(document)
    if len(lists) > 1:
        raise ValueError(f"it holds several lists of rows ({_names(lists)}); keep one of them in a file")
    if lists:
        return lists[0][1]
    values = [*document.values()]
    if values == [[]]:
        return []
    by_column = "it holds a list for each column ({}), not a list of rows; write an object for each row"
    if values and all(isinstance(value, list) and not _are_turns(value) for value in values):
        raise ValueError(by_column.format(_names(document.items())))
    if values and all(isinstance(value, dict) and value for value in values):
        raise ValueError(by_column.replace("a list", "a mapping", 1).format(_names(document.items())))
    return None


def _lists_of_rows(document: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    """Keys whose values are lists of objects, but for the turns of a chat: those are one row."""
    return [
        (key, value)
        for key, value in document.items()
        if key not in CHAT_COLUMNS and isinstance(value, list) and _are_objects(value) and not _are_turns(value)
    ]


def _are_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _are_turns(values: list[Any]) -> bool:
    return _are_objects(values) and any(all(keys <= turn.keys() for turn in values) for keys in _TURN_KEYS)


def _names(items: Any) -> str:
    return ", ".join(brief(key) for key, _ in [*items][:5])


def _as_row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {brief(row)}, not an object with columns")
    return row
