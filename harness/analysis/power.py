"""How small a difference a comparison shows, and how much more would decide it; before measuring and after.

A true difference of (t(1 − α/2) + t(0.8)) standard errors is called a difference in 80 % of repetitions: the minimum
detectable effect (Bloom 1995, Evaluation Review 19:547). The variance of a loss has a part of the stories and a part of
the seeds, each of which falls with their number. Arguments are numbers or arrays, and so are results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy

from harness.analysis.stats import ALPHA, quantile

POWER = 0.8
"""Chance that a true difference of the smallest detectable size is called one."""
_HALVINGS = 20
"""Of the range in which numbers are searched, up to a million."""


def smallest_difference(se: Any, df: Any, seed_share: Any = 0.0, seed_df: Any = math.nan, alpha: Any = ALPHA) -> Any:
    """The smallest true difference that an estimate shows, on its own scale. Arguments as columns of `stats`."""
    t = (quantile(p, df, seed_share, seed_df) for p in (1 - numpy.asarray(alpha, float) / 2, POWER))
    return sum(t) * numpy.asarray(se, float)


def smallest_loss_difference(
    stories: Any, seeds: Any, sd_story: Any, sd_seed: Any, *, seed_df: Any = None, alpha: Any = ALPHA
) -> Any:
    """The smallest true difference of losses that this many stories and seeds show, in nats.

    Args:
        stories: held-out stories.
        seeds: repeats.
        sd_story: standard deviation between stories of a story's difference, in nats.
        sd_seed: standard deviation between seeds of the mean difference.
        seed_df: degrees of freedom behind `sd_seed`, or what they are with so many seeds; null: seeds − 1.
        alpha: two-sided error rate.
    """
    stories, seeds = numpy.asarray(stories, float), numpy.asarray(seeds, float)
    of_stories, of_seeds = numpy.square(sd_story) / stories, numpy.square(sd_seed) / seeds
    variance = of_stories + of_seeds
    fraction = of_seeds / numpy.where(variance > 0, variance, 1.0)
    known = seeds - 1 if seed_df is None else seed_df(seeds) if callable(seed_df) else seed_df
    return smallest_difference(numpy.sqrt(variance), stories - 1, fraction, known, alpha)


def stories_needed(difference: Any, seeds: Any, sd_story: Any, sd_seed: Any, **given: Any) -> Any:
    """The least number of stories that show this difference in nats; nan where the seeds alone hide it.

    Args:
        difference: true difference, in nats.
        seeds: see `smallest_loss_difference`, as all others.
        sd_story: see there.
        sd_seed: see there.
        given: `seed_df` and `alpha`.
    """
    return _least(lambda n: smallest_loss_difference(n, seeds, sd_story, sd_seed, **given), difference)


def seeds_needed(difference: Any, stories: Any, sd_story: Any, sd_seed: Any, **given: Any) -> Any:
    """The least number of seeds that show this difference in nats; nan where the stories alone hide it. Arguments as of
    `stories_needed`.
    """
    return _least(lambda n: smallest_loss_difference(stories, n, sd_story, sd_seed, **given), difference)


def times_needed(difference: Any, stories: Any, seeds: Any, sd_story: Any, sd_seed: Any, **given: Any) -> Any:
    """By what number both stories and seeds are to be multiplied to show this difference in nats. Arguments as of
    `stories_needed`.
    """
    return _least(lambda n: smallest_loss_difference(n * stories, n * seeds, sd_story, sd_seed, **given), difference)


def visits_needed(difference: Any, visits: Any, se: Any, df: Any, alpha: Any = ALPHA) -> Any:
    """The least number of visits that show this difference in speed.

    Args:
        difference: of logarithms.
        visits: those behind `se`.
        se: standard error of their mean.
        df: degrees of freedom behind it, which grow as the visits do.
        alpha: two-sided error rate.
    """
    return _least(lambda n: smallest_difference(se * numpy.sqrt(visits / n), df * n / visits, alpha=alpha), difference)


def _least(smallest: Callable[[Any], Any], difference: Any) -> Any:
    """The least number from 2 on whose smallest detectable difference is at most this one."""
    wanted = numpy.asarray(difference, float)
    low = numpy.ones(wanted.shape)
    high = low + 2**_HALVINGS
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = smallest(middle) <= wanted
        low, high = numpy.where(enough, low, middle), numpy.where(enough, middle, high)
    return numpy.where(high > 2**_HALVINGS, numpy.nan, high)
