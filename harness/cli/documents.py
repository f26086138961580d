"""JSON documents for scripts: what a command prints with `--json`."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from harness.grids.grid import Grid, Trial
    from harness.launch.launcher import Launcher
    from harness.results.store import Store


def print_document(value: Any) -> None:
    """Print a value as JSON to stdout. Records become mappings, times ISO 8601, and what is not a number null."""
    print(json.dumps(_as_json(value), indent=1))


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    if isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, dt.datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def planned_document(trial: Trial, *, recorded: bool) -> dict[str, Any]:
    """A trial of a grid before it runs."""
    return {
        "spec_id": trial.spec.id,
        "label": trial.label,
        "repeat": trial.repeat,
        "recorded": recorded,
        "configuration": trial.spec.canonical(),
    }


def run_document(grid: Grid, store: Store, launcher: Launcher) -> dict[str, Any]:
    """A grid as it stands: its recorded trials in its order, and how many are left."""
    from harness.runner import grid_run

    rows = {row["trial_id"]: row for row in store.read("trials").to_pylist()}
    trials = [trial_document(rows[row["trial_id"]]) for row in grid_run.recorded(grid, store, launcher)]
    left = len(grid_run.pending(grid, store, launcher))
    return {"grid": grid.name, "folder": store.folder, "left": left, "trials": trials}


def trial_document(row: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded trial: what it is, how it ended, its configuration, and the figures that it has."""
    from harness.metrics import METRICS
    from harness.results.schema import spec_of

    # What could not be seen of a watched loop is null in its row.
    keys = {key: value for key, value in spec_of(dict(row)).canonical().items() if row[key] is not None}
    facts = ("trial_id", "spec_id", "label", "repeat", "status", "started_at", "environment_id", "phase", "error_type",
             "error", "log")  # fmt: skip
    return {
        **{name: row[name] for name in facts},
        "configuration": keys if row["watched"] else spec_of(dict(row)).canonical(),
        "figures": {name: row[name] for name in METRICS if row[name] is not None},
    }
