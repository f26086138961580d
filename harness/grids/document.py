"""The parts that every grid file has: name, title and base."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from harness._util.messages import first_line, kind_of, one_line, unknown
from harness._util.redact import redact_home
from harness.dialects import llama_factory_data
from harness.dialects.training_file import TrainingFile, interpret, is_training_file
from harness.errors import InputError
from harness.grids.levels import SPEC_KEYS, normalised
from harness.grids.spellings import as_number
from harness.grids.yaml_file import read_yaml
from harness.sources import models, stories
from harness.spec.trial import TrialSpec

GRID_KEYS = (
    "name", "title", "base", "design", "vary", "trials", "exclude", "repeats", "baseline_repeats", "visits",
    "visit_seconds", "claims", "tune", "match", "tune_first",
    "price_per_hour",
)  # fmt: skip

Match = Literal["trainable_parameters", "peak_memory_bytes"]
"""Figures at which the adapters of a grid can be made as large as the baseline's."""
MATCHED_WITHIN = 0.1
"""Part of the baseline's figure within which an adapter is as large."""


@dataclass(frozen=True)
class Timing:
    """How much a run times."""

    visits: int = 3
    """Visits of each trial; 0: nothing is timed."""
    seconds: float = 4.0
    """Least undisturbed seconds of each visit."""


_FIRST = 4
"""Keys of a file that a message names."""
_MOST_OF_REASONS = 20_000
"""Characters of a message that names all that is not supported in a training file."""

DEFAULT_TIMING = Timing()
NO_TIMING = Timing(visits=0)


def timing_of(document: Mapping[str, Any]) -> Timing:
    """`visits` and `visit_seconds` of a grid file.

    Raises:
        ValueError: one of them is not a number that can be.
    """
    visits = document.get("visits", DEFAULT_TIMING.visits)
    if not isinstance(visits, int) or isinstance(visits, bool) or visits < 0:
        raise ValueError(f"visits is {kind_of(visits)}; it must be a whole number, 0 to time nothing")
    seconds = as_number(document.get("visit_seconds", DEFAULT_TIMING.seconds))
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < math.inf:
        raise ValueError(f"visit_seconds is {kind_of(seconds)}; it must be a number of seconds above 0")
    return Timing(visits, float(seconds))


def match_of(document: Mapping[str, Any], design: str) -> Match | None:
    """`match` of a grid file; null: adapters are as large as their options say.

    Raises:
        ValueError: it is no such figure, or the grid has no baseline to be as large as.
    """
    figure = document.get("match")
    if figure is None:
        return None
    if figure not in get_args(Match):
        raise ValueError(unknown("match", figure, get_args(Match)))
    if design not in ("ablation", "ladder"):
        raise ValueError(f"match goes with a baseline, which design {design} does not have; use design: ablation")
    known: Match = figure
    return known


def price_of(document: Mapping[str, Any]) -> float | None:
    """`price_per_hour` of a grid file, of the machine, in whatever currency; null: none is given.

    Raises:
        ValueError: it is not a number that can be.
    """
    price = as_number(document.get("price_per_hour"))
    if price is None:
        return None
    if not isinstance(price, int | float) or isinstance(price, bool) or not 0 < price < math.inf:
        raise ValueError(f"price_per_hour is {kind_of(price)}; it must be a number above 0")
    return float(price)


@dataclass(frozen=True)
class Rates:
    """Learning rates that each configuration is tried at before the comparison."""

    values: tuple[float, ...]
    relative: bool
    """They are multiples of the configuration's own rate."""

    def of(self, spec: TrialSpec) -> tuple[float, ...]:
        """The rates of one configuration, lowest first."""
        if not self.relative:
            return self.values
        return tuple(float(f"{spec.learning_rate * multiple:.3g}") for multiple in self.values)

    @property
    def text(self) -> str:
        """1e-4, 3e-4 and so on; or 0.25, 1 and so on times its own."""
        return ", ".join(f"{value:g}" for value in self.values) + " times its own" * self.relative


_MULTIPLES = (10**-0.5, 1.0, 10**0.5, 10.0)
"""Those that are tried where none are given."""
_OF_RATES = "use learning_rate, or learning_rate: [1e-4, 3e-4, 1e-3], or learning_rate: {multiples: [0.25, 1, 4]}"


def rates_of(document: Mapping[str, Any], base: TrialSpec) -> Rates | None:
    """`tune_first` of a grid file; null: each configuration has its own rate.

    Raises:
        ValueError: it is neither `learning_rate` nor rates or multiples, or the base has no losses to choose by.
    """
    given = document.get("tune_first")
    if given is None:
        return None
    wanted: Any = given.get("learning_rate") if isinstance(given, Mapping) and len(given) == 1 else given
    relative = wanted == "learning_rate" or (isinstance(wanted, Mapping) and [*wanted] == ["multiples"])
    rates = (list(_MULTIPLES) if wanted == "learning_rate" else wanted["multiples"]) if relative else wanted
    rates = [as_number(rate) for rate in rates] if isinstance(rates, list) else rates
    if not isinstance(rates, list) or len(rates) < 2 or not all(_is_rate(rate) for rate in rates):
        raise ValueError(f"tune_first is {kind_of(given)}; {_OF_RATES}, with two or more")
    if not base.val_set_size or not models.pretrained(base.base_model):
        raise ValueError("tune_first chooses by losses: give a pretrained base_model, and val_set_size above 0")
    return Rates(tuple(sorted({float(rate) for rate in rates})), relative)


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def header(document: Mapping[str, Any], path: Path) -> tuple[str, str]:
    """Name and title of a grid file. Its top-level keys are validated.

    Raises:
        ValueError: a key is unknown, the name is not a valid folder name, or the title is not text; or the file is none
            of a grid.
    """
    _refuse_file_of_another_kind(document)
    for key in document:
        if key not in GRID_KEYS:
            raise ValueError(unknown("key", key, GRID_KEYS + tuple(SPEC_KEYS), hint=_belongs_in_base(key)))
    name = document.get("name", grid_name(path))
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"name is {kind_of(name)}, not a folder name; use letters, digits, '.', '_' and '-'")
    title = document.get("title", name)
    if not isinstance(title, str):
        raise ValueError(f"title is {kind_of(title)}; it must be text")
    return name, one_line(title)


def _refuse_file_of_another_kind(document: Mapping[str, Any]) -> None:
    strangers = [str(key) for key in document if key not in SPEC_KEYS]
    if len(strangers) > 1 and not document.keys() & {*GRID_KEYS}:  # a single one is a slip, like `bases`
        raise ValueError(
            f"neither a grid, whose keys are base, vary and others, nor a training file of Axolotl (base_model), "
            f"LLaMA-Factory or TRL (model_name_or_path) or torchtune (_component_): its keys are "
            f"{', '.join(strangers[:_FIRST])}{', …' * (len(strangers) > _FIRST)}"
        )


def grid_name(path: Path) -> str:
    """The name of a grid that its file does not name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("._-")[:64] or "grid"


def _belongs_in_base(key: Any) -> str:
    return f" (did you mean to put {key} under base:?)" if key in SPEC_KEYS else ""


def base_of(
    document: Mapping[str, Any], path: Path, *, without_unsupported: bool = False
) -> tuple[dict[str, Any], TrainingFile]:
    """The spec keys of `base`, or of the training file that it names, and what that file means.

    Args:
        document: of the grid file.
        path: of the grid file.
        without_unsupported: leave out keys of other tools that are not supported.

    Raises:
        ValueError: there is no base, or a key is unknown.
        InputError: the training file asks for what is not supported.
    """
    base = document.get("base")
    file = None
    if isinstance(base, str) and base.isprintable():
        file = path.parent / os.path.expanduser(base)  # Path.expanduser raises for ~nobody
        base = read_yaml(file)
        grid_keys = [key for key in base if key in GRID_KEYS]
        if grid_keys and not is_training_file(base, GRID_KEYS):
            raise ValueError(f"base: {file.name} has {grid_keys[0]}:, so it is a grid file; name a training file")
    if not isinstance(base, dict):
        raise ValueError(f"base is {kind_of(base)}; it must be a mapping of spec keys, or the path of a training file")
    meant = means(base, file or path, inline=file is None, without_unsupported=without_unsupported)
    return normalised(meant.values, "base"), meant


def means(
    document: Mapping[str, Any], path: Path, *, inline: bool = False, without_unsupported: bool = False
) -> TrainingFile:
    """What a training file means.

    Args:
        document: its keys and values.
        path: of the file that it stands in.
        inline: it is the `base` of a grid file.
        without_unsupported: leave out what is not supported.

    Raises:
        InputError: in one line with all its reasons, why it cannot be taken over.
    """
    try:
        document = _with_settings(document, path)
        meant = interpret(document, SPEC_KEYS, inline=inline, without_unsupported=without_unsupported)
        return _with_listed_datasets(meant, document, path)
    except ValueError as error:
        raise InputError(one_line(f"{path.name}: {error}", _MOST_OF_REASONS)) from None


_SETTINGS = ("deepspeed", "fsdp_config")
"""Keys of other tools that may name a JSON file instead of giving what stands in it."""


def _with_settings(document: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The document with the contents of such files, where they are there."""
    named = {key: os.path.expanduser(document[key]) for key in _SETTINGS if isinstance(document.get(key), str)}
    files = {key: folder / name for key, name in named.items() if (folder := _folder_of(name, path)) is not None}
    return {**document, **{key: _json_mapping(file) for key, file in files.items()}}


def _folder_of(name: str, path: Path) -> Path | None:
    """The folder of a training file, or the nearest above it, with a file of this name: tools are run there."""
    folders = (path.parent, *path.absolute().parents)
    return next((folder for folder in folders if os.path.isfile(folder / name)), None)


def _with_listed_datasets(meant: TrainingFile, document: Mapping[str, Any], path: Path) -> TrainingFile:
    """LLaMA-Factory's files name datasets that a dataset_info.json describes, from the folder in which it is run: that
    of the training file here, or one above it.
    """
    listed = llama_factory_data.info_path(document) if meant.tool == llama_factory_data.TOOL else None
    if listed is None or "datasets" in document:
        return meant
    folder = _folder_of(listed, path)
    if folder is None:
        return meant
    datasets = llama_factory_data.datasets_from(document, _json_mapping(folder / listed))
    moved = [each | {"path": _from(path.parent, folder, each["path"])} for each in datasets]
    return replace(meant, values={**meant.values, "datasets": moved})


def _json_mapping(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {kind_of(content)}; it must be a mapping")
    return content


def _from(folder: Path, other: Path, path: str) -> str:
    """A path that begins at another folder, from this one; what is no file there is on the hub."""
    return os.path.relpath(other / path, folder) if (other / path).exists() else path


def located(spec: TrialSpec, path: Path, variants: Iterable[TrialSpec] = ()) -> TrialSpec:
    """The spec of a grid file with the folder that its relative paths begin at, whichever file they are written in.

    Args:
        spec: without a folder.
        path: of the grid file.
        variants: specs that are made of it.
    """
    folder = str(path.parent.absolute())
    if not any(_has_relative_path(each, folder) for each in (spec, *variants)):
        return spec
    return spec.model_copy(update={"folder": redact_home(folder)})


def _has_relative_path(spec: TrialSpec, folder: str) -> bool:
    of_data = any(
        stories.is_relative_file(dataset.path, folder) for dataset in (*spec.datasets, *(spec.test_datasets or ()))
    )
    return of_data or models.is_relative_path(spec.base_model, folder)
