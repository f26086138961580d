"""What difference a grid will be able to show, before it is run.

For one comparison, at 80 % power and an error rate of 5 % (see `power`). A family of comparisons is judged more
strictly, and what an analysis can show once there are rows is in `Estimate.detectable`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy
import pandas

from harness.analysis import power, stats, timed, words
from harness.analysis.crossed import LEAST_TEXTS
from harness.analysis.measurements import Measurements
from harness.analysis.pilot import PILOT, PILOT_MODEL, Variances
from harness.analysis.stats import Noise
from harness.grids.grid import Grid
from harness.metrics import METRICS

SPEED, LOSS = METRICS["tokens_per_second"], METRICS["eval_loss"]
Part = Literal["reading", "story", "seeds"]
_LEAST_DF = 5
"""Degrees of freedom from which on recorded noise is taken for the pilot's."""
_LEAST_COMPARISONS = 3
"""Comparisons from which on their median variation between stories is."""


@dataclass(frozen=True)
class Plan:
    """How much a grid measures."""

    configurations: int
    """That are compared, the baseline included."""
    twin: bool
    """Whether the baseline runs twice."""
    visits: int
    stories: int
    """Held out; 0: no losses."""
    repeats: int
    baseline_repeats: int

    @classmethod
    def of(cls, grid: Grid, stories: int) -> Plan:
        """What a grid measures with so many held-out stories."""
        first = [trial for trial in grid.trials if trial.repeat == 0]
        baselines = [trial.repeat for trial in grid.trials if trial.baseline]
        return cls(
            configurations=sum(not trial.twin for trial in first),
            twin=any(trial.twin for trial in first),
            visits=grid.timing.visits,
            stories=stories,
            repeats=grid.repeats,
            baseline_repeats=1 + max(baselines, default=0),
        )


@dataclass(frozen=True)
class Known:
    """Variances and where they are from."""

    variances: Variances = PILOT
    recorded: frozenset[Part] = frozenset()
    """Those of recorded trials; the others are the pilot's."""
    trials: int = 0
    """Recorded trials behind them."""

    def source(self, parts: Collection[Part]) -> str:
        """Where these parts are from, in words."""
        ours = [part for part in parts if part in self.recorded]
        rows, pilot = f"{self.trials} recorded trials", f"pilot measurements of {PILOT_MODEL}"
        if not ours:
            return f"from {pilot}"
        if len(ours) == len(parts):
            return f"from {rows}"
        named = {"reading": "speeds", "story": "stories", "seeds": "seeds"}
        return f"{' and '.join(named[part] for part in ours)} from {rows}, the rest from {pilot}"


def variances_of(m: Measurements | None) -> Known:
    """Variances of recorded rows where there are enough, else of the pilot.

    Args:
        m: of the environment in which the grid will run; null: none are recorded.
    """
    if m is None:
        return Known()
    variances, parts = PILOT, set[Part]()
    visited = m.readings[m.readings["visit"]]
    reading = _noise_of_readings(m, visited)
    if reading is not None and reading.df >= _LEAST_DF:
        variances = replace(variances, reading=reading)
        parts.add("reading")
    stories = deviations_between_stories(m)
    if len(stories) >= _LEAST_COMPARISONS:
        variances = replace(variances, story=float(stories.median()))
        parts.add("story")
    seeds, alone = (m.between_seeds(m.stories, paired=paired) for paired in (True, False))
    if seeds is not None and alone is not None and seeds.mean.df >= _LEAST_DF:
        variances = replace(variances, seeds=seeds.mean, seeds_alone=alone.mean)
        parts.add("seeds")
    return Known(variances, frozenset(parts), int((m.trials["status"] == "ok").sum()))


def _noise_of_readings(m: Measurements, readings: pandas.DataFrame) -> Noise | None:
    if readings.empty:
        return None
    values = timed.logarithms(readings, "tokens_per_second")
    return stats.noise(values, readings["trial"].map(m.trials["stands_for"]), readings["block"])


def deviations_between_stories(m: Measurements) -> pandas.Series:
    """By comparison with the baseline, the standard deviation between stories of their differences in loss, in nats.

    Configurations that learn the same to the bit have none.
    """
    effects = m.effects(m.against_baseline(), "eval_loss").table
    deviations: pandas.Series = effects["se"] * numpy.sqrt((1 - effects["seed_share"]) * effects["n"])
    return deviations[deviations > 1e-6]


# ------------------------------------------------------------------------------------ differences


def smallest_speed_difference(plan: Plan, noise: Noise, visits: Any = None) -> Any:
    """The smallest true difference in speed that a comparison with the baseline shows, as a share.

    The noise is estimated from all readings of a run, so its degrees of freedom grow with the configurations.

    Args:
        plan: what is measured.
        noise: of one reading.
        visits: one number or several, instead of the plan's. Nan for a single one, which shows no noise.
    """
    visits = numpy.asarray(plan.visits if visits is None else visits, float)
    se, df = _of_speed(plan, noise, visits)
    return numpy.expm1(power.smallest_difference(se, df))


def _of_speed(plan: Plan, noise: Noise, visits: Any) -> tuple[Any, Any]:
    """Standard error of a comparison, and degrees of freedom of the residuals in `visits` blocks."""
    trials = plan.configurations + plan.twin
    df = numpy.where(visits > 1, (trials - 1) * visits - (plan.configurations - 1), numpy.nan)
    # Two runs of the baseline are averaged.
    return noise.sigma * numpy.sqrt((1.5 if plan.twin else 2.0) / visits), df


def smallest_loss_difference(plan: Plan, variances: Variances, stories: Any = None, repeats: Any = None) -> Any:
    """The smallest true difference in loss that a comparison shows, in nats.

    What seeds add is counted for a single seed too, with the noise that the analysis takes for it: that of the
    baseline's repeats, else what is known beforehand. An analysis without any repeat does not see it, and says *one
    seed*.

    Args:
        plan: what is measured.
        variances: of stories and seeds.
        stories: one number or several, instead of the plan's.
        repeats: the same.
    """
    stories = numpy.asarray(plan.stories if stories is None else stories, float)
    repeats = numpy.asarray(plan.repeats if repeats is None else repeats, float)
    deviation, df = _of_seeds(plan, variances, stories, repeats)
    return power.smallest_loss_difference(stories, repeats, variances.story, deviation, seed_df=df)


def _of_seeds(plan: Plan, variances: Variances, stories: Any, repeats: Any) -> tuple[Any, Any]:
    """Standard deviation between seeds of a mean difference, and the degrees of freedom that it will have: those of all
    configurations, where there are texts enough (see `crossed`).
    """
    paired, alone = math.sqrt(2) * variances.seeds.sigma, math.sqrt(2) * variances.seeds_alone.sigma
    once = (alone, plan.baseline_repeats - 1) if plan.baseline_repeats > 1 else (paired, variances.seeds.df)
    several = repeats > 1
    df = (repeats - 1) * numpy.where(stories >= LEAST_TEXTS, max(1, plan.configurations - 1), 1)
    return numpy.where(several, paired, once[0]), numpy.where(several, df, once[1])


# ------------------------------------------------------------------------------------ in words


def describe(plan: Plan, known: Known) -> list[str]:
    """What a grid can show, a line each for speed and loss, and where the variances are from; empty: nothing."""
    lines: list[str] = []
    parts: list[Part] = []
    if plan.visits and plan.configurations > 1:
        lines.append(f"speed {_speed(plan, known.variances)}")
        parts.append("reading")
    if plan.stories and plan.configurations > 1:
        lines.append(f"loss {_loss(plan, known.variances)}")
        parts += ["story", "seeds"]
    return [*lines, f"{power.POWER:.0%} power, one comparison; {known.source(parts)}"] if lines else []


def _speed(plan: Plan, variances: Variances) -> str:
    if plan.visits == 1:
        return "nothing (one visit shows no noise; give 2 or more)"
    smallest = float(smallest_speed_difference(plan, variances.reading))
    shown = f"{words.percent(smallest)} ({plan.visits} visits)"
    if smallest <= SPEED.negligible:
        return shown
    wanted = math.log1p(SPEED.negligible)
    se, df = _of_speed(plan, variances.reading, numpy.asarray(plan.visits, float))
    needed = power.visits_needed(wanted, plan.visits, se, df)
    return f"{shown}; {words.percent(SPEED.negligible)} needs {needed:,.0f} (visits)"


def _loss(plan: Plan, variances: Variances) -> str:
    if plan.stories == 1:
        return "nothing (one story shows no noise; give 2 or more, val_set_size)"
    smallest = float(smallest_loss_difference(plan, variances))
    shown = f"{show_nats(smallest)} ({plan.stories} stories, {_counted(plan.repeats, 'seed')})"
    if smallest <= LOSS.negligible:
        return shown
    return f"{shown}; {show_nats(LOSS.negligible)} needs {_what_shows(plan, variances, LOSS.negligible)}"


def _what_shows(plan: Plan, variances: Variances, wanted: float) -> str:
    """More stories if they would do, else more seeds, else more of both."""
    held_out, repeats = (numpy.asarray(number, float) for number in (plan.stories, plan.repeats))
    deviation, df = _of_seeds(plan, variances, held_out, repeats)
    stories = power.stories_needed(wanted, plan.repeats, variances.story, deviation, seed_df=df)
    if not math.isnan(stories):
        return f"{stories:,.0f} stories (val_set_size)"
    paired = math.sqrt(2) * variances.seeds.sigma

    def df_of(number: Any) -> Any:
        return _of_seeds(plan, variances, held_out, number)[1]

    seeds = power.seeds_needed(wanted, plan.stories, variances.story, paired, seed_df=df_of)
    if not math.isnan(seeds):
        return f"{seeds:,.0f} seeds (repeats)"
    times = power.times_needed(wanted, plan.stories, plan.repeats, variances.story, paired, seed_df=df_of)
    return f"{times * plan.stories:,.0f} stories, {times * plan.repeats:,.0f} seeds"


def show_nats(value: float) -> str:
    """0.05 nats."""
    return f"{value:.2g} nats"


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def ratio_to_negligible(speed: Any, loss: Any) -> Any:
    """The larger of both differences, each in units of its negligible size; nan where one is not measured is ignored.

    Below 1 it counts as 1: what is smaller than negligible decides nothing more.
    """
    ratios: Sequence[Any] = numpy.broadcast_arrays(
        numpy.asarray(speed, float) / SPEED.negligible, numpy.asarray(loss, float) / LOSS.negligible
    )
    return numpy.fmax(1.0, numpy.fmax(*ratios))
