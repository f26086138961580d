"""Joining results: trials of another folder, kept in this one too."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from harness._util.files import folder_aside, write_whole
from harness.results.schema import INFERENCE_TABLES, SCHEMAS, TRIAL_TABLES, Table
from harness.results.store import Store
from harness.results.validation import PART_NAME
from harness.results.versions import Version, described, versions_of

_Rows = dict[str, list[dict[str, Any]]]
"""Rows of a table by trial id."""


@dataclass(frozen=True)
class Joined:
    """What joining did with the trials of the source."""

    added: int
    replaced: int
    """Recorded in both, and better in the source."""
    kept: int
    """Recorded in both, and not better in the source."""


def join(target: Store, source: Store, on_progress: Callable[[int, int], None] = lambda done, of: None) -> Joined:
    """Copy the trials of one folder into another. Where both have a trial, the one that ended well is kept, else the
    later one. Steps, stories, inference results, adapter and log come with their trial. Joining again changes nothing.

    Args:
        target: folder that is added to.
        source: left as it is.
        on_progress: called with the number of trials copied so far, and of those to be copied.

    Raises:
        InputError: a trial id of the source is not one that harness gives.
        OSError: the target cannot be written.
    """
    versions = _versions(target, source)
    lost_here, lost_there = target.incomplete(), source.incomplete()
    mine = {row["trial_id"]: row for row in target.read("trials").to_pylist() if row["trial_id"] not in lost_here}
    theirs = [row for row in source.read("trials").to_pylist() if row["trial_id"] not in lost_there]
    better = [row for row in theirs if _is_better(row, mine.get(row["trial_id"]))]
    rows = {table: _by_trial(source.read(table)) for table in SCHEMAS}
    for number, row in enumerate(better, start=1):
        _copy(source.folder / "adapters", target.folder / "adapters", row["adapter_id"])
        _copy(source.folder / "logs", target.folder / "logs", row["log"] and Path(row["log"]).name)
        target.replace_rows(row["trial_id"], {table: rows[table].get(row["trial_id"], []) for table in TRIAL_TABLES})
        on_progress(number, len(better))
    _join_inference(target, rows)
    if source.description() or target.description():
        # The target's own, and of both how often the rows were looked at and the trials that their grids have.
        of_both = {"looks": source.description().get("looks"), "versions": described(versions)}
        target.describe(source.description() | target.description() | of_both)
    added = sum(row["trial_id"] not in mine for row in better)
    return Joined(added, len(better) - added, len(theirs) - len(better))


def copy_trial(target: Store, source: Store, trial_id: str, row: Mapping[str, Any]) -> None:
    """Copy one trial, with its steps and stories, under another row.

    Args:
        target: where it is copied to.
        source: where it is recorded.
        trial_id: its id in the source.
        row: all columns of its row in the target.

    Raises:
        OSError: the target cannot be written.
    """
    rows: dict[Table, list[dict[str, Any]]] = {}
    for table in TRIAL_TABLES:
        own = source.read(table).filter(pc.field("trial_id") == trial_id).to_pylist()
        rows[table] = [each | {"trial_id": row["trial_id"]} for each in own]
    target.replace_rows(row["trial_id"], rows | {"trials": [dict(row)]})


def _versions(target: Store, source: Store) -> dict[str, Version]:
    """The version of each environment; none where one of the folders has rows of it, and does not say of which. Watched
    loops are of none.
    """
    joined: dict[str, Version | None] = {}
    for store in (target, source):
        known = versions_of(store.description())
        rows = store.read("trials", ["trial_id", "environment_id", "watched"]).to_pylist()
        for each in {row["environment_id"] for row in rows if not row["watched"]}:
            mine, before = known.get(each), joined.get(each, known.get(each))
            joined[each] = None if mine is None or before is None else before.joined(mine)
    return {each: version for each, version in joined.items() if version is not None}


def _join_inference(target: Store, rows: Mapping[Table, _Rows]) -> None:
    """Copy inference results of adapters that the target has, and has no results of."""
    adapters = {row["trial_id"]: row["adapter_id"] for row in target.read("trials").to_pylist()}
    known = {row["trial_id"]: row["adapter_id"] for row in target.read("models").to_pylist()}
    for trial, models in rows["models"].items():
        adapter = models[0]["adapter_id"]
        if adapters.get(trial) == adapter and known.get(trial) != adapter:
            target.replace_rows(trial, {table: rows[table].get(trial, []) for table in INFERENCE_TABLES})


def _by_trial(content: pa.Table) -> _Rows:
    rows: _Rows = {}
    for row in content.to_pylist():
        rows.setdefault(row["trial_id"], []).append(row)
    return rows


def _is_better(row: Mapping[str, Any], mine: Mapping[str, Any] | None) -> bool:
    """Whether a record replaces the target's: it ended well and that one did not; it is later, or has more visits."""
    if mine is None:
        return True
    if (row["status"] == "ok") != (mine["status"] == "ok"):
        return bool(row["status"] == "ok")
    # Visits are added to a record later on.
    made = [(each["started_at"], each["timed_visits"] or 0) for each in (row, mine)]
    return bool(made[0] > made[1])


def _copy(source: Path, target: Path, name: str | None) -> None:
    """Copy the file or folder of that name, whole or not at all. A folder is named by its content's hash: one that is
    there already is the same.
    """
    if name is None or not PART_NAME.fullmatch(name) or (target / name).is_dir() or not (source / name).exists():
        return
    if (source / name).is_dir():
        with folder_aside(target, name, exist_ok=True) as aside:
            shutil.copytree(source / name, aside)
    else:
        write_whole(target / name, (source / name).read_bytes())
