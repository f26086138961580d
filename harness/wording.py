"""How values and mistakes are said: in one line, in a user's words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ValidationError

from harness.spec import DatasetSpec, PromptSpec, TrialSpec


def kind_of(value: Any) -> str:
    """What a YAML value is, in a user's words."""
    if isinstance(value, dict | list):
        name = "mapping" if isinstance(value, dict) else "list"
        return f"a {name}" if value else f"an empty {name}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "empty"}[value]
    return repr(value) if isinstance(value, str | int | float) else f"{type(value).__name__} {value}"


def as_written(value: Any) -> str:
    """A level as people write it in YAML."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return "+".join(map(as_written, value))
    if isinstance(value, dict):
        return str(value.get("path", value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def one_line(text: str) -> str:
    """Whatever a user's text holds, an error is one line that a terminal can show."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 600 else f"{line[:300]} … {line[-250:]}"


_FEW = 8
"""So many choices are all named, beside the nearest."""


def unknown(what: str, given: Any, known: Collection[str], hint: str = "") -> str:
    """What was given, and the nearest of what would do."""
    near = difflib.get_close_matches(str(given), list(known), n=1, cutoff=0.6)
    if not hint:
        everything = f"use {', '.join(known)}" if len(known) < 40 else "`harness keys` lists what there is"
        hint = f"; did you mean {near[0]}?" if near else f"; {everything}"
        if near and len(known) <= _FEW:
            hint += f" ({', '.join(known)})"
    return f"unknown {what} {given!r}{hint}"


# What pydantic calls a broken rule, in a user's words.
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


def explain(error: ValidationError, model: type[BaseModel] = TrialSpec) -> str:
    """The first of pydantic's errors, in one line; a misspelt key before what is missing without it."""
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    kind, context, given = first["type"], first.get("ctx", {}), first["input"]
    place = ".".join(str(part) for part in first["loc"])
    owner = PromptSpec if "type" in first["loc"] else DatasetSpec if "datasets" in first["loc"] else model
    if kind == "extra_forbidden":
        inside = place.rpartition(".")[0]
        return f"{inside}: " * bool(inside) + unknown("key", first["loc"][-1], owner.model_fields)
    if kind == "missing":
        meant = owner.model_fields.get(str(first["loc"][-1]))
        return f"{place} is missing; give one: {meant.description}" if meant else f"{place} is missing"  # of a pair
    if kind == "literal_error":
        return unknown(place, given, re.findall(r"'([^']*)'", context["expected"]))
    if kind == "value_error":
        return ": ".join(filter(None, (place, str(context["error"]))))
    rule = _RULES[kind].format(**context) if kind in _RULES else first["msg"]
    return f"{place} is {kind_of(given)}; it {rule}"
