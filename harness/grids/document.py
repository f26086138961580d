"""The parts that every grid file has: name, title and base."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness._util.messages import kind_of, one_line, unknown
from harness._util.redact import redact_home
from harness.grids.levels import SPEC_KEYS, normalised
from harness.grids.yaml_file import read_yaml
from harness.sources import models, stories
from harness.spec import TrialSpec

GRID_KEYS = (
    "name", "title", "base", "design", "vary", "trials", "exclude", "repeats", "baseline_repeats", "visits",
    "visit_seconds", "claims", "tune",
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """How much a run times."""

    visits: int = 3
    """Visits of each trial; 0: nothing is timed."""
    seconds: float = 4.0
    """Least undisturbed seconds of each visit."""


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
    seconds = document.get("visit_seconds", DEFAULT_TIMING.seconds)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < math.inf:
        raise ValueError(f"visit_seconds is {kind_of(seconds)}; it must be a number of seconds above 0")
    return Timing(visits, float(seconds))


def header(document: Mapping[str, Any], path: Path) -> tuple[str, str]:
    """Name and title of a grid file. Its top-level keys are validated.

    Raises:
        ValueError: a key is unknown, the name is not a valid folder name, or the title is not text.
    """
    for key in document:
        if key not in GRID_KEYS:
            raise ValueError(unknown("key", key, GRID_KEYS + tuple(SPEC_KEYS), hint=_belongs_in_base(key)))
    name = document.get("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("._-")[:64] or "grid")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"name is {kind_of(name)}, not a folder name; use letters, digits, '.', '_' and '-'")
    title = document.get("title", name)
    if not isinstance(title, str):
        raise ValueError(f"title is {kind_of(title)}; it must be text")
    return name, one_line(title)


def _belongs_in_base(key: Any) -> str:
    return f" (did you mean to put {key} under base:?)" if key in SPEC_KEYS else ""


def base_of(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The spec keys of `base`, or of the training file that it names.

    Raises:
        ValueError: there is no base, or a key is unknown.
    """
    base = document.get("base")
    if isinstance(base, str) and base.isprintable():
        base = read_yaml(path.parent / os.path.expanduser(base))  # Path.expanduser raises for ~nobody
    if not isinstance(base, dict):
        raise ValueError(f"base is {kind_of(base)}; it must be a mapping of spec keys, or the path of a training file")
    return normalised(base, "base")


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
    of_data = any(stories.is_relative_file(dataset.path, folder) for dataset in spec.datasets)
    return of_data or models.is_relative_path(spec.base_model, folder)
