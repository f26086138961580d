"""Verdicts on claims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy

from harness.analysis import inference, words
from harness.analysis.comparison import Comparison, claim_name, describe_pairs, figures
from harness.analysis.measurements import Estimate, Measurements
from harness.grids.claims import MODEL, Claim
from harness.metrics import FIGURES

Word = Literal["supported", "contradicted", "depends", "not distinguishable", "not measured here"]


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


def judge(comparison: Comparison) -> list[ClaimVerdict]:
    """The verdict on each claim, from the estimates that the whole report shows.

    *Supported* and *contradicted* say that the interval lies within the expected region or outside of it. A claim that
    there is an effect needs one that is more than negligible, and is contradicted by none. What is true of some of the
    compared pairs and false of others depends.
    """
    of_inference = _inference_estimates(comparison)
    return [
        _levels(claim, comparison.measurements) if not claim.compare else _compared(claim, comparison, of_inference)
        for claim in comparison.claims
    ]


def _compared(claim: Claim, comparison: Comparison, of_inference: dict[str, tuple[Estimate, str]]) -> ClaimVerdict:
    m, judgement = comparison.measurements, comparison.judgement
    if claim.is_about_inference:
        estimate, rests_on = of_inference.get(claim.id, (None, words.MISSING))
    else:
        name = claim_name(claim)
        estimate, rests_on = judgement.contrast(claim.metric, name), describe_pairs(m, judgement.pairs[name])
    if estimate is None:
        return ClaimVerdict(claim, "not measured here", words.MISSING, words.MISSING, words.MISSING)
    word = _word(claim, estimate)
    size = words.of_members(estimate) if word == "depends" else words.effect(estimate)
    return ClaimVerdict(claim, word, size, words.pairs(estimate), rests_on)


def _word(claim: Claim, estimate: Estimate) -> Word:
    """That of its pairs where they agree, or else of their mean where no pair differs from it."""
    of_members = {_of_one(claim, member.estimate) for member in estimate.members}
    if {"supported", "contradicted"} <= of_members:
        return "depends"
    if estimate.verdict != "depends":
        return _of_one(claim, estimate)
    return of_members.pop() if len(of_members) == 1 else "not distinguishable"


def _of_one(claim: Claim, estimate: Estimate) -> Word:
    expected, metric = claim.expectation, FIGURES[claim.metric]
    low, high = (estimate.value if end is None and metric.exact else end for end in (estimate.low, estimate.high))
    if low is None or high is None:
        return "not distinguishable"
    ratio = metric.scale == "ratio"
    least, most = (
        (1 / (1 + metric.negligible), 1 + metric.negligible) if ratio else (-metric.negligible, metric.negligible)
    )
    if expected.same:
        if estimate.verdict == "same":
            return "supported"
        return "contradicted" if high < least or low > most else "not distinguishable"
    if expected.is_direction(1.0 if ratio else 0.0):
        if estimate.verdict == "same":
            return "contradicted"
        if estimate.verdict == "not distinguishable" or least <= estimate.value <= most:
            return "not distinguishable"
        return "supported" if expected.low <= estimate.value <= expected.high else "contradicted"
    if expected.low <= low and high <= expected.high:
        return "supported"
    return "contradicted" if high < expected.low or low > expected.high else "not distinguishable"


def _inference_estimates(comparison: Comparison) -> dict[str, tuple[Estimate, str]]:
    """By the id of a claim about trained models, its estimate and what it rests on; each figure is one family."""
    m = comparison.measurements
    estimates: dict[str, tuple[Estimate, str]] = {}
    of_models = [claim for claim in comparison.claims if claim.is_about_inference]
    for metric in dict.fromkeys(claim.metric for claim in of_models):
        claims = [claim for claim in of_models if claim.metric == metric]
        comparable = [inference.of_equal_precision(m, *claim.compare[MODEL]) for claim in claims]
        rows = {
            number: inference.effects(measured, *claim.compare[MODEL], metric)
            for number, (claim, measured) in enumerate(zip(claims, comparable, strict=True))
        }
        for number, estimate in inference.estimates(m, rows, metric).items():
            claim = claims[number]
            labels = m.labels(inference.benchmarked_configs(comparable[number]))
            estimates[claim.id] = estimate, f"{' → '.join(claim.compare[MODEL])} of {', '.join(labels)}"
    return estimates


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
    word: Word = "supported" if all(agrees) else "depends" if any(agrees) else "contradicted"
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
