"""What each comparison could have shown, and what would decide those that are not distinguishable."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy
import pandas

from harness.analysis import power, stats
from harness.metrics import Metric

Unit = Literal["stories", "seeds", "times", "visits"]
"""What more of would decide a comparison; times: of both stories and seeds, so many times as many."""


def with_power(judged: pandas.DataFrame, metric: Metric, floor: float | None) -> pandas.DataFrame:
    """`judged` with the columns detectable, needed and unit, on the scale of the effects; null where there is none.

    A comparison that is not distinguishable would be decided by so many stories, seeds or visits, if its true size were
    the measured one (at least the negligible one).

    Args:
        judged: one family of effects (see `family.judge`).
        metric: what was compared.
        floor: smallest effect that is called a difference; null: unknown.
    """
    level = judged["level"].max() if len(judged) else stats.ALPHA
    noisy = judged[(judged["basis"] != "exact") & (judged["se"] > 0)]
    se, df, fraction, seed_df = (noisy[name].to_numpy(float) for name in ("se", "df", "seed_share", "seed_df"))
    detectable = numpy.maximum(power.smallest_difference(se, df, fraction, seed_df, level), floor or 0.0)
    shown = pandas.Series(detectable, noisy.index, dtype=float)
    judged = judged.assign(detectable=shown, needed=numpy.nan, unit=None)
    open_ = noisy[noisy["verdict"] == "not distinguishable"]
    if open_.empty:
        return judged
    negligible = math.log1p(metric.negligible) if metric.scale == "ratio" else metric.negligible
    wanted = numpy.maximum(open_["effect"].abs().to_numpy(float), negligible)
    needed, unit = _visits(open_, wanted, floor, level) if open_["seeds"].isna().all() else _texts(open_, wanted, level)
    judged.loc[open_.index, "needed"] = needed
    judged.loc[open_.index, "unit"] = unit
    return judged


def _visits(undecided: pandas.DataFrame, wanted: Any, floor: float | None, level: float) -> tuple[Any, Any]:
    visits, se, df = (undecided[name].to_numpy(float) for name in ("n", "se", "df"))
    needed = power.visits_needed(wanted, visits, se, df, level)
    # The floor is the standard error of a mean too, and falls with the visits.
    above_floor = numpy.ceil(visits * ((floor or 0.0) / wanted) ** 2)
    return numpy.maximum(needed, above_floor), ["visits" if basis in _VISITS else None for basis in undecided["basis"]]


_VISITS = ("visits", "repeats", "steps")


def _texts(undecided: pandas.DataFrame, wanted: Any, level: float) -> tuple[Any, Any]:
    """More stories; else more seeds; else more of both. The general passages are given: more seeds.

    Degrees of freedom of seeds grow with them: where all configurations have them in common, by as many as the seeds
    that there are have given; what one seed has from others it keeps.
    """
    texts, seeds, se, fraction, seed_df = (
        undecided[name].to_numpy(float) for name in ("n", "seeds", "se", "seed_share", "seed_df")
    )
    pooled, several = (undecided["pooled"] == "seeds").to_numpy(), seeds > 1
    each = numpy.where(pooled & several, seed_df / numpy.maximum(seeds - 1, 1), 1.0)
    least = numpy.where(pooled & ~several, seed_df, 0.0)
    sd_story, sd_seed = se * numpy.sqrt((1 - fraction) * texts), se * numpy.sqrt(fraction * seeds)
    stories = power.stories_needed(wanted, seeds, sd_story, sd_seed, seed_df=seed_df, alpha=level)

    def df_of(number: Any) -> Any:
        return numpy.fmax(each * (number - 1), least)

    more = power.seeds_needed(wanted, texts, sd_story, sd_seed, seed_df=df_of, alpha=level)
    both = power.times_needed(wanted, texts, seeds, sd_story, sd_seed, seed_df=df_of, alpha=level)
    # Where the stories that there are would do, it is the single seed that leaves it open.
    by_stories = (stories > texts) & (undecided["basis"] == "stories").to_numpy()
    by_seeds = ~by_stories & ~numpy.isnan(more)
    needed = numpy.select([by_stories, by_seeds], [stories, numpy.fmax(more, seeds + 1)], both)
    return needed, numpy.select([by_stories, by_seeds], ["stories", "seeds"], "times")
