"""The grid file that a training file of another tool means, as YAML with comments."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from harness.dialects.training_file import OWN, TrainingFile, is_training_file
from harness.errors import InputError
from harness.grids.document import GRID_KEYS, grid_name, means
from harness.grids.levels import make_spec, normalised
from harness.grids.yaml_file import read_yaml
from harness.sources import models, stories
from harness.spec.datasets import name_of_type
from harness.spec.trial import TrialSpec

_VARY = """
# What to compare with it, for example:
# vary:
#   lora_r: [4, 64]
#   precision: [nf4, int8]
#   gradient_checkpointing: [true, false]
"""
_ORDER = list(TrialSpec.model_fields)
_KEY = re.compile(r"(\w+): ")


def read(path: Path) -> TrainingFile:
    """What a training file means, without what is not supported.

    Raises:
        InputError: it is none, is for another task, has a key that no table has, or a value that cannot be.
    """
    document = read_yaml(path)
    if not is_training_file(document, GRID_KEYS):
        raise InputError(f"{path.name} is no training file of another tool; a grid file is run as it is")
    meant = means(document, path, without_unsupported=True)
    try:
        make_spec(normalised(meant.values, "base"), "base")
    except ValueError as error:
        raise InputError(f"{path.name}: {error}") from None
    return meant


def grid_file(meant: TrainingFile, path: Path, folder: Path) -> str:
    """The text of a grid file.

    Args:
        meant: what the training file means.
        path: of the training file.
        folder: that the grid file will stand in: relative paths begin there.
    """
    sources = _sources(meant)
    values = _relocated(meant.values, path.parent, folder)
    lines = [
        f"# What {path.name}, a training file of {meant.tool}, means here.",
        f"name: {grid_name(path)}",
        "base:",
        *(line for key, value in values.items() for line in _entry(key, value, sources.get(key, []), meant)),
        *_VARY.rstrip().splitlines(),
        *_comments("Without effect on what is measured:", {k: f"{k} ({why})" for k, why in meant.no_effect.items()}),
        *_comments("Other than there:", {k: f"{k} -> {text}" for k, text in meant.notes.items()}),
        *_comments("Left out, since it is not supported; it would change what is measured:", meant.without),
    ]
    return "\n".join(lines) + "\n"


def _sources(meant: TrainingFile) -> dict[str, list[str]]:
    """By spec key, the keys of the training file that it comes from."""
    sources: dict[str, list[str]] = {}
    for name, text in meant.mapped.items():
        keys = {match[1] for part in text.split("; ") if (match := _KEY.match(part))}
        for key in keys or {"datasets"} & {f"{name}s"}:
            sources.setdefault(key, []).append(name)
    return sources


def _entry(key: str, value: Any, names: list[str], meant: TrainingFile) -> list[str]:
    """A key of `base` with where it comes from: at the end of its line, or above where it has several."""
    text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, default_flow_style=False, width=10_000)
    lines = [f"  {line}" for line in text.rstrip("\n").split("\n")]
    if meant.tool == OWN or names == [key]:
        return lines
    comment = ", ".join(names) if names else f"{meant.tool}'s default"
    return [f"{lines[0]}  # {comment}"] if len(lines) == 1 else [f"  # {comment}", *lines]


def _comments(heading: str, texts: Mapping[str, str]) -> list[str]:
    return ["", f"# {heading}", *(f"#   {' '.join(text.split())}" for text in texts.values())] if texts else []


def _relocated(values: Mapping[str, Any], before: Path, after: Path) -> dict[str, Any]:
    """The values with relative paths that lead from another folder to where they did."""
    folder = str(before.absolute())

    def moved(path: str, absolute: str) -> str:
        return path if absolute == path else os.path.relpath(absolute, after.absolute())

    result = {key: values[key] for key in sorted(values, key=lambda key: _ORDER.index(key) if key in _ORDER else -1)}
    if isinstance(model := result.get("base_model"), str) and models.is_relative_path(model, folder):
        result["base_model"] = moved(model, models.absolute(model, folder))
    for key in ("datasets", "test_datasets"):
        if isinstance(entries := result.get(key), list):
            result[key] = [
                _named(entry) | {"path": moved(entry["path"], stories.absolute(entry["path"], folder))}
                for entry in entries
            ]
    return result


def _named(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset, with the name of its prompt keys where they have one."""
    name = name_of_type(entry["type"]) if isinstance(entry.get("type"), Mapping) else None
    return {**entry, "type": name} if name else dict(entry)
