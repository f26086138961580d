"""Coverage of the intervals of loss differences, by simulation on measured losses of stories.

The population is a matrix of measured paired differences, seeds × stories. Runs of fewer seeds and stories are drawn
from it, and the interval of each is computed as a report computes it. Counted is how often it holds the population's
mean over tokens, at a nominal 95 %.

- `measured`: stories are drawn with replacement, and seeds from a normal distribution with the measured covariance of
  the stories' losses between seeds. Drawn with replacement, two of eight seeds would be one and the same in an eighth
  of the runs, which never happens. Few seeds have a covariance of low rank, by which many stories move together: from
  four, independent noise seems to be covered in 98.9 %, from 24 in 97.0 % at most.
- `normal`: seeds, stories and what is left of each loss are normal, with the measured variances.

One seed takes the noise between seeds from six others, as from a configuration that was repeated six times. Several
seeds have their own noise, as in a report of one comparison, or that of six comparisons, each of so many seeds, as in
the report of a grid.

    python benchmarks/coverage.py [--results results/seeds] [--draws 20000]
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import pandas
from rich.console import Console
from rich.table import Table

from harness.analysis import loading
from harness.analysis.crossed import of_tables

ROOT = Path(__file__).parent.parent
STORIES = (16, 32, 64)
LEAST, MOST = 0.93, 0.97
REPEATED = 6
"""Seeds behind the noise that a single seed takes."""
COMPARISONS = 6
"""Of a report in which several seeds have the noise of all comparisons, the one that is looked at among them."""
_CHUNK = 5000


@dataclass(frozen=True)
class Population:
    """Differences of losses in nats per token."""

    name: str
    of_stories: Any
    """Of each story, the mean over seeds."""
    deviations: Any
    """Seeds × stories: what each seed deviates from it."""
    tokens: Any
    """Of each story."""

    @property
    def truth(self) -> float:
        """The mean, weighted by tokens."""
        return float(numpy.average(self.of_stories, weights=self.tokens))

    @cached_property
    def deviations_of(self) -> tuple[float, float, float]:
        """Standard deviations between seeds, between stories, and of what is left."""
        seeds, stories = self.deviations.shape
        means = numpy.average(self.deviations, axis=1, weights=self.tokens)
        left = ((self.deviations - means[:, None]) ** 2).sum() / ((seeds - 1) * (stories - 1))
        between_seeds = (means**2).sum() / (seeds - 1) - left / stories
        between_stories = self.of_stories.var(ddof=1) - left / seeds
        first, second, third = (math.sqrt(max(0.0, x)) for x in (between_seeds, between_stories, left))
        return first, second, third


def populations(folder: Path) -> list[Population]:
    """Each configuration against the baseline of the same seed, and the baseline against itself under another."""
    m = loading.load(folder)
    trials = m.trials.loc[(m.trials["status"] == "ok") & ~m.trials["twin"], ["config", "repeat"]]
    losses = m.stories.join(trials, on="trial", how="inner")
    wide = losses.pivot_table(index=["config", "repeat"], columns="story", values="loss").dropna(axis=1)
    tokens = losses.groupby("story")["tokens"].first()[wide.columns].to_numpy(float)
    base = wide.loc[m.baseline]

    def of(name: str, table: Any, scale: float = 1.0) -> Population:
        means = table.mean(axis=0)
        return Population(name, means * (scale == 1.0), scale * (table - means), tokens)

    others = [config for config in wide.index.unique("config") if config != m.baseline]
    compared = [of(m.labels([c])[0], (wide.loc[c] - base).dropna().to_numpy()) for c in others]
    # Seeds are exchangeable: of two, neither is better in truth.
    return [*compared, of("another seed", base.to_numpy(), math.sqrt(2))]


Drawn = Callable[[int, int, int], tuple[Any, Any]]
"""So many draws, seeds and stories of a population: losses (draws × seeds × stories) and tokens (draws × stories)."""
Interval = Callable[[Drawn, int, int, int], pandas.DataFrame]
"""Effects of so many draws, seeds and stories."""


def measured(
    population: Population, draws: int, seeds: int, stories: int, generator: numpy.random.Generator
) -> tuple[Any, Any]:
    """Differences (draws × seeds × stories) and tokens of stories, drawn from those measured."""
    chosen = generator.integers(0, len(population.tokens), (draws, stories))
    count = len(population.deviations)
    mixed = generator.normal(0.0, 1 / math.sqrt(count - 1), (draws, seeds, count))
    deviations = mixed @ population.deviations[:, chosen].transpose(1, 0, 2)
    return population.of_stories[chosen][:, None, :] + deviations, population.tokens[chosen]


def normal(
    population: Population, draws: int, seeds: int, stories: int, generator: numpy.random.Generator
) -> tuple[Any, Any]:
    """The same from normal distributions."""
    of_seeds, of_stories, left = population.deviations_of
    losses = population.truth + generator.normal(0.0, of_stories, (draws, 1, stories))
    losses = (
        losses
        + generator.normal(0.0, of_seeds, (draws, seeds, 1))
        + generator.normal(0.0, left, (draws, seeds, stories))
    )
    return losses, generator.choice(population.tokens, (draws, stories))


def noise_of(losses: Any, tokens: Any) -> tuple[Any, Any, int]:
    """What repeated trials say of the noise of one seed, by draw (see `crossed.SeedNoise`).

    Args:
        losses: by draw, comparison, seed and story.
        tokens: by draw and story.
    """
    means = numpy.einsum("dkrs,ds->dkr", losses, tokens / tokens.sum(axis=1, keepdims=True))
    left = (losses - means[..., None]).var(axis=2, ddof=1).mean(axis=(1, 2))
    comparisons, seeds = means.shape[1:]
    return means.var(axis=2, ddof=1).mean(axis=1), left, comparisons * (seeds - 1)


def of_one_seed(draw: Drawn, draws: int, _: int, stories: int) -> pandas.DataFrame:
    """With the noise of other seeds."""
    losses, tokens = draw(draws, 1 + REPEATED, stories)
    return of_tables(losses[:, :1], tokens, noise_of(losses[:, None, 1:], tokens))


def of_own_seeds(draw: Drawn, draws: int, seeds: int, stories: int) -> pandas.DataFrame:
    """With the noise of their own seeds."""
    return of_tables(*draw(draws, seeds, stories))


def of_a_grid(draw: Drawn, draws: int, seeds: int, stories: int) -> pandas.DataFrame:
    """With the noise of the seeds of all comparisons."""
    losses, tokens = draw(draws, COMPARISONS * seeds, stories)
    by_comparison = losses.reshape(draws, COMPARISONS, seeds, stories)
    variance, left, df = noise_of(by_comparison, tokens)
    return of_tables(by_comparison[:, 0], tokens, (variance / seeds, left / seeds, df))


def coverage(
    population: Population, draw: Callable[..., Any], interval: Interval, seeds: int, stories: int, draws: int
) -> float:
    """The share of intervals that hold the truth."""
    drawn: Drawn = functools.partial(draw, population, generator=numpy.random.default_rng(0))
    held = 0
    for start in range(0, draws, _CHUNK):
        effects = interval(drawn, min(_CHUNK, draws - start), seeds, stories)
        held += int(((effects["low"] <= population.truth) & (population.truth <= effects["high"])).sum())
    return held / draws


NOISES: tuple[tuple[str, Interval, tuple[int, ...]], ...] = (
    ("six others", of_one_seed, (1,)),
    ("their own", of_own_seeds, (2, 3, 5)),
    ("a grid", of_a_grid, (2, 3)),
)


def main() -> int:
    """Print the table; 1 where a cell is outside 93 to 97 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results/seeds")
    parser.add_argument("--draws", type=int, default=20_000)
    given = parser.parse_args()
    headings = ("difference", "drawn", "seeds", "noise of", *(f"{n} stories" for n in STORIES))
    table = Table(*headings, title="Coverage of 95 % intervals")
    outside: dict[str, int] = {}
    for population in populations(given.results):
        for draw in (measured, normal):
            for noise, interval, counts in NOISES:
                for seeds in counts:
                    cells = [coverage(population, draw, interval, seeds, n, given.draws) for n in STORIES]
                    outside[noise] = outside.get(noise, 0) + sum(not LEAST <= cell <= MOST for cell in cells)
                    shown = (f"{cell:.1%}" + ("" if LEAST <= cell <= MOST else " !") for cell in cells)
                    table.add_row(population.name, draw.__name__, str(seeds), noise, *shown)
    Console().print(table)
    for noise, count in outside.items():
        print(f"noise of {noise}: {count} cells are outside {LEAST:.0%} to {MOST:.0%}, at {given.draws:,} draws each")
    return int(any(outside.values()))


if __name__ == "__main__":
    sys.exit(main())
