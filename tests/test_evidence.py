"""The committed reports follow from the committed rows: recomputed by pandas alone, as a reader would."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import numpy
import pandas
import pytest
from house import ROOT

REPORTS = ("lesson", "short", "techniques", "practice", "forgetting", "methods", "today")
SAME = {"peak_memory_bytes": 0.01, "tokens_per_second": 0.02, "eval_loss": 0.01}
"""What counts as no effect."""


@cache
def rows(report: str) -> dict[str, pandas.DataFrame]:
    """Trials of a report by label and repeat, their held-out losses and their timed steps."""
    text = (ROOT / "reports" / report / "report.md").read_text(encoding="utf-8")
    query = re.search(r"\.query\(\"(environment_id.+)\"\)", text)
    assert query is not None
    folder = ROOT / "results" / report
    trials = pandas.read_parquet(folder / "trials").query(query[1])
    # A label that once meant another configuration has rows of both; the report takes the newest.
    trials = trials.sort_values("started_at").drop_duplicates(["label", "repeat"], keep="last")
    trials["label"] = trials["label"].where(~trials["twin"].astype(bool), "baseline")
    of_trial = trials[["trial_id", "label", "repeat"]]
    stories, steps = (pandas.read_parquet(folder / n).merge(of_trial, on="trial_id") for n in ("stories", "steps"))
    held_out = stories[(stories["when"] == "after") & (stories["kind"] == "held-out")]
    return {"trials": trials, "stories": held_out, "steps": steps}


def memory(report: str, label: str, reference: str = "baseline") -> float:
    """The highest peak over the repeats that both have."""
    peaks = rows(report)["trials"].groupby(["label", "repeat"])["peak_memory_bytes"].max()
    shared = peaks[label].index.intersection(peaks[reference].index)
    return float(peaks[label][shared].max() / peaks[reference][shared].max())


def loss(report: str, label: str, reference: str = "baseline") -> float:
    """The mean over repeats of the token-weighted mean difference."""
    stories = rows(report)["stories"].groupby(["label", "repeat", "story_id"])[["loss", "tokens"]].mean()
    both = stories.loc[label].join(stories.loc[reference].add_suffix("_of_reference"), how="inner")
    weighted = (both["loss"] - both["loss_of_reference"]) * both["tokens"]
    return float((weighted.groupby("repeat").sum() / both["tokens"].groupby("repeat").sum()).mean())


def speed(report: str, label: str, reference: str = "baseline") -> float:
    """The mean ratio within blocks; a visit's speed is the tokens of its different steps by their mean seconds, in
    units of the baseline's where each visit took its steps in turn.
    """
    steps = rows(report)["steps"]
    quiet = steps[steps["block"].notna() & ~steps["disturbed"].astype(bool)]
    visit = ["label", "trial_id", "block"]
    quiet = quiet[quiet.groupby(visit)["seconds"].transform("size") >= 3]
    makes = ["samples", "tokens", "supervised_tokens", "padded_tokens"]
    mean = quiet.groupby([*visit, *makes])["seconds"].mean().reset_index().groupby(visit)[["tokens", "seconds"]].sum()
    if quiet.get("reference_seconds", pandas.Series([math.nan])).notna().all():
        mean["tokens"] *= quiet.groupby(visit)["reference_seconds"].mean()
    logarithms = numpy.log(mean["tokens"] / mean["seconds"]).groupby(["label", "block"]).mean()
    return math.exp((logarithms[label] - logarithms[reference]).dropna().mean())


WAYS = {"peak_memory_bytes": memory, "eval_loss": loss, "tokens_per_second": speed}


@pytest.mark.parametrize("report", REPORTS)
def test_comparisons_are_recomputed_from_the_parquet(report: str) -> None:
    compared = pandas.read_csv(ROOT / "reports" / report / "comparisons.csv").dropna(subset=["effect"])
    if "grid" in compared:
        compared = compared[compared["grid"] == report]
    compared = compared[compared["metric"].isin(WAYS) & (compared["technique"] != "baseline again")]
    compared = compared[(compared["metric"] != "tokens_per_second") | (compared["basis"] == "visits")]
    assert len(compared) >= 6
    for row in compared.itertuples():
        again = WAYS[str(row.metric)](report, str(row.technique))
        assert again == pytest.approx(row.effect, rel=1e-6, abs=1e-9), (row.technique, row.metric)
        assert_verdict_agrees(row)


def assert_verdict_agrees(row: Any) -> None:
    """Its word says what its interval says."""
    if math.isnan(row.low):
        return
    none = 0.0 if row.metric == "eval_loss" else 1.0
    differs = row.low > none or row.high < none
    if row.basis == "exact":
        differs = abs(row.effect - 1) > SAME[row.metric]
    assert (row.verdict in ("better", "worse", "higher", "lower")) == differs, row


NUMBER = r"[+-]?[\d.]+"
EXPECTED = re.compile(rf"(\w+): (?:ratio|difference) (<=|>=|<|>|=|between) ({NUMBER})(?: and ({NUMBER}))?$")
SIZE = re.compile(rf"'?×?({NUMBER})(?: \(({NUMBER})(?: to |–)({NUMBER})\))?$")


@pytest.mark.parametrize("report", [name for name in REPORTS if name != "methods"])  # which has no such claim
def test_verdicts_are_recomputed_from_the_parquet(report: str) -> None:
    """Claims about one pair: the size from the rows, the word from the interval."""
    claims = pandas.read_csv(ROOT / "reports" / report / "claims.csv")
    if "Grid" in claims:
        claims = claims[claims["Grid"].str.split(";").str[0] == report]
    judged = set()
    for row in claims.itertuples():
        expected, sides = EXPECTED.match(str(row.Expected)), str(row[7]).split(" → ")
        size = SIZE.match(str(row.Measured).replace("−", "-"))
        if expected is None or size is None or expected[1] not in WAYS or len(sides) != 2 or ";" in sides[1]:
            continue
        if expected[1] == "tokens_per_second" and "block" not in rows(report)["steps"]:
            continue  # timed before there were visits
        metric, effect = expected[1], WAYS[expected[1]](report, sides[1], sides[0])
        shown, low, high = (float(size[i] or size[1]) for i in (1, 2, 3))
        assert effect == pytest.approx(shown, abs=0.006 if metric != "eval_loss" else 0.0006), row.Claim
        if size[2] is None:
            low = high = effect
        elif {size[2], size[3]} & {expected[3], expected[4], f"{float(expected[3]):+.3f}"}:
            continue  # rounded, an end is where the claim begins: the digits do not tell on which side
        assert row.Verdict == word(expected, effect, low, high), (row.Claim, effect)
        judged.add((metric, row.Claim))
    assert len(judged) >= (20 if report == "lesson" else 2)
    assert report != "lesson" or {metric for metric, _ in judged} == set(WAYS)


def word(expected: re.Match[str], effect: float, low: float, high: float) -> str:
    """What an interval says of an expectation: within it, outside of it, or neither."""
    metric, sign = expected[1], expected[2]
    none, bound, margin = 0.0 if metric == "eval_loss" else 1.0, float(expected[3]), SAME[metric]
    least = {"<": -math.inf, "<=": -math.inf, "=": bound - margin}.get(sign, bound)
    most = {">": math.inf, ">=": math.inf, "=": bound + margin, "between": float(expected[4] or 0)}.get(sign, bound)
    open_ = "not distinguishable" if low <= none <= high else "not decided"
    if sign not in ("=", "between") and bound == none:  # that there is an effect, and which way
        if none - margin <= low and high <= none + margin:
            return "contradicted"
        if open_ == "not distinguishable" or abs(effect - none) <= margin:
            return open_
        return "supported" if least <= effect <= most else "contradicted"
    if least <= low and high <= most:
        return "supported"
    return "contradicted" if high < least or low > most else open_
