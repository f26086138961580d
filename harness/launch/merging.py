"""Merging an adapter, from asking to a whole folder in its place; the work is done in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import grid
from harness.errors import InputError
from harness.launch.isolated import isolated
from harness.results import find, spec_of
from harness.spec import TrialSpec

_ON_THE_CARD = ("peak_memory_bytes", "tokens_per_second", "eval_loss_before", "eval_loss", "trainable_parameters",
                "adapter_bytes")  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """An adapter, and how it was trained."""

    spec: TrialSpec
    folder: Path
    name: str
    """Short, for a folder's name."""
    figures: Mapping[str, float]
    """Of its trial; empty where it comes from elsewhere."""


@dataclass(frozen=True)
class Recorded(Trained):
    """The adapter of a recorded trial."""

    row: Mapping[str, Any]
    """Of the trials table."""
    grid: Path
    """Folder of its grid's results."""


def trained(results: Path, trial: str) -> Recorded:
    """The adapter of a recorded trial.

    Args:
        results: folder of the grids' folders.
        trial: beginning of its id, or its label.

    Raises:
        InputError: there is none, or there are several.
    """
    matches = list(find(results, trial))
    # A whole id is meant as such: it is the beginning of its twin's too.
    matches = [match for match in matches if match[1]["trial_id"] == trial] or matches
    if not matches:
        raise InputError(f"no trial {trial!r} in {results}; `harness ls <grid>` lists them")
    kept = [(folder, row) for folder, row in matches if row["adapter_id"] is not None]
    if not kept:
        folder, row = matches[0]
        raise InputError(
            f"{row['label']} of {folder.name} ended as {row['status']} and kept no adapter; "
            "that takes adapter: lora and save_adapter: true"
        )
    if len(kept) > 1:
        ids = ", ".join(row["trial_id"] for _, row in kept[:4])
        raise InputError(f"{len(kept)} trials are called {trial!r}; give the beginning of one id: {ids}")
    folder, row = kept[0]
    figures = {name: row[name] for name in _ON_THE_CARD if row[name] is not None}
    name = f"{folder.name}-{row['trial_id']}"
    adapter = folder / "adapters" / row["adapter_id"]
    return Recorded(spec_of(row), adapter, name, figures, row, folder)


def merge(source: Trained, out: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Merge an adapter and put the model into `out`, which is whole or absent.

    Returns:
        The fields of `harness.merge.Merged`.

    Raises:
        InputError: the adapter is none, does not fit, or cannot be merged here.
        OSError: the folder cannot be written.
    """
    check_adapter(source.folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already; give another --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{out.name}.*.aside"):  # by a merge that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.aside")
    try:
        text = source.spec.model_dump_json()
        found = isolated(_merge, text, str(source.folder), str(aside), dict(source.figures), trust_remote_code)
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return dict(found)


def configured(config: Path) -> TrialSpec:
    """The spec of a training file, or the baseline of a grid file.

    Raises:
        InputError: it is neither, or names no baseline among several trials.
    """
    trials = grid.load(config, repeats=1).trials
    chosen = [trial.spec for trial in trials if trial.baseline] or [trial.spec for trial in trials]
    if len(chosen) > 1:
        raise InputError(f"{config.name}: {len(chosen)} trials and no baseline; give the training file of one")
    return chosen[0]


def cost(found: Mapping[str, Any]) -> str:
    """What merging does to the loss, with its interval over stories, in a sentence."""
    import pandas

    from harness import stats

    losses = pandas.DataFrame({name: found["losses"][name] for name in ("merged", "unmerged")})
    differences = losses["merged"] - losses["unmerged"]
    effect = stats.paired(differences, pandas.Series(0, differences.index)).loc[0]
    return (
        f"merged − unmerged: {effect['effect']:+.5f} nats ({effect['low']:+.5f} to {effect['high']:+.5f}) "
        f"over {len(differences)} held-out stories"
    )


def merge_lora(
    config_path: str | Path, adapter_path: str | Path, out: str | Path | None = None, *, trust_remote_code: bool = False
) -> Path:
    """Merge an adapter into the base model of a training configuration.

    Args:
        config_path: a training file or a grid file; its base says the model, its precision and the stories.
        adapter_path: folder of the adapter, in peft's format.
        out: folder for the merged model; null: `<output_dir of the configuration>/merged`, else `merged/` beside it.
        trust_remote_code: let a model from the hub run its own code.

    Returns:
        The folder.

    Raises:
        InputError: something is not there, or the adapter does not fit.
    """
    config = Path(config_path)
    spec = configured(config)
    folder = Path(out) if out is not None else Path(spec.output_dir or config.parent) / "merged"
    merge(Trained(spec, Path(adapter_path), folder.name, {}), folder, trust_remote_code=trust_remote_code)
    return folder


def check_adapter(folder: Path) -> None:
    """Refuse a folder that holds no adapter, before anything is loaded.

    Raises:
        InputError: what is missing.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name} there; give a folder that a trial with save_adapter: true has kept")
    try:
        kind = json.loads((folder / "adapter_config.json").read_bytes())["peft_type"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder}/adapter_config.json: not a configuration of peft") from None
    if kind != "LORA":
        raise InputError(f"{folder}: an adapter of kind {kind}; LoRA alone is merged")


def _merge(text: str, adapter: str, folder: str, figures: dict[str, float], trust_remote_code: bool) -> dict[str, Any]:
    from harness import merge as merging

    spec = TrialSpec.model_validate_json(text)
    found = merging.merge(spec, Path(adapter), Path(folder), figures, trust_remote_code=trust_remote_code)
    return found.model_dump(mode="json")
