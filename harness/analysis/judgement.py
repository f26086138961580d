"""Every comparison of a report, judged once: tables, claims, plots and sentences show the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import pandas

from harness.analysis import stats
from harness.analysis.estimate import Estimate, Member
from harness.analysis.measurements import Measurements
from harness.metrics import FIGURES, HEADLINE

_MOST_MEMBERS = 12
"""Pairs of a contrast that are named by what each differs in; more are named by their labels."""
_MOST_DEVIATIONS = 100
"""Pairs of a contrast, each of which is held against their mean."""
Pair = tuple[int, int]
"""A reference, and the configuration that is compared with it."""


class Judgement:
    """The estimates of a report. All comparisons of a figure are one family, whatever table or claim they are for.

    A contrast of several pairs is their mean, each with the same weight. Where one pair differs from the mean by more
    than noise, or some are better and others worse, it *depends*, and has no verdict of its own.

    Args:
        measurements: what is compared.
        single: pairs (columns reference and config) that are compared each for itself, in the headline figures.
        contrasts: by name, the pairs of a contrast and the metrics that it is about.
        alpha: error rate of each family.
    """

    def __init__(
        self,
        measurements: Measurements,
        single: pandas.DataFrame,
        contrasts: Mapping[str, tuple[pandas.DataFrame, Sequence[str]]],
        alpha: float = stats.ALPHA,
    ) -> None:
        self.pairs = {name: pairs for name, (pairs, _) in contrasts.items()}
        """By the name of the contrast."""
        self._about = {name: frozenset(metrics) for name, (_, metrics) in contrasts.items()}
        metrics = dict.fromkeys((*HEADLINE, *(metric for _, names in contrasts.values() for metric in names)))
        self._families: dict[str, _Family] = {}
        named = functools.cache(lambda pairs: contexts(measurements, pairs))  # the same for each metric
        for metric in metrics:
            alone = [[pair] for pair in _as_pairs(single)] if metric in HEADLINE else []
            several = [_as_pairs(pairs) for pairs, names in contrasts.values() if metric in names]
            self._families[metric] = _Family(measurements, metric, [*alone, *several], alpha, named)

    def pair(self, metric: str, reference: int, config: int) -> Estimate | None:
        """The estimate of one pair; null where it was not measured, or is in no contrast."""
        family = self._families.get(metric)
        return family.of([(reference, config)]) if family is not None else None

    def measured(self, name: str, metrics: Sequence[str]) -> pandas.DataFrame:
        """The pairs of a contrast that were compared in one of these figures; all of them where none was."""
        pairs = self.pairs[name]
        known = [any(self.pair(metric, *pair) is not None for metric in metrics) for pair in _as_pairs(pairs)]
        return pairs[known] if any(known) else pairs

    def contrast(self, metric: str, name: str) -> Estimate | None:
        """The estimate of a contrast; null where none of its pairs was measured, or it is not about this metric."""
        family = self._families.get(metric) if metric in self._about[name] else None
        return family.of(_as_pairs(self.pairs[name])) if family is not None else None


class _Family:
    """All comparisons of one figure."""

    def __init__(
        self,
        m: Measurements,
        metric: str,
        contrasts: Iterable[Sequence[Pair]],
        alpha: float,
        contexts_of: Callable[[tuple[Pair, ...]], list[str]],
    ) -> None:
        self._contexts_of = contexts_of
        self._exact, self._negligible = FIGURES[metric].exact, FIGURES[metric].negligible
        self._numbers: dict[Pair, int] = {}
        several = []
        for pairs in contrasts:
            for pair in pairs:
                if pair not in self._numbers and pair[::-1] not in self._numbers:
                    self._numbers[pair] = len(self._numbers)
            if len(pairs) > 1 and not self._exact:
                several.append(pairs)
        columns = ["comparison", "reference", "config"]
        rows = [(number, *pair) for pair, number in self._numbers.items()]
        effects = m.effects(pandas.DataFrame(rows, columns=columns, dtype="int64"), metric)
        measured, mixtures = effects.table.index, list[dict[int, float]]()
        self._means: dict[tuple[Pair, ...], int] = {}
        self._deviations: dict[int, list[int]] = {}
        """By the number of a mean, those of the members' deviations from it."""
        numbers = count(len(self._numbers))
        for pairs in several:
            known = [(number, sign) for number, sign in map(self._number, pairs) if number in measured]
            key = tuple(p for p in pairs if self._number(p)[0] in measured)
            if len(known) < 2 or key in self._means:
                continue
            mean = {number: sign / len(known) for number, sign in known}
            self._means[key] = next(numbers)
            mixtures.append(mean)
            self._deviations[self._means[key]] = []
            if len(known) > _MOST_DEVIATIONS:
                continue
            for number, sign in known if len(known) > 2 else known[:1]:  # of two, one is as far from it as the other
                self._deviations[self._means[key]].append(next(numbers))
                mixtures.append({n: (sign if n == number else 0.0) - weight for n, weight in mean.items()})
        self._estimates = m.estimates(effects.combined(mixtures, len(self._numbers)), metric, alpha)

    def of(self, pairs: Sequence[Pair]) -> Estimate | None:
        """The estimate of one pair, or of several with their members."""
        measured = [pair for pair in pairs if self._number(pair)[0] in self._estimates]
        if len(measured) < 2:
            return self._single(measured[0]) if measured else None
        members = [self._single(pair) for pair in measured]
        named = tuple(map(Member, self._contexts_of(tuple(measured)), members))
        estimate = self._exact_mean(members) if self._exact else self._estimates[self._means[tuple(measured)]]
        sides = {member.verdict for member in members}
        if {"better", "worse"} <= sides or {"lower", "higher"} <= sides or self._members_differ(measured, members):
            return replace(estimate, verdict="depends", p=None, detectable=None, needed=None, unit=None, members=named)
        return replace(estimate, members=named)

    def _members_differ(self, pairs: Sequence[Pair], members: Sequence[Estimate]) -> bool:
        """Whether they differ by more than noise; exact ones by more than is negligible."""
        if self._exact:
            return max(e.value for e in members) > (1 + self._negligible) * min(e.value for e in members)
        deviations = (self._estimates[number] for number in self._deviations[self._means[tuple(pairs)]])
        return any(each.verdict in ("better", "worse", "lower", "higher") for each in deviations)

    def _exact_mean(self, members: Sequence[Estimate]) -> Estimate:
        """Their geometric mean, with the range and the verdict of the one that is farthest from no effect."""
        farthest = max(members, key=lambda e: abs(math.log(e.value)))
        value = math.exp(sum(math.log(e.value) for e in members) / len(members))
        low, high = min(e.low or e.value for e in members), max(e.high or e.value for e in members)
        return replace(farthest, value=value, low=low, high=high)

    def _single(self, pair: Pair) -> Estimate:
        number, sign = self._number(pair)
        estimate = self._estimates[number]
        return estimate if sign > 0 else estimate.reversed

    def _number(self, pair: Pair) -> tuple[int, float]:
        """Its number, and whether it is that of the reversed pair."""
        if pair in self._numbers:
            return self._numbers[pair], 1.0
        return self._numbers.get(pair[::-1], -1), -1.0


def contexts(m: Measurements, pairs: Sequence[Pair]) -> list[str]:
    """What each pair differs in from the others: the keys that both of its sides share, else its levels."""
    labels = [" → ".join(m.labels(pair)) for pair in pairs]
    if len(pairs) > _MOST_MEMBERS:
        return labels
    keys_of_all = m.keys_of([config for pair in pairs for config in pair])
    sides = list(zip(keys_of_all[::2], keys_of_all[1::2], strict=True))
    shared = [{k: v for k, v in one.items() if other[k] == v} for one, other in sides]
    keys = [key for key in sides[0][0] if len({str(of.get(key)) for of in shared}) > 1]
    own = [", ".join(f"{key}={_shown(of[key])}" for key in keys if key in of) for of in shared]
    return own if len({*own, ""}) > len(pairs) else labels


def _shown(level: Any) -> str:
    """As YAML writes it."""
    return str(level).lower() if level is None or isinstance(level, bool) else str(level)


def _as_pairs(pairs: pandas.DataFrame) -> list[Pair]:
    return [(int(a), int(b)) for a, b in pairs[["reference", "config"]].to_numpy().tolist()]
