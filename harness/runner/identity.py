"""The ids under which a trial may be recorded, its place in the grid, and the grid's version."""

from __future__ import annotations

from typing import Any

from harness.environment import resolve_device
from harness.grids.grid import Grid, Trial
from harness.launch.launcher import Launcher
from harness.record import Job, trial_id
from harness.results.versions import Version


def possible_ids(trial: Trial | Job, launcher: Launcher) -> list[str]:
    """The trial's ids, one for each environment that the launcher may run it in."""
    return [*ids_by_environment(trial, launcher).values()]


def ids_by_environment(trial: Trial | Job, launcher: Launcher) -> dict[str, str]:
    """`possible_ids` by the id of the environment."""
    environments = launcher.environments(resolve_device(trial.spec.device))
    return {each.id: trial_id(trial.spec, each, trial.contents, twin=trial.twin) for each in environments}


def lease_id(trial: Trial | Job, launcher: Launcher) -> str:
    """The id that a trial is leased under: the first of them."""
    return possible_ids(trial, launcher)[0]


def place_in_grid(trial: Trial) -> dict[str, Any]:
    """Columns that say where a trial stands in its grid."""
    return {name: getattr(trial, name) for name in ("label", "factor", "level", "repeat", "baseline_id")}


def version_of(grid: Grid) -> Version | None:
    """The trials that a grid has; null of a search, which goes on proposing them."""
    if grid.tune is not None:
        return None
    specs: dict[str, tuple[str, ...]] = {}
    for trial in grid.trials:
        specs[trial.label] = (*specs.get(trial.label, ()), trial.spec.id)
    baselines = tuple(dict.fromkeys(trial.baseline_id for trial in grid.trials))
    return Version(baselines=baselines, specs=specs, whole=grid.whole)
