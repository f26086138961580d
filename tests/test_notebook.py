"""Results as Python and notebooks have them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import harness
from harness.errors import InputError
from harness.report.notebook import Results
from harness.results.store import Store

ROOT = Path(__file__).parent.parent
TECHNIQUES = ROOT / "results/techniques"


@pytest.fixture(scope="module")
def results() -> Results:
    return harness.load(TECHNIQUES)


def test_rows_are_those_of_the_parquet_with_units(results: Results) -> None:
    recorded = Store(TECHNIQUES).read("trials")
    assert results.trials.shape == recorded.shape
    assert results.trials.peak_memory_bytes.tolist() == recorded["peak_memory_bytes"].to_pylist()
    units = results.trials.attrs["units"]
    assert units["peak_memory_bytes"] == "B"
    assert units["eval_loss"] == "nats"
    assert units["load_seconds"] == "s"
    assert "label" not in units
    assert results.steps.attrs["units"]["seconds"] == "s"
    assert len(results.stories) == Store(TECHNIQUES).read("stories").num_rows
    with pytest.raises(InputError, match="there are trials, steps, stories"):
        results.rows("rows")


def test_comparisons_are_those_of_the_report(results: Results) -> None:
    frame = results.comparisons
    (of_nf4,) = frame.query("technique == 'precision=nf4' and metric == 'peak_memory_bytes'").to_dict("records")
    trials = results.trials.query("status == 'ok'")
    means = trials.groupby("label").peak_memory_bytes.mean()
    assert of_nf4["value"] == pytest.approx(means["precision=nf4"] / means["baseline"], rel=1e-3)
    assert of_nf4["verdict"] == "better"
    spread = frame.query("metric == 'eval_loss'").dropna(subset=["low"])
    assert ((spread.low <= spread.value) & (spread.value <= spread.high)).all()
    assert set(results.claims.verdict) & {"supported", "contradicted"}


def test_a_notebook_shows_the_techniques(results: Results) -> None:
    shown = results._repr_html_()
    assert "precision=nf4" in shown
    assert re.search(r"<th>Technique</th>", shown)
    assert "configurations" in repr(results)
    assert "techniques" in results.tables
    chart = next(iter(results.charts.values()))
    assert "$schema" in chart.to_dict()


def test_what_is_no_folder_is_named() -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        harness.load("nowhere")
