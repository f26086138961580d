"""Variances of a pilot, from which a grid without rows of its own is forecast."""

from __future__ import annotations

from dataclasses import dataclass

from harness.analysis.stats import Noise

PILOT_MODEL = "SmolLM2-135M"


@dataclass(frozen=True)
class Variances:
    """By how much measurements vary that should be equal."""

    reading: Noise
    """Of the logarithm of a speed that one visit reads."""
    story: float
    """Standard deviation between stories of a story's difference in loss between two configurations, in nats."""
    seeds: Noise
    """Of a trial's mean loss between seeds, after the effect that a seed has on all configurations, in nats."""
    seeds_alone: Noise
    """The same with that effect: where the baseline alone is repeated."""


PILOT = Variances(
    reading=Noise(0.070, 45), story=0.059, seeds=Noise(0.0085, 42), seeds_alone=Noise(0.016, 44)
)  # fmt: skip
"""From the rows that `results/` had on 2026-11-23, on two cores of a shared machine, by `forecast.variances_of`:

reading
    `stats.noise` of log(tokens_per_second) of the 69 trials of `techniques`, configurations and repeats taken out. They
    are of whole trials, from before there were visits; visits to a quiet machine repeat better.
story
    Median over the 26 comparisons with the baseline in `techniques`, `forgetting` and `practice` whose losses differ.
seeds, seeds_alone
    `crossed.seed_noise` of the three repeats of `techniques`, paired and not.
"""

LOAD_SECONDS = 0.57
"""To load a base model: median `load_seconds` of the trials of `techniques`."""
START_SECONDS = 1.0
"""Of a trial or visit, to begin its process and to read and tokenise its stories; chosen, not measured."""
