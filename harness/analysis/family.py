"""Comparisons that are judged together: one family, in which a difference that does not exist is rare anywhere.

The errors of comparisons with one baseline, over the same stories and blocks, are correlated. What a family needs
follows from that correlation (the single-step min-P procedure; Westfall and Young 1993, Resampling-Based Multiple
Testing, ch. 2): at which level each comparison is to be judged so that any of them exceeds its bound with probability
`ALPHA`, at most, if no effect exists. The intervals at that level hold all at the same time, and say what the verdicts
say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy
import pandas
from scipy import special

from harness.analysis import stats

MARGIN = 0.8
"""Families are judged at this part of the error rate that is promised. Judged at all of it, the promise would hold with
nothing to spare, and only for errors that are normal and vary equally; real ones are neither."""
_DRAWS = 10_000
_LEVELS = numpy.logspace(0, -5, 26)
_MOST_JOINT = 500
"""Comparisons whose correlation is taken into account; more are judged as if they were independent, which is stricter
(Šidák 1967, J. Am. Stat. Assoc. 62:626)."""
_SOURCE = ["source", "unit"]
NO_ERRORS = pandas.Series(
    index=pandas.MultiIndex.from_arrays([[], [], []], names=["comparison", *_SOURCE]), dtype=float
)


@dataclass(frozen=True)
class Effects:
    """Effects of comparisons on one figure, and what their errors have in common."""

    table: pandas.DataFrame
    """See `stats`; with a column `basis`."""
    errors: pandas.Series
    """By comparison and independent source of error (a trial in a block, a text, a seed): by how much the effect moves
    with one standard deviation of it. Their squares add up to `se`². A comparison without any has errors of its own."""

    def combined(self, mixtures: Sequence[Mapping[int, float]], first: int) -> Effects:
        """With weighted sums of these effects, which are not exact, as further comparisons, numbered from `first`.

        Args:
            mixtures: of each, the weights by comparison.
            first: number of the first.
        """
        if not mixtures:
            return self
        rows = [(first + i, c, weight) for i, mixture in enumerate(mixtures) for c, weight in mixture.items()]
        of = pandas.DataFrame(rows, columns=["mixture", "comparison", "weight"])
        parts = of.merge(self.table, left_on="comparison", right_index=True)
        by = parts.groupby("mixture", sort=False)
        table = by[["n", "df", "seeds", "seed_df", "basis", "pooled"]].agg(
            {"n": "min", "df": "min", "seeds": "min", "seed_df": "min", "basis": "first", "pooled": "first"}
        )
        table["effect"] = (parts["effect"] * parts["weight"]).groupby(parts["mixture"]).sum()
        known = self.errors.rename("error").reset_index().merge(of, on="comparison")
        known["error"] *= known["weight"]
        errors = known.groupby(["mixture", *_SOURCE])["error"].sum().rename_axis(["comparison", *_SOURCE])
        own = (parts["se"] * parts["weight"]) ** 2
        alone = own.where(~parts["comparison"].isin(self.errors.index.unique("comparison")), 0.0)
        alone = alone.groupby(parts["mixture"]).sum().where(by["se"].count() == by["se"].size())
        joint = (errors**2).groupby("comparison").sum().reindex(table.index, fill_value=0.0)
        table["se"] = numpy.sqrt(joint + alone)
        # What the members have in common may cancel: the seeds' part is that of the errors that are left.
        seeds = errors[errors.index.get_level_values("source") != "text"]
        fraction = (seeds**2).groupby("comparison").sum().reindex(table.index, fill_value=0.0) / table["se"] ** 2
        table["seed_share"] = fraction.where(table["seeds"].notna() & (table["se"] > 0), 0.0).clip(upper=1.0)
        table = stats.with_intervals(table)
        return Effects(pandas.concat([self.table, table]), pandas.concat([self.errors, errors]))


class Family:
    """What comparisons need that are judged together.

    Args:
        effects: all of them. Exact ones and those without an interval need nothing.
    """

    def __init__(self, effects: Effects) -> None:
        self._tested = effects.table[(effects.table["se"] > 0) & effects.table["p"].notna()]
        self._errors = effects.errors

    def level(self, alpha: float = stats.ALPHA) -> float:
        """The error rate of each comparison with which that of the family is `alpha`."""
        count = len(self._tested)
        if count <= 1:
            return alpha
        if count > _MOST_JOINT:
            return -math.expm1(math.log1p(-alpha) / count)
        # A sampled one may lie below what is valid for any errors (Bonferroni).
        return max(float(numpy.quantile(self._smallest, alpha, method="lower")), alpha / count)

    def adjusted(self, p: pandas.Series) -> pandas.Series:
        """P-values of comparisons as those of the family: how often any of its effects would seem so large."""
        count = len(self._tested)
        if count <= 1:
            return p
        if count > _MOST_JOINT:
            return p.map(lambda each: -math.expm1(count * math.log1p(-min(each, 1 - 1e-16))), na_action="ignore")
        smaller = numpy.searchsorted(self._smallest, p.to_numpy(float), side="right") / len(self._smallest)
        # The sum over the comparisons bounds it (Bonferroni); draws say nothing of what is rarer than they are many.
        bound = count * p
        return pandas.Series(numpy.where(smaller > 0, smaller, bound), p.index).clip(upper=bound).where(p.notna())

    @cached_property
    def _smallest(self) -> Any:
        """Draws of the smallest p-value of a family without effects, in order.

        What is estimated once for all comparisons is drawn once: where it comes out too small, it does for all of them
        together, which errors that are independent would not do.
        """
        generator, directions = numpy.random.default_rng(0), self._directions()
        t = numpy.abs(generator.standard_normal((_DRAWS, directions.shape[1])) @ directions.T)
        own, seeds, of_seeds = (self._tested[name].to_numpy(float) for name in ("df", "seed_df", "seed_share"))
        pooled = self._tested["pooled"].to_numpy()
        variance = (1 - of_seeds) * _scaled_chi_square(own, pooled == "all", generator)
        mixed = of_seeds > 0
        part = of_seeds * _scaled_chi_square(seeds, pooled == "seeds", generator) if mixed.any() else 0.0
        variance += part
        t /= numpy.sqrt(variance)
        smallest = numpy.ones(_DRAWS)
        for df in numpy.unique(own[~mixed]):
            largest = t[:, ~mixed & (own == df)].max(axis=1)
            smallest = numpy.minimum(smallest, 2 * special.stdtr(df, -largest))
        if mixed.any():
            fraction = (part / variance)[:, mixed]
            p = _p_values(t[:, mixed], own[mixed], fraction, seeds[mixed])
            smallest = numpy.minimum(smallest, p.min(axis=1))
        return numpy.sort(smallest)

    def _directions(self) -> Any:
        """By comparison and independent source, the errors, each with variance 1."""
        index = self._tested.index
        known = self._errors[self._errors.index.isin(index, level="comparison")]
        wide: Any = known.unstack(_SOURCE) if len(known) else pandas.DataFrame(index=index)
        table = wide.reindex(index).fillna(0.0).to_numpy(float)
        lengths = numpy.sqrt((table**2).sum(axis=1))
        alone = numpy.eye(len(table))[:, lengths == 0]
        joint = numpy.hstack([table / numpy.where(lengths > 0, lengths, 1.0)[:, None], alone])
        if joint.shape[1] > len(joint):  # as many sources as comparisons will do
            values, vectors = numpy.linalg.eigh(joint @ joint.T)
            # The symmetric root: eigenvectors alone have other signs, and so other draws, on another processor.
            roots = numpy.sqrt(numpy.where(values > 1e-12 * values[-1], values, 0.0))
            joint = (vectors * roots) @ vectors.T
        return joint


def _p_values(t: Any, df: Any, seed_share: Any, seed_df: Any) -> Any:
    """`stats.two_sided` of many draws: between levels, by the logarithm of the level."""
    p = numpy.ones(t.size)
    open_, lower = numpy.arange(t.size), numpy.zeros(t.size)
    values, shares = t.ravel(), seed_share.ravel()
    for level, before in zip(_LEVELS[1:], _LEVELS, strict=False):
        own, of_seeds = (stats.quantile(1 - level / 2, each)[open_ % t.shape[1]] for each in (df, seed_df))
        upper = stats.between(own, of_seeds, shares[open_], level / 2)
        reached = values[open_] >= upper
        inside = open_[~reached]
        fraction = (values[inside] - lower[~reached]) / (upper - lower)[~reached]
        p[inside] = before * (level / before) ** fraction
        open_, lower = open_[reached], upper[reached]
        p[open_] = level
    return p.reshape(t.shape)


def _scaled_chi_square(df: Any, common: Any, generator: numpy.random.Generator) -> Any:
    """Draws of χ² ÷ df by comparison; those with a common estimate and equal degrees of freedom have the same."""
    drawn = numpy.ones((_DRAWS, len(df)))
    for value in numpy.unique(df[numpy.isfinite(df) & (df > 0)]):
        columns = df == value
        for of, number in ((columns & common, 1), (columns & ~common, int((columns & ~common).sum()))):
            if of.any():
                drawn[:, of] = 2 * generator.standard_gamma(value / 2, (_DRAWS, number)) / value
    return drawn


def judge(
    effects: Effects,
    better: Literal["lower", "higher", None],
    negligible: float,
    floor: float | None = None,
    alpha: float = stats.ALPHA,
) -> pandas.DataFrame:
    """The table of one family with `low` and `high` that hold for all of its rows at the same time, `p_family`,
    `level` (the error rate of a row), and `verdict`.

    An interval without 0 is a difference, and no other is: where the noise floor is wider than an interval, the
    interval is as wide as the floor.

    Args:
        effects: one family.
        better: which direction is better; null: neither, and the verdicts are `lower` and `higher`.
        negligible: an interval within ± this value is `same`, unless it comes from one seed.
        floor: effects up to this size are noise, whatever their interval; null: unknown.
        alpha: error rate of the family, of which it uses the `MARGIN`.
    """
    table, family, noise = effects.table, Family(effects), floor or 0.0
    level = family.level(MARGIN * alpha)
    effect, exact = table["effect"], (table["basis"] == "exact").to_numpy()
    half = numpy.maximum(stats.critical(table, level) * table["se"], noise)
    low, high = (table[end].where(exact, effect + sign * half) for end, sign in (("low", -1), ("high", 1)))
    p = (family.adjusted(table["p"]) / MARGIN).clip(upper=1.0)
    p = p.where(exact | (effect.abs() > noise) | table["p"].isna(), 1.0)
    # One seed cannot say that others would agree.
    several = ~(table["seeds"] == 1)
    differs = ((low > 0) | (high < 0)) & (~exact | (effect != 0))
    same = (low >= -negligible) & (high <= negligible) & several
    up, down = {"higher": ("better", "worse"), "lower": ("worse", "better"), None: ("higher", "lower")}[better]
    words = numpy.select([same, differs & (effect > 0), differs], ["same", up, down], "not distinguishable")
    return table.assign(low=low, high=high, p_family=p, level=level, verdict=words)
