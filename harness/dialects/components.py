"""A mapping with `_component_`, whose other keys are arguments: each is taken, passed over or refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.dialects.rules import Reader, Unlike

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LARGEST = 1e300
_ABSENT = object()
_TYPES: tuple[tuple[type, tuple[type, ...], str], ...] = (
    (bool, (bool,), "true or false"),
    (int, (int, float), "a number"),
    (float, (int, float), "a number"),
    (str, (str,), "text"),
    (list, (list,), "a list"),
    (dict, (dict,), "a mapping"),
)
"""Types of an argument's default, what a value may be, and the words for it; true and false are no numbers."""


@dataclass
class Component:
    """A component of a training file, and the arguments that are not read yet."""

    reader: Reader
    place: str
    """Its key, like `optimizer` or `dataset[1]`."""
    path: str
    """Dotted path of what is called."""
    arguments: dict[str, Any]

    @classmethod
    def of(cls, reader: Reader, key: str) -> Component | None:
        """That of a top-level key; null where the file has none, or it is no mapping (which is then refused)."""
        given = reader.get(key)
        return None if given is None else cls.read(reader, key, given)

    @classmethod
    def read(cls, reader: Reader, place: str, given: Any) -> Component | None:
        """That of a value; null where it is no mapping, which is then refused."""
        if not isinstance(given, Mapping):
            reader.refuse(place, "it must be a mapping with _component_", given)
            return None
        arguments = {str(key): value for key, value in given.items()}
        path = str(arguments.pop("_component_", ""))
        return cls(reader, place, path, arguments)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition(".")[2]

    @property
    def family(self) -> str:
        """The third part of a path like `torchtune.models.llama3_1.…`; empty for others."""
        parts = self.path.split(".")
        return parts[2] if parts[:2] == ["torchtune", "models"] and len(parts) > 3 else ""

    def take(self, key: str, default: Any) -> Any:
        """An argument, which counts as read; the default where it is absent, null, or of another type (and refused).

        Args:
            key: its name.
            default: true or false, a number, a list, a mapping or a text; null: any value will do.
        """
        value = self.arguments.pop(key, None)
        if value is None:
            return default
        if isinstance(default, float) and isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        for kind, wanted, words in _TYPES:
            if default is not None and isinstance(default, kind):
                if isinstance(value, wanted) and (kind is bool or not isinstance(value, bool)) and _finite(value):
                    return value
                self.refuse(key, f"use {words}", value)
                return default
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """As `take`, for a text that may be absent."""
        value = self.take(key, "")
        return value or default

    def drop(self, *keys: str) -> None:
        """Pass over arguments."""
        for key in keys:
            self.arguments.pop(key, None)

    def refuse(self, key: str, instead: str, value: Any = _ABSENT) -> None:
        """Count an argument, or the component itself, as not supported."""
        shown = self.arguments.get(key, self.path) if value is _ABSENT else value
        self.reader.refuse(self.place if key == "_component_" else f"{self.place}.{key}", instead, shown)

    def refuse_rest(self, off: tuple[Any, ...] = ()) -> None:
        """Count what is left as not supported, but for empty values, false and those of `off`."""
        for key, value in self.arguments.items():
            if value not in (None, False, "", [], {}, *off):
                self.refuse(key, "harness has no counterpart; remove it", value)


def _finite(value: Any) -> bool:
    return not isinstance(value, int | float) or abs(value) < _LARGEST  # which nothing is that is no number


def number(value: Any) -> float:
    """A number, which YAML reads as text where it is written like 2e-5.

    Raises:
        Unlike: it is none.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise Unlike("use a number")
    return float(value)


def whole_number(value: Any, *, least: int) -> int:
    """A whole number.

    Raises:
        Unlike: it is none, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise Unlike(f"use a whole number, {least} or more")
    return value
