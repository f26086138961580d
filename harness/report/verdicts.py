"""What the measurements say of each claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import pandas
from scipy import stats as distributions

from harness import stats
from harness.claims import MODEL, Claim, lesson
from harness.metrics import FIGURES, METRICS
from harness.report import served, words
from harness.report.measurements import Estimate, Measurements, labels
from harness.report.tables import compared

Word = Literal["supported", "contradicted", "not distinguishable", "not measured here"]


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim, what was measured of it, and what follows."""

    claim: Claim
    word: Word
    size: str
    """The measured size, with its interval."""
    pairs: str
    """What the doubt is over."""
    rests_on: str
    """The trials, by label."""
    trials: tuple[int, ...] = ()
    """Their configurations."""


def judge(measurements: Measurements, claims: Sequence[Claim] | None = None) -> list[ClaimVerdict]:
    """The verdict on each claim. Those that could be measured are one family (Holm).

    Args:
        measurements: what they are held against.
        claims: without them the grid's own and the lesson's.
    """
    if claims is None:
        claims = (*measurements.claims, *lesson().claims)
    evidence = _evidence(claims, measurements) | _evidence_at_work(claims, measurements)
    adjusted = stats.holm(pandas.Series({number: found.p for number, found in evidence.items()}, dtype=float))
    return [
        _verdict(claim, evidence.get(number), adjusted.get(number)) if claim.compare else _levels(claim, measurements)
        for number, claim in enumerate(claims)
    ]


# ------------------------------------------------------------------------------------ two conditions


@dataclass(frozen=True)
class _Evidence:
    """What was measured of a claim."""

    estimate: Estimate
    inside: bool
    """Whether the measured effect lies in the expected region."""
    p: float
    """Of the measured side: how likely so much distance from the region's border is if there is none."""
    rests_on: str
    trials: tuple[int, ...]


def _evidence(claims: Sequence[Claim], m: Measurements) -> dict[int, _Evidence]:
    """What was measured of each claim that compares two conditions, by its number."""
    pairs = {n: m.pairs(claim) for n, claim in enumerate(claims) if claim.compare and not claim.is_of_models}
    found: dict[int, _Evidence] = {}
    for metric in dict.fromkeys(claims[number].metric for number in pairs):
        mine = [pairs[number].assign(comparison=number) for number in pairs if claims[number].metric == metric]
        effects = m.effects(pandas.concat(mine), metric)
        for number, estimate in m.estimates(effects, metric).items():
            inside, p = _side(claims[number], effects.loc[number], m)
            configs = tuple(int(x) for x in pandas.unique(pairs[number].to_numpy().ravel()))
            found[number] = _Evidence(estimate, inside, p, compared(m, pairs[number]), configs)
    return found


def _evidence_at_work(claims: Sequence[Claim], m: Measurements) -> dict[int, _Evidence]:
    """What was measured of each claim about trained models at work, by its number."""
    found: dict[int, _Evidence] = {}
    for number, claim in enumerate(claims):
        if not claim.is_of_models:
            continue
        reference, model = claim.compare[MODEL]
        alike = served.of_equal_precision(m, reference, model)
        effects = served.effects(alike, reference, model, claim.metric)
        for comparison, estimate in m.estimates(effects, claim.metric).items() if len(effects) else ():
            inside, p = _side(claim, effects.loc[comparison], m)
            configs = served.trials(alike)
            rests_on = f"{reference} → {model} of {', '.join(labels(m, configs))}"
            found[number] = _Evidence(estimate, inside, p, rests_on, configs)
    return found


def _verdict(claim: Claim, found: _Evidence | None, p: float | None) -> ClaimVerdict:
    if found is None or p is None:
        return ClaimVerdict(claim, "not measured here", words.MISSING, words.MISSING, words.MISSING)
    sure = not math.isnan(p) and p < stats.ALPHA
    word: Word = "not distinguishable" if not sure else "supported" if found.inside else "contradicted"
    size, doubt = words.effect(found.estimate), words.pairs(found.estimate)
    return ClaimVerdict(claim, word, size, doubt, found.rests_on, found.trials)


def _region(claim: Claim) -> tuple[float, float]:
    """The expected region on the scale of the effects."""
    expected, metric = claim.expectation, FIGURES[claim.metric]
    if metric.scale == "difference":
        around = metric.negligible if expected.same else 0.0
        return expected.low - around, expected.high + around
    around = math.log1p(metric.negligible) if expected.same else 0.0
    low = math.log(expected.low) if expected.low > 0 else -math.inf
    high = -math.inf if expected.high <= 0 else math.log(expected.high) if expected.high < math.inf else math.inf
    return low - around, high + around


def _side(claim: Claim, row: Any, m: Measurements) -> tuple[bool, float]:
    """Whether the effect lies in the expected region, and a two-sided p-value for its distance from the border.

    Within the noise floor of a border no side is taken. Of exact figures every pair must lie on the same side.
    """
    low, high = _region(claim)
    if FIGURES[claim.metric].exact:
        sides = {bool(low <= x <= high) for x in (float(row["low"]), float(row["high"]))}
        return sides == {True}, 0.0 if len(sides) == 1 else math.nan
    effect, se, df = float(row["effect"]), float(row["se"]), float(row["df"])
    inside = low <= effect <= high
    # Inside, both borders must be far; outside, the nearest one.
    distance = min(abs(effect - bound) for bound in (low, high) if math.isfinite(bound))
    # The floor is of training speeds.
    noise = (m.floor or 0.0) if claim.metric in METRICS and METRICS[claim.metric].group == "speed" else 0.0
    if distance <= noise or math.isnan(se) or not df > 0:
        return inside, math.nan
    return inside, float(2 * distributions.t.sf(distance / se, df)) if se > 0 else 0.0


# ------------------------------------------------------------------------------------ one condition


def _levels(claim: Claim, m: Measurements) -> ClaimVerdict:
    """A claim about a figure or an end itself: every configuration of the condition has its say."""
    configs = m.selected(claim.where)
    if claim.expectation.quantity == "status":
        if claim.expectation.status != "skipped":  # what was not started says nothing of its end
            configs = configs[configs["status"] != "skipped"]
        agrees = [status == claim.expectation.status for status in configs["status"]]
        counts = configs["status"].value_counts()
        size = ", ".join(f"{count} {status}" for status, count in counts.items())
    else:
        configs = configs[configs["measured"]]
        ok = m.trials[m.trials["status"] == "ok"]
        names = [claim.metric, *([claim.per] if claim.per else [])]
        means = ok.groupby("config")[names].mean().reindex(configs.index)
        values: Any = (means[claim.metric] / (means[claim.per] if claim.per else 1.0)).to_numpy(float)
        known = numpy.isfinite(values)
        configs, values = configs[known], values[known]
        agrees = [bool(claim.expectation.low <= value <= claim.expectation.high) for value in values]
        size = _range(claim, values)
    if not agrees:
        return ClaimVerdict(claim, "not measured here", words.MISSING, words.MISSING, words.MISSING)
    word: Word = "supported" if all(agrees) else "not distinguishable" if any(agrees) else "contradicted"
    several = labels(m, configs.index)
    shown = ", ".join(several[:4]) + (f" and {len(several) - 4} more" if len(several) > 4 else "")
    counted = f"{len(several)} configuration" + "s" * (len(several) != 1)
    return ClaimVerdict(claim, word, size, counted, shown, tuple(configs.index))


def _range(claim: Claim, values: Any) -> str:
    if not len(values):
        return words.MISSING

    def show(value: float) -> str:
        return f"{value:.3g}" if claim.per else words.figure(claim.metric, value)

    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"
