"""Effects of paired comparisons, their standard errors, and the interval of each for itself.

Functions work on whole columns. A table of effects has one row per comparison, on the scale of the
estimate (logarithm for ratios, nats for losses), with these columns:

effect, low, high
    The mean over the pairs and the 95 % interval of this comparison alone; null bounds where the pairs give none. What
    is shown are the intervals of a family (see `family.judge`).
se, df
    Standard error and degrees of freedom of Student's t behind the interval; `se` is 0 for exact figures.
seeds, seed_share, seed_df
    Of losses: the number of seeds, the part of the variance (`se`²) that is due to them, and the degrees of freedom
    behind that part; `df` is then that of the texts' part. Elsewhere null, 0 and null.
pooled
    Which part of the variance is an estimate that all comparisons have in common: `all`, that of the `seeds`, or
    `none`.
n
    Pairs; texts for losses.
p
    Two-sided p-value of "no effect"; null where there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy
import pandas
from scipy import special

ALPHA = 0.05
"""Error rate of a family: the chance that one without any true difference shows one, at most (see `family.MARGIN`)."""
_WORTH = 4
"""Degrees of freedom that the pooled noise is worth beside a configuration's own (see `noise`)."""
_MOST_SWEEPS, _SETTLED = 50, 1e-9
_HALVINGS = 40
"""Of the logarithm of a p-value between 1e-30 and 1: exact to ten digits."""
Verdict = Literal["better", "worse", "lower", "higher", "same", "not distinguishable", "depends"]
"""`depends`: of several pairs, some say one thing and some another."""


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


def exact(differences: pandas.Series, by: pandas.Series, effect: pandas.Series | None = None) -> pandas.DataFrame:
    """As `paired`, for figures without noise: any effect is significant.

    Args:
        differences: one number per pair.
        by: the comparison that each pair belongs to.
        effect: by comparison; null: the mean of its pairs. The interval is the range over the pairs and this.
    """
    groups = differences.groupby(by, sort=False)
    effects = pandas.DataFrame({"effect": groups.mean(), "n": groups.count()})
    if effect is not None:
        effects["effect"] = effect.reindex(effects.index)
    effects["low"] = numpy.minimum(groups.min(), effects["effect"])
    effects["high"] = numpy.maximum(groups.max(), effects["effect"])
    effects = effects[effects["n"] > 0]
    effects["se"], effects["df"] = 0.0, math.inf
    effects["seeds"], effects["seed_share"], effects["seed_df"], effects["pooled"] = numpy.nan, 0.0, numpy.nan, "none"
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
    larger: Mapping[Any, float] = field(default_factory=dict, compare=False)
    """By configuration, standard deviations above it."""

    def errors(self, weights: pandas.Series, configs: Any) -> pandas.Series:
        """Errors with which trials enter effects.

        Args:
            weights: the weight of each in its effect.
            configs: its configuration.
        """
        return weights * [self.larger.get(config, self.sigma) for config in configs]


def noise(values: pandas.Series, treatment: pandas.Series, block: pandas.Series, layouts: int = 1) -> Noise | None:
    """Residual noise of a randomised block design, after the effects of treatment and block.

    The trials of a repeat are interleaved in random order, so a repeat is a block. Disturbances of the machine affect
    all configurations, so the noise is pooled over them: three repeats of twenty configurations give 38 degrees of
    freedom, where each configuration alone gives two. One that is noisier keeps a part of that: its variance is a
    weighted mean of its own and the pooled one (a moderated variance, as in Smyth 2004, Stat. Appl. Genet. Mol. Biol.
    3:3, with a given weight), and never less than this.

    Args:
        values: one per trial.
        treatment: its configuration.
        block: its repeat.
        layouts: separate designs in one table, which share neither treatments nor blocks.

    Returns:
        Null where no degree of freedom is left.
    """
    known = values.notna()
    residual = values[known].to_numpy(float)
    (of, treatments), (in_block, blocks) = (pandas.factorize(column[known]) for column in (treatment, block))
    df = len(residual) - len(treatments) - len(blocks) + layouts
    if df < 1 or not len(residual):
        return None
    sizes = numpy.bincount(of)
    for _ in range(_MOST_SWEEPS):  # one sweep is exact where every configuration is in every repeat
        before = residual
        residual = residual - (numpy.bincount(of, residual) / sizes)[of]
        residual = residual - (numpy.bincount(in_block, residual) / numpy.bincount(in_block))[in_block]
        if numpy.abs(before - residual).max() < _SETTLED:
            break
    pooled = float((residual**2).sum()) / df
    own_df = numpy.maximum(sizes - 1 - (len(blocks) - layouts) * sizes / len(residual), 0)
    moderated = numpy.sqrt((_WORTH * pooled + numpy.bincount(of, residual**2)) / (_WORTH + own_df))
    larger = {config: sigma for config, sigma in zip(treatments, moderated.tolist(), strict=True) if sigma**2 > pooled}
    return Noise(math.sqrt(pooled), df, larger)


def in_blocks(effects: pandas.DataFrame, variance: Any, noise: Noise) -> pandas.DataFrame:
    """`effects` (columns effect and n) with standard errors from the pooled noise of all trials.

    Args:
        effects: one row per comparison.
        variance: by comparison, that of its effect.
        noise: of one trial.
    """
    return with_intervals(effects.assign(se=numpy.sqrt(variance), df=float(noise.df), pooled="all"))


def with_intervals(effects: pandas.DataFrame) -> pandas.DataFrame:
    """`effects` with `low`, `high` and `p` from its `effect`, `se` and `df`, and from what is said of seeds."""
    effects = effects.assign(
        seeds=effects.get("seeds", numpy.nan),
        seed_share=effects.get("seed_share", 0.0),
        seed_df=effects.get("seed_df", numpy.nan),
        pooled=effects.get("pooled", "none"),
    )
    effect = effects["effect"].to_numpy(float)
    half = critical(effects, ALPHA) * effects["se"].to_numpy(float)
    return effects.assign(low=effect - half, high=effect + half, p=two_sided(effects, effect))


def critical(effects: pandas.DataFrame, alpha: Any) -> Any:
    """The multiple of `se` that an estimate exceeds with probability alpha, in either direction, if there is no effect.

    Args:
        effects: see above.
        alpha: one, or one per row.
    """
    own, fraction, seeds = (effects[name].to_numpy(float) for name in ("df", "seed_share", "seed_df"))
    return quantile(1 - numpy.asarray(alpha, float) / 2, own, fraction, seeds)


def quantile(probability: Any, df: Any, seed_share: Any = 0.0, seed_df: Any = math.nan) -> Any:
    """Upper quantile of Student's t; where seeds have a part in the variance, between the quantiles of both parts.

    Cochran (1964, Biometrics 20:191) weights both by their fractions of the variance, so that the single degree of
    freedom of two seeds counts as much as their variance does. Satterthwaite's degrees of freedom cover 0.88 there at a
    nominal 0.95, as two seeds may agree by chance. Cochran's weights cover 0.94 to 0.98, and too little in the tails
    that a family of comparisons needs. With the exponent of the fraction, found by simulation, measured losses are
    covered at 0.93 to 0.97. With two seeds that dominate, a false difference comes up to 1.5 times as often as stated
    at 0.05 and three times at 0.0025; with three, 1.3 times (`benchmarks/coverage.py`, tests).

    Args:
        probability: above 0.5; one, or one per row, as all others.
        df: degrees of freedom of the texts' part, or of all.
        seed_share: see above.
        seed_df: see above.
    """
    return _upper(1 - numpy.asarray(probability, float), df, seed_share, seed_df)


def _upper(tail: Any, df: Any, seed_share: Any, seed_df: Any) -> Any:
    """The quantile above which this probability lies: 1 minus a small one has no digits left."""
    df, seed_share, seed_df = (numpy.asarray(x, float) for x in (df, seed_share, seed_df))
    own = -special.stdtrit(numpy.where(df > 0, df, numpy.nan), tail)
    of_seeds = -special.stdtrit(numpy.where(seed_df > 0, seed_df, numpy.nan), tail)
    return between(own, of_seeds, seed_share, tail)


def between(own: Any, of_seeds: Any, seed_share: Any, tail: Any) -> Any:
    """The quantile of both parts of a variance, between those of each (see `quantile`).

    Args:
        own: of the texts' part.
        of_seeds: of the seeds' part.
        seed_share: see above.
        tail: probability above it.
    """
    exponent = numpy.clip(2.22 + 0.515 * numpy.log10(2 * tail), 0.5, 1.55)
    return numpy.where(seed_share > 0, own + seed_share**exponent * (of_seeds - own), own)


def two_sided(effects: pandas.DataFrame, distance: Any) -> Any:
    """P-value of a true distance of 0, for estimates that lie this far from it: where `critical` equals it.

    Args:
        effects: see above; `effect` is not read.
        distance: one per row.
    """
    own, fraction, seeds, se = (effects[name].to_numpy(float) for name in ("df", "seed_share", "seed_df", "se"))
    with numpy.errstate(divide="ignore", invalid="ignore"):
        t = numpy.abs(numpy.asarray(distance, float)) / se
    t = numpy.where((se == 0) & (distance == 0), 0.0, t)  # pairs that agree to the last bit
    p = 2 * special.stdtr(numpy.where(own > 0, own, numpy.nan), -t)
    mixed = numpy.flatnonzero((fraction > 0) & numpy.isfinite(t))
    low, high = numpy.full(len(mixed), -30 * math.log(10)), numpy.zeros(len(mixed))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = _upper(numpy.exp(middle) / 2, own[mixed], fraction[mixed], seeds[mixed]) > t[mixed]
        low, high = numpy.where(below, middle, low), numpy.where(below, high, middle)
    p[mixed] = numpy.where(numpy.isnan(seeds[mixed]) | ~(own[mixed] > 0), numpy.nan, numpy.exp(high))
    return p


def noise_floor(twins: pandas.Series) -> float | None:
    """The effect below which nothing is called a difference, from a baseline run twice (A/A).

    Standard error of the mean difference between two runs of the same spec, whose true mean is 0:
    sqrt(mean of squares) ÷ sqrt(n). A single difference is a poor estimate of its size and is doubled.

    Args:
        twins: one difference per block of visits.

    Returns:
        Null without twins.
    """
    values = twins.dropna().to_numpy(float)
    if not len(values):
        return None
    return float((2 if len(values) == 1 else 1) * math.sqrt(numpy.mean(values**2)) / math.sqrt(len(values)))
