"""What trials meet when they begin, printed before any of them does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from harness._util.terminal import plain
from harness.cli.console import out

if TYPE_CHECKING:  # imported where they are used: --help must answer at once
    from harness.grids.grid import Trial


def inspect_trials(trials: Iterable[Trial], trust_remote_code: bool, *, remote: bool = False) -> None:
    """Look at the data and the model of each trial in a process of its own, and print what is worth knowing.

    Args:
        trials: that are to run.
        trust_remote_code: let models from the hub run their own code.
        remote: they run on other machines.

    Raises:
        InputError: a trial cannot run.
    """
    from harness.launch.isolated import run_isolated

    looked_at = {trial.spec.id: (trial.label, trial.spec.model_dump_json()) for trial in trials}
    if not looked_at:
        return
    inspection = run_isolated(_inspect, list(looked_at.values()), trust_remote_code, remote)
    for line in inspection["data"]:
        out.print(plain(line), highlight=False, soft_wrap=True)
    for warning in inspection["warnings"]:
        out.print(f"[yellow]{plain(warning)}[/]", highlight=False, soft_wrap=True)


def _inspect(trials: list[tuple[str, str]], trust_remote_code: bool, remote: bool) -> dict[str, Any]:
    """In the child: the fields of a `training.inspection.Inspection`."""
    from harness.spec.trial import TrialSpec
    from harness.training import inspection

    specs = [(label, TrialSpec.model_validate_json(text)) for label, text in trials]
    seen = inspection.inspect(specs, remote=remote, trust_remote_code=trust_remote_code)
    return seen.model_dump(mode="json")
