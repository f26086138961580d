"""Verdicts on claims."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pandas

from harness.analysis import inference, words
from harness.analysis.comparison import Comparison, claim_name, describe_pairs
from harness.analysis.estimate import Estimate
from harness.analysis.measurements import SPEC_KEYS, Measurements
from harness.grids.claims import Claim, Expectation
from harness.metrics import FIGURES
from harness.record import TIMED_FIGURES

Word = Literal["supported", "contradicted", "depends", "not distinguishable", "not decided", "not measured here"]
"""The order of a tally. *Not decided*: the interval excludes no effect, and reaches across the edge of what the claim
says; *not distinguishable*: it holds no effect."""

_MEASURED_BY = {
    "visits": (*TIMED_FIGURES, "flops_per_second"),
    "measure_forgetting": ("forgetting", "general_loss_before"),
    "evaluate_tasks": ("task_score", "task_score_before"),
    "val_set_size": ("eval_loss", "eval_loss_before", "eval_perplexity"),
}
"""By the key that asks for them, figures that a trial may be without."""


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
    value: float | None = None
    """The measured size: a ratio, a difference, or a figure in its unit; null: there are several, or none."""
    low: float | None = None
    """Ends of its interval, or of several sizes; null: not known."""
    high: float | None = None
    source: str = ""
    """Of several grids, those that it was measured by, with the verdicts of the others."""
    lacking: str = ""
    """What the grid's trials lack that were measured and are nearly what it is about; empty: there are none such."""


def judge(comparison: Comparison) -> list[ClaimVerdict]:
    """The verdict on each claim, from the estimates that the whole report shows.

    *Supported* and *contradicted* say that the interval lies within the expected region or outside of it. A claim that
    there is an effect needs one that is more than negligible, and is contradicted by none. What is true of some of the
    compared pairs and false of others depends; what is false of some and true of none is contradicted.
    """
    return [
        _compared(claim, comparison) if claim.compare else _levels(claim, comparison) for claim in comparison.claims
    ]


def _compared(claim: Claim, comparison: Comparison) -> ClaimVerdict:
    m, judgement = comparison.measurements, comparison.judgement
    if claim.is_about_inference:
        estimate, rests_on = _of_models(claim, comparison)
    else:
        name = claim_name(claim)
        estimate = judgement.contrast(claim.metric, name)
        rests_on = describe_pairs(m, judgement.measured(name, [claim.metric]))
    if estimate is None:
        none = (words.MISSING, words.MISSING, words.MISSING)
        return ClaimVerdict(claim, "not measured here", *none, lacking=_lacking(claim, m))
    word = _word(claim, estimate)
    if word == "depends":
        sizes = [member.estimate.value for member in estimate.members]
        text, value, low, high = words.of_members(estimate), None, min(sizes), max(sizes)
        return ClaimVerdict(claim, word, text, words.pairs(estimate), rests_on, value, low, high)
    text = words.effect(estimate)
    return ClaimVerdict(claim, word, text, words.pairs(estimate), rests_on, estimate.value, estimate.low, estimate.high)


def _lacking(claim: Claim, m: Measurements) -> str:
    """What keeps a pair of a grid's trials from deciding a claim: a figure of theirs, or what else they differ in."""
    if claim.is_about_inference:
        return ""
    if len(m.pairs(claim)):
        keys = [key for key, metrics in _MEASURED_BY.items() if claim.metric in metrics]
        return f"its trials are there, without {claim.metric}{f'; set {keys[0]}' if keys else ''}"
    nearest = m.pairs(claim.model_copy(update={"free": SPEC_KEYS, "hold": ()}))
    if claim not in m.claims or nearest.empty:  # the lesson's cannot be edited
        return ""
    first, second = (m.configs.loc[nearest[name].iloc[0]] for name in ("reference", "config"))
    differing = [key for key in SPEC_KEYS if str(first[key]) != str(second[key]) and key not in claim.compare]
    return f"its trials are there, and differ in {', '.join(differing)} too; name that under free in the claim"


def _word(claim: Claim, estimate: Estimate) -> Word:
    """That of the mean of its pairs where none differs from it, unless it is false of one; else that of all of them."""
    of_members = {_of_one(claim, member.estimate) for member in estimate.members}
    if estimate.verdict == "depends":
        return _of_all(of_members)
    of_mean = _of_one(claim, estimate)
    return _of_all({of_mean, *of_members}) if "contradicted" in of_members else of_mean


def _of_all(each: set[Word]) -> Word:
    """The word for what is to be true of all of these, of which there is at least one."""
    if {"supported", "contradicted"} <= each:
        return "depends"
    if "contradicted" in each:
        return "contradicted"
    return each.pop() if len(each) == 1 else "not decided"


def _of_one(claim: Claim, estimate: Estimate) -> Word:
    expected, metric = claim.expectation, FIGURES[claim.metric]
    low, high = (estimate.value if end is None and metric.exact else end for end in (estimate.low, estimate.high))
    if low is None or high is None:
        return "not distinguishable"
    no_effect = 1.0 if metric.scale == "ratio" else 0.0
    open_: Word = "not distinguishable" if low <= no_effect <= high else "not decided"
    if expected.same:
        least, most = words.negligible_range(claim.metric)
        if estimate.verdict == "same":
            return "supported"
        return "contradicted" if high < least or low > most else open_
    if expected.is_direction(no_effect):
        if estimate.verdict == "same":
            return "contradicted"
        if estimate.verdict == "not distinguishable" or words.is_negligible(estimate):
            return open_
        return "supported" if expected.low <= estimate.value <= expected.high else "contradicted"
    return _of_region(expected, low, high) or open_


def _of_region(expected: Expectation, low: float, high: float) -> Word | None:
    """The word for an interval; null where it reaches across the edge of the region."""
    if expected.low <= low and high <= expected.high:
        return "supported"
    return "contradicted" if high < expected.low or low > expected.high else None


def _of_models(claim: Claim, comparison: Comparison) -> tuple[Estimate | None, str]:
    """The estimate for a claim about trained models, and what it rests on."""
    m, pair = comparison.measurements, inference.of_claim(comparison.measurements, claim)
    labels = m.labels(inference.benchmarked_configs(m, pair.trials))
    return comparison.of_models.get((claim.metric, pair)), f"{pair.reference} → {pair.model} of {', '.join(labels)}"


def _levels(claim: Claim, comparison: Comparison) -> ClaimVerdict:
    """The verdict on a claim about a figure or a status: every configuration of the condition counts."""
    m = comparison.measurements
    configs = m.selected(claim.where)
    of_figure = _forgetting if claim.metric == "forgetting" and claim.per is None else _values
    judged = _statuses if claim.expectation.quantity == "status" else of_figure
    each, size, low, high = judged(claim, comparison, configs)
    if not each:
        return ClaimVerdict(claim, "not measured here", words.MISSING, words.MISSING, words.MISSING)
    labels = m.labels(each)
    shown = ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")
    counted = f"{len(labels)} configuration" + "s" * (len(labels) != 1)
    return ClaimVerdict(claim, _of_all({*each.values()}), size, counted, shown, None, low, high)


_Levels = tuple[dict[int, Word], str, float | None, float | None]
"""The word for each configuration, their sizes in a text, and the least and the most of them."""


def _statuses(claim: Claim, _: Comparison, configs: pandas.DataFrame) -> _Levels:
    """Of how each configuration ended."""
    if claim.expectation.status != "skipped":  # not run, so how it would end is unknown
        configs = configs[configs["status"] != "skipped"]
    each = {int(c): _whether(status == claim.expectation.status) for c, status in configs["status"].items()}  # type: ignore[call-overload]  # the index holds configurations
    ends = ", ".join(f"{count} {status}" for status, count in configs["status"].value_counts().items())
    return each, ends, None, None


def _values(claim: Claim, comparison: Comparison, configs: pandas.DataFrame) -> _Levels:
    """Of the figure of each configuration."""
    expected, per = claim.expectation, claim.per
    means = comparison.means.reindex(configs.index[configs["measured"]])
    values: pandas.Series = means[claim.metric] / (means[per] if per else 1.0)
    known = {int(config): value for config, value in values.items() if math.isfinite(value)}  # type: ignore[call-overload]
    each = {c: _whether(expected.low <= v <= expected.high) for c, v in known.items()}
    return each, _range(claim, [*known.values()]), min(known.values(), default=None), max(known.values(), default=None)


def _forgetting(claim: Claim, comparison: Comparison, configs: pandas.DataFrame) -> _Levels:
    """Of what each configuration forgot, by the interval that the page shows."""
    of_all = comparison.learnt["forgetting"]
    known = {config: of_all[config] for config in configs.index if config in of_all}
    each: dict[int, Word] = {
        config: "not decided"
        if e.low is None or e.high is None
        else _of_region(claim.expectation, e.low, e.high) or "not decided"
        for config, e in known.items()
    }
    ends = sorted(known.values(), key=lambda e: e.value)
    sizes = [e.value for e in ends]
    text = " to ".join(dict.fromkeys(words.effect(e) for e in (ends[:1] + ends[-1:])))
    return each, text, min(sizes, default=None), max(sizes, default=None)


def _whether(agrees: bool) -> Word:
    return "supported" if agrees else "contradicted"


def _range(claim: Claim, values: list[float]) -> str:
    if not len(values):
        return words.MISSING

    def show(value: float) -> str:
        return f"{value:.3g}" if claim.per else words.figure(claim.metric, value)

    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"
