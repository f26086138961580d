"""Learning rates found before a comparison: each configuration is tried at the same few, judged on other stories."""

from __future__ import annotations

from dataclasses import replace

from harness.grids.document import NO_TIMING
from harness.grids.grid import Grid, Trial, interleave
from harness.launch.launcher import Launcher
from harness.record import Tuned, TunedRate
from harness.results.store import Store
from harness.runner.identity import possible_ids
from harness.spec.trial import TrialSpec


def grid_of_rates(grid: Grid) -> Grid:
    """The trainings by which each configuration of a grid with `rates` gets its own: a grid for itself."""
    trials = [
        Trial(_tuning(trial.spec, rate), f"{trial.label}, learning_rate={rate:g}", trial.label, f"{rate:g}")
        for trial in _configurations(grid)
        for rate in _rates(grid, trial)
    ]
    name = f"{grid.name}-rates"
    title = f"{grid.title}: learning rates"
    return Grid(name, title, "list", tuple(interleave(trials, name)), timing=NO_TIMING, whole=grid.whole)


def tuned(grid: Grid, trainings: Grid, store: Store, launcher: Launcher) -> Tuned:
    """What the recorded trainings say.

    Args:
        grid: whose rates are looked for.
        trainings: of `grid_of_rates`, with contents.
        store: of the trainings.
        launcher: in whose environments they were made.
    """
    columns = ["trial_id", "status", "eval_loss", "trial_seconds"]
    rows = {row["trial_id"]: row for row in store.read("trials", columns).to_pylist()}
    made = {t.spec.id: rows[each] for t in trainings.trials for each in possible_ids(t, launcher) if each in rows}
    rates = []
    for trial in _configurations(grid):
        own = {str(rate): made.get(_tuning(trial.spec, rate).id) for rate in _rates(grid, trial)}
        losses = {rate: row["eval_loss"] if row and row["status"] == "ok" else None for rate, row in own.items()}
        ended = {rate: loss for rate, loss in losses.items() if loss is not None}
        seconds = [row["trial_seconds"] or 0.0 for row in own.values() if row is not None]
        each = TunedRate(
            label=trial.label,
            key=_key(trial.spec),
            losses=losses,
            rate=float(min(ended, key=lambda rate: ended[rate])) if ended else trial.spec.learning_rate,
            trials=len(seconds),
            seconds=sum(seconds),
        )
        rates.append(each)
    return Tuned(rates=tuple(rates), results=trainings.name)


def with_rates(grid: Grid, tuned: Tuned) -> Grid:
    """The grid with each configuration at its rate, in all repeats."""
    rates = {each.key: each.rate for each in tuned.rates}
    by_key = {key: rates[key] for trial in _configurations(grid) if (key := _key(trial.spec)) in rates}
    specs = {
        trial.spec.id: trial.spec.model_copy(update={"learning_rate": by_key[_key(trial.spec)]})
        for trial in grid.trials
        if _key(trial.spec) in by_key
    }
    return replace(grid.with_specs(specs), tuned=tuned)


def _configurations(grid: Grid) -> list[Trial]:
    """Each configuration once."""
    return [trial for trial in grid.trials if trial.repeat == 0 and not trial.twin]


def _rates(grid: Grid, trial: Trial) -> tuple[float, ...]:
    return () if grid.rates is None else grid.rates.of(trial.spec)


def _tuning(spec: TrialSpec, rate: float) -> TrialSpec:
    keys = {
        "learning_rate": rate,
        "held_out_part": "tuning",
        "measure_forgetting": False,
        "evaluate_tasks": None,
        "save_adapter": False,
    }
    return spec.model_copy(update=keys)


def _key(spec: TrialSpec) -> str:
    """Equal for all repeats of a configuration."""
    return spec.model_copy(update={"seed": 0}).id
