"""Training files of Axolotl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.dialects.rules import Dialect, Reader, Rule

_TABLE: dict[str, Rule] = {}


def _combine(reader: Reader) -> None:
    raise NotImplementedError


def is_one(document: Mapping[str, Any]) -> bool:
    """Whether a training file is one of Axolotl."""
    raise NotImplementedError


DIALECT = Dialect("Axolotl", _TABLE, {}, _combine)
