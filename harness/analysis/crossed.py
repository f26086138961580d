"""Intervals of mean losses: texts and seeds are both random, and each text is seen under each seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy
import pandas

from harness.analysis import stats
from harness.analysis.family import NO_ERRORS, Effects
from harness.analysis.stats import Noise, with_intervals


@dataclass(frozen=True)
class SeedNoise:
    """Variation between equal trials under several seeds, from all configurations."""

    mean: Noise
    """Of a trial's mean loss."""
    left: float
    """Variance of one text's loss, after the effects of its trial and of the text: what is left of it in `mean`."""
    paired: bool = True
    """Whether it is that of trials of one repeat, without what a seed does to all of them."""


LEAST_TEXTS = 8
"""With fewer, the many degrees of freedom of all seeds stand beside too few of the texts: by simulation, families of
twenty then claim a false difference in 11 % of cases, and in 2 to 6 % with those of their own seeds. From eight texts
on it is 3 to 6 %, where own seeds that dominate give 9 to 15 %."""
_ENOUGH = 5
"""Degrees of freedom from which on the noise of pairs is known well enough, if those of independent seeds are more than
twice as many: one further repeat of a single configuration gives one, which would make every interval endless."""
NO_SEED_BETWEEN = SeedNoise(Noise(0.0, 0), 0.0)
"""That of models of one trial, which have their seed in common."""


def seed_noise(losses: pandas.DataFrame, *, paired: bool) -> SeedNoise | None:
    """Noise from the configurations that were repeated; null where none was.

    Args:
        losses: columns config, repeat, story, tokens and loss of every trial.
        paired: the noise in the difference of two trials of a repeat, where several configurations were repeated often
            enough to know it. Else the seeds of each are taken for independent ones.
    """
    texts = losses.groupby(["config", "repeat", "story"])[["loss", "tokens"]].mean().reset_index()
    trial = [texts["config"], texts["repeat"]]
    total = (texts["loss"] * texts["tokens"]).groupby(trial).sum()
    means = (total / texts["tokens"].groupby(trial).sum()).rename("loss").reset_index()
    mean = alone = stats.noise(means["loss"], means["config"], pandas.Series(0, means.index))
    if paired:
        # A repeat of one configuration alone says nothing of differences.
        blocks = means[means.groupby("repeat")["config"].transform("nunique") > 1]
        of_pairs = stats.noise(blocks["loss"], blocks["config"], blocks["repeat"])
        if of_pairs is not None and alone is not None and of_pairs.df >= min(_ENOUGH, alone.df / 2):
            mean = of_pairs
    if mean is None:
        return None
    in_blocks = mean is not alone
    of_trial = means.set_index(["config", "repeat"])["loss"]
    rest = texts["loss"] - of_trial.reindex(pandas.MultiIndex.from_frame(texts[["config", "repeat"]])).to_numpy()
    config, repeat = (texts.groupby([key, "story"]).ngroup() for key in ("config", "repeat"))
    story = texts.groupby("story").ngroup()
    left = stats.noise(rest, config, repeat if in_blocks else story, layouts=story.nunique())
    return SeedNoise(mean, left.sigma**2 if left is not None else 0.0, in_blocks)


def crossed(
    losses: pandas.DataFrame,
    noise: SeedNoise | None = None,
    weights: pandas.Series | None = None,
    by_own_seeds: pandas.Index | None = None,
) -> Effects:
    """Effect of each comparison: the mean over seeds of the mean over texts, weighted by tokens.

    Args:
        losses: columns comparison, repeat, story, tokens and loss (a difference or a change, nats per token); a text
            counts where every repeat of its comparison has it.
        noise: of the seeds. Comparisons of several seeds have it where it is paired, or where they are two, and there
            are texts enough, and else that of their own; null: unknown, and those of one seed have no interval.
        weights: see `timed.weights`, of the configurations in each mean; null: each comparison has a trial of its own.
        by_own_seeds: comparisons whose seeds, if more than two, count alone: they differ by less than those of other
            configurations (`equal_work`).
    """
    shared = _shared(losses)
    counts = shared.groupby("comparison")["repeat"].agg(["nunique", "size"])
    counts["own"] = counts.index.isin([] if by_own_seeds is None else by_own_seeds)
    tables, errors = [of_tables(numpy.empty((0, 1, 1)), numpy.empty((0, 1)))], [NO_ERRORS]
    for shape, group in counts.groupby(["nunique", "size", "own"]):
        repeats, rows, own = (int(each) for each in cast("tuple[int, int, bool]", shape))
        comparisons = group.index
        values = shared[shared["comparison"].isin(comparisons)]
        table, tokens = (values[x].to_numpy(float).reshape(-1, repeats, rows // repeats) for x in ("loss", "tokens"))
        of_seeds = known = None
        texts = rows // repeats
        # Two have one degree of freedom: what others differ by, which is more, then gives the narrower interval.
        by_own = texts < LEAST_TEXTS or (own and repeats > 2)
        by_others = noise is not None and (noise.paired or repeats == 2)
        several = by_others and weights is not None and not by_own
        if noise is not None and (repeats == 1 or several):
            of_seeds = _of_seeds(noise.mean, comparisons, weights)
            if repeats > 1:  # what learns the same to the bit under all seeds has no noise
                differ = comparisons[(table != 0).any(axis=(1, 2))]
                of_seeds = of_seeds[of_seeds.index.isin(differ, level="comparison")]
            squares = (of_seeds**2).groupby("comparison").sum().reindex(comparisons, fill_value=0.0).to_numpy()
            left = noise.left / noise.mean.sigma**2 if noise.mean.sigma else 0.0
            known = (squares, left * squares, noise.mean.df)
        parts = _parts(table, tokens.mean(axis=1), known)
        tables.append(_effects(parts).set_index(comparisons))
        keys = values.assign(text=parts.text_errors.repeat(repeats, axis=0).ravel())
        errors += [_of_texts(keys), _of_own_seeds(keys, parts) if of_seeds is None else of_seeds]
    return Effects(pandas.concat(tables[1:] or tables), pandas.concat(errors[1:] or errors))


_KEYS = ["comparison", "source", "unit"]


def _of_seeds(noise: Noise, comparisons: pandas.Index, weights: pandas.Series | None) -> pandas.Series:
    """Errors of seeds from the noise of all configurations."""
    if weights is None:
        once = pandas.DataFrame({"comparison": comparisons, "source": "seed", "unit": comparisons.astype(str)})
        return once.assign(error=noise.sigma).set_index(_KEYS)["error"]
    of_configs = weights[weights.index.isin(comparisons, level="comparison")]
    return noise.errors(of_configs, of_configs.index.get_level_values("unit").astype(int))


def _of_texts(keys: pandas.DataFrame) -> pandas.Series:
    once = keys.drop_duplicates(["comparison", "story"])
    return once.assign(source="text", unit=once["story"].astype(str)).set_index(_KEYS)["text"]


def _of_own_seeds(keys: pandas.DataFrame, parts: _Parts) -> pandas.Series:
    """Errors of several seeds from what they differ by in each comparison."""
    once = keys.drop_duplicates(["comparison", "repeat"])
    once = once.assign(source="seed", unit=once["repeat"].astype(str), error=parts.seed_errors.ravel())
    return once.set_index(_KEYS)["error"]


def of_tables(losses: Any, tokens: Any, known: tuple[Any, Any, int] | None = None) -> pandas.DataFrame:
    """Effects of comparisons of equally many seeds and texts, with intervals.

    The variance of the mean is that of two crossed random factors, as in two-way clustering (Cameron, Gelbach and
    Miller 2011, J. Bus. Econ. Stat. 29:238), which needs neither equal weights nor equal variances of the texts:

        variance between seeds + max(0, variance between texts − variance of what is left)

    What is left is in both others and counts once. It is subtracted from the texts' part, which has many degrees of
    freedom: subtracted from that of two or three seeds it would too often leave nothing of it. One seed says nothing
    about others: its part is what is known from other trials, and else there is no interval.

    Args:
        losses: nats per token by comparison, seed and text.
        tokens: judged tokens by comparison and text.
        known: by comparison the variance of the mean between seeds and, within it, of one text's loss, of which several
            seeds have their own, and the degrees of freedom behind the first (see `SeedNoise`); null: that of the
            comparison's own seeds.
    """
    return _effects(_parts(losses, tokens, known))


class _Parts(NamedTuple):
    """A mean and the parts of its variance, by comparison."""

    mean: Any
    texts: int
    seeds: int
    variance: Any
    between_seeds: Any
    seed_df: int
    pooled: bool
    """Whether the variance between seeds is that of all comparisons."""
    text_df: Any
    text_errors: Any
    """By comparison and text; their squares add up to the part of the texts."""
    seed_errors: Any
    """By comparison and seed."""


def _parts(losses: Any, tokens: Any, known: tuple[Any, Any, int] | None) -> _Parts:
    seeds, texts = losses.shape[1:]
    weights = tokens / tokens.sum(axis=1, keepdims=True)
    of_seeds = numpy.einsum("crs,cs->cr", losses, weights)
    # Without its seed's mean: what a seed adds to every text is no property of a text.
    rest = losses - of_seeds[:, :, None]
    of_texts = rest.mean(axis=1)
    # Kish's effective number: a few long texts among many short ones vary as few do.
    effective = 1 / (weights**2).sum(axis=1)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        # One text, or one that has nearly all tokens, says nothing of others.
        correction = numpy.where(effective > 1.5, effective / (effective - 1), numpy.nan)
    between_texts = correction * ((weights * of_texts) ** 2).sum(axis=1)
    if seeds > 1:
        squares = ((rest - of_texts[:, None, :]) ** 2).sum(axis=1)
        left = correction * (weights**2 * squares).sum(axis=1) / (seeds * (seeds - 1))
        between_seeds, seed_df = of_seeds.var(axis=1, ddof=1) / seeds, seeds - 1
    else:
        unknown = numpy.full(len(losses), numpy.nan)
        between_seeds, of_text, seed_df = known or (unknown, unknown, 0)
        left = of_text / effective
    if known is not None:
        between_seeds, seed_df = known[0], known[2]
    of_texts_alone = numpy.maximum(between_texts - left, 0.0)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        kept = numpy.where(between_texts > 0, of_texts_alone / between_texts, 0.0)
    return _Parts(
        mean=of_seeds.mean(axis=1),
        texts=texts,
        seeds=seeds,
        variance=between_seeds + of_texts_alone,
        between_seeds=between_seeds,
        seed_df=seed_df,
        pooled=known is not None,
        text_df=effective - 1,
        text_errors=weights * of_texts * numpy.sqrt(correction * kept)[:, None],
        seed_errors=(of_seeds - of_seeds.mean(axis=1, keepdims=True)) / math.sqrt(max(1, seeds * (seeds - 1))),
    )


def _effects(parts: _Parts) -> pandas.DataFrame:
    columns = {
        "effect": parts.mean,
        "n": parts.texts,
        "seeds": float(parts.seeds),
        "se": numpy.sqrt(parts.variance),
        "df": parts.text_df,
        "seed_share": parts.between_seeds / numpy.where(parts.variance > 0, parts.variance, 1.0),
        "seed_df": float(parts.seed_df),
        "pooled": "seeds" if parts.pooled else "none",
    }
    return with_intervals(pandas.DataFrame(columns, index=range(len(parts.mean))))


def _shared(losses: pandas.DataFrame) -> pandas.DataFrame:
    """One row per comparison, repeat and text, in order: the mean over its pairs, of texts that all repeats have."""
    keys = ["comparison", "repeat", "story"]
    means = losses.groupby(keys)[["loss", "tokens"]].mean().reset_index().dropna(subset=["loss"])
    repeats = means.groupby("comparison")["repeat"].transform("nunique")
    seen = means.groupby(["comparison", "story"])["repeat"].transform("size")
    shared: pandas.DataFrame = means[seen == repeats]
    return shared
