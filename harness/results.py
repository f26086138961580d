"""The record of a trial, its Arrow schema, and the parquet folder that keeps every one.

`results/<grid>/{trials,steps,stories}/` hold one part per trial, written aside and renamed, so
that a part is whole or absent; `{models,requests,answers}/` the same of trained models at work. The
schema is declared from the spec and the metrics.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import re
import shutil
import time
import types
import typing
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from harness import metrics
from harness.environment import Environment
from harness.errors import InputError
from harness.files import locked, write_whole
from harness.spec import TrialSpec
from harness.wording import explain, one_line

SCHEMA_VERSION = 1

Status = Literal["ok", "oom", "diverged", "did_not_train", "timeout", "killed", "failed", "skipped"]
Phase = Literal["start", "load", "evaluate", "forward", "backward", "optimizer", "save"]
Table = Literal["trials", "steps", "stories", "models", "requests", "answers"]
Model = Literal["base", "unmerged", "merged"]
"""A trained model at work: the base alone, the base under its adapter, and the two made one."""

DISK_FULL = "DiskFull"
"""Kind of error of a trial that had no room for what it writes: no fault of its own."""

_MOST_LOOKS = 10
_COMPACT_ABOVE = 16
"""More parts than this become one at the end of a run."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Step(_Row):
    """One optimizer step."""

    step: int
    """From 1."""
    tracked: bool
    """Memory was followed and the time does not count; else the other way round."""
    seconds: float
    """Wall time; of a tracked step with the tracker's cost."""
    loss: float
    """Nats per supervised token before this step's update."""
    grad_norm: float | None
    """Before clipping; null where a fp16 step was skipped by the loss scaler."""
    learning_rate: float
    """During this step."""
    samples: int
    """Examples."""
    tokens: int
    """Non-padding tokens."""
    supervised_tokens: int
    """Tokens that carry loss."""
    padded_tokens: int
    """All positions."""
    peak_memory_bytes: int | None
    """Highest live memory of the step, where it was followed."""


class StoryLoss(_Row):
    """Loss of one held-out story, or of one general passage."""

    story_id: str
    """Hash of its texts."""
    when: Literal["before", "after"]
    """Before or after training."""
    loss: float
    """Nats per completion token."""
    tokens: int
    """Completion tokens."""
    kind: Literal["held-out", "general"] = "held-out"
    """A story like those that were learnt, or a text that has nothing to do with them."""


class Served(_Row):
    """A model at work: what it takes."""

    model: Model
    """Which of the three."""
    precision: str
    """Of its base weights; what was quantised for training is merged in 16 bit."""
    model_bytes: int
    """See `metrics.INFERENCE`."""
    peak_inference_bytes: int
    """As above."""
    logit_difference: float | None = None
    """As above; of the merged model alone."""


class Request(_Row):
    """One timed request."""

    model: Model
    """Which of the three."""
    round: int
    """From 0. In each round every model is loaded anew and asked the same."""
    story_id: str
    """Whose prompt it was."""
    prompt_tokens: int
    """Tokens of the prompt."""
    prefill_seconds: float
    """Until the first new token."""
    token_seconds: tuple[float, ...]
    """Of each new token after the first."""


class Answer(_Row):
    """What a model makes of a held-out story."""

    model: Model
    """Which of the three."""
    story_id: str
    """Hash of the story's texts."""
    loss: float
    """Nats per completion token."""
    tokens: int
    """Completion tokens."""
    synopsis: str | None = None
    """What was asked, where a story was generated."""
    reference: str | None = None
    """The story that was held out."""
    story: str | None = None
    """The story that was generated."""
    rouge_l: float | None = None
    """See `metrics.INFERENCE`."""
    distinct_2: float | None = None
    """As above."""
    repetition: float | None = None
    """As above."""
    words: float | None = None
    """As above."""


class Inference(_Row):
    """A trained model at work, measured."""

    environment: Environment
    """Where it was."""
    models: tuple[Served, ...]
    """One each."""
    requests: tuple[Request, ...]
    """Timed."""
    answers: tuple[Answer, ...]
    """To held-out stories; none where the weights are random."""


class Job(_Row):
    """What a worker is asked to do: a spec, and the trial's place in its grid."""

    grid: str
    """Name of the grid."""
    spec: TrialSpec
    """What to execute."""
    label: str
    """The trial's name in its grid."""
    factor: str | None = None
    """Factor that sets it apart from the baseline."""
    level: str | None = None
    """That factor's level."""
    repeat: int = 0
    """Repeat number."""
    baseline_id: str | None = None
    """Id of the spec that it is compared with; its own for a baseline."""
    twin: bool = False
    """The baseline run a second time."""
    study: str | None = None
    """Name of the search that proposed it."""
    study_trial: int | None = None
    """Its number there."""


class Record(Job):
    """How one trial ended, and all that was measured. Exactly one per trial."""

    environment: Environment
    """Where it ran."""
    status: Status
    """How it ended."""
    phase: Phase | None = None
    """Where it was when it did not end well."""
    error_type: str | None = None
    """Kind of the error."""
    error: str | None = None
    """Its first line."""
    started_at: dt.datetime
    """UTC."""
    metrics: dict[str, float | int | None] = {}
    """Figures by metric name; what is absent is null."""
    steps: tuple[Step, ...] = ()
    """Optimizer steps."""
    stories: tuple[StoryLoss, ...] = ()
    """Held-out stories."""
    adapter_id: str | None = None
    """Hash of the saved adapter's weights and configuration: the name of its folder under `adapters/`."""
    attempt: int = 1
    """From 1. Of the earlier ones nothing came: the worker was lost."""
    node: str | None = None
    """Machine of a cluster that it ran on; null: that of its runner."""
    log: str | None = None
    """What it printed, within the results folder, where it did not end well."""

    @field_validator("metrics")
    @classmethod
    def _known_and_finite(cls, values: dict[str, float | int | None]) -> dict[str, float | int | None]:
        return {name: metrics.check(name, value) for name, value in values.items()}

    @model_validator(mode="after")
    def _status_agrees(self) -> Record:
        if self.status == "ok" and (self.phase or self.error or self.error_type):
            raise ValueError("an ok record has no phase and no error")
        if self.status != "ok":
            scores = [n for n, v in self.metrics.items() if n in metrics.SCORES and v is not None]
            if scores:
                raise ValueError(f"a {self.status} record carries no scores, and has {', '.join(scores)}")
        return self

    @classmethod
    def of(cls, job: Job, **outcome: Any) -> Record:
        """The record that ends a job."""
        return cls(**{name: getattr(job, name) for name in Job.model_fields}, **outcome)

    @property
    def trial_id(self) -> str:
        """Spec and environment: the same trial on the same machine has the same id."""
        return trial_id(self.spec, self.environment, twin=self.twin)


def trial_id(spec: TrialSpec, environment: Environment, *, twin: bool = False) -> str:
    """Identity of a trial: `<spec id>-<environment id>`, and `-twin` where it is the baseline's second run."""
    return f"{spec.id}-{environment.id}" + "-twin" * twin


# ------------------------------------------------------------------------------------ schema

_IDENTITY = {
    "trial_id": pa.string(),
    "spec_id": pa.string(),
    "environment_id": pa.string(),
    **{n: pa.string() for n in ("grid", "label", "factor", "level")},
    "repeat": pa.int64(),
    "baseline_id": pa.string(),
    "twin": pa.bool_(),
    "study": pa.string(),
    "study_trial": pa.int64(),
    **{n: pa.string() for n in ("status", "phase", "error_type", "error", "adapter_id")},
    "attempt": pa.int64(),
    "node": pa.string(),
    "log": pa.string(),
    "started_at": pa.timestamp("us", tz="UTC"),
}
_ENVIRONMENT = {"device_type": pa.string(), "device_name": pa.string(), "environment": pa.string()}


def _arrow(annotation: Any) -> pa.DataType:
    """Arrow type of a field's annotation; nested models travel as JSON text."""
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
        return (
            pa.string() if isinstance(args[0], type) and issubclass(args[0], BaseModel) else pa.list_(_arrow(args[0]))
        )
    raise TypeError(f"no Arrow type for {annotation}")


def _model_columns(model: type[BaseModel]) -> dict[str, pa.DataType]:
    return {name: _arrow(field.annotation) for name, field in model.model_fields.items()}


AT_WORK: dict[Table, type[_Row]] = {"requests": Request, "answers": Answer, "models": Served}
"""Tables of trained models at work, in the order in which they are written."""

_SINCE = {"measure_forgetting": False, "sharding": "none", "kind": "held-out", "attempt": 1}
"""Columns that came later, and what they would have said of the rows from before; of others null."""

_METRIC_COLUMNS = {m.name: pa.int64() if m.type == "int" else pa.float64() for m in metrics.METRICS.values()}

SCHEMAS: dict[Table, pa.Schema] = {
    "trials": pa.schema(
        _IDENTITY | _model_columns(TrialSpec) | {"effective_batch_size": pa.int64()} | _METRIC_COLUMNS | _ENVIRONMENT,
        metadata={"schema_version": str(SCHEMA_VERSION)},
    ),
    "steps": pa.schema(
        {"trial_id": pa.string()} | _model_columns(Step), metadata={"schema_version": str(SCHEMA_VERSION)}
    ),
    "stories": pa.schema(
        {"trial_id": pa.string()} | _model_columns(StoryLoss), metadata={"schema_version": str(SCHEMA_VERSION)}
    ),
    **{
        table: pa.schema(
            {"trial_id": pa.string(), "adapter_id": pa.string()} | _model_columns(row),
            metadata={"schema_version": str(SCHEMA_VERSION)},
        )
        for table, row in AT_WORK.items()
    },
}


def _trial_row(record: Record) -> dict[str, Any]:
    spec = record.spec.model_dump(mode="json")
    spec["datasets"] = json.dumps(spec["datasets"], sort_keys=True)
    return {
        **{name: getattr(record, name) for name in _IDENTITY if name in Record.model_fields},
        "trial_id": record.trial_id,
        "spec_id": record.spec.id,
        "environment_id": record.environment.id,
        **spec,
        "effective_batch_size": record.spec.effective_batch_size,
        **{name: record.metrics.get(name) for name in _METRIC_COLUMNS},
        "device_type": record.environment.device_type,
        "device_name": record.environment.device_name,
        "environment": record.environment.model_dump_json(),
    }


def spec_of(row: Mapping[str, Any]) -> TrialSpec:
    """The spec of a row of the trials table."""
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
        values[name] = value
    for name in ("memory_budget", "train_samples", "max_steps", "eval_sequence_length"):
        values[name] = None if values[name] is None else int(values[name])  # pandas holds nullable integers as floats
    return _plain_spec(values)


def _plain_spec(values: Mapping[str, Any]) -> TrialSpec:
    return TrialSpec.model_validate({**values, "datasets": json.loads(values["datasets"])})


# ------------------------------------------------------------------------------------ rows of others

_DECLARED: dict[str, dict[str, FieldInfo]] = {
    "trials": {**TrialSpec.model_fields, **Record.model_fields},
    "steps": Step.model_fields,
    "stories": StoryLoss.model_fields,
    **{table: row.model_fields for table, row in AT_WORK.items()},
}
"""The fields that columns are made of, by table and name."""

_ONCE: dict[Table, tuple[str, ...]] = {
    "trials": ("trial_id",),
    "steps": ("trial_id", "step"),
    "stories": ("trial_id", "story_id", "when", "kind"),
    "models": ("trial_id", "model"),
    "answers": ("trial_id", "model", "story_id"),
}
"""Columns that together are said once in a part."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_PART_NAME = re.compile(_NAME)
_IDS = ("trial_id", "spec_id", "environment_id", "baseline_id", "adapter_id")
_PATTERNS = {**dict.fromkeys(_IDS, rf"\A{_NAME}\z"), "log": rf"\Alogs/{_NAME}\z"}
"""What becomes a path, or a part of the code that a report shows."""
_NULLABLE = frozenset(_METRIC_COLUMNS) | {"adapter_id"}
"""Columns that may be null, beside those whose field says so."""
_SIGNED = frozenset({"loss"} | {m.name for m in metrics.METRICS.values() if m.scale == "difference"})
_LAST_MICROSECOND = int(dt.datetime(9999, 1, 1, tzinfo=dt.UTC).timestamp()) * 10**6
"""Python counts no further."""


class _Damaged(Exception):
    """What is wrong with a part."""


def _refuse_foreign(table: Table, content: pa.Table) -> None:
    """Look whether rows are such as `Store` writes: whoever reads them relies on it.

    Args:
        table: whose rows they are.
        content: some of its columns, in their declared types.

    Raises:
        _Damaged: they are not; somebody else has written or changed them.
    """
    there = {*content.column_names}
    for name in content.column_names:
        if said := _foreign(content[name].combine_chunks(), name, _DECLARED[table].get(name)):
            raise _Damaged(f"not rows of harness ({name} {said})")
    once = _ONCE.get(table)
    if once and {*once} <= there and len(content.group_by(list(once)).aggregate([])) < len(content):
        raise _Damaged(f"not rows of harness (the same {' and '.join(once)} twice)")
    try:
        if "environment" in there:
            for text in content["environment"].unique().to_pylist():
                Environment.model_validate_json(text)
        if TrialSpec.model_fields.keys() <= there and len(content):
            # Repeats differ in the seed alone: their spec is looked at once, with the largest.
            rows = content.select([name for name in TrialSpec.model_fields if name != "seed"]).to_pylist()
            seed = pc.max(content["seed"]).as_py()
            for row in {str(row): row for row in rows}.values():
                _plain_spec(row | {"seed": seed})
    except ValidationError as error:
        raise _Damaged(one_line(f"not rows of harness ({explain(error)})")) from None
    except (ValueError, TypeError, RecursionError):
        raise _Damaged("not rows of harness (datasets is no JSON)") from None


def _foreign(column: pa.Array, name: str, field: FieldInfo | None) -> str | None:
    """What a column holds that none of harness's does; null where there is nothing."""
    known = column.drop_null()
    may_be_null = field is not None and (not field.is_required() or type(None) in typing.get_args(field.annotation))
    if len(known) < len(column) and not may_be_null and name not in _NULLABLE:
        return "is missing"
    if pa.types.is_list(known.type):
        known = known.flatten()
        if known.null_count:
            return "has gaps"
    if not len(known) or pa.types.is_boolean(known.type):
        return None
    if pa.types.is_string(known.type):
        known = known.unique()
        if name in _PATTERNS and not pc.all(pc.match_substring_regex(known, _PATTERNS[name])).as_py():
            return "is no name"
        words = _words(field.annotation) if field is not None else ()
        return "is none of its words" if words and not {*known.to_pylist()} <= {*words} else None
    if pa.types.is_timestamp(known.type):
        known = known.cast(pa.int64())
        if pc.max(known).as_py() > _LAST_MICROSECOND:
            return "is beyond all time"
    elif pa.types.is_floating(known.type) and not pc.all(pc.is_finite(known)).as_py():
        return "is not finite"
    return "is negative" if name not in _SIGNED and pc.min(known).as_py() < 0 else None


def _words(annotation: Any) -> tuple[str, ...]:
    """The words of a Literal, alone or beside null."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    beside = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    return next((words for each in beside if (words := _words(each))), ())


# ------------------------------------------------------------------------------------ store


class DamagedPart(UserWarning):
    """A part of the results that is none of ours or is damaged; its rows are left out."""


@dataclass(frozen=True)
class Joined:
    """What joining two folders did with the trials of the other one."""

    added: int
    replaced: int
    """Recorded in both, and later in the other one."""
    kept: int
    """Recorded in both, and not later there."""


_OF_A_TRIAL: tuple[Table, ...] = ("steps", "stories", "trials")
"""What is listed in the last is whole in those before."""


class Store:
    """The parquet folder of one grid. Several processes may write to it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, record: Record) -> None:
        """Keep a record; a former one of the same trial is replaced. The trials part comes last:
        a trial that is listed has its steps and stories.

        Raises:
            OSError: the folder cannot be written.
        """
        name = record.trial_id
        steps = [{"trial_id": name, **step.model_dump()} for step in record.steps]
        stories = [{"trial_id": name, **story.model_dump()} for story in record.stories]
        with locked(self.folder):
            self._write_part("steps", name, steps)
            self._write_part("stories", name, stories)
            self._write_part("trials", name, [_trial_row(record)])

    def write_inference(self, trial: Mapping[str, Any], inference: Inference) -> None:
        """Keep how a trial's model works; what was known of it before is replaced. `models` comes last: what is listed
        there has its requests and answers.

        Args:
            trial: its row.
            inference: what was measured.

        Raises:
            OSError: the folder cannot be written.
        """
        of = {"trial_id": trial["trial_id"], "adapter_id": trial["adapter_id"]}
        with locked(self.folder):
            for table in AT_WORK:
                rows = [of | row.model_dump() for row in getattr(inference, table)]
                self._write_part(table, trial["trial_id"], rows)

    def _write_part(self, table: Table, name: str, rows: list[dict[str, Any]]) -> None:
        self._write_table(table, name, pa.Table.from_pylist(rows, schema=SCHEMAS[table]))

    def _write_table(self, table: Table, name: str, content: pa.Table) -> None:
        if not _PART_NAME.fullmatch(name):  # rows of others may say anything
            raise InputError(f"{self.folder}: {name!r} is no trial id")
        written = pa.BufferOutputStream()
        pq.write_table(content, written, compression="zstd")
        write_whole(self.folder / table / f"{name}.parquet", written.getvalue().to_pybytes())

    def describe(self, about: Mapping[str, Any]) -> None:
        """Keep what the grid says of itself (title, claims) beside its rows, for the report.

        Raises:
            OSError: the folder cannot be written.
        """
        if about != self.description():
            write_whole(self.folder / "grid.json", json.dumps(about, indent=1).encode())

    def description(self) -> dict[str, Any]:
        """What the grid said of itself; empty where nothing is known."""
        try:
            found = json.loads((self.folder / "grid.json").read_bytes())
            json.dumps(found, ensure_ascii=False).encode()  # JSON can escape half a character, which no page holds
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def completed(self) -> dict[str, str]:
        """Status of each recorded trial, by trial id; of those that have lost their steps or stories none."""
        rows = self.read("trials", columns=["trial_id", "status"])
        lost = self.incomplete()
        statuses = zip(rows["trial_id"].to_pylist(), rows["status"].to_pylist(), strict=True)
        return {trial: status for trial, status in statuses if trial not in lost}

    def incomplete(self) -> set[str]:
        """Trials whose row is there and whose steps or stories are not: a part was damaged, or moved away."""
        rows = self.read("trials", columns=["trial_id", "optimizer_steps", "evaluated_stories"])
        lost = set()
        for table, needs in (("steps", "optimizer_steps"), ("stories", "evaluated_stories")):
            there = set(self.read(table, columns=["trial_id"])["trial_id"].to_pylist())  # type: ignore[arg-type]  # literals
            wanted = zip(rows["trial_id"].to_pylist(), rows[needs].to_pylist(), strict=True)
            lost |= {trial for trial, count in wanted if count and trial not in there}
        return lost

    def marks(self) -> dict[str, dt.datetime]:
        """When each recorded trial began: what tells a record from a later one of the same trial."""
        rows = self.read("trials", columns=["trial_id", "started_at"])
        return dict(zip(rows["trial_id"].to_pylist(), rows["started_at"].to_pylist(), strict=True))

    def mark(self, trial_id: str) -> dt.datetime | None:
        """As `marks`, of one trial; null where it is not recorded."""
        row = self.part(trial_id)
        if row is not None:
            return row["started_at"]  # type: ignore[no-any-return]  # rows are untyped
        return self.marks().get(trial_id) if any(p.name.startswith("all-") for p in self._parts("trials")) else None

    def rename(self, names: Mapping[str, Mapping[str, Any]]) -> None:
        """Give recorded trials the place that they have in the grid now: it may have been edited since.

        Args:
            names: by trial id, any of `label`, `factor`, `level`, `repeat` and `baseline_id`.
        """
        with locked(self.folder):
            for row in self.read("trials").to_pylist():
                wanted = names.get(row["trial_id"])
                if wanted and any(row[key] != value for key, value in wanted.items()):
                    self._write_part("trials", row["trial_id"], [row | wanted])

    def part(self, trial_id: str) -> dict[str, Any] | None:
        """The row of a trial that was recorded since the parts were last made one; null where it was not."""
        try:
            content = _read_part(self.folder / "trials" / f"{trial_id}.parquet", "trials")
        except (FileNotFoundError, _Damaged):
            return None
        return content.to_pylist()[0]  # type: ignore[no-any-return]  # pyarrow has no types

    def adopt(self, source: Store, trial_id: str, row: Mapping[str, Any]) -> None:
        """Keep a trial of another folder as `row`, with its steps and stories.

        Args:
            source: where it is recorded.
            trial_id: its id there.
            row: all columns of its row here.
        """
        tables: tuple[Table, ...] = ("steps", "stories")
        with locked(self.folder):
            for table in tables:
                found = source.read(table).filter(pc.field("trial_id") == trial_id).to_pylist()
                self._write_part(table, row["trial_id"], [each | {"trial_id": row["trial_id"]} for each in found])
            self._write_part("trials", row["trial_id"], [dict(row)])

    def join(self, other: Store, hear: Callable[[int, int], None] = lambda done, of: None) -> Joined:
        """Keep the trials of another folder here too, each once: where both have one, that which ended well, else the
        later one. What comes with a trial (steps, stories, its model at work, adapter, log) comes along. Joining again
        changes nothing.

        Args:
            other: left as it is.
            hear: told how many trials are done, of how many.

        Raises:
            InputError: a name in its rows is not one that harness gives.
            OSError: the folder cannot be written.
        """
        lost_here, lost_there = self.incomplete(), other.incomplete()
        mine = {row["trial_id"]: row for row in self.read("trials").to_pylist() if row["trial_id"] not in lost_here}
        theirs = [row for row in other.read("trials").to_pylist() if row["trial_id"] not in lost_there]
        newer = [row for row in theirs if _is_better(row, mine.get(row["trial_id"]))]
        of_trial = {table: _by_trial(other.read(table)) for table in SCHEMAS}
        for number, row in enumerate(newer, start=1):
            _copy_within(other.folder / "adapters", self.folder / "adapters", row["adapter_id"])
            _copy_within(other.folder / "logs", self.folder / "logs", row["log"] and Path(row["log"]).name)
            with locked(self.folder):
                for table in _OF_A_TRIAL:
                    self._write_part(table, row["trial_id"], of_trial[table].get(row["trial_id"], []))
            hear(number, len(newer))
        self._join_at_work(of_trial)
        if not self.description() and other.description():
            self.describe(other.description())
        added = sum(row["trial_id"] not in mine for row in newer)
        return Joined(added, len(newer) - added, len(theirs) - len(newer))

    def _join_at_work(self, theirs: Mapping[Table, Mapping[str, list[dict[str, Any]]]]) -> None:
        """Keep how another folder's models work, where they are those of the trials here and it is not known yet."""
        adapters = {row["trial_id"]: row["adapter_id"] for row in self.read("trials").to_pylist()}
        known = {row["trial_id"]: row["adapter_id"] for row in self.read("models").to_pylist()}
        for trial, rows in theirs["models"].items():
            adapter = rows[0]["adapter_id"]
            if adapters.get(trial) == adapter and known.get(trial) != adapter:
                with locked(self.folder):
                    for table in AT_WORK:
                        self._write_part(table, trial, theirs[table].get(trial, []))

    def read(self, table: Table, columns: list[str] | None = None) -> pa.Table:
        """All rows of a table, the latest record of each trial only; empty where nothing was recorded. Parts that are
        damaged or none of ours are left out, with a `DamagedPart` warning each.

        Raises:
            InputError: a part is of a newer version of harness.
        """
        for _ in range(_MOST_LOOKS):
            with contextlib.suppress(FileNotFoundError):
                return self._read(table, columns)
        raise InputError(f"{self.folder}: its parts vanish while they are read; is somebody moving them?")

    def _read(self, table: Table, columns: list[str] | None) -> pa.Table:
        tables = list(self._whole_parts(table, columns).values())
        return _latest(tables) if tables else SCHEMAS[table].empty_table().select(columns or SCHEMAS[table].names)

    def _parts(self, table: Table) -> list[Path]:
        """Compacted parts first and single ones after: a trial that is in both was run again."""
        parts = [p for p in (self.folder / table).glob("*.parquet") if not p.name.startswith(".")]
        return sorted(parts, key=lambda p: (not p.name.startswith("all-"), p.name))

    def _whole_parts(self, table: Table, columns: list[str] | None = None) -> dict[Path, pa.Table]:
        """Those that can be read; a warning for each of the others."""
        found = {}
        for part in self._parts(table):
            try:
                found[part] = _read_part(part, table, columns)
            except _Damaged as damage:
                warnings.warn(DamagedPart(f"{part}: {damage}; left out"), stacklevel=4)
        return found

    def damage(self) -> dict[Path, str]:
        """Parts that cannot be read, each with what is wrong with it.

        Raises:
            InputError: a part is of a newer version of harness.
        """
        found = {}
        for table in SCHEMAS:
            for part in self._parts(table):
                try:
                    _read_part(part, table)
                except _Damaged as damage:
                    found[part] = str(damage)
                except FileNotFoundError:  # compacted meanwhile
                    continue
        return found

    def set_aside(self) -> None:
        """Move damaged and foreign parts out of the way, into `set-aside/`, with a `DamagedPart` warning each.

        Raises:
            InputError: a part is of a newer version of harness.
            OSError: the folder cannot be written.
        """
        if not self.folder.is_dir():
            return
        with locked(self.folder):
            for part, reason in self.damage().items():
                place = self.folder / "set-aside" / f"{part.parent.name}-{time.time_ns()}-{part.name}"
                place.parent.mkdir(exist_ok=True)
                part.rename(place)
                warnings.warn(DamagedPart(f"{part}: {reason}; set aside as {place.name}"), stacklevel=2)

    def compact(self, above: int = _COMPACT_ABOVE) -> None:
        """Make one part of many. Rows are written before the parts that held them go; a reader in
        between sees some rows twice and keeps one.
        """
        with locked(self.folder):
            for table in SCHEMAS:
                if len(self._parts(table)) > above:
                    parts = self._whole_parts(table)  # what is damaged stays as it is
                    content = _latest(list(parts.values()))
                    # In the order of time: should a former one be left behind, the rows of the later one count.
                    name = f"all-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
                    self._write_table(table, name, content)
                    for part in parts:
                        part.unlink(missing_ok=True)


def _read_part(part: Path, table: Table, columns: list[str] | None = None) -> pa.Table:
    schema = SCHEMAS[table] if columns is None else pa.schema([SCHEMAS[table].field(c) for c in columns])
    try:
        with pq.ParquetFile(part) as file:
            about = file.schema_arrow
            version = (about.metadata or {}).get(b"schema_version", b"").decode(errors="replace")
            if not re.fullmatch(r"[0-9]{1,9}", version):
                raise _Damaged("not written by harness (it has no schema_version)")
            if int(version) > SCHEMA_VERSION:
                raise InputError(
                    f"{part}: schema_version {version} is newer than this harness ({SCHEMA_VERSION}); upgrade it"
                )
            if "trial_id" not in about.names or len(set(about.names)) < len(about.names):
                raise _Damaged("not written by harness (it has no trial_id, or a column twice)")
            content = file.read(columns=[name for name in schema.names if name in about.names])
        content.validate(full=True)
        cast = [
            content[field.name].cast(field.type)
            if field.name in about.names
            else pa.repeat(pa.scalar(_SINCE.get(field.name), field.type), len(content))
            for field in schema
        ]
    except (FileNotFoundError, InputError):
        raise  # somebody compacted the folder meanwhile: its rows are in another part
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk or the system, not of the part
        raise _Damaged(one_line(f"not a readable parquet file ({error})")) from None
    found = pa.table(cast, schema=schema)
    _refuse_foreign(table, found)
    return found


def _latest(tables: list[pa.Table]) -> pa.Table:
    """One table of all rows but those of a trial that is in a later table too."""
    owner = {trial: i for i, part in enumerate(tables) for trial in set(part["trial_id"].to_pylist())}
    kept = [
        part.filter(pa.array([owner[trial] == i for trial in part["trial_id"].to_pylist()], pa.bool_()))
        for i, part in enumerate(tables)
    ]
    return pa.concat_tables(kept)


def _by_trial(content: pa.Table) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in content.to_pylist():
        found.setdefault(row["trial_id"], []).append(row)
    return found


def _is_better(row: Mapping[str, Any], mine: Mapping[str, Any] | None) -> bool:
    """Whether a trial's record is kept in place of the one that is here: a later one, unless it ended worse."""
    if mine is None:
        return True
    if (row["status"] == "ok") != (mine["status"] == "ok"):
        return bool(row["status"] == "ok")
    return bool(row["started_at"] > mine["started_at"])


def _copy_within(source: Path, target: Path, name: str | None) -> None:
    """Copy a file or folder of that name, which is whole or absent. A folder that is there already is the same: its
    name is the hash of its content.
    """
    if name is None or not _PART_NAME.fullmatch(name) or (target / name).is_dir() or not (source / name).exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    aside = target / f".{name}.{uuid.uuid4().hex[:8]}.aside"
    try:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
        copy(source / name, aside)
        aside.replace(target / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)


def find(root: Path, trial: str) -> Iterable[tuple[Path, dict[str, Any]]]:
    """Rows whose trial id or spec id begins with `trial`, or whose label is `trial`, in any grid under `root`."""
    for folder in sorted(p.parent for p in root.glob("*/trials")):
        for row in Store(folder).read("trials").to_pylist():
            if row["trial_id"].startswith(trial) or row["label"] == trial:
                yield folder, row
