"""Paired differences and their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy
from scipy import stats


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, and the doubt about it."""

    mean: float
    low: float
    high: float
    """95 % interval of Student's t over the pairs."""
    n: int
    """Pairs."""

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_difference(values: Mapping[str, float], reference: Mapping[str, float]) -> Difference | None:
    """`values` minus `reference` over their common keys, each key one pair; null below two pairs."""
    common = sorted(values.keys() & reference.keys())
    if len(common) < 2:
        return None
    differences = numpy.array([values[key] - reference[key] for key in common])
    mean = float(differences.mean())
    half = float(stats.t.ppf(0.975, len(common) - 1) * differences.std(ddof=1) / math.sqrt(len(common)))
    return Difference(mean, mean - half, mean + half, len(common))
