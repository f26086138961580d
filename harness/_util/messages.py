"""Texts of values and errors: one line each, in a user's words."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

DISTRIBUTION = "finetune-harness"
"""Name under which pip installs harness; `harness-bench` on PyPI is another project."""


def pip_install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def kind_of(value: Any) -> str:
    """Describe a YAML value: `an empty list`, `true`, `'text'`."""
    if isinstance(value, dict | list):
        name = "mapping" if isinstance(value, dict) else "list"
        return f"a {name}" if value else f"an empty {name}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "empty"}[value]
    return repr(value) if isinstance(value, str | int | float) else f"{type(value).__name__} {value}"


def as_written(value: Any) -> str:
    """A value as it is written in YAML; of a mapping its `path`."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return "+".join(map(as_written, value))
    if isinstance(value, dict):
        return str(value.get("path", value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def one_line(text: str, most: int = 600) -> str:
    """A text as one printable line, cut in the middle where it is longer than `most` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else f"{line[: most // 2]} … {line[50 - most // 2 :]}"


def first_line(error: BaseException) -> str:
    """First line of an error's text; where it has none, the name of its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_FEW = 8
"""Up to this many choices are all listed with the nearest."""


def unknown(what: str, given: Any, known: Collection[str], hint: str = "") -> str:
    """The message for an unknown name, with the nearest of the known ones."""
    near = difflib.get_close_matches(str(given), list(known), n=1, cutoff=0.6)
    if not hint:
        everything = f"use {', '.join(known)}" if len(known) < 40 else "`harness keys` lists what there is"
        hint = f"; did you mean {near[0]}?" if near else f"; {everything}"
        if near and len(known) <= _FEW:
            hint += f" ({', '.join(known)})"
    return f"unknown {what} {given!r}{hint}"


# pydantic's error types in a user's words.
_RULES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "tuple_type": "must be a list",
    "too_short": "must have at least one entry",
    "model_type": "must be a mapping",
    "greater_than_equal": "must be {ge:.15g} or more",
    "greater_than": "must be more than {gt:.15g}",
    "less_than_equal": "must be {le:.15g} or less",
    "less_than": "must be less than {lt:.15g}",
}


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of the errors of validating `model`, in one line; a misspelt key comes before a missing one."""
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    kind, context, given = first["type"], first.get("ctx", {}), first["input"]
    place = ".".join(str(part) for part in first["loc"])
    owner = _owner(model, first["loc"])
    if kind == "extra_forbidden":
        inside = place.rpartition(".")[0]
        return f"{inside}: " * bool(inside) + unknown("key", first["loc"][-1], owner.model_fields)
    if kind == "missing":
        field = owner.model_fields.get(str(first["loc"][-1]))  # null for an entry of a pair
        return f"{place} is missing; give one: {field.description}" if field else f"{place} is missing"
    if kind == "literal_error":
        return unknown(place, given, re.findall(r"'([^']*)'", context["expected"]))
    if kind == "value_error":
        return ": ".join(filter(None, (place, str(context["error"]))))
    rule = _RULES[kind].format(**context) if kind in _RULES else first["msg"]
    return f"{place} is {kind_of(given)}; it {rule}"


def _owner(model: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel]:
    """The model, `model` or one nested in it, whose field the last part of a place is."""
    for part in place[:-1]:
        if part in model.model_fields:
            model = _nested(model.model_fields[str(part)].annotation) or model
    return model


def _nested(annotation: Any) -> type[BaseModel] | None:
    """The model within an annotation like `tuple[Model, ...]` or `Model | None`."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    return next(filter(None, map(_nested, typing.get_args(annotation))), None)
