"""The ids under which a trial may be recorded, and its place in the grid."""

from __future__ import annotations

from typing import Any

from harness.environment import resolve_device
from harness.grids.grid import Trial
from harness.launch.launcher import Launcher
from harness.record import Job, trial_id


def possible_ids(trial: Trial | Job, launcher: Launcher) -> list[str]:
    """The trial's ids, one for each environment that the launcher may run it in."""
    environments = launcher.environments(resolve_device(trial.spec.device))
    return [trial_id(trial.spec, each, trial.contents, twin=trial.twin) for each in environments]


def lease_id(trial: Trial | Job, launcher: Launcher) -> str:
    """The id that a trial is leased under: the first of them."""
    return possible_ids(trial, launcher)[0]


def place_in_grid(trial: Trial) -> dict[str, Any]:
    """Columns that say where a trial stands in its grid."""
    return {name: getattr(trial, name) for name in ("label", "factor", "level", "repeat", "baseline_id")}
