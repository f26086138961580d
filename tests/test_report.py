"""The comparison: ratios to the baseline, doubt beside the loss, and nothing that was not measured."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pyarrow.compute
import pytest
from conftest import SMALL
from scipy import stats as scipy_stats

from harness.environment import current
from harness.errors import InputError
from harness.report import techniques
from harness.results import Job, Record, Store, StoryLoss
from harness.spec import TrialSpec
from harness.stats import paired_difference

LATER = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
Small = Callable[..., TrialSpec]


def keep(store: Store, spec: TrialSpec, label: str, losses: list[float], **figures: Any) -> None:
    environment = figures.pop("environment", current("cpu"))
    status = figures.pop("status", "ok")
    started_at = figures.pop("started_at", dt.datetime(2026, 1, 1, tzinfo=dt.UTC))
    baseline_id = figures.pop("baseline_id", TrialSpec.model_validate(SMALL | {"seed": spec.seed}).id)
    failure = {} if status == "ok" else {"phase": "forward", "error": "no", "error_type": "X"}
    stories = [StoryLoss(story_id=str(i), when="after", loss=x, tokens=10) for i, x in enumerate(losses)]
    store.write(
        Record.of(
            Job(grid="g", spec=spec, label=label, factor=None if label == "baseline" else "f",
                baseline_id=baseline_id, repeat=spec.seed),
            environment=environment, status=status, **failure, started_at=started_at,
            metrics=figures, stories=tuple(stories),
        )
    )  # fmt: skip


def test_ratios_are_to_the_baseline_of_the_same_repeat(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    base = {"peak_memory_bytes": 1000, "tokens_per_second": 100.0, "eval_loss": 2.0}
    for seed, slow in ((0, 1.0), (1, 0.5)):  # the machine was slower in the second repeat
        keep(store, small(seed=seed), "baseline", [2.0, 2.0, 2.0], **base | {"tokens_per_second": 100 * slow})
        other = {"peak_memory_bytes": 600, "tokens_per_second": 80 * slow, "eval_loss": 1.9}
        keep(store, small(seed=seed, lora_r=8), "lora_r=8", [1.8, 1.9, 2.0], **other)
    keep(store, small(lora_r=64), "lora_r=64", [], status="oom", oom_reached_bytes=2**30, oom_requested_bytes=2**30)
    found, _ = techniques.compare(tmp_path)
    assert [line.label for line in found] == ["baseline", "lora_r=8", "lora_r=64"]
    line = found[1]
    assert line.memory_ratio == pytest.approx(0.6)
    assert line.speed_ratio == pytest.approx(0.8)
    assert line.repeats == 2
    assert line.loss_difference is not None
    assert line.loss_difference.mean == pytest.approx(-0.1)
    assert line.loss_difference.n == 3, "a story counts once, however often it was repeated"
    text = techniques.markdown("g", found, "a machine")
    assert "oom in forward, needs at least 2.00 GiB" in text
    assert "| lora_r=64 | oom in forward, needs at least 2.00 GiB | – | – | – | – | – |" in text


def test_losses_on_other_tokens_are_not_compared(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    keep(store, small(), "baseline", [2.0, 2.0], eval_loss=2.0)
    keep(store, small(sequence_length=512), "longer", [1.0, 1.1], eval_loss=1.0)
    found, _ = techniques.compare(tmp_path)
    assert found[1].eval_loss == 1.0
    assert found[1].loss_difference is None


def test_environments_do_not_mix(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    here = current("cpu")
    elsewhere = here.model_copy(update={"cpu_name": "another"})
    third = here.model_copy(update={"cpu_name": "a third"})
    keep(store, small(), "baseline", [], environment=elsewhere, peak_memory_bytes=5)
    assert techniques.compare(tmp_path)[0][0].memory_bytes == 5, "the only one there is"
    keep(store, small(), "baseline", [], environment=third, peak_memory_bytes=7)
    with pytest.raises(InputError, match="2 environments"):
        techniques.compare(tmp_path)
    assert techniques.compare(tmp_path, third.id)[0][0].memory_bytes == 7
    keep(store, small(), "baseline", [], peak_memory_bytes=9)
    found, described = techniques.compare(tmp_path)
    assert found[0].memory_bytes == 9, "this machine's own"
    assert "2 trials of other environments are left out" in described
    with pytest.raises(InputError, match="no trials of environment"):
        techniques.compare(tmp_path, "12345678")


def test_former_versions_of_a_grid_do_not_mix(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    former, now = small(sequence_length=512).id, small().id
    keep(store, small(sequence_length=512), "baseline", [2.0], peak_memory_bytes=50, baseline_id=former)
    keep(store, small(sequence_length=512, lora_r=8), "lora_r=8", [2.0], peak_memory_bytes=80, baseline_id=former)
    keep(store, small(), "baseline", [2.0], peak_memory_bytes=10, started_at=LATER)
    keep(store, small(lora_r=8), "lora_r=8", [2.0], peak_memory_bytes=20, started_at=LATER)
    found, described = techniques.compare(tmp_path)
    assert [(line.label, line.memory_bytes, line.memory_ratio) for line in found] == [
        ("baseline", 10, 1.0),
        ("lora_r=8", 20, 2.0),
    ]
    assert "2 trials of other versions of the grid are left out" in described
    found, _ = techniques.compare(tmp_path, baseline_ids={former})
    assert [line.memory_bytes for line in found] == [50, 80]
    # A trial that the edited grid still has takes its new place.
    trial = store.read("trials").filter(pyarrow.compute.field("spec_id") == now)["trial_id"].to_pylist()[0]
    store.rename({trial: {"label": "shorter", "factor": "f", "baseline_id": former}})
    found, _ = techniques.compare(tmp_path, baseline_ids={former})
    assert [(line.label, line.memory_ratio) for line in found] == [
        ("baseline", 1.0),
        ("lora_r=8", 1.6),
        ("shorter", 0.2),
    ]


def test_without_a_baseline_there_are_figures_and_no_ratios(small: Small, tmp_path: Path) -> None:
    keep(Store(tmp_path), small(), "alone", [2.0], peak_memory_bytes=5, baseline_id=None)
    found, where = techniques.compare(tmp_path)
    assert found[0].memory_bytes == 5
    assert found[0].memory_ratio is None
    assert "alone" in techniques.markdown("g", found, where)
    with pytest.raises(InputError, match="no trials are recorded"):
        techniques.compare(tmp_path / "empty")


def test_intervals_are_students() -> None:
    reference = {"a": 1.0, "b": 2.0, "c": 4.0}
    values = {"a": 1.5, "b": 2.1, "c": 4.6, "only here": 9.0}
    found = paired_difference(values, reference)
    assert found is not None
    expected = scipy_stats.ttest_1samp([0.5, 0.1, 0.6], 0).confidence_interval(0.95)
    assert (found.low, found.high, found.n) == (pytest.approx(expected.low), pytest.approx(expected.high), 3)
    assert not found.distinguishable
    assert paired_difference({"a": 1.0}, {"a": 2.0}) is None


def test_intervals_cover_what_they_promise() -> None:
    generator = numpy.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        noise = generator.normal(0.3, 1.0, 6)
        found = paired_difference(dict(enumerate(noise)), dict.fromkeys(range(6), 0.0))  # type: ignore[arg-type]  # keys
        assert found is not None
        hits += found.low <= 0.3 <= found.high
    assert math.isclose(hits / 1000, 0.95, abs_tol=0.02)
