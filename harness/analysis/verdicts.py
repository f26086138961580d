"""Verdicts on claims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import pandas

from harness.analysis import inference, stats, words
from harness.analysis.comparison import describe_pairs, figures
from harness.analysis.measurements import Estimate, Measurements
from harness.grids.claims import MODEL, Claim, lesson
from harness.metrics import FIGURES, METRICS

Word = Literal["supported", "contradicted", "not distinguishable", "not measured here"]


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim, its evidence and its verdict."""

    claim: Claim
    word: Word
    size: str
    """The measured size, with its interval."""
    pairs: str
    """What the interval is over."""
    rests_on: str
    """Labels of the compared configurations."""


def judge(measurements: Measurements, claims: Sequence[Claim] | None = None) -> list[ClaimVerdict]:
    """The verdict on each claim; the measured ones are one family (Holm).

    Args:
        measurements: the evidence.
        claims: null: the grid's own and the lesson's.
    """
    if claims is None:
        claims = (*measurements.claims, *lesson().claims)
    evidence = _evidence(claims, measurements) | _inference_evidence(claims, measurements)
    adjusted = stats.holm(pandas.Series({number: each.p for number, each in evidence.items()}, dtype=float))
    return [
        _verdict(claim, evidence.get(number), adjusted.get(number)) if claim.compare else _levels(claim, measurements)
        for number, claim in enumerate(claims)
    ]


@dataclass(frozen=True)
class _Evidence:
    """Evidence for or against a claim."""

    estimate: Estimate
    inside: bool
    """Whether the measured effect lies in the expected region."""
    p: float
    """Of the null hypothesis that the true effect lies on the region's border."""
    rests_on: str


def _evidence(claims: Sequence[Claim], m: Measurements) -> dict[int, _Evidence]:
    """Evidence on each claim that compares two conditions, by its number."""
    pairs = {n: m.pairs(claim) for n, claim in enumerate(claims) if claim.compare and not claim.is_about_inference}
    evidence: dict[int, _Evidence] = {}
    for metric in dict.fromkeys(claims[number].metric for number in pairs):
        of_metric = [pairs[number].assign(comparison=number) for number in pairs if claims[number].metric == metric]
        effects = m.effects(pandas.concat(of_metric), metric)
        for number, estimate in m.estimates(effects, metric).items():
            inside, p = _side(claims[number], effects.loc[number], m)
            evidence[number] = _Evidence(estimate, inside, p, describe_pairs(m, pairs[number]))
    return evidence


def _inference_evidence(claims: Sequence[Claim], m: Measurements) -> dict[int, _Evidence]:
    """Evidence on each claim about trained models, by its number."""
    evidence: dict[int, _Evidence] = {}
    for number, claim in enumerate(claims):
        if not claim.is_about_inference:
            continue
        reference, model = claim.compare[MODEL]
        comparable = inference.of_equal_precision(m, reference, model)
        effects = inference.effects(comparable, reference, model, claim.metric)
        for comparison, estimate in m.estimates(effects, claim.metric).items() if len(effects) else ():
            inside, p = _side(claim, effects.loc[comparison], m)
            benchmarked = m.labels(inference.benchmarked_configs(comparable))
            rests_on = f"{reference} → {model} of {', '.join(benchmarked)}"
            evidence[number] = _Evidence(estimate, inside, p, rests_on)
    return evidence


def _verdict(claim: Claim, evidence: _Evidence | None, p: float | None) -> ClaimVerdict:
    if evidence is None or p is None:
        return ClaimVerdict(claim, "not measured here", words.MISSING, words.MISSING, words.MISSING)
    sure = not math.isnan(p) and p < stats.ALPHA
    word: Word = "not distinguishable" if not sure else "supported" if evidence.inside else "contradicted"
    size, pairs = words.effect(evidence.estimate), words.pairs(evidence.estimate)
    return ClaimVerdict(claim, word, size, pairs, evidence.rests_on)


def _region(claim: Claim) -> tuple[float, float]:
    """The expected region on the scale of the effects."""
    expected, metric = claim.expectation, FIGURES[claim.metric]
    if metric.scale == "difference":
        tolerance = metric.negligible if expected.same else 0.0
        return expected.low - tolerance, expected.high + tolerance
    tolerance = math.log1p(metric.negligible) if expected.same else 0.0
    low = math.log(expected.low) if expected.low > 0 else -math.inf
    high = -math.inf if expected.high <= 0 else math.log(expected.high) if expected.high < math.inf else math.inf
    return low - tolerance, high + tolerance


def _side(claim: Claim, row: Any, m: Measurements) -> tuple[bool, float]:
    """Whether the effect lies in the expected region, and a two-sided p-value for its distance from the border.

    The p-value is nan within the noise floor of a border, and for exact figures whose pairs lie on both sides.
    """
    low, high = _region(claim)
    if FIGURES[claim.metric].exact:
        sides = {bool(low <= x <= high) for x in (float(row["low"]), float(row["high"]))}
        return sides == {True}, 0.0 if len(sides) == 1 else math.nan
    effect = float(row["effect"])
    inside = low <= effect <= high
    # The nearest border decides, on either side of it.
    distance = min(abs(effect - bound) for bound in (low, high) if math.isfinite(bound))
    # The noise floor is known for training speeds only.
    noise = (m.floor or 0.0) if claim.metric in METRICS and METRICS[claim.metric].group == "speed" else 0.0
    # One seed cannot say that others would agree.
    if distance <= noise or (claim.expectation.same and inside and row["seeds"] == 1):
        return inside, math.nan
    return inside, float(stats.two_sided(row.to_frame().T, numpy.array([distance]))[0])


def _levels(claim: Claim, m: Measurements) -> ClaimVerdict:
    """The verdict on a claim about a figure or a status: every configuration of the condition counts."""
    configs = m.selected(claim.where)
    if claim.expectation.quantity == "status":
        if claim.expectation.status != "skipped":  # not run, so how it would end is unknown
            configs = configs[configs["status"] != "skipped"]
        agrees = [status == claim.expectation.status for status in configs["status"]]
        counts = configs["status"].value_counts()
        size = ", ".join(f"{count} {status}" for status, count in counts.items())
    else:
        configs = configs[configs["measured"]]
        ok = m.trials[m.trials["status"] == "ok"]
        names = [claim.metric, *([claim.per] if claim.per else [])]
        means = figures(ok, "config")[names].reindex(configs.index)
        values: Any = (means[claim.metric] / (means[claim.per] if claim.per else 1.0)).to_numpy(float)
        known = numpy.isfinite(values)
        configs, values = configs[known], values[known]
        agrees = [bool(claim.expectation.low <= value <= claim.expectation.high) for value in values]
        size = _range(claim, values)
    if not agrees:
        return ClaimVerdict(claim, "not measured here", words.MISSING, words.MISSING, words.MISSING)
    word: Word = "supported" if all(agrees) else "not distinguishable" if any(agrees) else "contradicted"
    labels = m.labels(configs.index)
    shown = ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")
    counted = f"{len(labels)} configuration" + "s" * (len(labels) != 1)
    return ClaimVerdict(claim, word, size, counted, shown)


def _range(claim: Claim, values: Any) -> str:
    if not len(values):
        return words.MISSING

    def show(value: float) -> str:
        return f"{value:.3g}" if claim.per else words.figure(claim.metric, value)

    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"
