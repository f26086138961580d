"""Validation of rows: whether they are such as `Store` writes. Files of others may hold anything."""

from __future__ import annotations

import datetime as dt
import re
import types
import typing
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from harness import metrics
from harness._util.messages import explain, one_line
from harness.environment import Environment
from harness.results.schema import FIELDS, METRIC_COLUMNS, Table, parse_spec
from harness.spec.trial import TrialSpec

_KEYS: dict[Table, tuple[str, ...]] = {
    "trials": ("trial_id",),
    "steps": ("trial_id", "block", "step"),
    "stories": ("trial_id", "story_id", "when", "kind"),
    "tasks": ("trial_id", "task", "item", "when"),
    "models": ("trial_id", "model"),
    "answers": ("trial_id", "model", "story_id"),
}
"""Columns that together are unique within a part."""
_FOREIGN = "not rows of harness"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
PART_NAME = re.compile(_NAME)
"""Names of parts, adapters and logs."""
_IDS = ("trial_id", "spec_id", "environment_id", "baseline_id", "adapter_id")
_FINGERPRINTS = ("data_fingerprint", "base_fingerprint")
_PATTERNS = {
    **dict.fromkeys(_IDS, rf"\A{_NAME}\z"),
    **dict.fromkeys(_FINGERPRINTS, r"\A[0-9a-f]{12}\z"),
    "log": rf"\Alogs/{_NAME}\z",
}
"""Values that become paths, or part of the code that a report shows."""
_NULLABLE = frozenset(METRIC_COLUMNS) | {"adapter_id", "effective_batch_size"}
"""Columns that may be null, besides those whose field is optional."""
_SIGNED = frozenset({"loss"} | {m.name for m in metrics.METRICS.values() if m.scale == "difference"})
_LAST_MICROSECOND = int(dt.datetime(9999, 1, 1, tzinfo=dt.UTC).timestamp()) * 10**6
"""Of datetime."""


class Damaged(Exception):
    """A part cannot be read; the message is the reason."""


def validate_rows(table: Table, content: pa.Table) -> None:
    """Check that rows are such as `Store` writes: their readers rely on it.

    Args:
        table: whose rows they are.
        content: some of its columns, in their declared types.

    Raises:
        Damaged: they are not.
    """
    there = {*content.column_names}
    for name in content.column_names:
        if fault := _fault(content[name].combine_chunks(), name, FIELDS[table].get(name)):
            raise Damaged(f"{_FOREIGN} ({name} {fault})")
    key = _KEYS.get(table)
    if key and {*key} <= there and len(content.group_by(list(key)).aggregate([])) < len(content):
        raise Damaged(f"{_FOREIGN} (the same {' and '.join(key)} twice)")
    if "environment" in there:
        _validate_environments(content["environment"])
    if TrialSpec.model_fields.keys() <= there and len(content):
        _validate_specs(content)


def _validate_environments(column: pa.ChunkedArray) -> None:
    try:
        for text in column.unique().to_pylist():
            Environment.model_validate_json(text)
    except ValidationError as error:
        raise Damaged(one_line(f"{_FOREIGN} ({explain(error, Environment)})")) from None


def _validate_specs(content: pa.Table) -> None:
    # Repeats differ only in the seed: their spec is validated once, with the largest.
    names = [name for name in TrialSpec.model_fields if name != "seed"]
    columns = (_hashable(content[name]) for name in names)
    seed = pc.max(content["seed"]).as_py()
    try:
        for row in dict.fromkeys(zip(*columns, strict=True)):
            values = (list(value) if isinstance(value, tuple) else value for value in row)
            parse_spec(dict(zip(names, values, strict=True)) | {"seed": seed})
    except ValidationError as error:
        raise Damaged(one_line(f"{_FOREIGN} ({explain(error, TrialSpec)})")) from None
    except (ValueError, TypeError, RecursionError):
        raise Damaged(f"{_FOREIGN} (datasets is not JSON)") from None


def _hashable(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column; lists as tuples."""
    values: list[Any] = column.to_pylist()
    return [value and tuple(value) for value in values] if pa.types.is_list(column.type) else values


def _fault(column: pa.Array, name: str, field: FieldInfo | None) -> str | None:
    """What is wrong with the values of a column; null where nothing is."""
    known = column.drop_null()
    may_be_null = field is not None and (not field.is_required() or type(None) in typing.get_args(field.annotation))
    if len(known) < len(column) and not may_be_null and name not in _NULLABLE:
        return "is missing"
    if pa.types.is_list(known.type):
        known = known.flatten()
        if known.null_count:
            return "has nulls"
    if not len(known) or pa.types.is_boolean(known.type):
        return None
    if pa.types.is_string(known.type):
        known = known.unique()
        if name in _PATTERNS and not pc.all(pc.match_substring_regex(known, _PATTERNS[name])).as_py():
            return "is not a valid name"
        choices = _choices(field.annotation) if field is not None else ()
        return "is none of its values" if choices and not {*known.to_pylist()} <= {*choices} else None
    if pa.types.is_timestamp(known.type):
        known = known.cast(pa.int64())
        if pc.max(known).as_py() > _LAST_MICROSECOND:
            return "is out of range"
    elif pa.types.is_floating(known.type) and not pc.all(pc.is_finite(known)).as_py():
        return "is not finite"
    return "is negative" if name not in _SIGNED and pc.min(known).as_py() < 0 else None


def _choices(annotation: Any) -> tuple[str, ...]:
    """The values of a Literal, or of the Literal in a union."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    members = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    return next((choices for each in members if (choices := _choices(each))), ())
