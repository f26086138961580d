"""References of a training file to its own values, like `${output_dir}/logs`, as OmegaConf resolves them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_REFERENCE = re.compile(r"\$\{([\w./ -]+)\}")
_DEEPEST = 20
"""References that a reference leads to; more of them stand in a circle."""


class _Unresolved(Exception):
    """A reference names nothing in the file, or itself."""


def resolve(document: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """A file with its references replaced by what they name.

    One that names nothing in the file, an environment variable or itself is left as text.

    Args:
        document: keys and values.

    Returns:
        the keys and values, and the top-level keys that references name.
    """
    named: set[str] = set()
    return {str(key): _value(each, document, named, 0) for key, each in document.items()}, named


def is_reference(value: Any) -> bool:
    """Whether a value is, or contains, a reference that could not be resolved."""
    return isinstance(value, str) and "${" in value


def _value(value: Any, document: Mapping[str, Any], named: set[str], depth: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _value(each, document, named, depth) for key, each in value.items()}
    if isinstance(value, list):
        return [_value(each, document, named, depth) for each in value]
    return _text(value, document, named, depth) if is_reference(value) else value


def _text(text: str, document: Mapping[str, Any], named: set[str], depth: int) -> Any:
    try:
        if whole := _REFERENCE.fullmatch(text):
            return _named(whole[1], document, named, depth)
        return _REFERENCE.sub(lambda match: _within(_named(match[1], document, named, depth)), text)
    except _Unresolved:
        return text


def _named(path: str, document: Mapping[str, Any], named: set[str], depth: int) -> Any:
    """What a path like `checkpointer.checkpoint_dir` names."""
    if depth >= _DEEPEST:
        raise _Unresolved
    value: Any = document
    for part in path.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            raise _Unresolved
    named.add(path.split(".")[0])
    result = _value(value, document, named, depth + 1)
    if is_reference(result):
        raise _Unresolved
    return result


def _within(value: Any) -> str:
    if isinstance(value, Mapping | list):
        raise _Unresolved
    return "" if value is None else str(value)
