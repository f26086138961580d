"""Rows of a file: JSON lines, JSON, CSV and Parquet."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def brief(value: Any) -> str:
    """A value in at most 40 characters, for a message."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."


def full_path(path: str, folder: str | None) -> str:
    """Where a path leads: `~` is the home folder, and a relative path begins at `folder`; null: at the current one."""
    # Unlike Path, os.path raises neither for ~nobody nor for names that are too long.
    return os.path.join(os.path.expanduser(folder or ""), os.path.expanduser(path))


def is_relative(path: str) -> bool:
    """Whether it depends on the folder that a path begins at where it leads."""
    return not os.path.isabs(os.path.expanduser(path))


def hint_of_current(path: str, folder: str | None) -> str:
    """For a path that leads nowhere from `folder`: what to write instead, if it leads somewhere from here."""
    if folder is None or not is_relative(path) or not os.path.exists(path):
        return ""
    return f"; it is in the current folder, so write {os.path.relpath(path, full_path('', folder))}"


UNREADABLE = (
    ValueError, OSError, KeyError, TypeError, NotImplementedError, RecursionError, OverflowError, csv.Error,
)  # fmt: skip
"""What `read_file` raises for a malformed file. OverflowError: a time that parquet can hold and Python cannot."""


def read_file(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file in one of the formats of `SUFFIXES`.

    Raises:
        One of `UNREADABLE`: it is malformed.
    """
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        # Split only at newlines: U+2028 and the like may be part of a JSON string.
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
                yield _as_row(row, f"line {number}")
    elif suffix == ".json":
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(rows, list):
            raise ValueError(f"it holds {brief(rows)}, not a list of rows")
        yield from (_as_row(row, f"row {n}") for n, row in enumerate(rows, start=1))
    elif suffix == ".csv":
        # pandas would take the first of too many fields for an index and shift the others.
        csv.field_size_limit(2**31 - 1)
        with file.open(encoding="utf-8-sig", newline="") as text:
            for number, row in enumerate(csv.DictReader(text, strict=True), start=1):
                if None in row:
                    raise ValueError(f"row {number} has more fields than the header; quote texts with commas")
                yield row
    else:
        from pyarrow import parquet

        yield from parquet.ParquetFile(file).read().to_pylist()


def _as_row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {brief(row)}, not an object with columns")
    return row
