"""Intervals of mean losses: texts and seeds are both random, and each text is seen under each seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import pandas

from harness.analysis import stats
from harness.analysis.stats import Noise, with_intervals


@dataclass(frozen=True)
class SeedNoise:
    """Variation between equal trials under several seeds, for comparisons that have one."""

    mean: Noise
    """Of a trial's mean loss."""
    left: float
    """Variance of one text's loss, after the effects of its trial and of the text: what is left of it in `mean`."""


def seed_noise(losses: pandas.DataFrame, *, paired: bool) -> SeedNoise | None:
    """Noise from the configurations that were repeated; null where none was.

    Args:
        losses: columns config, repeat, story, tokens and loss of every trial.
        paired: the noise in the difference of two trials of a repeat, where several configurations were repeated. Where
            one was, its seeds are taken for independent ones.
    """
    texts = losses.groupby(["config", "repeat", "story"])[["loss", "tokens"]].mean().reset_index()
    trial = [texts["config"], texts["repeat"]]
    total = (texts["loss"] * texts["tokens"]).groupby(trial).sum()
    means = (total / texts["tokens"].groupby(trial).sum()).rename("loss").reset_index()
    once = pandas.Series(0, means.index)
    mean = stats.noise(means["loss"], means["config"], means["repeat"]) if paired else None
    in_blocks = mean is not None
    mean = mean or stats.noise(means["loss"], means["config"], once)
    if mean is None:
        return None
    of_trial = means.set_index(["config", "repeat"])["loss"]
    rest = texts["loss"] - of_trial.reindex(pandas.MultiIndex.from_frame(texts[["config", "repeat"]])).to_numpy()
    config, repeat = (texts.groupby([key, "story"]).ngroup() for key in ("config", "repeat"))
    story = texts.groupby("story").ngroup()
    left = stats.noise(rest, config, repeat if in_blocks else story, layouts=story.nunique())
    return SeedNoise(mean, left.sigma**2 if left is not None else 0.0)


def crossed(
    losses: pandas.DataFrame, noise: SeedNoise | None = None, squared_weights: pandas.Series | None = None
) -> pandas.DataFrame:
    """Effect of each comparison (see `stats`): the mean over seeds of the mean over texts, weighted by tokens.

    Args:
        losses: columns comparison, repeat, story, tokens and loss (a difference or a change, nats per token); a text
            counts where every repeat of its comparison has it.
        noise: for comparisons of one seed; null: unknown.
        squared_weights: by comparison, Σ w² over the trials of its mean; null: 1.
    """
    shared = _shared(losses)
    counts = shared.groupby("comparison")["repeat"].agg(["nunique", "size"])
    effects = []
    for shape in counts.drop_duplicates().itertuples(index=False, name=None):
        repeats, rows = (int(count) for count in shape)
        comparisons = counts.index[(counts["nunique"] == repeats) & (counts["size"] == rows)]
        values = shared[shared["comparison"].isin(comparisons)]
        table, tokens = (values[x].to_numpy(float).reshape(-1, repeats, rows // repeats) for x in ("loss", "tokens"))
        weights = numpy.ones(len(table)) if squared_weights is None else squared_weights.reindex(comparisons).to_numpy()
        known = (noise.mean.sigma**2 * weights, noise.left * weights, noise.mean.df) if noise is not None else None
        of_shape = of_tables(table, tokens.mean(axis=1), known)
        effects.append(of_shape.set_index(comparisons))
    return pandas.concat(effects) if effects else of_tables(numpy.empty((0, 1, 1)), numpy.empty((0, 1)))


def of_tables(losses: Any, tokens: Any, known: tuple[Any, Any, int] | None = None) -> pandas.DataFrame:
    """Effects of comparisons of equally many seeds and texts, with intervals.

    The variance of the mean is that of two crossed random factors, as in two-way clustering (Cameron, Gelbach and
    Miller 2011, J. Bus. Econ. Stat. 29:238), which needs neither equal weights nor equal variances of the texts:

        variance between seeds + max(0, variance between texts − variance of what is left)

    What is left is in both others and counts once. It is subtracted from the texts' part, which has many degrees of
    freedom: subtracted from that of two or three seeds it would too often leave nothing of it. One seed says nothing
    about others: its part is 0, or what is known from elsewhere.

    Args:
        losses: nats per token by comparison, seed and text.
        tokens: judged tokens by comparison and text.
        known: for those of one seed, by comparison the variance of its mean and, within it, of one text's loss, and the
            degrees of freedom behind the first (see `SeedNoise`); null: unknown.
    """
    seeds, texts = losses.shape[1:]
    weights = tokens / tokens.sum(axis=1, keepdims=True)
    of_seeds = numpy.einsum("crs,cs->cr", losses, weights)
    # Without its seed's mean: what a seed adds to every text is no property of a text.
    rest = losses - of_seeds[:, :, None]
    of_texts = rest.mean(axis=1)
    # Kish's effective number: a few long texts among many short ones vary as few do.
    effective = 1 / (weights**2).sum(axis=1)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        correction = numpy.where(effective > 1 + 1e-9, effective / (effective - 1), numpy.nan)
    between_texts = correction * ((weights * of_texts) ** 2).sum(axis=1)
    if seeds > 1:
        squares = ((rest - of_texts[:, None, :]) ** 2).sum(axis=1)
        left = correction * (weights**2 * squares).sum(axis=1) / (seeds * (seeds - 1))
        between_seeds, seed_df = of_seeds.var(axis=1, ddof=1) / seeds, seeds - 1
    else:
        nothing = numpy.zeros(len(losses))
        between_seeds, of_text, seed_df = known or (nothing, nothing, 0)
        left = of_text / effective
    variance = between_seeds + numpy.maximum(between_texts - left, 0.0)
    columns = {
        "effect": of_seeds.mean(axis=1),
        "n": texts,
        "seeds": float(seeds),
        "se": numpy.sqrt(variance),
        "df": effective - 1,
        "seed_share": between_seeds / numpy.where(variance > 0, variance, 1.0),
        "seed_df": float(seed_df),
    }
    return with_intervals(pandas.DataFrame(columns, index=range(len(losses))))


def _shared(losses: pandas.DataFrame) -> pandas.DataFrame:
    """One row per comparison, repeat and text, in order: the mean over its pairs, of texts that all repeats have."""
    keys = ["comparison", "repeat", "story"]
    means = losses.groupby(keys)[["loss", "tokens"]].mean().reset_index().dropna(subset=["loss"])
    repeats = means.groupby("comparison")["repeat"].transform("nunique")
    seen = means.groupby(["comparison", "story"])["repeat"].transform("size")
    shared: pandas.DataFrame = means[seen == repeats]
    return shared
