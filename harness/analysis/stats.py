"""Effects of paired comparisons, their intervals, and the verdicts that follow from them.

Functions work on whole columns. A table of effects has one row per comparison, on the scale of the
estimate (logarithm for ratios, nats for losses), with these columns:

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
"""Family-wise error rate: the chance that a family without any true difference shows one."""
_MOST_SWEEPS, _SETTLED = 50, 1e-9
Verdict = Literal["better", "worse", "lower", "higher", "same", "not distinguishable"]


def paired(differences: pandas.Series, by: pandas.Series) -> pandas.DataFrame:
    """Effect of each comparison: mean difference over its pairs, with Student's t.

    Student's t is used at every n: with three pairs a percentile bootstrap covers 0.75 at a nominal 0.95,
    and from twenty pairs on the two agree.

    Args:
        differences: one number per pair; nulls are dropped.
        by: the comparison that each pair belongs to.
    """
    groups = differences.groupby(by, sort=False)
    effects = pandas.DataFrame({"effect": groups.mean(), "n": groups.count()})
    effects["df"] = (effects["n"] - 1).astype(float)
    effects["se"] = groups.std(ddof=1) / numpy.sqrt(effects["n"])
    return with_intervals(effects[effects["n"] > 0])


def exact(differences: pandas.Series, by: pandas.Series) -> pandas.DataFrame:
    """As `paired`, for figures without noise: the interval is the range over the pairs; any effect is significant."""
    groups = differences.groupby(by, sort=False)
    ranges = {"effect": groups.mean(), "n": groups.count(), "low": groups.min(), "high": groups.max()}
    effects = pandas.DataFrame(ranges)
    effects = effects[effects["n"] > 0]
    effects["se"], effects["df"] = 0.0, math.inf
    effects["p"] = numpy.where(effects["effect"] == 0, 1.0, 0.0)
    return effects


def welch(a: pandas.DataFrame, b: pandas.DataFrame) -> pandas.DataFrame:
    """Effects `a` − `b` of two independent samples, by Welch's t: for one pair of trials with many readings each.

    Args:
        a: columns `mean`, `var` (of the sample) and `count`, one row per comparison.
        b: the same rows.
    """
    va, vb = a["var"] / a["count"], b["var"] / b["count"]
    with numpy.errstate(divide="ignore", invalid="ignore"):
        df = (va + vb) ** 2 / (va**2 / (a["count"] - 1) + vb**2 / (b["count"] - 1))
    return with_intervals(
        pandas.DataFrame({"effect": a["mean"] - b["mean"], "n": 1, "df": df, "se": numpy.sqrt(va + vb)})
    )


@dataclass(frozen=True)
class Noise:
    """Variation between equal trials."""

    sigma: float
    """Standard deviation of one trial."""
    df: int
    """Degrees of freedom behind it."""


def noise(values: pandas.Series, treatment: pandas.Series, block: pandas.Series) -> Noise | None:
    """Residual noise of a randomised block design, after the effects of treatment and block.

    The trials of a repeat are interleaved in random order, so a repeat is a block. Disturbances of the machine affect
    all configurations, so the noise is pooled over them: three repeats of twenty configurations give 38 degrees of
    freedom, where each configuration alone gives two.

    Args:
        values: one per trial.
        treatment: its configuration.
        block: its repeat.

    Returns:
        Null where no degree of freedom is left.
    """
    known = values.notna()
    residual, treatments, blocks = values[known], treatment[known], block[known]
    df = len(residual) - treatments.nunique() - blocks.nunique() + 1
    if df < 1:
        return None
    for _ in range(_MOST_SWEEPS):  # one sweep is exact where every configuration is in every repeat
        before = residual
        residual = residual - residual.groupby(treatments).transform("mean")
        residual = residual - residual.groupby(blocks).transform("mean")
        if (before - residual).abs().max() < _SETTLED:
            break
    return Noise(math.sqrt(float((residual**2).sum()) / df), df)


def in_blocks(effects: pandas.DataFrame, weights: pandas.Series, noise: Noise) -> pandas.DataFrame:
    """`effects` (columns effect and n) with standard errors from the pooled noise of all trials.

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
    """P-values adjusted over one family (Holm 1979), which bounds the family-wise error rate. Nulls stay null."""
    known = p.dropna().sort_values()
    scaled = known * numpy.arange(len(known), 0, -1)
    return scaled.cummax().clip(upper=1.0).reindex(p.index)


def noise_floor(twins: pandas.Series) -> float | None:
    """The effect below which nothing is called a difference, from a baseline run twice (A/A).

    Standard error of the mean difference between two runs of the same spec, whose true mean is 0:
    sqrt(mean of squares) ÷ sqrt(n). A single difference is a poor estimate of its size and is doubled.

    Args:
        twins: one difference per repeat.

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
        better: which direction is better; null: neither, and the verdicts are `lower` and `higher`.
        negligible: an interval within ± this value is `same`.
        floor: effects up to this size are noise, whatever their interval; null: unknown.
        alpha: family-wise error rate.
    """
    effect, low, high = effects["effect"], effects["low"], effects["high"]
    adjusted = holm(effects["p"])
    noise = floor or 0.0
    differs = (adjusted < alpha) & (effect.abs() > noise) & ((low > 0) | (high < 0))
    same = (low >= -negligible) & (high <= negligible) & (noise <= negligible)
    up, down = {"higher": ("better", "worse"), "lower": ("worse", "better"), None: ("higher", "lower")}[better]
    words = numpy.select([same, differs & (effect > 0), differs], ["same", up, down], "not distinguishable")
    return effects.assign(p_holm=adjusted, verdict=words)
