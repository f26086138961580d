"""Merges an adapter into its base, in a process of its own, and puts the whole model into a folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness._util.files import folder_aside, remove_unfinished
from harness.adapters.trained import TrainedAdapter, check_adapter, notes, refuse_changed_base, spec_of_file
from harness.errors import InputError
from harness.launch.isolated import run_isolated
from harness.spec.trial import TrialSpec

OnNote = Callable[[str], None]
"""Called with what to know of a merge, a line each."""


def merge(
    adapter: TrainedAdapter,
    out: Path,
    *,
    allow_difference: bool = False,
    trust_remote_code: bool = False,
    on_note: OnNote = lambda note: None,
) -> dict[str, Any]:
    """Merge an adapter and put the model into `out`, which is whole or absent.

    Args:
        adapter: the trained adapter.
        out: folder for the model.
        allow_difference: write a model that is off by more than rounding too.
        trust_remote_code: let a model from the hub run its own code.
        on_note: called as something is found that its user should know; the card says it too.

    Returns:
        The fields of `merged_model.Merged`.

    Raises:
        InputError: the folder holds no adapter, it does not fit its base, the base has changed since, or the merged
            model is off by more than rounding.
        OSError: the folder cannot be written.
    """
    check_adapter(adapter.folder)
    refuse_changed_base(adapter)
    place = _place(out)
    known = notes(adapter)
    for note in known:
        on_note(note)
    with folder_aside(place.parent, place.name) as aside:
        aside.mkdir()  # what cannot be written is found before anything is loaded
        spec, figures = adapter.spec.model_dump_json(), dict(adapter.figures)
        merged = run_isolated(
            _merge, spec, str(adapter.folder), str(aside), figures, allow_difference, trust_remote_code, known,
            on_progress=on_note,
        )  # fmt: skip
    return dict(merged)


def _place(out: Path) -> Path:
    """Where the folder of a model is put, by a path without links, once what killed merges have left is removed.

    Raises:
        InputError: something is there, or an empty folder in whose place no other can be put.
    """
    place = Path(os.path.realpath(out))
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"{out} is there already; give another --out, or remove it")
    if place.exists() and (place == Path.cwd() or os.path.ismount(place)):
        what = "a mount point" if os.path.ismount(place) else "the current folder"
        raise InputError(f"{out} is {what}, and the model is put in its place as a whole; give --out {out / 'merged'}")
    remove_unfinished(place.parent, place.name)
    return place


def merge_lora(
    config_path: str | Path,
    adapter_path: str | Path,
    out: str | Path | None = None,
    *,
    allow_difference: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Merge an adapter into the base model of a training configuration.

    Args:
        config_path: a training file or a grid file; its base says the model, its precision and the stories.
        adapter_path: folder of the adapter, in peft's format.
        out: folder for the merged model; null: `<output_dir of the configuration>/merged`, else `merged/` beside it.
        allow_difference: write a model that is off by more than rounding too.
        trust_remote_code: let a model from the hub run its own code.

    Returns:
        The folder.

    Raises:
        InputError: something is not there, the adapter does not fit, or the merged model is off by more than rounding.
    """
    config = Path(config_path)
    spec = spec_of_file(config)
    folder = Path(out) if out is not None else Path(spec.output_dir or config.parent) / "merged"
    adapter = TrainedAdapter(spec, Path(adapter_path), folder.name, {})
    merge(
        adapter, folder, allow_difference=allow_difference, trust_remote_code=trust_remote_code, on_note=warnings.warn
    )  # fmt: skip
    return folder


def _merge(
    spec: str,
    adapter: str,
    folder: str,
    figures: dict[str, float],
    allow_difference: bool,
    trust_remote_code: bool,
    known: Sequence[str],
    on_note: OnNote,
) -> dict[str, Any]:
    from harness.adapters import merged_model

    merged = merged_model.merge(
        TrialSpec.model_validate_json(spec),
        Path(adapter),
        Path(folder),
        figures,
        allow_difference=allow_difference,
        trust_remote_code=trust_remote_code,
        known=known,
        on_note=on_note,
    )
    return merged.model_dump(mode="json")
