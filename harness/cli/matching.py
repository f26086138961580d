"""Makes adapters as large as the baseline's where a grid asks for it (`match`), and shows their sizes."""

from __future__ import annotations

from typing import Any

from harness._util.terminal import plain
from harness.cli.console import out
from harness.errors import InputError
from harness.grids.document import MATCHED_WITHIN
from harness.grids.grid import Grid, Trial
from harness.spec.keys import FULL
from harness.spec.trial import TrialSpec

_solved: dict[tuple[str, str, str], tuple[str, str, float | None]] = {}
"""Spec, size and ratio, by figure, baseline and spec, in JSON: a grid is loaded several times."""


def matched(grid: Grid, *, trust_remote_code: bool) -> Grid:
    """The grid with its adapters as large as the baseline's, which is printed once; itself where none is asked for.

    Raises:
        InputError: a model cannot be built.
    """
    from harness.launch.isolated import run_isolated

    baseline = next((trial.spec for trial in grid.trials if trial.baseline), None)
    if grid.match is None:
        return grid
    if baseline is None:
        raise InputError(f"{grid.name}: match makes adapters as large as the baseline's, and the grid excludes it")
    of_baseline = baseline.model_dump_json()
    trials = {_without_seed(t, baseline): t for t in grid.trials if t.spec.adapter != FULL and not _is_baseline(t)}
    missing = [spec for spec in trials if (grid.match, of_baseline, spec) not in _solved]
    if missing:
        named = [(trials[spec].label, spec) for spec in missing]
        sizes = run_isolated(_match, named, of_baseline, grid.match, trust_remote_code)
        for spec, solved in zip(missing, sizes, strict=True):
            _solved[grid.match, of_baseline, spec] = solved
            _print(trials[spec].label, grid.match, *solved[1:])
    specs = {
        trial.spec.id: _seeded(_solved[grid.match, of_baseline, _without_seed(trial, baseline)][0], trial)
        for trial in grid.trials
        if trial.spec.adapter != FULL and not _is_baseline(trial)
    }
    return grid.with_specs(specs)


def _is_baseline(trial: Trial) -> bool:
    return trial.spec.id == trial.baseline_id


def _without_seed(trial: Trial, baseline: TrialSpec) -> str:
    """The spec of a trial in the baseline's repeat: that of all repeats."""
    return trial.spec.model_copy(update={"seed": baseline.seed}).model_dump_json()


def _seeded(spec: str, trial: Trial) -> TrialSpec:
    return TrialSpec.model_validate_json(spec).model_copy(update={"seed": trial.spec.seed})


def _print(label: str, figure: str, size: str, ratio: float | None) -> None:
    from harness.metrics import METRICS

    if ratio is None:
        text = f"{plain(label)}: {METRICS[figure].label} not known before it is trained; its size stays"
        out.print(f"[yellow]{text}[/]", highlight=False, soft_wrap=True)
        return
    off = abs(ratio - 1) > MATCHED_WITHIN
    which = size or "has one size alone"
    text = f"{plain(label)}: {which}, {ratio:.2f} of the baseline's {METRICS[figure].label}"
    out.print(f"[yellow]{text}[/]" if off else text, highlight=False, soft_wrap=True)


def _match(
    trials: list[tuple[str, str]], baseline: str, figure: Any, trust_remote_code: bool
) -> list[tuple[str, str, float | None]]:
    """In the child: the fields of each `predict.matching.Matched`, the spec as JSON."""
    from harness.predict import matching

    parsed = [(label, TrialSpec.model_validate_json(spec)) for label, spec in trials]
    solved = matching.match(
        parsed, TrialSpec.model_validate_json(baseline), figure, trust_remote_code=trust_remote_code
    )
    return [(each.spec.model_dump_json(), each.size, each.ratio) for each in solved]
