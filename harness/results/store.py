"""The parquet folder that keeps every record.

`results/<grid>/{trials,steps,stories}/` hold one part per trial, written aside and renamed, so
that a part is whole or absent; `{models,requests,answers}/` hold inference results in the same way.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from harness._util.files import locked, write_whole
from harness.errors import InputError
from harness.record import WATCHED, InferenceRecord, Record, Step
from harness.results.parts import DamagedPart, latest_rows, read_part, write_parts
from harness.results.schema import INFERENCE_TABLES, SCHEMAS, Table, trial_row
from harness.results.validation import PART_NAME, Damaged
from harness.results.versions import Version, described, versions_of

_EVERY = ""
"""Stands for all environments where something is known of each."""
_MOST_ATTEMPTS = 10
"""How often a folder is read whose parts are compacted meanwhile."""
_COMPACT_ABOVE = 16
"""More parts than this are compacted at the end of a run."""


class Store:
    """The parquet folder of one grid. Several processes may write to it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, record: Record) -> None:
        """Keep a record. An earlier one of the same trial is replaced.

        Raises:
            OSError: the folder cannot be written.
        """
        name = record.trial_id
        steps = [{"trial_id": name, **step.model_dump()} for step in record.steps]
        stories = [{"trial_id": name, **story.model_dump()} for story in record.stories]
        tasks = [{"trial_id": name, **item.model_dump()} for item in record.tasks]
        self.replace_rows(name, {"steps": steps, "stories": stories, "tasks": tasks, "trials": [trial_row(record)]})

    def add_visit(
        self, record: Record, figures: Callable[[Mapping[str, Any], Sequence[Step]], Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """Add the steps of a timing visit to those of its trial, and update the trial's row.

        Args:
            record: of the visit.
            figures: from the trial's row and all its steps, the columns to update.

        Returns:
            The updated row; null where the trial is not recorded, or its rows are damaged.

        Raises:
            OSError: the folder cannot be written.
        """
        name = record.trial_id
        with locked(self.folder):
            try:
                rows, of_steps = self._rows_of("trials", name), self._rows_of("steps", name)
            except Damaged:  # to write it anew would lose what can still be mended
                return None
            if not rows:
                return None
            before = [Step(**{k: v for k, v in row.items() if k != "trial_id"}) for row in of_steps]
            steps = (*before, *record.steps)
            row = rows[0] | dict(figures(rows[0], steps))
            self._write(name, {"steps": [{"trial_id": name, **step.model_dump()} for step in steps], "trials": [row]})
            return row

    def _rows_of(self, table: Table, trial_id: str) -> list[dict[str, Any]]:
        """The rows of one trial: from its own part, else from the compacted ones.

        Raises:
            Damaged: its own part is.
        """
        try:
            content = read_part(self.folder / table / f"{trial_id}.parquet", table)
        except FileNotFoundError:
            content = self.read(table).filter(pc.field("trial_id") == trial_id)
        return content.to_pylist()  # type: ignore[no-any-return]  # pyarrow has no types

    def write_inference(self, trial: Mapping[str, Any], inference: InferenceRecord) -> None:
        """Keep the inference results of a trial's adapter. Earlier ones are replaced.

        Args:
            trial: its row.
            inference: what was measured.

        Raises:
            OSError: the folder cannot be written.
        """
        ids = {"trial_id": trial["trial_id"], "adapter_id": trial["adapter_id"]}
        rows = {table: [ids | row.model_dump() for row in getattr(inference, table)] for table in INFERENCE_TABLES}
        self.replace_rows(trial["trial_id"], rows)

    def replace_rows(self, trial_id: str, rows: Mapping[Table, Sequence[Mapping[str, Any]]]) -> None:
        """Replace a trial's rows in some tables.

        Args:
            trial_id: the trial.
            rows: by table, in the order in which they come into place: `TRIAL_TABLES` or `INFERENCE_TABLES`.

        Raises:
            InputError: it is not a trial id.
            OSError: the folder cannot be written; the earlier rows are kept.
        """
        with locked(self.folder):
            self._write(trial_id, rows)

    def _write(self, name: str, rows: Mapping[Table, Sequence[Mapping[str, Any]]]) -> None:
        contents = {table: pa.Table.from_pylist(list(of), schema=SCHEMAS[table]) for table, of in rows.items()}
        self._write_parts(name, contents)

    def _write_parts(self, name: str, contents: Mapping[Table, pa.Table]) -> None:
        """Write a part of each table, all or none."""
        if not PART_NAME.fullmatch(name):  # rows of others may hold anything
            raise InputError(f"{self.folder}: {name!r} is not a trial id")
        write_parts({self.folder / table / f"{name}.parquet": content for table, content in contents.items()})

    def describe(
        self,
        about: Mapping[str, Any],
        environment_ids: Collection[str] = (_EVERY,),
        version: Version | None = None,
    ) -> None:
        """Keep the grid's title and claims with its rows, for the report. Rows that were looked at stay so.

        Args:
            about: `Grid.about`, or another store's description.
            environment_ids: whose rows are looked at as often as the grid says.
            version: the trials that the grid has in these environments; null: those that `about` has.

        Raises:
            OSError: the folder cannot be written.
        """
        with locked(self.folder):
            before = self.description()
            looks = _looks(before)
            for environment_id, number in _looks(about, environment_ids).items():
                looks[environment_id] = max(number, looks.get(environment_id, 1))
            versions = versions_of(about if version is None else before)
            if version is not None:
                versions |= {each: version.after(versions.get(each)) for each in environment_ids}
            kept = {"looks": looks, "versions": described(versions)}
            about = {key: value for key, value in about.items() if key not in kept} | {
                k: v for k, v in kept.items() if v
            }
            if about != before:
                write_whole(self.folder / "grid.json", json.dumps(about, indent=1).encode())

    def description(self) -> dict[str, Any]:
        """What `describe` kept; empty where it kept nothing."""
        try:
            about = json.loads((self.folder / "grid.json").read_bytes())
            json.dumps(about, ensure_ascii=False).encode()  # JSON can hold lone surrogates, UTF-8 cannot
        except (OSError, ValueError, RecursionError):
            return {}
        return about if isinstance(about, dict) else {}

    def completed(self) -> dict[str, str]:
        """Status of each recorded trial by trial id, but for those that have lost their steps or stories."""
        rows = self.read("trials", columns=["trial_id", "status"])
        lost = self.incomplete()
        statuses = zip(rows["trial_id"].to_pylist(), rows["status"].to_pylist(), strict=True)
        return {trial: status for trial, status in statuses if trial not in lost}

    def incomplete(self) -> set[str]:
        """Trials whose steps, stories or answers are missing: a part was damaged, or moved away."""
        rows = self.read("trials", columns=["trial_id", "optimizer_steps", "evaluated_stories", "task_score"])
        lost = set()
        for table, needs in (("steps", "optimizer_steps"), ("stories", "evaluated_stories"), ("tasks", "task_score")):
            there = set(self.read(table, columns=["trial_id"])["trial_id"].to_pylist())  # type: ignore[arg-type]  # literals
            wanted = zip(rows["trial_id"].to_pylist(), rows[needs].to_pylist(), strict=True)
            measured = {trial for trial, figure in wanted if figure is not None and (figure or table == "tasks")}
            lost |= measured - there
        return lost

    def start_times(self) -> dict[str, dt.datetime]:
        """When each recorded trial began. It tells records of the same trial apart."""
        rows = self.read("trials", columns=["trial_id", "started_at"])
        return dict(zip(rows["trial_id"].to_pylist(), rows["started_at"].to_pylist(), strict=True))

    def row(self, trial_id: str, columns: Sequence[str]) -> dict[str, Any] | None:
        """At least these columns of a trial's row; null where it is not recorded."""
        recent = self.recent_row(trial_id)
        if recent is not None or not any(part.name.startswith("all-") for part in self._parts("trials")):
            return recent
        rows = self.read("trials", columns=["trial_id", *columns]).filter(pc.field("trial_id") == trial_id)
        return next(iter(rows.to_pylist()), None)

    def rename(self, names: Mapping[str, Mapping[str, Any]]) -> None:
        """Update the place of recorded trials in the grid, which may have been edited or moved since.

        Args:
            names: by trial id, any of `label`, `factor`, `level`, `repeat`, `baseline_id` and `folder`.
        """
        with locked(self.folder):
            for row in self.read("trials").to_pylist():
                wanted = names.get(row["trial_id"])
                if wanted and any(row[key] != value for key, value in wanted.items()):
                    self._write(row["trial_id"], {"trials": [row | wanted]})

    def recent_row(self, trial_id: str) -> dict[str, Any] | None:
        """The row of a trial that was recorded since the last compaction; null where it was not."""
        try:
            content = read_part(self.folder / "trials" / f"{trial_id}.parquet", "trials")
        except (FileNotFoundError, Damaged):
            return None
        return next(iter(content.to_pylist()), None)

    def read(self, table: Table, columns: list[str] | None = None) -> pa.Table:
        """All rows of a table, of the latest record of each trial; empty where nothing was recorded. Damaged and
        foreign parts are left out, with a `DamagedPart` warning each.

        Raises:
            InputError: a part is of a newer version of harness.
        """
        for _ in range(_MOST_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                return self._read(table, columns)
        raise InputError(f"{self.folder}: its parts vanish while they are read; is another program moving them?")

    def _read(self, table: Table, columns: list[str] | None) -> pa.Table:
        parts = self._whole_parts(table, columns)
        return latest_rows(parts) if parts else SCHEMAS[table].empty_table().select(columns or SCHEMAS[table].names)

    def _parts(self, table: Table) -> list[Path]:
        """Compacted parts first, single ones after: a trial that is in both was run again."""
        parts = [p for p in (self.folder / table).glob("*.parquet") if not p.name.startswith(".")]
        return sorted(parts, key=lambda p: (not p.name.startswith("all-"), p.name))

    def _whole_parts(self, table: Table, columns: list[str] | None = None) -> dict[Path, pa.Table]:
        """The readable parts; a warning for each of the others."""
        contents = {}
        for part in self._parts(table):
            try:
                contents[part] = read_part(part, table, columns)
            except Damaged as damage:
                warnings.warn(DamagedPart(f"{part}: {damage}; left out"), stacklevel=4)
        return contents

    def damage(self) -> dict[Path, str]:
        """Parts that cannot be read, each with the reason.

        Raises:
            InputError: a part is of a newer version of harness.
        """
        reasons = {}
        for table in SCHEMAS:
            for part in self._parts(table):
                try:
                    read_part(part, table)
                except Damaged as damage:
                    reasons[part] = str(damage)
                except FileNotFoundError:  # compacted meanwhile
                    continue
        return reasons

    def set_aside(self) -> None:
        """Move damaged and foreign parts into `set-aside/`, with a `DamagedPart` warning each.

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
        """Make one part of many. The old parts are removed after the new one is written; a reader in between sees
        rows twice and keeps one.
        """
        with locked(self.folder):
            for table in SCHEMAS:
                if len(self._parts(table)) > above:
                    parts = self._whole_parts(table)  # damaged ones stay as they are
                    content = latest_rows(parts)
                    # Names sort by time: should an earlier one be left behind, the rows of the later one count.
                    name = f"all-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
                    self._write_parts(name, {table: content})
                    for part in parts:
                        part.unlink(missing_ok=True)


def grid_folders(root: Path) -> list[Path]:
    """The results of one grid, or of each grid in a folder."""
    return [root] if (root / "trials").is_dir() else sorted(path.parent for path in root.glob("*/trials"))


def find(root: Path, trial: str) -> Iterable[tuple[Path, dict[str, Any]]]:
    """Rows whose trial id or spec id begins with `trial`, or whose label is `trial`, in any grid under `root`; of a
    watched loop its name without `WATCHED` does too.
    """
    for folder in grid_folders(root):
        for row in Store(folder).read("trials").to_pylist():
            label = row["label"].removesuffix(WATCHED) if row["watched"] else row["label"]
            if row["trial_id"].startswith(trial) or trial in (row["label"], label):
                yield folder, row


def looks_of(about: Mapping[str, Any], environment_id: str) -> int:
    """How often an environment's rows of a described grid were looked at, at most."""
    looks = _looks(about)
    return max(looks.get(environment_id, 1), looks.get(_EVERY, 1))


def _looks(about: Mapping[str, Any], environment_ids: Collection[str] = (_EVERY,)) -> dict[str, int]:
    """Numbers above one by environment; a file edited by hand may hold anything.

    Args:
        about: says them by environment, or one number.
        environment_ids: that one number is of; in files of earlier versions it is of all.
    """
    looks = about.get("looks")
    looks = looks if isinstance(looks, dict) else dict.fromkeys(environment_ids, looks)
    return {of: number for of, number in looks.items() if type(number) is int and number > 1}
