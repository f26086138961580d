"""What a run would do and be able to show, and the size that shows most in a given time; printed before it starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness._util.terminal import plain
from harness._util.units import counted
from harness.cli.console import out
from harness.cli.predictions import predict_trials
from harness.errors import InputError

if TYPE_CHECKING:  # imported where they are used: --help must answer at once
    from harness.analysis.measurements import Measurements
    from harness.analysis.sizing import Choices, Size, Work
    from harness.environment import Environment
    from harness.grids.grid import Grid
    from harness.launch.launcher import Launcher
    from harness.record import Status
    from harness.results.store import Store
    from harness.sources.splits import Counts
    from harness.spec.trial import TrialSpec

_LEAD = "can show: "
_NO_BASELINE = "no trial has the values of base, so none is compared with it: give them as a level or a trial too"
_UNITS = {"s": 1, "min": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """Seconds of a time like 90s, 30min, 1.5h.

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h)", text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not seconds:
        raise InputError(f"--size {text!r} is no time; give one like 90s, 30min or 1.5h")
    return seconds


def environments_of(grid: Grid, launcher: Launcher) -> tuple[Environment, ...]:
    """Where a grid's trials may run."""
    return tuple(e for device_type in grid.device_types for e in launcher.environments(device_type))


def print_merged(grid: Grid) -> None:
    """Which levels are one configuration with another, and have no row of their own."""
    for label, of in grid.merged.items():
        line = f"{label} is the same configuration as {of}, which runs for both"
        out.print(plain(line), highlight=False, soft_wrap=True)


def print_forecast(grid: Grid, store: Store, here: Sequence[Environment]) -> None:
    """What each figure will be able to show; nothing for figures that are not measured."""
    from harness.analysis import forecast

    plan = forecast.Plan.of(grid, _held_out(grid))
    if plan.configurations < 2:
        return
    if not any(trial.baseline for trial in grid.trials):
        out.print(_NO_BASELINE, style="yellow", highlight=False, soft_wrap=True)
        return
    if not (plan.visits or plan.stories):
        return
    lines = forecast.describe(plan, forecast.variances_of(recorded(store, here)))
    indent = " " * len(_LEAD)
    for number, line in enumerate(lines):
        whole = (indent if number else _LEAD) + line
        folded = whole if len(whole) <= out.width else whole.replace("; ", f";\n{indent}  ")
        out.print(folded, style="dim", highlight=False)


def recorded(store: Store, here: Sequence[Environment]) -> Measurements | None:
    """The recorded trials of the newest version of a grid in one of these environments; null where there are none."""
    from harness.analysis import loading

    for environment in here:
        try:
            return loading.load(store.folder, environment.id)
        except InputError:
            continue
    return None


def _held_out(grid: Grid) -> int:
    """Held-out stories of the baseline, or of the first trial; 0 where no loss is measured."""
    from harness.sources import models

    spec = _typical(grid)
    if not spec.val_set_size or not models.pretrained(spec.base_model):
        return 0
    try:
        return _counts(spec).held_out(spec.val_set_size)
    except InputError:  # the run itself says what is wrong with the data
        return int(spec.val_set_size)


def _typical(grid: Grid) -> TrialSpec:
    return next((trial.spec for trial in grid.trials if trial.baseline), grid.trials[0].spec)


def _counts(spec: TrialSpec) -> Counts:
    """Distinct stories of a spec's datasets."""
    from harness.sources import splits, stories

    return splits.counts(stories.read_all(spec))


def print_trials(
    grid: Grid,
    store: Store,
    launcher: Launcher,
    statuses: frozenset[Status],
    limit: int | None,
    stop: str | None,
    *,
    as_json: bool,
) -> None:
    """The trials of a grid, and which of them are recorded.

    Args:
        grid: of them.
        store: of its results.
        launcher: whose environment they would run in.
        statuses: recorded trials that would run again.
        limit: number of trials that would run now; null: all.
        stop: what a run here would stop at; null: nothing.
        as_json: as a document too.
    """
    from rich.table import Table

    from harness.cli.documents import planned_document, print_document
    from harness.runner import grid_run

    pending = grid_run.pending(grid, store, launcher, statuses)
    for line in grid_run.kept_apart(pending, store, launcher):
        out.print(plain(line), highlight=False, soft_wrap=True)
    now = f", {limit} of them now" if limit is not None and limit < len(pending) else ""
    table = Table(title=f"{plain(grid.title)}: {counted(len(grid.trials), 'trial')}, {len(pending)} to run{now}")
    for heading in ("#", "trial", "repeat", "spec id", "recorded"):
        table.add_column(heading)
    for number, trial in enumerate(grid.trials, start=1):
        recorded = "" if trial in pending else "yes"
        table.add_row(str(number), plain(trial.label), str(trial.repeat), trial.spec.id, recorded)
    out.print(table)
    if as_json:
        trials = [planned_document(trial, recorded=trial not in pending) for trial in grid.trials]
        left = len(pending)
        print_document({"grid": grid.name, "folder": store.folder, "left": left, "stops_at": stop, "trials": trials})


# ------------------------------------------------------------------------------------ --size


@dataclass(frozen=True)
class Sizing:
    """What is asked with `--size`."""

    budget: float
    """Seconds."""
    trust_remote_code: bool
    predict: bool
    """Whether steps of trials without a record may be predicted."""
    most_trials: int


def sized(
    grid_of: Callable[[int | None, int | None], Grid],
    store: Store,
    here: Sequence[Environment],
    sizing: Sizing,
) -> Grid:
    """The grid at the size that shows most within the time, which is printed.

    Args:
        grid_of: the grid with so many repeats and held-out stories; null: the file's.
        store: of its results.
        here: where it will run.
        sizing: what is asked.

    Raises:
        InputError: not even the smallest size fits, there is nothing to choose, or it is not known how long trials
            take.
    """
    from harness.analysis import forecast
    from harness.analysis import sizing as sizes

    grid = grid_of(1, None)
    plan = forecast.Plan.of(grid, _held_out(grid))
    if plan.configurations < 2 or not (plan.visits or plan.stories):
        raise InputError(f"--size: {grid.name} compares neither speeds nor losses, so its size decides nothing")
    if not any(trial.baseline for trial in grid.trials):
        raise InputError(f"--size: {grid.name}: {_NO_BASELINE}")
    measurements = recorded(store, here)
    work = _work(grid, store, measurements, sizing)
    variances = forecast.variances_of(measurements).variances
    size, fits = sizes.choose(sizing.budget, plan, variances, work, _choices(grid, sizing))
    if not fits:
        raise InputError(
            f"--size {sizes.show_time(sizing.budget)} is too short for {grid.name}: "
            f"its smallest size takes about {sizes.show_time(size.seconds)}"
        )
    out.print(size.describe(sizing.budget), highlight=False, soft_wrap=True)
    return _at(size, grid_of)


def _at(size: Size, grid_of: Callable[[int | None, int | None], Grid]) -> Grid:
    grid = grid_of(size.repeats, size.stories or None)
    return replace(grid, timing=replace(grid.timing, visits=size.visits))


def _work(grid: Grid, store: Store, measurements: Measurements | None, sizing: Sizing) -> Work:
    """What the grid takes: by recorded trials, else by predicted steps."""
    from harness.analysis import sizing as sizes
    from harness.runner import visits

    specs = [trial.spec for trial in grid.trials if trial.repeat == 0]
    costs = {} if measurements is None else sizes.recorded_costs(measurements, sizes.trained_seconds(store))
    unknown = [spec for spec in specs if sizes.cost_key(spec) not in costs]
    if unknown and sizing.predict:
        predictions = predict_trials(unknown, sizing.trust_remote_code, with_rates=True)
        costs |= sizes.predicted_costs(unknown, predictions, _counts(specs[0]).trained_on(_held_out(grid)))
    every = sizes.completed(costs, specs)
    if every is None:
        raise InputError(f"--size: it is not known how long a trial of {grid.name} takes; run it once without --size")
    return sizes.work_of(grid.trials, every, grid.timing.seconds, in_turn=visits.in_turn(grid))


def _choices(grid: Grid, sizing: Sizing) -> Choices:
    """Sizes that the data and the limit of trials allow."""
    from harness.analysis import sizing as sizes
    from harness.spec import length

    specs = [trial.spec for trial in grid.trials]
    held_out = _held_out(grid)
    stories = [held_out]
    # A number of epochs is one of the stories that are left: it would train on others.
    if held_out and all(spec.train_samples is not None or spec.max_steps is not None for spec in specs):
        counts = _counts(_typical(grid))
        trained = (sum(length.step_sizes(spec, counts.others)) for spec in specs)
        kept = max(min(samples, counts.trained_on(held_out)) for samples in trained)
        most = counts.given or counts.others - kept
        if most >= sizes.LEAST_STORIES:
            stories = sizes.story_counts(sizes.LEAST_STORIES, most)
    repeats = range(1, max(1, sizing.most_trials // len(specs)) + 1)
    choices = sizes.Choices(stories)
    return replace(
        choices,
        visits=choices.visits if grid.timing.visits else [0],
        repeats=[n for n in choices.repeats if n in repeats],
    )
