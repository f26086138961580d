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

REPORTS = ("techniques", "practice", "forgetting", "methods", "today")
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


def memory(report: str, label: str) -> float:
    """The highest peak over the repeats that both have."""
    peaks = rows(report)["trials"].groupby(["label", "repeat"])["peak_memory_bytes"].max()
    shared = peaks[label].index.intersection(peaks["baseline"].index)
    return float(peaks[label][shared].max() / peaks["baseline"][shared].max())


def loss(report: str, label: str) -> float:
    """The mean over repeats of the token-weighted mean difference."""
    stories = rows(report)["stories"].groupby(["label", "repeat", "story_id"])[["loss", "tokens"]].mean()
    of_baseline = stories.loc["baseline"].add_suffix("_of_baseline")
    both = stories.loc[label].join(of_baseline, how="inner")
    weighted = (both["loss"] - both["loss_of_baseline"]) * both["tokens"]
    return float((weighted.groupby("repeat").sum() / both["tokens"].groupby("repeat").sum()).mean())


def speed(report: str, label: str) -> float:
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
    return math.exp((logarithms[label] - logarithms["baseline"]).dropna().mean())


@pytest.mark.parametrize("report", REPORTS)
def test_comparisons_are_recomputed_from_the_parquet(report: str) -> None:
    compared = pandas.read_csv(ROOT / "reports" / report / "comparisons.csv").dropna(subset=["effect"])
    ways = {"peak_memory_bytes": memory, "eval_loss": loss, "tokens_per_second": speed}
    compared = compared[compared["metric"].isin(ways) & (compared["technique"] != "baseline again")]
    compared = compared[(compared["metric"] != "tokens_per_second") | (compared["basis"] == "visits")]
    assert len(compared) >= 6
    for row in compared.itertuples():
        again = ways[str(row.metric)](report, str(row.technique))
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


EXPECTED = re.compile(r"(\w+): (ratio|difference) (<=|>=|<|>) (-?[\d.]+)$")


@pytest.mark.parametrize("report", [name for name in REPORTS if name != "methods"])  # which has no such claim
def test_verdicts_on_memory_are_recomputed_from_the_parquet(report: str) -> None:
    """Claims about the peaks of one pair: exact figures, so that the expectation alone decides."""
    claims = pandas.read_csv(ROOT / "reports" / report / "claims.csv")
    peaks = rows(report)["trials"].groupby("label")["peak_memory_bytes"].max()
    judged = 0
    for row in claims.itertuples():
        expected = EXPECTED.match(str(row.Expected))
        sides = str(row[7]).split(" → ")
        if expected is None or expected[1] != "peak_memory_bytes" or len(sides) != 2 or ";" in sides[1]:
            continue
        ratio, bound = peaks[sides[1]] / peaks[sides[0]], float(expected[4])
        holds = {"<": ratio < bound, "<=": ratio <= bound, ">": ratio > bound, ">=": ratio >= bound}[expected[3]]
        assert row.Verdict == ("supported" if holds else "contradicted"), (row.Claim, ratio)
        judged += 1
    assert judged >= 2
