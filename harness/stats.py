"""Effects of paired comparisons, their intervals, and the words that follow from them.

Everything works on whole columns: a table of effects has one row per comparison, on the scale on
which it is estimated (the logarithm for ratios, nats for losses), with these columns:

effect, low, high
    The mean over the pairs and its 95 % interval; null bounds where the pairs give none.
se, df
    Standard error and degrees of freedom of Student's t behind the interval; `se` is 0 for exact figures.
n
    Pairs.
p
    Two-sided p-value of "no effect"; null where there is no interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import pandas
from scipy import stats

ALPHA = 0.05
"""Share of null comparisons, over a whole family, that may be called a difference."""

_MOST_SWEEPS, _SETTLED = 50, 1e-9

Verdict = Literal["better", "worse", "lower", "higher", "same", "not distinguishable"]


def paired(differences: pandas.Series, by: pandas.Series) -> pandas.DataFrame:
    """Effects from differences of pairs, one group of pairs a comparison: Student's t over each group.

    Student's t is used at every n: with three pairs a percentile bootstrap covers .75 where .95 is said,
    and from twenty pairs on the two agree.

    Args:
        differences: one number a pair; nulls are left out.
        by: the comparison that each pair belongs to.
    """
    groups = differences.groupby(by, sort=False)
    found = pandas.DataFrame({"effect": groups.mean(), "n": groups.count()})
    found["df"] = (found["n"] - 1).astype(float)
    found["se"] = groups.std(ddof=1) / numpy.sqrt(found["n"])
    return with_intervals(found[found["n"] > 0])


def exact(differences: pandas.Series, by: pandas.Series) -> pandas.DataFrame:
    """As `paired`, for figures that do not vary: the interval is the range over the pairs, and any effect is one."""
    groups = differences.groupby(by, sort=False)
    found = pandas.DataFrame({"effect": groups.mean(), "n": groups.count(), "low": groups.min(), "high": groups.max()})
    found = found[found["n"] > 0]
    found["se"], found["df"] = 0.0, math.inf
    found["p"] = numpy.where(found["effect"] == 0, 1.0, 0.0)
    return found


def welch(a: pandas.DataFrame, b: pandas.DataFrame) -> pandas.DataFrame:
    """Effects `a` − `b` of two independent samples each, by Welch's t: for what has one pair and many readings.

    Args:
        a: columns `mean`, `var` (of the sample) and `count`, one row per comparison.
        b: the same rows.
    """
    va, vb = a["var"] / a["count"], b["var"] / b["count"]
    with numpy.errstate(divide="ignore", invalid="ignore"):
        df = (va + vb) ** 2 / (va**2 / (a["count"] - 1) + vb**2 / (b["count"] - 1))
    found = pandas.DataFrame({"effect": a["mean"] - b["mean"], "n": 1, "df": df, "se": numpy.sqrt(va + vb)})
    return with_intervals(found)


@dataclass(frozen=True)
class Noise:
    """What equal trials differ by."""

    sigma: float
    """Standard deviation of one trial."""
    df: int
    """Degrees of freedom behind it."""


def noise(values: pandas.Series, treatment: pandas.Series, block: pandas.Series) -> Noise | None:
    """The noise of a randomised block design: what is left of the values after their treatment and their block.

    The trials of a repeat are interleaved in random order, so a repeat is a block; what disturbs the machine
    spares no configuration, so all of them together say how large the noise is. With three repeats of twenty
    configurations that is 40 degrees of freedom, where each configuration for itself has two.

    Args:
        values: one per trial.
        treatment: its configuration.
        block: its repeat.

    Returns:
        Null where nothing is left to judge by.
    """
    known = values.notna()
    residual, treatments, blocks = values[known], treatment[known], block[known]
    df = len(residual) - treatments.nunique() - blocks.nunique() + 1
    if df < 1:
        return None
    for _ in range(_MOST_SWEEPS):  # exact at once where every configuration is in every repeat
        before = residual
        residual = residual - residual.groupby(treatments).transform("mean")
        residual = residual - residual.groupby(blocks).transform("mean")
        if (before - residual).abs().max() < _SETTLED:
            break
    return Noise(math.sqrt(float((residual**2).sum()) / df), df)


def in_blocks(effects: pandas.DataFrame, weights: pandas.Series, noise: Noise) -> pandas.DataFrame:
    """`effects` (columns effect and n) whose standard error follows from the noise of all trials.

    Args:
        effects: one row per comparison.
        weights: by comparison, the sum of squares of the weights with which trials enter its effect.
        noise: of one trial.
    """
    return with_intervals(effects.assign(se=noise.sigma * numpy.sqrt(weights), df=float(noise.df)))


def with_intervals(effects: pandas.DataFrame) -> pandas.DataFrame:
    """`effects` with `low`, `high` and `p` from its `effect`, `se` and `df`."""
    effect, se, df = (effects[name].to_numpy(float) for name in ("effect", "se", "df"))
    half = stats.t.ppf(1 - ALPHA / 2, numpy.where(df > 0, df, numpy.nan)) * se
    return effects.assign(low=effect - half, high=effect + half, p=_two_sided(effect, se, df))


def _two_sided(effect: Any, se: Any, df: Any) -> Any:
    with numpy.errstate(divide="ignore", invalid="ignore"):
        t = numpy.abs(effect) / se
    t = numpy.where((se == 0) & (effect == 0), 0.0, t)  # pairs that agree to the last bit
    return 2 * stats.t.sf(t, numpy.where(df > 0, df, numpy.nan))


def holm(p: pandas.Series) -> pandas.Series:
    """P-values adjusted over one family (Holm 1979): the chance of one false difference in all of them. Nulls stay."""
    known = p.dropna().sort_values()
    scaled = known * numpy.arange(len(known), 0, -1)
    return scaled.cummax().clip(upper=1.0).reindex(p.index)


def noise_floor(twins: pandas.Series) -> float | None:
    """The effect below which nothing is called a difference, from a baseline run twice (A/A).

    The standard error of the mean of what two runs of the same thing differ by, whose true mean is 0:
    sqrt(mean of squares) ÷ sqrt(n). A single difference says little of its own size and counts twice.

    Args:
        twins: one difference a repeat.

    Returns:
        Null without twins.
    """
    values = twins.dropna().to_numpy(float)
    if not len(values):
        return None
    return float((2 if len(values) == 1 else 1) * math.sqrt(numpy.mean(values**2)) / math.sqrt(len(values)))


def verdicts(
    effects: pandas.DataFrame,
    better: Literal["lower", "higher", None],
    negligible: float,
    floor: float | None = None,
    alpha: float = ALPHA,
) -> pandas.DataFrame:
    """`effects` with `p_holm`, adjusted over its rows, and `verdict`.

    Args:
        effects: one family of comparisons.
        better: which way is better; null: neither, and the words are `lower` and `higher`.
        negligible: an interval within ± this much is `same`.
        floor: effects up to this size are noise, whatever their interval; null: none known.
        alpha: share of false differences over the family.
    """
    effect, low, high = effects["effect"], effects["low"], effects["high"]
    adjusted = holm(effects["p"])
    noise = floor or 0.0
    differs = (adjusted < alpha) & (effect.abs() > noise) & ((low > 0) | (high < 0))
    same = (low >= -negligible) & (high <= negligible) & (noise <= negligible)
    up, down = {"higher": ("better", "worse"), "lower": ("worse", "better"), None: ("higher", "lower")}[better]
    words = numpy.select([same, differs & (effect > 0), differs], ["same", up, down], "not distinguishable")
    return effects.assign(p_holm=adjusted, verdict=words)
