"""The Arrow schema of the results, derived from spec, metrics and record; records to rows, and rows to specs."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from harness import metrics
from harness.record import Answer, ItemScore, ModelFootprint, Record, Request, Row, Step, StoryLoss
from harness.spec.datasets import Facts
from harness.spec.trial import TrialSpec

SCHEMA_VERSION = 1
Table = Literal["trials", "steps", "stories", "tasks", "models", "requests", "answers"]
_IDENTITY = {
    "trial_id": pa.string(),
    "spec_id": pa.string(),
    "environment_id": pa.string(),
    **{n: pa.string() for n in ("data_fingerprint", "base_fingerprint", "grid", "label", "factor", "level")},
    "repeat": pa.int64(),
    "baseline_id": pa.string(),
    "twin": pa.bool_(),
    "watched": pa.bool_(),
    "study": pa.string(),
    "study_trial": pa.int64(),
    **{n: pa.string() for n in ("status", "phase", "error_type", "error", "adapter_id")},
    "attention_kernel": pa.string(),
    "base_formats": pa.string(),
    "attempt": pa.int64(),
    "disturbed": pa.bool_(),
    "node": pa.string(),
    "log": pa.string(),
    "started_at": pa.timestamp("us", tz="UTC"),
}
_JSON = ("datasets", "test_datasets", "special_tokens", "lora_modules_to_save", "lora_target_parameters",
         "adapter_options", "evaluate_tasks")  # fmt: skip
"""Fields of a spec that are stored as JSON: mappings, and lists, which could not be compared."""
_ENVIRONMENT = {"device_type": pa.string(), "device_name": pa.string(), "environment": pa.string()}


def _arrow(annotation: Any) -> pa.DataType:
    """Arrow type of a field's annotation; nested models are stored as JSON."""
    plain = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    if annotation in plain:
        return plain[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return pa.string()
    if origin is typing.Annotated:
        return _arrow(args[0])
    if origin in (typing.Union, types.UnionType):
        return _arrow(next(a for a in args if a is not type(None)))
    if origin is tuple:
        return pa.list_(_arrow(args[0]))
    raise TypeError(f"no Arrow type for {annotation}")


def _columns(model: type[BaseModel]) -> dict[str, pa.DataType]:
    return {
        name: pa.string() if name in _JSON else _arrow(field.annotation) for name, field in model.model_fields.items()
    }


# In the order in which they are written: a row of the last table promises those of the others.
TRIAL_TABLES: tuple[Table, ...] = ("steps", "stories", "tasks", "trials")
"""Tables of records."""
INFERENCE_TABLES: dict[Table, type[Row]] = {"requests": Request, "answers": Answer, "models": ModelFootprint}
"""Tables of inference results."""
FIELDS: dict[Table, dict[str, FieldInfo]] = {
    "trials": {**TrialSpec.model_fields, **Record.model_fields},
    "steps": Step.model_fields,
    "stories": StoryLoss.model_fields,
    "tasks": ItemScore.model_fields,
    **{table: row.model_fields for table, row in INFERENCE_TABLES.items()},
}
"""Declarations of columns, by table and name."""
METRIC_COLUMNS = {m.name: pa.int64() if m.type == "int" else pa.float64() for m in metrics.METRICS.values()}


def _schema(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    return pa.schema(columns, metadata={"schema_version": str(SCHEMA_VERSION)})


_OF_TRIAL = {"trial_id": pa.string()}
_OF_ADAPTER = _OF_TRIAL | {"adapter_id": pa.string()}
SCHEMAS: dict[Table, pa.Schema] = {
    "trials": _schema(
        _IDENTITY | _columns(TrialSpec) | {"effective_batch_size": pa.int64()} | METRIC_COLUMNS | _ENVIRONMENT
    ),
    "steps": _schema(_OF_TRIAL | _columns(Step)),
    "stories": _schema(_OF_TRIAL | _columns(StoryLoss)),
    "tasks": _schema(_OF_TRIAL | _columns(ItemScore)),
    **{table: _schema(_OF_ADAPTER | _columns(row)) for table, row in INFERENCE_TABLES.items()},
}


def absent_value(table: Table, column: str) -> Any:
    """What a column holds for rows from before it existed."""
    field = FIELDS[table].get(column)
    absent = ... if field is None else Facts.of(field).absent
    return None if absent is ... else absent


def trial_row(record: Record) -> dict[str, Any]:
    """A record as a row of the trials table."""
    spec = record.spec.model_dump(mode="json") | {"lr_scheduler": record.spec.schedule}
    spec |= {name: json.dumps(spec[name], sort_keys=True) for name in _JSON if spec[name] is not None}
    spec |= dict.fromkeys(record.unseen)
    return {
        **{name: getattr(record, name) for name in _IDENTITY if name in Record.model_fields},
        "trial_id": record.trial_id,
        "spec_id": record.spec.id,
        "environment_id": record.environment.id,
        "base_formats": None if record.base_formats is None else json.dumps(record.base_formats),
        **spec,
        "effective_batch_size": _effective_batch_size(record),
        **{name: record.metrics.get(name) for name in METRIC_COLUMNS},
        "device_type": record.environment.device_type,
        "device_name": record.environment.device_name,
        "environment": record.environment.model_dump_json(),
    }


def _effective_batch_size(record: Record) -> int | None:
    factors = {"micro_batch_size", "gradient_accumulation_steps", "num_processes"}
    return None if factors & {*record.unseen} else record.spec.effective_batch_size


_SPEC_COLUMNS = _columns(TrialSpec)
_ALWAYS_KNOWN = frozenset(
    name for name, field in TrialSpec.model_fields.items() if not field.is_required() and field.default is not None
)
"""Keys that are never null in a spec: a null in a row is one that could not be seen of a watched loop."""
_INTEGERS = frozenset(name for name, type_ in _SPEC_COLUMNS.items() if pa.types.is_integer(type_))


def spec_of(row: Mapping[str, Any]) -> TrialSpec:
    """The spec of a row of the trials table, from Arrow or pandas."""
    import numpy
    import pandas

    values: dict[str, Any] = {}
    for name in TrialSpec.model_fields:
        value = row[name]
        if isinstance(value, numpy.ndarray):
            value = value.tolist()
        elif value is None or (not isinstance(value, list | tuple) and pandas.isna(value)):
            value = None
        elif isinstance(value, numpy.generic):
            value = value.item()
        # pandas holds nullable integers as floats.
        values[name] = int(value) if name in _INTEGERS and isinstance(value, float) else value
    return parse_spec(values)


def parse_spec(values: Mapping[str, Any]) -> TrialSpec:
    """A spec of plain values, its datasets as JSON. What was recorded stays readable, though it be refused by now. Keys
    that could not be seen have their defaults in it.

    Raises:
        ValueError: they are not those of a spec.
    """
    nested = {name: json.loads(values[name]) for name in _JSON if isinstance(values[name], str)}
    known = {name: value for name, value in values.items() if value is not None or name not in _ALWAYS_KNOWN}
    return TrialSpec.model_validate({**known, **nested}, context="keys alone")
