"""Values of a row: how a message shows them, which are empty, and which are text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

_MOST_COLUMNS = 12
"""Columns that a message names."""
_DEEPEST = 64
"""Levels of nesting that a value may have: templates and JSON writers descend by recursion."""


def brief(value: Any) -> str:
    """A value in at most 40 characters, for a message."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."


def names(columns: Collection[Any]) -> str:
    """Columns for a message, sorted; the first of them where there are many."""
    shown = [brief(column) for column in sorted(columns, key=str)]
    further = len(shown) - _MOST_COLUMNS
    return ", ".join(shown[:_MOST_COLUMNS]) + (f" and {further} more" if further > 0 else "")


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing; tables have NaN in empty ones."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value in ([], {}) or (isinstance(value, float) and value != value)


# A lone surrogate: JSON can hold it, tokenizers cannot.
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_text(value: Any) -> bool:
    """Whether a tokenizer can read it, be it empty."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def parsed(value: Any, opening: str = "[") -> Any:
    """What a text that begins as JSON holds; anything else, and text that is no JSON, as it is."""
    if isinstance(value, str) and value.lstrip().startswith(opening):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def without_nulls(value: Any, depth: int = 0) -> Any:
    """A value without keys that are null, at any level: Arrow gives each mapping of a column the keys of all.

    Raises:
        ValueError: it is nested too deeply, or holds what is no text.
    """
    if depth > _DEEPEST:
        raise ValueError(f"is nested in more than {_DEEPEST} levels")
    if isinstance(value, dict):
        return {key: without_nulls(inner, depth + 1) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner, depth + 1) for inner in value]
    if isinstance(value, str) and not is_text(value):
        raise ValueError(f"holds {brief(value)}, which is no text")
    return value
