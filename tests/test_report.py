"""Measurements into comparisons, tables, claims, recommendations and files."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime as dt
import io
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
import vl_convert
import yaml
from conftest import SMALL, Answer
from rich.console import Console
from rows import keep

from harness.analysis import compare_runs, comparison, cost, loading, longer, pareto, recommend, verdicts, words
from harness.analysis.estimate import Estimate
from harness.analysis.measurements import Measurements
from harness.analysis.sizing import show_time
from harness.cli.progress import PlainDisplay
from harness.environment import current
from harness.errors import InputError
from harness.grids import grid as grids
from harness.grids.claims import Claim, Contrast
from harness.launch.inline import InlineLauncher
from harness.metrics import HEADLINE
from harness.record import Job, Record, trial_id
from harness.report import details, document, front, page, plots, summary, tables, writers
from harness.report.claim_cards import by_section
from harness.results.store import Store
from harness.results.versions import Version
from harness.runner import grid_run
from harness.spec.trial import TrialSpec

ROOT = Path(__file__).parent.parent
LATER = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
Ask = Callable[..., Answer]
Small = Callable[..., TrialSpec]
BASE = {"peak_memory_bytes": 1000, "tokens_per_second": 100.0, "eval_loss": 2.0}


def row(m: Measurements, label: str) -> tuple[str, ...]:
    """The technique comparison's figures for a label."""
    (cells,) = [cells for cells in tables.techniques(comparison.compare(m)).rows if cells[0].text == label]
    return tuple(cell.text for cell in cells[2:])


def estimate(m: Measurements, label: str, metric: str) -> Estimate:
    (config,) = m.configs.index[m.configs["label"] == label]
    result = comparison.compare(m).of(metric, config)
    assert result is not None
    return result


def claim(**given: Any) -> Claim:
    return Claim.model_validate({"id": "c", "says": "so", "metric": "peak_memory_bytes"} | given)


def verdict(m: Measurements, **given: Any) -> verdicts.ClaimVerdict:
    """The verdict on one claim."""
    return verdicts.judge(comparison.compare(m, [claim(**given)]))[0]


# ------------------------------------------------------------------------------------ comparisons


def test_ratios_are_to_the_baseline_of_the_same_repeat(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed, slow in ((0, 1.0), (1, 0.5)):  # the machine was slower in the second repeat
        keep(store, small(seed=seed), "baseline", [2.0, 2.0, 2.0], **BASE | {"tokens_per_second": 100 * slow})
        other = {"peak_memory_bytes": 600, "tokens_per_second": 80 * slow, "eval_loss": 1.9}
        keep(store, small(seed=seed, lora_r=8), "lora_r=8", [1.8, 1.9, 2.0], **other)
    keep(store, small(lora_r=64), "lora_r=64", [], status="oom", oom_reached_bytes=2**30, oom_requested_bytes=2**30)
    m = loading.load(tmp_path)
    memory, speed, loss = (estimate(m, "lora_r=8", metric) for metric in HEADLINE)
    assert (memory.value, memory.verdict, memory.n) == (pytest.approx(0.6), "better", 2)
    assert (speed.value, speed.n, speed.basis) == (pytest.approx(0.8), 2, "repeats")
    assert loss.value == pytest.approx(-0.1)
    assert (loss.n, loss.seeds) == (3, 2), "a story counts once, however often it was repeated"
    assert "×0.60 high savings" in row(m, "lora_r=8")
    failed = "lora_r=64 (oom in forward, needs at least 2.00 GiB)"
    assert row(m, failed) == (*["–"] * 6, "0")


def test_losses_are_compared_on_equal_tokens_only(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    keep(store, small(), "baseline", [2.0, 2.0], eval_loss=2.0)
    keep(store, small(sequence_length=512), "longer", [1.0, 1.1], eval_loss=1.0, story_tokens=20)
    m = loading.load(tmp_path)
    assert row(m, "longer")[4:6] == ("1.0000", "–")


def test_the_repeat_that_holds_most_is_the_memory(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed, (ours, theirs) in enumerate([(500, 1000), (640, 980), (600, 800)]):
        parts = {"memory_weights_bytes": 100, "memory_activations_bytes": ours - 100}
        keep(store, small(seed=seed), "baseline", [], **BASE | {"peak_memory_bytes": theirs})
        keep(store, small(seed=seed, lora_r=8), "lora_r=8", [], **BASE | {"peak_memory_bytes": ours}, **parts)
    m = loading.load(tmp_path)
    memory = estimate(m, "lora_r=8", "peak_memory_bytes")
    assert memory.value == pytest.approx(0.64), "of both the highest, in whatever repeat"
    assert (memory.low, memory.high) == (pytest.approx(0.5), pytest.approx(0.75)), "and the range over the repeats"
    assert row(m, "lora_r=8")[:2] == ("640 B", "×0.64 (0.50–0.75) high savings")
    (config,) = m.configs.index[m.configs["label"] == "lora_r=8"]
    figures = comparison.compare(m).mean(config)
    assert figures["memory_weights_bytes"] + figures["memory_activations_bytes"] == 640, "parts of that peak"


def test_losses_count_tokens_and_say_when_there_was_one_seed(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    for label, r, after in (("baseline", 4, [2.0, 2.0]), ("lora_r=8", 8, [2.3, 2.1]), ("lora_r=9", 9, [2.001, 2.0])):
        keep(store, small(lora_r=r), label, after, story_tokens=[30, 10], **BASE)
    m = loading.load(tmp_path)
    assert estimate(m, "lora_r=8", "eval_loss").value == pytest.approx((30 * 0.3 + 10 * 0.1) / 40)
    nearly = estimate(m, "lora_r=9", "eval_loss")
    assert nearly.verdict == "not distinguishable", "one seed cannot say that others agree"
    assert words.pairs(nearly) == "2 stories, one seed"


def test_an_undecided_comparison_says_what_would_decide_it(small: Small, tmp_path: Path) -> None:
    folder, out = tmp_path / "results" / "g", tmp_path / "out"
    generator = random.Random(6)
    for seed in range(3):
        for label, r in (("baseline", 4), ("lora_r=8", 8)):
            stories = [2.0 + generator.uniform(-0.1, 0.1) for _ in range(8)]
            keep(Store(folder), small(seed=seed, lora_r=r), label, stories, **BASE | {"eval_loss": sum(stories) / 8})
    report = full_report(folder, out)
    (cells,) = next(table for table in report.tables if table.id == "not-decided").rows
    comparison_, figure, _, smallest, decides = (cell.text for cell in cells)
    assert (comparison_, figure) == ("lora_r=8 against the baseline", "eval loss")
    assert smallest.endswith(" nats")
    assert "(val_set_size)" in decides
    for file in ("report.md", "report.html", "tables/not-decided.csv", "tables/not-decided.tex"):
        text = (out / file).read_text()
        assert smallest in text, file
        assert "stories (val" in text, file
    caption = str(writers.terminal(report.comparison).caption)
    assert f"not decided, by the smallest detectable difference: eval loss {smallest} (1)" in caption


def test_repeats_that_one_of_two_lacks_make_no_difference(small: Small, tmp_path: Path) -> None:
    """The baseline has more repeats, of other losses: stories and costs are compared in those that both have."""
    for seed, level in enumerate((2.0, 2.0, 1.5, 1.5)):
        keep(Store(tmp_path), small(seed=seed), "baseline", [level, level + 0.1], rates=[100.0] * 30, **BASE)
    for seed in (0, 1):
        keep(Store(tmp_path), small(seed=seed, lora_r=8), "lora_r=8", [2.0, 2.1], rates=[100.0] * 30, **BASE)
    ended = {"status": "diverged", "rates": [100.0] * 10}
    keep(Store(tmp_path), small(seed=2, lora_r=8), "lora_r=8", [], **ended)
    m = loading.load(tmp_path)
    compared, steps = comparison.compare(m), document._steps(m, tmp_path)
    assert len(steps) == 6 * 30, "none of the trial that diverged"
    technique = details.configurations(compared, tmp_path, steps, 10)[1]
    assert [story[3] for story in technique.stories] == [0.0, 0.0]
    steps.loc[(steps["config"] == 0) & (steps["repeat"] > 1), "loss"] -= 0.5
    costs = cost.costs(compared, steps)
    assert costs is not None
    assert [each.seconds for each in costs.rows] == [30.0, 30.0]


def test_sentences_on_the_baselines_second_run(small: Small, tmp_path: Path) -> None:
    for seed in range(3):
        for label, twin in (("baseline", False), ("baseline again", True)):
            if twin and seed:
                continue
            figures = BASE | {"tokens_per_second": None if twin else 100.0, "predicted_peak_memory_bytes": 1000}
            keep(Store(tmp_path), small(seed=seed), label, [2.0, 2.1], twin=twin, **figures)
    m = loading.load(tmp_path)
    compared = comparison.compare(m)
    caveats = " ".join(summary.caveats(compared, m.alpha))
    assert "was not run twice" not in caveats
    assert "has no speed of both its runs" in caveats
    assert "With one repeat" not in caveats, "its second run counts for none"
    steps = document._steps(m, tmp_path)
    sentences = " ".join(summary.sentences(compared, steps))
    assert sentences.startswith("1 configuration was tried")
    assert "over 1 configuration" in sentences


def test_whole_numbers_stay_whole_next_to_what_was_not_seen_of_a_loop(small: Small, tmp_path: Path) -> None:
    keep(Store(tmp_path), small(), "baseline", [2.0, 2.1], **BASE)
    keep(Store(tmp_path), small(sequence_length=128), "shorter", [2.0, 2.1], **BASE)
    unseen = ("lora_r", "sequence_length", "micro_batch_size")
    job = Job(grid="g", spec=small(), label="mine (watched)", baseline_id=small().id, watched=True, unseen=unseen)
    begun = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    Store(tmp_path).write(Record.of(job, environment=current("cpu"), status="ok", started_at=begun, metrics={}))
    m = loading.load(tmp_path)
    compared = comparison.compare(m)
    assert comparison.differences(m, [0, 1, 2]) == ["the baseline", "sequence_length: 128", "nothing that was seen"]
    (levels,) = (table for table in tables.all_tables(compared) if table.id == "batch-sequence")
    assert [r[0].text for r in levels.rows if "length" in r[0].text] == ["sequence length 128", "sequence length 256"]
    assert (
        "LoRA r 4, fp32, micro-batch 2 × 2, 256 tokens" in summary.sentences(compared, document._steps(m, tmp_path))[1]
    )


def test_a_loop_that_was_disturbed_is_to_be_watched_again(small: Small, tmp_path: Path) -> None:
    """What a run times again is its trials: it has nothing of somebody's program."""
    for label, watched in (("baseline", False), ("mine (watched)", True)):
        job = Job(grid="g", spec=small(), label=label, baseline_id=small().id, watched=watched)
        begun = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
        Store(tmp_path).write(
            Record.of(job, environment=current("cpu"), status="ok", started_at=begun, metrics={}, disturbed=True)
        )
    m = loading.load(tmp_path)
    trials, loops = (line for line in summary.caveats(comparison.compare(m), m.alpha) if "for others" in line)
    assert trials.endswith("baseline. harness run times them again.")
    assert loops.endswith("which have no speed: mine (watched). Watch them again while it is idle.")


def test_a_report_says_what_a_longer_run_would_decide(small: Small, tmp_path: Path) -> None:
    folder, out = tmp_path / "results" / "g", tmp_path / "out"
    generator = random.Random(6)
    # Of 30 s, 2 were loading and 10 were steps: each of the eight stories took 2.25.
    took = {"trial_seconds": 30.0, "load_seconds": 2.0, "step_seconds_median": 1.0, "optimizer_steps": 10,
            "evaluated_stories": 8, "training_stories": 4}  # fmt: skip
    for seed in range(3):
        for label, r in (("baseline", 4), ("lora_r=8", 8), ("lora_r=9", 9)):
            stories = [2.0 + (r == 9) + generator.uniform(-0.1, 0.1) for _ in range(8)]
            loss = sum(stories) / 8
            speed = generator.uniform(90.0, 110.0)
            figures = BASE | took | {"eval_loss": loss, "tokens_per_second": speed}
            keep(Store(folder), small(seed=seed, lora_r=r), label, stories, **figures)
    report = full_report(folder, out)
    speeds, losses = report.longer
    open_loss, open_speed, other_speed = (
        estimate(report.comparison.measurements, label, metric)
        for label, metric in (
            ("lora_r=8", "eval_loss"),
            ("lora_r=8", "tokens_per_second"),
            ("lora_r=9", "tokens_per_second"),
        )
    )
    table = next(table for table in report.tables if table.id == "not-decided")
    assert table.note.endswith("The data has 12 stories.")
    # Nine trials, of a second to start and 30: other stories are held out, so that all are trained again, more often.
    assert (open_loss.unit, open_loss.verdict) == ("times", "not distinguishable")
    times = open_loss.needed or 0
    decided = (
        f"{8 * times:,} held-out stories (val_set_size), more than the data has (12), and {3 * times:,} repeats "
        "(repeats) would decide it"
    )
    time = show_time(times * 9 * (31.0 + 18.0 * (times - 1)))
    assert losses == f"1 of 2 losses is not decided; {decided}, in about {time}."
    fewer = min(open_speed.needed or 0, other_speed.needed or 0)
    decided = f"{fewer:,} visits instead of 3 (visits) would decide 1 of them"
    assert speeds == f"2 of 2 speeds are not decided; {decided}.", (
        "nothing was visited: it is not known how long that takes"
    )
    assert all(line in (out / "report.md").read_text() for line in (speeds, losses))


def test_other_stories_make_trials_that_are_timed_anew(small: Small, tmp_path: Path) -> None:
    # Eight stories and as many general passages: each took 1.125 s.
    took = {"trial_seconds": 30.0, "load_seconds": 2.0, "optimizer_steps": 10, "evaluated_stories": 8}
    # Each of both visits takes a second to start, two to load, one to warm up, and three steps of a second.
    timed = {"step_seconds_median": 1.0, "timed_visits": 2, "timed_steps": 6, "rates": [100] * 3, "blocks": (1, 2)}
    general = {"measure_forgetting": True, "general_samples": 8}
    baseline_id = small(**general).id
    once = (("baseline", 4), ("r=8", 8), ("baseline again", 4))
    for seed, label, r in [(0, *each) for each in once] + [(1, *each) for each in once[:2]]:
        figures = BASE | took | {"twin": "again" in label, "baseline_id": baseline_id, "tokens_per_second": None}
        visited = {} if seed else timed
        keep(Store(tmp_path), small(seed=seed, lora_r=r, **general), label, [2.0] * 8, **figures | visited)
    m = loading.load(tmp_path)
    visits = 3 * 2 * 7
    assert longer._stories(m, [], 8, 24)[1] == 5 * (31 + 1.125 * 16) + visits
    # Three times as many of both: the baseline's second run and the visits are of the first repeat alone.
    undecided = Estimate("eval_loss", 0.1, -0.1, 0.3, 8, "stories", None, "not distinguishable", seeds=2)
    what, seconds = longer._times(m, [undecided], 1, 3)
    assert what.startswith("24 held-out stories")
    assert seconds == (3 * 4 + 1) * (31 + 1.125 * 16) + visits


def test_the_time_of_further_visits_is_that_of_the_recorded_ones() -> None:
    """23 trials in a block, each with a model and a baseline to load, a warm-up, and three or more steps of both."""
    folder = ROOT / "results" / "techniques"
    m = loading.load(folder, "fb116a5f")
    (sentence,) = (line for line in longer.sentences(comparison.compare(m)) if "visits" in line)
    match = re.search(r"(\d+) visits instead of 3 .* in about (\d+) min", sentence)
    assert match, sentence
    more, minutes = int(match[1]) - 3, int(match[2])
    assert 60 * minutes / more / 23 == pytest.approx(20, abs=4), "seconds of a visit, as LOG.md has them"


def test_one_repeat_has_an_interval_over_its_steps(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    keep(store, small(), "baseline", [], rates=[100, 102, 98, 100], **BASE)
    keep(store, small(lora_r=8), "half", [], rates=[50, 51, 49, 50], **BASE | {"tokens_per_second": 50.0})
    keep(store, small(lora_r=9), "unsteady", [], rates=[50, 150, 60, 120], **BASE | {"tokens_per_second": 90.0})
    keep(store, small(lora_r=10), "one step", [], rates=[50], **BASE | {"tokens_per_second": 50.0})
    m = loading.load(tmp_path)
    half = estimate(m, "half", "tokens_per_second")
    assert (half.value, half.basis, half.verdict) == (pytest.approx(0.5), "steps", "worse")
    assert half.low is not None
    assert half.low < 0.5 < (half.high or 0)
    assert estimate(m, "unsteady", "tokens_per_second").verdict == "not distinguishable"
    assert estimate(m, "one step", "tokens_per_second").low is None


def test_a_second_run_of_the_baseline_is_noise_and_sets_the_floor(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed, twin in enumerate((110.0, 92.0, 105.0)):
        keep(store, small(seed=seed), "baseline", [], **BASE)
        keep(
            store, small(seed=seed), "baseline again", [], twin=True, factor=None, **BASE | {"tokens_per_second": twin}
        )
        keep(store, small(seed=seed, lora_r=8), "slower", [], **BASE | {"tokens_per_second": 95.0 + seed / 100})
        keep(store, small(seed=seed, lora_r=9), "much slower", [], **BASE | {"tokens_per_second": 60.0 + seed / 100})
    m = loading.load(tmp_path)
    squares = [math.log(x / 100) ** 2 for x in (110, 92, 105)]
    assert m.floor == pytest.approx(math.sqrt(sum(squares) / 3) / math.sqrt(3))
    assert estimate(m, "slower", "tokens_per_second").verdict == "not distinguishable", "steady, and below the floor"
    assert estimate(m, "much slower", "tokens_per_second").verdict == "worse"
    again = row(m, "baseline again")
    assert again[3] == "the noise between two equal runs"
    assert again[1] == "–"
    compared = comparison.compare(m)
    assert m.labels(compared.undecided("tokens_per_second")) == ["slower"]
    assert compared.undecided("eval_loss") == {}


def test_without_speeds_a_second_run_of_the_baseline_shows_no_noise(small: Small, tmp_path: Path) -> None:
    untimed = {"peak_memory_bytes": 1000, "eval_loss": 2.0}
    keep(Store(tmp_path), small(), "baseline", [2.0], **untimed)
    keep(Store(tmp_path), small(), "baseline again", [2.0], twin=True, factor=None, **untimed)
    assert row(loading.load(tmp_path), "baseline again")[2:4] == ("–", "–")


def test_a_claim_rests_on_what_was_compared(small: Small, tmp_path: Path) -> None:
    """A pair of trials without the figure is none of its verdict."""
    for precision, figures in (("fp32", BASE), ("bf16", BASE | {"tokens_per_second": None})):
        for r in (4, 8):
            label = f"{precision}, {r}"
            keep(Store(tmp_path), small(precision=precision, lora_r=r), label, [2.0], **figures)
    claim = Claim(
        id="x", says="x", metric="tokens_per_second", compare={"lora_r": (4, 8)}, expect="ratio > 0.5"
    )  # fmt: skip
    compared = comparison.compare(loading.load(tmp_path), [claim])
    (verdict,) = verdicts.judge(compared)
    assert verdict.rests_on == "fp32, 4 → fp32, 8"


def test_environments_do_not_mix(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    here = current("cpu")
    other = here.model_copy(update={"cpu_name": "another"})
    third = here.model_copy(update={"cpu_name": "a third"})
    keep(store, small(), "baseline", [], environment=other, peak_memory_bytes=5)
    assert loading.load(tmp_path).environment_id == other.id, "the only one there is"
    keep(store, small(), "baseline", [], environment=third, peak_memory_bytes=7)
    with pytest.raises(InputError, match="2 environments"):
        loading.load(tmp_path)
    assert row(loading.load(tmp_path, third.id), "baseline")[0] == "7 B"
    keep(store, small(), "baseline", [], peak_memory_bytes=9)
    m = loading.load(tmp_path)
    assert row(m, "baseline")[0] == "9 B", "this machine's own"
    assert row(loading.load(tmp_path, here=[third]), "baseline")[0] == "7 B", "the runner's own"
    assert m.left_out == ("2 trials of other environments",)
    with pytest.raises(InputError, match="no trials of environment"):
        loading.load(tmp_path, "12345678")


def test_machines_of_one_processor_name_do_not_mix(small: Small, tmp_path: Path) -> None:
    """Virtual machines call every generation of a maker's processors alike."""
    here = current("cpu").model_copy(update={"cpu_model": "family 99, model 2"})
    older = here.model_copy(update={"cpu_model": "family 98, model 1"})
    for environment in (here, older):
        keep(Store(tmp_path), small(), "baseline", [], environment=environment)
    with pytest.raises(InputError, match="2 environments"):
        loading.load(tmp_path)
    assert "(family 98, model 1), " in loading.load(tmp_path, older.id).where


def test_repeats_that_an_earlier_version_alone_had_are_left_out(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed in range(2):
        for rank, label in ((16, "baseline"), (8, "lora_r=8"), (4, "gone")):
            spec = small(sequence_length=512, lora_r=rank, seed=seed)
            former = small(sequence_length=512, lora_r=16, seed=seed).id
            keep(store, spec, label, [], peak_memory_bytes=50, baseline_id=former)
    for rank, label in ((16, "baseline"), (8, "lora_r=8")):
        now = small(lora_r=16).id
        keep(store, small(lora_r=rank), label, [], peak_memory_bytes=10, started_at=LATER, baseline_id=now)
    m = loading.load(tmp_path)
    assert set(m.trials["label"]) == {"baseline", "lora_r=8"}
    assert m.left_out == ("6 trials of other versions of the grid",)
    # A second repeat of the same version belongs to it, whenever it ran.
    keep(store, small(lora_r=16, seed=1), "baseline", [], baseline_id=small(lora_r=16, seed=1).id, started_at=LATER)
    assert loading.load(tmp_path).configs["repeats"].sum() == 3


def test_failures_stand_first(small: Small, tmp_path: Path, ask: Ask) -> None:
    for rank, label, status in ((16, "baseline", "failed"), (8, "lora_r=8", "ok")):
        given = {"peak_memory_bytes": 10} if status == "ok" else {"status": status}
        keep(Store(tmp_path / "g"), small(lora_r=rank), label, [], baseline_id=small(lora_r=16).id, **given)
    code, printed, _ = ask("report", str(tmp_path / "g"), "-o", str(tmp_path / "out"))
    text = " ".join(printed.split())
    assert code == 0
    assert "2 configurations were tried on this machine; their trials ended as 1 " in text
    assert "No trial of the baseline ended well: figures are shown, and no technique is compared with it." in text
    assert ">not compared<" in (tmp_path / "out/report.html").read_text()
    keep(Store(tmp_path / "h"), small(lora_r=8), "lora_r=8", [], peak_memory_bytes=9)
    keep(Store(tmp_path / "h"), small(lora_r=16), "baseline", [], peak_memory_bytes=9)
    code, printed, _ = ask("compare", str(tmp_path / "g"), str(tmp_path / "h"))
    assert (code, "baseline │" in printed) == (0, False)
    assert "not compared, as these did not end well: baseline (in g)" in " ".join(printed.split())


def test_one_of_something_is_in_the_singular(
    small: Small, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(Store(tmp_path / "g"), small(), "baseline", [], peak_memory_bytes=10)
    code, printed, _ = ask("report", str(tmp_path / "g"), "-o", str(tmp_path / "out"), "--full", "--format", "md")
    text = " ".join(printed.split())
    assert code == 0
    assert "1 configuration, 1 trial" in text
    assert "1 configuration was tried on this machine; its trial ended as 1 ok." in text
    assert "1 file written" in text
    monkeypatch.chdir(tmp_path / "g")
    assert loading.load(Path()).name == "g", "its report is reports/g"


def test_old_versions_of_a_grid_do_not_mix(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    former, now = small(sequence_length=512).id, small().id
    keep(store, small(sequence_length=512), "baseline", [], peak_memory_bytes=50, baseline_id=former)
    keep(store, small(sequence_length=512, lora_r=8), "lora_r=8", [], peak_memory_bytes=80, baseline_id=former)
    keep(store, small(), "baseline", [], peak_memory_bytes=10, started_at=LATER)
    keep(store, small(lora_r=8), "lora_r=8", [], peak_memory_bytes=20, started_at=LATER)
    m = loading.load(tmp_path)
    assert (row(m, "baseline")[0], row(m, "lora_r=8")[0]) == ("10 B", "20 B")
    assert m.left_out == ("2 trials of other versions of the grid",)
    of_former = Version(baselines=(former,), specs={"baseline": (former, now)}, whole=False)
    assert row(loading.load(tmp_path, version=of_former), "lora_r=8")[:2] == ("80 B", "×1.60 more")
    # A trial that the edited grid still has takes its new place.
    (trial,) = [r["trial_id"] for r in store.read("trials").to_pylist() if r["spec_id"] == now]
    store.rename({trial: {"label": "shorter", "factor": "f", "baseline_id": former}})
    assert row(loading.load(tmp_path, version=of_former), "shorter")[:2] == ("10 B", "×0.20 very high savings")
    # A level that was edited under its name leaves its former trials behind.
    edited = LATER + dt.timedelta(minutes=1)
    keep(store, small(lora_r=8, learning_rate=1e-3), "lora_r=8", [], peak_memory_bytes=30, started_at=edited)
    keep(store, small(), "baseline", [], peak_memory_bytes=10, started_at=edited)
    assert row(loading.load(tmp_path), "lora_r=8")[0] == "30 B"


@dataclasses.dataclass
class Edited:
    """A grid whose file is edited between its runs, each on a day of its own."""

    folder: Path
    day: int = 0

    def run(self, ranks: dict[str, int], *only: str, repeats: int = 1, learning_rate: float = 1e-4) -> Measurements:
        """Record what is not recorded yet; what a report shows then."""
        self.day += 1
        file = self.folder / "g.yml"
        vary = {"method": {label: {"lora_r": rank} for label, rank in ranks.items()}}
        base = SMALL | {"learning_rate": learning_rate}
        file.write_text(yaml.safe_dump({"name": "g", "base": base, "vary": vary, "repeats": repeats}))
        grid, store = grids.load(file), Store(self.folder / "g")
        grid = grid.only(only) if only else grid
        done = store.completed()
        for t in grid.trials:
            if trial_id(t.spec, current("cpu"), twin=t.twin) not in done:
                at = dt.datetime(2026, 1, self.day, tzinfo=dt.UTC)
                given = {"baseline_id": t.baseline_id, "repeat": t.repeat, "started_at": at}
                keep(store, t.spec, t.label, [], twin=t.twin, peak_memory_bytes=t.spec.lora_r or 0, **given)
        assert not grid_run.run_grid(grid, store, InlineLauncher(), PlainDisplay(Console(file=io.StringIO()))).records
        return loading.load(store.folder)


def shown(m: Measurements) -> dict[str, tuple[int, float, int]]:
    """Rank, learning rate and repeats by label, without the baseline's second run."""
    rows = m.configs[~m.configs["twin"]]
    return {row.label: (row.lora_r, row.learning_rate, row.repeats) for row in rows.itertuples()}


def test_a_grid_that_is_edited_and_edited_back_is_reported_as_it_is(tmp_path: Path) -> None:
    """What was run before records nothing when it is run again: no moment in the rows tells that it is the latest."""
    grid = Edited(tmp_path)
    first = grid.run({"big": 8})
    assert shown(first) == {"baseline": (4, 1e-4, 1), "big": (8, 1e-4, 1)}
    m = grid.run({"big": 16})
    assert shown(m) == {"baseline": (4, 1e-4, 1), "big": (16, 1e-4, 1)}
    assert m.left_out == ("1 trial of other versions of the grid",)
    assert shown(grid.run({"big": 8})) == shown(first)
    assert shown(grid.run({"big": 8}, learning_rate=1e-3)) == {"baseline": (4, 1e-3, 1), "big": (8, 1e-3, 1)}
    m = grid.run({"big": 8})
    assert shown(m) == shown(first)
    assert m.left_out == ("4 trials of other versions of the grid",)
    assert recommend.recommend(m).label == "baseline"


def test_levels_that_the_grid_no_longer_has_are_left_out(tmp_path: Path) -> None:
    grid = Edited(tmp_path)
    grid.run({"big": 8, "small": 2})
    m = grid.run({"big": 8}, repeats=2)
    assert shown(m) == {"baseline": (4, 1e-4, 2), "big": (8, 1e-4, 2)}
    assert m.left_out == ("1 trial of levels that the grid no longer has",)
    assert shown(grid.run({"big": 8})) == shown(m), "repeats are no levels"
    m = grid.run({"big": 8, "small": 2})
    assert shown(m) == {"baseline": (4, 1e-4, 2), "big": (8, 1e-4, 2), "small": (2, 1e-4, 1)}
    only = grid.run({"big": 16, "small": 2}, "big")
    assert shown(only)["small"] == (2, 1e-4, 1), "--only hides no other level"
    assert shown(only)["big"] == (16, 1e-4, 1)


def test_a_run_that_was_cut_off_names_what_is_to_come(tmp_path: Path, ask: Ask) -> None:
    grid = Edited(tmp_path)
    assert grid.run({"big": 8, "small": 2}).not_run == {}
    store = Store(tmp_path / "g")
    version = store.description()["versions"][current("cpu").id]
    more = {"big": (*version["specs"]["big"], "later"), "large": ("one", "two"), "last": ("other",)}
    store.describe({}, {current("cpu").id}, Version(**version | {"specs": version["specs"] | more}))
    assert loading.load(tmp_path / "g").not_run == {"big": 1, "large": 2, "last": 1}
    _, out, _ = ask("report", str(tmp_path / "g"), "--format", "md")
    assert "4 trials have not run in this environment yet: big, large, last." in " ".join(out.split())
    assert "4 trials have not run in this environment yet" in (tmp_path / "reports/g/report.md").read_text()


def test_a_folder_of_grids_is_none(tmp_path: Path, ask: Ask) -> None:
    (tmp_path / "results").mkdir()
    Edited(tmp_path / "results").run({"big": 8})
    code, _, errors = ask("report", str(tmp_path / "results"))
    assert (code, "it has the results of g, each a folder of its own" in " ".join(errors.split())) == (2, True)


def test_what_was_run_last_is_readable_whatever_is_in_its_file(tmp_path: Path) -> None:
    keep(Store(tmp_path), TrialSpec.model_validate(SMALL), "baseline", [], peak_memory_bytes=9)
    here = current("cpu").id
    for odd in (3, [], {here: 3}, {here: {"baselines": 3, "specs": {}}}, {"other": {"baselines": [], "specs": {}}}):
        (tmp_path / "grid.json").write_text(json.dumps({"versions": odd}))
        m = loading.load(tmp_path)
        assert (len(m.configs), m.left_out) == (1, ())
    (tmp_path / "grid.json").write_text(json.dumps({"versions": {here: {"baselines": ["a"], "specs": {"b": ["a"]}}}}))
    assert loading.load(tmp_path).left_out == ("the grid as it is now, of which nothing is recorded",)


# ------------------------------------------------------------------------------------ contrasts and claims


def ablation(small: Small, tmp_path: Path) -> Measurements:
    """LoRA at two ranks, full fine-tuning with its own learning rate, micro-batches at equal effective batch."""
    store = Store(tmp_path)
    for label, memory, speed, changes in (
        ("baseline", 1000, 100.0, {}),
        ("lora_r=64", 1300, 98.0, {"lora_r": 64}),
        ("full", 4000, 80.0, {"adapter": "none", "learning_rate": 1e-5}),
        ("micro 4", 1500, 120.0, {"micro_batch_size": 4, "gradient_accumulation_steps": 1}),
        ("micro 1", 700, 70.0, {"micro_batch_size": 1, "gradient_accumulation_steps": 4}),
        ("dropout", 1000, 99.0, {"lora_dropout": 0.1}),
        ("both", 1234, 50.0, {"lora_r": 64, "lora_dropout": 0.1, "gradient_checkpointing": True}),
    ):
        for seed in range(3):
            figures = {"peak_memory_bytes": memory, "tokens_per_second": speed * (1 + seed / 1000)}
            keep(store, small(seed=seed, **changes), label, [], **figures)
    keep(store, small(memory_budget=2**30), "budget", [], status="oom")
    return loading.load(tmp_path)


def named(m: Measurements, contrast: Contrast) -> list[tuple[str, ...]]:
    return [tuple(m.labels(pair)) for pair in m.pairs(contrast).to_numpy().tolist()]


def test_pairs_differ_in_what_is_named_and_in_nothing_else(small: Small, tmp_path: Path) -> None:
    m = ablation(small, tmp_path)
    assert named(m, Contrast(compare={"lora_r": ("highest", "lowest")})) == [("lora_r=64", "baseline")]
    assert named(m, Contrast(compare={"lora_dropout": (0.0, "highest")})) == [("baseline", "dropout")]
    assert named(m, Contrast(compare={"gradient_checkpointing": (False, True)})) == [], "two more keys differ there"
    full = Contrast(compare={"adapter": ("none", "lora")}, free=("learning_rate", "lora_r", "lora_dropout"))
    assert named(m, full) == [("full", "baseline")], "the pair that differs least"
    held = Contrast(
        compare={"micro_batch_size": ("lowest", "highest")},
        free=("gradient_accumulation_steps",),
        hold=("effective_batch_size",),
    )
    assert named(m, held) == [("micro 1", "micro 4")]
    assert named(m, held.model_copy(update={"where": {"lora_r": 64}})) == []
    assert named(m, Contrast(compare={"precision": ("fp32", ["bf16", "fp16"])})) == []


def test_claims_are_judged_by_where_the_interval_lies(small: Small, tmp_path: Path) -> None:
    m = ablation(small, tmp_path)
    rank = {"compare": {"lora_r": ["highest", "lowest"]}}
    assert verdict(m, **rank, expect="ratio < 1").word == "supported"
    assert verdict(m, **rank, expect="ratio <= 0.5").word == "contradicted"
    assert verdict(m, **rank, expect="ratio < 1").rests_on == "lora_r=64 → baseline"
    dropout = {"compare": {"lora_dropout": [0.0, "highest"]}}
    assert verdict(m, **dropout, expect="ratio = 1").word == "supported"
    assert verdict(m, **dropout, expect="ratio > 1").word == "contradicted", "equal is not more"
    checkpointing = {"compare": {"gradient_checkpointing": [False, True]}}
    assert verdict(m, **checkpointing, expect="ratio < 1").word == "not measured here"
    speed = {**rank, "metric": "tokens_per_second"}
    assert verdict(m, **speed, expect="ratio > 1").word == "supported"
    assert verdict(m, **speed, expect="ratio > 1.5").word == "contradicted"
    assert verdict(m, **speed, expect="ratio between 0.9 and 1.1").word == "supported"


def test_full_fine_tuning_has_no_rank(small: Small, tmp_path: Path) -> None:
    """Its recorded one, of the base that it comes from, is no level of a claim."""
    for label, adapter, r, parameters in (
        ("baseline", "lora", 8, 10),
        ("large", "lora", 16, 20),
        ("full", "none", 8, 99),
    ):
        spec = small(adapter=adapter, lora_r=r)
        keep(Store(tmp_path), spec, label, [2.0], trainable_parameters=parameters, **BASE)
    m = loading.load(tmp_path)
    of_rank = {"metric": "trainable_parameters", "expect": "value < 50"}
    assert verdict(m, where={"lora_r": 8}, **of_rank).word == "supported"
    assert verdict(m, where={"lora_r": "lowest"}, **of_rank).word == "supported"
    assert verdict(m, where={"lora_r": "any"}, **of_rank).word == "supported"
    assert verdict(m, where={"adapter": "none"}, **of_rank).word == "contradicted"
    assert verdict(m, where={"adapter": "none", "lora_r": 8}, **of_rank).word == "not measured here"


def test_what_an_own_claim_lacks(small: Small, tmp_path: Path) -> None:
    """Where its trials are there, to run them again would change nothing."""
    own = (
        claim(compare={"micro_batch_size": [1, 4]}, expect="ratio > 1"),
        claim(compare={"lora_dropout": [0.0, 0.1]}, metric="eval_loss", expect="difference > 0"),
        claim(compare={"gradient_checkpointing": [False, True]}, where={"lora_r": 8}, expect="ratio < 1"),
    )
    m = dataclasses.replace(ablation(small, tmp_path), claims=own)
    advice = [each.would_measure for each in by_section(verdicts.judge(comparison.compare(m, own)))["of this grid"]]
    assert "differ in gradient_accumulation_steps too; name that under free" in advice[0]
    assert "without eval_loss; set val_set_size" in advice[1]
    assert advice[2] == "vary {gradient_checkpointing: [false, true]} with lora_r: 8, then harness run"


def test_claims_within_the_noise_are_not_judged(small: Small, tmp_path: Path) -> None:
    for seed in range(3):
        speed = (110.0, 91.0, 110.0)[seed]
        twin = {"twin": True, "factor": None, "peak_memory_bytes": 1000, "tokens_per_second": speed}
        keep(Store(tmp_path), small(seed=seed), "baseline again", [], **twin)
    m = ablation(small, tmp_path)
    speed = {"compare": {"lora_r": ["highest", "lowest"]}, "metric": "tokens_per_second"}
    assert verdict(m, **speed, expect="ratio > 1").word == "not distinguishable"
    assert verdict(m, **speed, expect="ratio > 1.5").word == "contradicted"


def test_claims_about_figures_and_ends(small: Small, tmp_path: Path) -> None:
    m = ablation(small, tmp_path)
    memory = {"where": {"adapter": "none"}, "per": None}
    assert verdict(m, **memory, expect="value between 3000 and 5000").word == "supported"
    assert verdict(m, **memory, expect="value < 3000").size == "3.91 KiB"
    assert verdict(m, where={"adapter": "lora"}, expect="value < 1100").word == "depends", "some are"
    ends = {"where": {"memory_budget": 2**30}}
    assert verdict(m, **ends, expect="status oom").word == "supported"
    assert verdict(m, **ends, expect="status ok").word == "contradicted"
    assert verdict(m, **ends, metric="forgetting", expect="status oom").word == "supported", "whatever its metric"
    assert verdict(m, **ends, metric="", expect="status oom").word == "supported"
    assert verdict(m, where={"memory_budget": 5}, expect="status oom").word == "not measured here"


def test_every_claim_has_a_verdict_and_every_lesson_row_a_cell(small: Small, tmp_path: Path) -> None:
    m = ablation(small, tmp_path)
    judged = verdicts.judge(comparison.compare(m))
    assert len(judged) >= 20
    words_ = {v.claim.id: v.word for v in judged}
    assert words_["lora-memory-80"] == "contradicted"
    assert words_["batch-memory"] == "supported"
    assert words_["system-prompt-loss"] == "not measured here"
    every = {table.id: table for table in tables.all_tables(comparison.compare(m))}
    formats = [[cell.text for cell in cells] for cells in every["formats"].rows]
    assert all(cells[1] == "not measured" for cells in formats), "nothing is guessed"
    lora = next(cells for cells in every["methods"].rows if cells[0].text == "LoRA")
    assert lora[2].text == "×0.25 very high savings"
    assert lora[3].text == "high savings", "with the lesson's word for it"
    assert [cells[0].text for cells in every["batch-sequence"].rows][:3] == [
        "micro-batch 1",
        "micro-batch 2",
        "micro-batch 4",
    ]


def test_words_follow_the_printed_thresholds() -> None:
    def of(metric: str, value: float, verdict: str = "better") -> str:
        return words.word(Estimate(metric, value, None, None, 3, "repeats", 0.01, verdict))  # type: ignore[arg-type]

    assert of("peak_memory_bytes", 0.75) == "high savings"
    assert of("peak_memory_bytes", 0.751) == "medium savings"
    assert of("tokens_per_second", 0.5) == "much slower"
    assert of("eval_loss", 0.3) == "noticeable loss"
    assert of("eval_loss", 0.3, "not distinguishable") == "not distinguishable"
    assert of("tokens_per_second", 1.01, "same") == "same within 2%"
    assert "high savings up to 0.75×" in words.thresholds()[0]


# ------------------------------------------------------------------------------------ the whole report


def full_report(folder: Path, out: Path) -> document.Document:
    report = document.document(loading.load(folder), folder)
    writers.write(report, out)
    return report


def measured(small: Small, folder: Path) -> None:
    """Three techniques and a twin, three repeats, every figure that the tables show."""
    generator = random.Random(5)
    store = Store(folder)
    kinds: dict[str, tuple[float, dict[str, Any]]] = {
        "baseline": (1.0, {}),
        "baseline again": (1.0, {}),
        "lora_r=8": (1.3, {"lora_r": 8}),
        "=cmd|'<script>alert(1)</script>": (0.8, {"gradient_checkpointing": True}),
        "full": (4.0, {"adapter": "none"}),
    }
    for seed in range(3):
        for label, (size, changes) in kinds.items():
            speed = 100.0 / size * generator.uniform(0.98, 1.02)
            losses = [2.0 + i / 10 + size / 20 + generator.uniform(-0.01, 0.01) for i in range(6)]
            parts = {f"memory_{c}_bytes": int(200 * size) for c in ("weights", "adapters", "gradients", "optimizer")}
            keep(
                store, small(seed=seed, **changes), label, losses, twin=label == "baseline again",
                peak_memory_bytes=int(1000 * size), tokens_per_second=speed, eval_loss=sum(losses) / 6,
                memory_activations_bytes=int(200 * size), total_parameters=100, trainable_parameters=1,
                rates=[speed, speed * 1.01], step_seconds_median=1.0, optimizer_steps=4,
                predicted_peak_memory_bytes=int(990 * size), **parts,
            )  # fmt: skip


def test_a_report_has_every_format(small: Small, tmp_path: Path) -> None:
    folder, out = tmp_path / "results" / "g", tmp_path / "out"
    measured(small, folder)
    report = full_report(folder, out)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    for chart in ("memory", "pareto", "effects", "loss", "predicted"):
        assert {f"plots/{chart}.svg", f"plots/{chart}.png"} <= files
        assert (out / f"plots/{chart}.png").read_bytes().startswith(b"\x89PNG")
    for table in ("techniques", "components", "bytes-per-parameter", "lora-parameters", "formats", "methods", "summary",
                  "practice", "batch-sequence", "effective-batch", "merged"):  # fmt: skip
        assert {f"tables/{table}.csv", f"tables/{table}.tex"} <= files
    assert {"report.html", "report.md", "comparisons.csv", "claims.csv"} <= files
    assert not any(name.startswith(".") for name in files)

    markdown = (out / "report.md").read_text()
    assert "![Peak memory by component](plots/memory.svg)" in markdown
    assert "<script" not in markdown
    assert all(line in markdown for line in ("## Claims", "## Caveats", "high savings up to 0.75×"))
    assert report.summary[0].startswith("4 configurations with 3 repeats")

    html = (out / "report.html").read_text()
    assert "<script>alert(1)" not in html
    assert "lora_r: 8" in html, "each configuration can be copied"
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in html

    rows = list(csv.DictReader((out / "comparisons.csv").open()))
    hostile = [r["technique"] for r in rows if "script" in r["technique"]]
    assert hostile
    assert all(name.startswith("'=") for name in hostile), "no spreadsheet computes a label"
    latex = (out / "tables/techniques.tex").read_text()
    assert r"lora\_r=8" in latex
    assert r"\textless{}script\textgreater{}" in latex
    assert r"\toprule" in latex


def test_the_scripts_of_charts_are_bundled_once(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(Store(tmp_path / "g"), small(), "baseline", [2.0, 2.0], **BASE)
    report = document.document(loading.load(tmp_path / "g"), tmp_path / "g")
    bundle, times = vl_convert.javascript_bundle, []
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda: (times.append(1), bundle())[1])
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    assert page.html(report) == page.html(report)
    assert len(times) == 1
    monkeypatch.setenv("HARNESS_CACHE", "/dev/null/cache")
    assert bundle() in page.html(report), "without a cache"
    assert len(times) == 2


def test_figures_can_be_recomputed_from_the_parquet(small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "g"
    measured(small, folder)
    m = loading.load(folder)
    _recompute(document.document(m, folder), at_least=9)


def test_the_committed_report_is_rendered_from_the_committed_rows() -> None:
    """At least sixty of its cells are recomputed by the code of the appendix."""
    text = (ROOT / "reports/techniques/report.md").read_text()
    environment = re.search(r"environment ([0-9a-f]{8})", text)
    assert environment
    folder = Path("results/techniques")
    with contextlib.chdir(ROOT):
        report = document.document(loading.load(folder, environment[1]), folder)
        assert writers.markdown(report) == text
        _recompute(report, at_least=60)


def test_the_readme_shows_the_committed_report() -> None:
    readme, report = ((ROOT / name).read_text() for name in ("README.md", "reports/lesson/report.md"))
    block = re.search(r"<!-- lesson -->(.*?)<!-- end -->", readme, re.DOTALL)
    assert block
    shown = block[1].strip().splitlines()
    assert len(shown) > 20
    assert set(shown) <= set(report.splitlines())


def _recompute(report: document.Document, at_least: int) -> None:
    """Run the appendix's code and hold each figure of the comparison against what it gives."""
    names: dict[str, Any] = {"pandas": pandas, "numpy": numpy}
    labels = report.comparison.measurements.configs["label"]
    cells = 0
    for metric, snippet in zip(HEADLINE, report.snippets, strict=True):
        lines = snippet.code.splitlines()
        assert len(lines) <= 10
        exec(compile(snippet.code, "appendix", "exec"), names)  # noqa: S102 - our own code, as printed
        for config, estimate_ in report.comparison.estimates[metric].items():
            assert names["result"][labels[config]] == pytest.approx(estimate_.value), (metric, labels[config])
            cells += 1
    assert cells >= at_least


@pytest.mark.parametrize("case", ["one trial", "all failed", "only ooms", "no baseline", "baseline failed"])
def test_poor_results_give_a_useful_page(small: Small, tmp_path: Path, ask: Ask, case: str) -> None:
    store = Store(tmp_path / "g")
    if case == "one trial":
        keep(store, small(), "baseline", [2.0], **BASE)
    elif case in ("all failed", "only ooms"):
        status = "failed" if case == "all failed" else "oom"
        for r in (4, 8):
            keep(store, small(lora_r=r), "baseline" if r == 4 else "lora_r=8", [], status=status)
    elif case == "no baseline":
        keep(store, small(lora_r=8), "lora_r=8", [2.0, 2.1], baseline_id=None, **BASE)
        keep(store, small(lora_r=16), "lora_r=16", [2.0, 2.1], baseline_id=None, **BASE)
    else:
        keep(store, small(), "baseline", [], status="failed")
        keep(store, small(lora_r=8), "lora_r=8", [2.0, 2.1], **BASE)
    report = full_report(tmp_path / "g", tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert ("baseline" if case == "one trial" else "lora_r=8") in text
    assert not re.search(r"\bnan\b", text)
    if case in ("no baseline", "baseline failed"):
        assert any("no technique is compared" in caveat for caveat in report.caveats)
        assert "no technique is compared" in text.split("| Answer |")[0], "before what looks like an answer"
        assert "no technique is compared" in page.html(report).split('id="in-words"')[0].split('id="answers"')[1]
        printed = [ask("report", str(tmp_path / "g"), "--format", "md", *more)[1] for more in ([], ["--full"])]
        assert [" ".join(each.split()).count("no technique is compared") for each in printed] == [1, 1]
    if case == "only ooms":
        assert "oom in forward" in text
    if case != "one trial":
        assert "ended as" in text


@pytest.mark.parametrize(("stories", "counted"), [(1, "1 held-out story (10 tokens)"), (2, "2 held-out stories (20")])
def test_one_story_is_no_stories(stories: int, counted: str, small: Small, tmp_path: Path) -> None:
    keep(Store(tmp_path), small(), "baseline", [2.0] * stories, **BASE)
    assert counted in front.about(loading.load(tmp_path))


def test_a_front_is_what_nothing_beats() -> None:
    figures = pandas.DataFrame({"a": [1, 2, 3, 2, math.nan, 1], "b": [3, 2, 1, 3, 0, 3]})
    assert pareto.pareto_front(figures).tolist() == [True, True, True, False, False, True]


# ------------------------------------------------------------------------------------ recommend, compare


def test_plots_and_tables_of_former_rows_go(small: Small, tmp_path: Path) -> None:
    folder, out = tmp_path / "results" / "g", tmp_path / "out"
    measured(small, folder)
    before = full_report(folder, out)
    for mine in ("plots/mine.png", "tables/mine.csv"):
        (out / mine).touch()
    (out / "files.json").write_text((out / "files.json").read_text().replace("[", '["../results/g/grid.json",', 1))
    (folder / "grid.json").touch()
    fewer = dataclasses.replace(before, charts=before.charts[1:], tables=before.tables[1:])
    chart, table = before.charts[0].id, before.tables[0].id

    def there() -> set[str]:
        return {path.name for kind in ("plots", "tables") for path in (out / kind).iterdir()}

    writers.write(fewer, out, formats=("html", "svg"))
    assert f"{chart}.svg" not in there()
    assert {f"{chart}.png", f"{table}.csv"} <= there(), "formats that are not written stay"
    writers.write(fewer, out)
    names = {f"{each.id}.{kind}" for each in fewer.charts for kind in ("svg", "png")}
    names |= {f"{each.id}.{kind}" for each in fewer.tables for kind in ("csv", "tex")}
    assert there() == names | {"mine.png", "mine.csv"}, "a user's own files stay"
    assert (folder / "grid.json").exists(), "nothing outside is removed, whatever the list says"


def test_recommendation_keeps_the_limits_and_says_the_price(small: Small, tmp_path: Path) -> None:
    measured(small, tmp_path)
    m = loading.load(tmp_path)
    best = recommend.recommend(m)
    assert best.label == "=cmd|'<script>alert(1)</script>", "lowest loss, fastest and smallest"
    within = recommend.recommend(m, max_loss=2.32, min_speed=90, memory=1000)
    assert TrialSpec.model_validate(yaml.safe_load(within.yaml)).lora_r == 4
    assert "needs 800 B of 1000 B" in within.sentences[0]
    with pytest.raises(InputError, match=r"nothing measured is within memory 5 B; the best: =cmd.* has 800 B"):
        recommend.recommend(m, memory=5)


def test_noise_does_not_decide_a_recommendation(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    losses = {"a": [2.0, 2.4, 1.9, 2.2], "b": [2.1, 2.2, 1.95, 2.26], "c": [3.0, 3.4, 2.9, 3.2]}
    for seed in range(3):
        for number, (label, stories) in enumerate(losses.items()):
            speed = {"a": 50.0, "b": 100.0, "c": 200.0}[label] * (1 + seed / 500)
            keep(
                store, small(seed=seed, lora_r=4 + number), "baseline" if label == "a" else label, stories,
                tokens_per_second=speed, eval_loss=sum(stories) / 4, peak_memory_bytes=100,
            )  # fmt: skip
    best = recommend.recommend(loading.load(tmp_path))
    assert best.label == "baseline", "b is twice as fast, but may be worse by more than is negligible"
    assert any(sentence.startswith("For more speed take c") for sentence in best.sentences)
    for seed in range(3):
        stories = [x + 0.001 for x in losses["a"]]
        keep(store, small(seed=seed, lora_r=9), "as good", stories, tokens_per_second=99.0 * (1 + seed / 500),
             eval_loss=sum(stories) / 4, peak_memory_bytes=100)  # fmt: skip
    best = recommend.recommend(loading.load(tmp_path))
    assert best.label == "as good", "its loss is higher by less than is negligible, and it is twice as fast"
    assert any(sentence.startswith("For more speed take c") for sentence in best.sentences)


def test_a_recommendation_trades_for_nothing_that_is_not_known_to_be_better(small: Small, tmp_path: Path) -> None:
    """Nor for what is better by less than is negligible."""
    generator = random.Random(0)
    noise = [generator.uniform(-0.5, 0.5) for _ in range(8)]
    for seed in range(3):
        for r, label, loss, memory in ((4, "baseline", 2.0, 1000), (8, "noisy", 2.3, 999), (9, "large", 1.9995, 2000)):
            stories = [loss + (r == 8) * each for each in noise]
            speed = 100.0 + (r == 8) * (20.0 * seed - 15.0) - (r == 9)
            keep(Store(tmp_path), small(seed=seed, lora_r=r), label, stories, tokens_per_second=speed,
                 eval_loss=sum(stories) / 8, peak_memory_bytes=memory)  # fmt: skip
    best = recommend.recommend(loading.load(tmp_path))
    assert best.label == "baseline"
    assert not [sentence for sentence in best.sentences if sentence.startswith("For ")]


def test_a_level_that_is_better_where_it_ends_well_is_not_named_as_the_best(small: Small, tmp_path: Path) -> None:
    for seed in range(3):
        keep(Store(tmp_path), small(seed=seed), "baseline", [2.0, 2.1, 2.2], **BASE)
        if seed < 2:
            figures = BASE | {"eval_loss": 1.0}
            keep(Store(tmp_path), small(seed=seed, lora_r=8), "lora_r=8", [1.0, 1.1, 1.2], **figures)
    keep(Store(tmp_path), small(seed=2, lora_r=8), "lora_r=8", [], status="diverged")
    m = loading.load(tmp_path)
    assert estimate(m, "lora_r=8", "eval_loss").verdict == "better"
    cards = {card.title: card.figure for card in front.cards(comparison.compare(m))}
    assert cards["Lowest loss"] == "none that ended well under every seed is better than the baseline"


def test_more_is_asked_for_than_most_trials_have() -> None:
    usual = pandas.Series([3, 3, 1])
    assert longer._instead("visits", 8, 1, usual) == "8 visits instead of 3"
    assert longer._instead("visits", 2, 1, usual) == "3 visits that all count", "one of them was lost"
    assert longer._instead("visits", 8, 5, usual) == "8 visits instead of 5"
    assert longer._instead("repeats", 8, 1, usual[:0]) == "8 repeats instead of 1"


def test_a_recommendation_counts_on_nothing_that_was_not_measured(small: Small, tmp_path: Path) -> None:
    slow, quick = ([loss, loss + 0.1] for loss in (2.0, 1.0))
    keep(Store(tmp_path), small(), "baseline", slow, **BASE)
    keep(Store(tmp_path), small(seed=1), "baseline", slow, **BASE)
    untimed = BASE | {"tokens_per_second": None, "eval_loss": 1.0}
    keep(Store(tmp_path), small(lora_r=8), "untimed", quick, **untimed)
    assert recommend.recommend(loading.load(tmp_path)).label == "untimed"
    assert recommend.recommend(loading.load(tmp_path), min_speed=90).label == "baseline"
    ended = {"status": "oom", "oom_reached_bytes": 1800, "oom_requested_bytes": 200}
    keep(Store(tmp_path), small(lora_r=8, seed=1), "untimed", [], **ended)
    m = loading.load(tmp_path)
    assert recommend.needed_bytes(m) == {0: 1000, 1: 2000}, "in another repeat it asked for more"
    assert recommend.recommend(m, memory=1500).label == "baseline"
    assert row(m, "untimed (oom in forward, needs at least 1.95 KiB)")[0] == "1000 B"
    assert verdict(m, where={"lora_r": 8}, expect="status ok").word == "contradicted"


def test_without_a_speed_of_the_baseline_others_are_compared_with_one_another(small: Small, tmp_path: Path) -> None:
    for seed in (0, 1):
        for number, (label, speed) in enumerate((("baseline", None), ("fast", 200.0), ("slow", 50.0))):
            figures = BASE | {"tokens_per_second": speed}
            keep(Store(tmp_path), small(seed=seed, lora_r=4 + number), label, [2.0, 2.1], **figures)
    m = loading.load(tmp_path)
    assert recommend.recommend(m).label == "fast"
    cards = {card.title: card.figure for card in front.cards(comparison.compare(m))}
    assert cards["Fastest"] == "none can be compared with the baseline"
    assert cards["Lowest loss"].startswith("none is better than the baseline")


def test_what_no_further_measuring_decides_asks_for_none(small: Small, tmp_path: Path) -> None:
    for seed, (one, other) in enumerate(((1000, 1100), (1050, 1040))):
        keep(Store(tmp_path), small(seed=seed), "baseline", [2.0, 2.1], **BASE | {"peak_memory_bytes": one})
        held = BASE | {"peak_memory_bytes": other}
        keep(Store(tmp_path), small(seed=seed, lora_r=8), "lora_r=8", [2.0, 2.1], **held)
    compared = comparison.compare(loading.load(tmp_path))
    (memory,) = (r for r in tables.not_decided(compared).rows if r[1].text == "peak memory")
    assert memory[-1].text == "–", "no visit changes what its batches hold"


def test_two_runs_compare_memory_and_loss_and_speed_only_when_asked(small: Small, tmp_path: Path) -> None:
    other = current("cpu").model_copy(update={"cpu_name": "another", "device_name": "another"})
    for name, environment, factor in (("a", current("cpu"), 1.0), ("b", other, 2.0), ("c", current("cpu"), 2.0)):
        for seed in range(3):
            for label, r in (("baseline", 4), ("lora_r=8", 8)):
                figures = BASE | {
                    "tokens_per_second": factor * (100.0 + seed / 10),
                    "peak_memory_bytes": int(1000 / factor),
                }
                keep(
                    Store(tmp_path / name),
                    small(seed=seed, lora_r=r),
                    label,
                    [2.0, 2.1],
                    environment=environment,
                    **figures,
                )
    a, b, c = (loading.load(tmp_path / name) for name in "abc")
    refused = compare_runs.compare_runs(a, b)
    assert {names[0] for names in refused.environments} == {"cpu_name", "device_name"}
    assert refused.warning is not None
    assert "not compared" in refused.warning
    first = [cell.text for cell in tables.run_comparison(refused).rows[0]]
    assert first[3] == "×0.50 very high savings"
    assert first[6] == "–"
    asked = compare_runs.compare_runs(a, b, across_environments=True)
    assert tables.run_comparison(asked).rows[0][6].text.startswith("×2.00")
    assert "may be the machine's" in (asked.warning or "")
    same = compare_runs.compare_runs(a, c)
    assert (same.environments, same.warning) == ((), None)
    assert tables.run_comparison(same).rows[0][6].text.startswith("×2.00")
    keep(Store(tmp_path / "d"), small(lora_r=99), "baseline", [], **BASE)
    with pytest.raises(InputError, match="no measured configuration in common"):
        compare_runs.compare_runs(a, loading.load(tmp_path / "d"))


def test_runs_of_one_name_are_distinguished(small: Small, tmp_path: Path) -> None:
    for folder, ranks in (("one/g", (4, 8, 16, 32)), ("other/g", (4, 64, 32))):
        for r in ranks:
            failed = {"status": "failed"} if r == 32 and folder == "other/g" else BASE
            keep(Store(tmp_path / folder), small(lora_r=r), "baseline" if r == 4 else f"lora_r={r}", [2.0], **failed)
    one, other = (loading.load(tmp_path / folder) for folder in ("one/g", "other/g"))
    assert compare_runs.compare_runs(one, other).unpaired == (
        "not compared, as these did not end well: lora_r=32 (in the second); in the first alone: lora_r=8, lora_r=16; "
        "in the second alone: lora_r=64"
    )


def test_a_speed_is_shown_of_the_runs_that_are_compared(small: Small, tmp_path: Path) -> None:
    """Also where the second run of the baseline alone was timed."""
    for folder, speed in (("a", 100.0), ("b", 50.0)):
        for twin in (False, True):
            figures = BASE | {"tokens_per_second": speed if twin else None}
            label = "baseline again" if twin else "baseline"
            keep(Store(tmp_path / folder), small(), label, [2.0], twin=twin, baseline_id=small().id, **figures)
    a, b = (loading.load(tmp_path / name) for name in "ab")
    (pair,) = compare_runs.compare_runs(a, b).pairs
    assert (pair.first["tokens_per_second"], pair.second["tokens_per_second"]) == (100.0, 50.0)


def test_two_runs_are_paired_by_their_seeds(small: Small, tmp_path: Path) -> None:
    """The second was begun at the seed of the first's second repeat, and lacks a configuration."""
    losses = {0: [2.0, 3.1], 1: [2.4, 3.7], 2: [2.1, 3.5]}
    for name, seeds in (("a", (0, 1)), ("b", (1, 2))):
        for repeat, seed in enumerate(seeds):
            for label, r in (("baseline", 4), ("lora_r=8", 8)) if name == "a" else (("baseline", 4),):
                peak, mean = 1000 + 100 * seed, sum(losses[seed]) / 2
                figures = BASE | {"peak_memory_bytes": peak, "eval_loss": mean, "repeat": repeat}
                keep(Store(tmp_path / name), small(seed=seed, lora_r=r), label, losses[seed], **figures)
    a, b = (loading.load(tmp_path / name) for name in "ab")
    compared = compare_runs.compare_runs(a, b)
    (pair,) = compared.pairs
    assert (pair.first["peak_memory_bytes"], pair.second["peak_memory_bytes"]) == (1100, 1100)
    assert (pair.first["eval_loss"], pair.second["eval_loss"]) == (pytest.approx(3.05), pytest.approx(3.05))
    assert [pair.estimates[metric].value for metric in ("peak_memory_bytes", "eval_loss")] == [1.0, 0.0]
    assert compared.unpaired == "in a alone: lora_r=8"
    looked_at = dataclasses.replace(a, alpha=a.alpha / 10)
    ways = [
        compare_runs.compare_runs(*runs).pairs[0].estimates["eval_loss"] for runs in ((a, looked_at), (looked_at, a))
    ]
    assert ways[0] == ways[1], "a run that was looked at several times is, whichever comes first"


def test_techniques_stand_together_by_what_they_act_on(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    techniques: dict[str, tuple[str | None, dict[str, Any]]] = {
        "micro_batch_size=2": ("micro_batch_size", {"micro_batch_size": 2, "gradient_accumulation_steps": 1}),
        "more steps": ("technique", {"max_steps": 5, "learning_rate": 1e-3}),
        "QLoRA": ("technique", {"precision": "nf4", "gradient_checkpointing": True}),
        "kept": ("technique", {"gradient_checkpointing": True, "checkpoint_keep": "attention"}),
        "full": ("technique", {"adapter": "none", "learning_rate": 1e-5}),
        "precision=fp32": ("precision", {"precision": "fp32"}),
    }
    base = {"gradient_accumulation_steps": 2, "micro_batch_size": 1, "precision": "bf16"}
    of_baseline = {"baseline_id": small(**base).id}
    keep(store, small(**base), "baseline", [], **BASE | of_baseline)
    for label, (factor, keys) in techniques.items():
        keep(store, small(**base | keys), label, [], factor=factor, **BASE | of_baseline)
    compared = comparison.compare(loading.load(tmp_path))
    assert [tuple(cell.text for cell in cells[:2]) for cells in tables.techniques(compared).rows] == [
        ("baseline", "–"),
        ("precision=fp32", "weights"),
        ("full", "adapters"),
        ("kept", "activations"),
        ("micro_batch_size=2", "data"),
        ("more steps", "training"),
        ("QLoRA", "several"),
    ]
    chart = plots.effects(compared)
    assert chart is not None
    panel = chart.spec()["hconcat"][0]["layer"][1]["encoding"]["y"]
    names = panel["scale"]["domain"]
    assert names[:4] == ["Weights", "precision=fp32", "Adapters", "full"]


def test_each_panel_of_effects_has_the_rows_that_the_first_one_names() -> None:
    """Speeds of a search are known of a few: their dots stand at the names of these."""
    chart = plots.effects(comparison.compare(loading.load(Path(__file__).parent.parent / "results/tune")))
    assert chart is not None
    panels = chart.spec()["hconcat"]
    domains = [panel["layer"][1]["encoding"]["y"]["scale"]["domain"] for panel in panels]
    assert len(domains) == 3
    assert all(domain == domains[0] and len(domain) > 20 for domain in domains)
