"""Finds an adapter and how it was trained: in recorded results, or by a training file."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from harness._util.messages import one_line
from harness.errors import InputError
from harness.grids import grid
from harness.record import NO_CONTENTS, Contents
from harness.results.schema import spec_of
from harness.results.store import find
from harness.sources import fingerprints
from harness.spec import capabilities
from harness.spec.trial import TrialSpec

_CARD_METRICS = ("peak_memory_bytes", "tokens_per_second", "eval_loss_before", "eval_loss", "trainable_parameters",
                "adapter_bytes")  # fmt: skip
"""Figures of the trial that a merged model's card shows."""


_SAME_BUT_CONTENTS = ("spec_id", "environment_id", "twin")


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter, and how it was trained."""

    spec: TrialSpec
    folder: Path
    name: str
    """Short, for a folder's name."""
    figures: Mapping[str, float]
    """Of its trial, by metric; empty where it was not recorded here."""


@dataclass(frozen=True)
class RecordedAdapter(TrainedAdapter):
    """The adapter of a recorded trial."""

    row: Mapping[str, Any]
    """Its row of the trials table."""
    results: Path
    """Folder of its grid's results."""


def find_adapter(results: Path, trial: str) -> RecordedAdapter:
    """The adapter of a recorded trial.

    Args:
        results: folder of the grids' folders.
        trial: beginning of its id, or its label.

    Raises:
        InputError: there is none, or there are several.
    """
    matches = list(find(results, trial))
    # A whole id is also the beginning of its twin's id, and means itself alone.
    matches = [match for match in matches if match[1]["trial_id"] == trial] or matches
    if not matches:
        raise InputError(f"no trial {trial!r} in {results}; `harness ls <grid>` lists them")
    # Of a trial that was run again with other contents, the latest.
    by_time = sorted(matches, key=lambda match: match[1]["started_at"])
    latest = {(folder, *(row[name] for name in _SAME_BUT_CONTENTS)): (folder, row) for folder, row in by_time}
    kept = [(folder, row) for folder, row in latest.values() if row["adapter_id"] is not None]
    if not kept:
        folder, row = matches[0]
        raise InputError(
            f"{row['label']} of {folder.name} ended as {row['status']} and kept no adapter; "
            "that takes an adapter and save_adapter: true"
        )
    if len(kept) > 1:
        ids = ", ".join(row["trial_id"] for _, row in kept[:4])
        raise InputError(f"{len(kept)} trials are called {trial!r}; give the beginning of one id: {ids}")
    folder, row = kept[0]
    figures = {name: row[name] for name in _CARD_METRICS if row[name] is not None}
    name = f"{folder.name}-{row['trial_id']}"
    adapter = folder / "adapters" / row["adapter_id"]
    return RecordedAdapter(spec_of(row), adapter, name, figures, row, folder)


def refuse_changed_base(adapter: TrainedAdapter) -> None:
    """Refuse an adapter whose base model is not the one that it was trained on.

    Raises:
        InputError: it has changed since; nothing is known of an adapter that no trial kept.
    """
    before = _contents(adapter).base
    if before is not None and before != fingerprints.base(adapter.spec):
        _refuse(adapter.spec.base_model, "the adapter belongs to what it was")


def refuse_changed_data(adapter: TrainedAdapter) -> None:
    """Refuse an adapter whose stories are not those of its trial: they may have been trained on.

    Raises:
        InputError: they have changed since.
    """
    if data_changed(adapter):
        _refuse(adapter.spec.dataset_paths, "these are not the stories that its trial held out")


def data_changed(adapter: TrainedAdapter) -> bool:
    """Whether the stories are not those of its trial.

    Raises:
        InputError: they cannot be read.
    """
    before = _contents(adapter).data
    return before is not None and before != fingerprints.data(adapter.spec)


def notes(adapter: TrainedAdapter) -> list[str]:
    """What to know before an adapter is merged: it names another base, or the data have changed; a line each."""
    lines = []
    named = _configuration(adapter.folder).get("base_model_name_or_path")
    if named and _last_part(str(named)) != _last_part(adapter.spec.base_model):
        lines.append(
            f"the adapter names the base that it was trained on {one_line(str(named), 200)}, and is merged into "
            f"{adapter.spec.base_model}"
        )
    with contextlib.suppress(InputError):  # data that are gone cannot be compared, and no losses are measured on them
        if data_changed(adapter):
            paths = adapter.spec.dataset_paths
            lines.append(f"{paths} changed since this trial ran: the losses are of its present held-out stories")
    return lines


def _last_part(base_model: str) -> str:
    """The name of a model without where it is, which differs between machines and tools."""
    return re.split(r"[/\\:]", base_model.rstrip("/\\"))[-1].lower()


def kind(folder: Path) -> str:
    """The kind of adapter that a folder holds, by its configuration: `lora`, say.

    Raises:
        InputError: there is no configuration of peft.
    """
    return str(_configuration(folder)["peft_type"]).lower()


def _configuration(folder: Path) -> Mapping[str, Any]:
    try:
        read: Mapping[str, Any] = json.loads((folder / "adapter_config.json").read_bytes())
        read["peft_type"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder}/adapter_config.json: not a configuration of peft") from None
    return read


def _contents(adapter: TrainedAdapter) -> Contents:
    return Contents.of_row(adapter.row) if isinstance(adapter, RecordedAdapter) else NO_CONTENTS


def _refuse(name: str, reason: str) -> NoReturn:
    raise InputError(f"{name} changed since this trial ran, and {reason}; put it back, or run the trial again")


def spec_of_file(file: Path) -> TrialSpec:
    """The spec of a training file, or the baseline of a grid file.

    Raises:
        InputError: it is neither, or names no baseline among several trials.
    """
    trials = grid.load(file, repeats=1).trials
    chosen = [trial.spec for trial in trials if trial.baseline] or [trial.spec for trial in trials]
    if len(chosen) > 1:
        raise InputError(f"{file.name}: {len(chosen)} trials and no baseline; give the training file of one")
    return chosen[0]


def check_adapter(folder: Path, *, to_merge: bool = True) -> None:
    """Refuse a folder that holds no adapter, before anything is loaded.

    Args:
        folder: of the adapter.
        to_merge: it shall be merged, which some methods cannot be.

    Raises:
        InputError: what is missing, or why it cannot be merged.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            hint = "give a folder that a trial with save_adapter: true has kept"
            if (folder / "adapter_model.bin").is_file():
                hint = "adapter_model.bin may run code when it is read; load it with peft, and save it as safetensors"
            raise InputError(f"{folder}: no {name} there; {hint}")
    method = kind(folder)
    if to_merge and (reason := capabilities.why_not_merged(method)):
        raise InputError(f"{folder}: an adapter of kind {method.upper()}: {reason}")
