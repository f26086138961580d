"""Timing visits: enough undisturbed steps, in blocks that every trial is in, and nothing else in a speed."""

from __future__ import annotations

import datetime as dt
import io
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import trials
from conftest import Quiet
from rich.console import Console
from test_launch import Watch

from harness.analysis import comparison, loading
from harness.analysis.timed import effects, logarithms
from harness.cli import run
from harness.cli.progress import Pace, PlainDisplay
from harness.grids import grid as grids
from harness.grids.document import NO_TIMING, Timing
from harness.launch.local import LocalLauncher
from harness.predict.prediction import NO_PREDICTIONS
from harness.record import Job, Record, Step, Visit
from harness.report import document
from harness.results.store import Store
from harness.results.timing import row_figures
from harness.runner import execution, grid_run, visits
from harness.runner.grid_run import Summary, run_grid
from harness.runner.identity import possible_ids
from harness.training import batches, checkpoints, order, waiting
from harness.training.schedule import VisitSchedule
from harness.training.step import Trainer

GRID = """
name: g
base: {base_model: random:tiny, datasets: [{path: storyteller-openings}], sequence_length: 256, precision: fp32,
  micro_batch_size: 2, gradient_accumulation_steps: 2, train_samples: 8, val_set_size: 0, lora_r: 4}
vary:
  gradient_checkpointing: [true]
visits: 2
visit_seconds: 0.05
"""


def timed(number: int, seconds: float, tokens: int, *, block: int | None = 1, disturbed: bool = False) -> Step:
    return Step(step=number, tracked=block is None, seconds=seconds, loss=1.0, grad_norm=1.0, learning_rate=1e-4,
                samples=1, tokens=tokens, supervised_tokens=tokens, padded_tokens=tokens, peak_memory_bytes=None,
                block=block, disturbed=disturbed)  # fmt: skip


# ------------------------------------------------------------------------------------ which steps, and how many


def taken(disturbed: Callable[[int], bool], seconds: float = 1.0, least: float = 4.0) -> tuple[list[int], bool]:
    """Steps that a visit takes, where each lasts so long and the n-th is disturbed or not."""
    schedule, steps = VisitSchedule(3, least), list[int]()
    for step in schedule:
        steps.append(step)
        schedule.record(step, seconds, disturbed=disturbed(len(steps)))
    return steps, schedule.is_complete


def test_quiet_visits_take_whole_rounds_until_the_time_is_up() -> None:
    assert taken(lambda n: False) == ([0, 1, 2] * 2, True)
    assert taken(lambda n: False, seconds=10.0) == ([0, 1, 2], True), "slow steps: each once"


def test_disturbed_steps_are_taken_again() -> None:
    steps, complete = taken(lambda n: n in (2, 3))
    assert complete
    assert steps[:5] == [0, 1, 2, 1, 2]
    assert sorted(steps[3:]) == sorted([1, 2, 0, 1, 2]), "each is undisturbed equally often"


def test_visits_give_up_on_a_machine_that_stays_busy() -> None:
    steps, complete = taken(lambda n: True)
    assert not complete
    assert 6 <= len(steps) <= 20


def test_all_levels_are_timed_on_the_same_lengths(small: Any) -> None:
    """Accumulation and micro-batch must not be confounded with how long the timed examples are."""
    spec = small(sequence_length=8192, val_set_size=0)
    examples = batches.load(spec, checkpoints.load_tokenizer(spec)).train
    trained = sorted(map(len, examples))
    means = {}
    for micro, accumulated in ((1, 4), (2, 2), (4, 1), (2, 1), (2, 3), (1, 1)):
        spec = small(sequence_length=8192, micro_batch_size=micro, gradient_accumulation_steps=accumulated,
                     train_samples=len(examples))  # fmt: skip
        steps = order.timed_steps(spec, examples)
        assert [len(step) for step in steps] == [micro * accumulated] * 3
        lengths = [len(example) for step in steps for example in step]
        means[micro, accumulated] = sum(lengths) / len(lengths)
    assert means[1, 4] == means[2, 2] == means[4, 1]
    few = small(sequence_length=8192, micro_batch_size=8, gradient_accumulation_steps=2, train_samples=3)
    assert [len(step) for step in order.timed_steps(few, examples)] == [3] * 3, "no larger than the one that is trained"
    overall = sum(trained) / len(trained)
    assert all(abs(mean / overall - 1) < 0.05 for mean in means.values()), means


# ------------------------------------------------------------------------------------ what waited


def test_waiting_is_seen_when_another_process_has_the_core() -> None:
    """Two processes on one core: each waits half of the time."""
    code = (
        "import os, time\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from harness.training.waiting import Waiting, is_disturbed\n"
        "waiting = Waiting()\n"
        "def spin(s):\n"
        "    end = time.perf_counter() + s\n"
        "    while time.perf_counter() < end: pass\n"
        "if os.fork() == 0:\n"
        "    spin(0.5); os._exit(0)\n"
        "spin(0.4)\n"
        "waited = waiting.since_last()\n"
        "print(waited, is_disturbed(waited, 0.4))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    waited, disturbed = run.stdout.split()
    if waited == "None":
        pytest.skip("this kernel has no schedstat")
    assert float(waited) > 0.1
    assert disturbed == "True"


def test_a_little_waiting_and_unknown_waiting_disturb_nothing() -> None:
    assert not waiting.is_disturbed(None, 1.0)
    assert not waiting.is_disturbed(0.001, 0.01)
    assert not waiting.is_disturbed(0.07, 1.0), "what the kernel and the host of an idle virtual machine take"
    assert waiting.is_disturbed(0.2, 1.0)


# ------------------------------------------------------------------------------------ in turn with the baseline


def test_steps_of_the_baseline_are_taken_in_turn(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step has one of the baseline next to it, before it every other time; the trial's own memory counts."""
    own, baseline = small(lora_r=8), small()
    taken: list[Any] = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda trainer, batches: taken.append(trainer.spec) or step(trainer, batches))
    records = [
        trials.run(own, visit=Visit(block=1, seconds=0.05, reference=reference)) for reference in (None, baseline)
    ]
    alone, in_turn = records
    assert [step.reference_seconds for step in alone.steps] == [None] * len(alone.steps)
    assert all(step.reference_seconds and step.seconds != step.reference_seconds for step in in_turn.steps)
    turns = taken[-2 * len(in_turn.steps) :]
    assert turns[:4] == [own, baseline, baseline, own]
    assert in_turn.metrics["peak_timed_bytes"] == pytest.approx(alone.metrics["peak_timed_bytes"], rel=1e-3)
    assert in_turn.steps[0].loss == pytest.approx(alone.steps[0].loss), "the baseline is another model"


def test_what_slows_a_machine_for_a_while_cancels() -> None:
    """Two configurations, one 20 % slower, on a machine whose speed changes threefold from one visit to the next."""
    slowness = iter([1.0, 2.9, 1.7, 1.2, 2.2, 1.1, 3.0, 1.4])
    rows = []
    for block in range(4):
        for config, seconds in ((0, 1.0), (1, 1.25)):
            of_reference = next(slowness)
            own = seconds * of_reference * (1 + 0.001 * block)
            speeds = {"tokens_per_second": 100 / own, "step_seconds_median": own, "reference_seconds": of_reference}
            rows.append({"trial": config, "block": block, "visit": True, **speeds})
    readings = pandas.DataFrame(rows)
    pairs = pandas.DataFrame({"comparison": [0], "reference": [0], "config": [1]})
    configs = pandas.Series([0, 1])

    def effect(metric: str, readings: pandas.DataFrame) -> Any:
        return effects(pairs, metric, readings, pandas.DataFrame(), configs).table.loc[0]

    assert effect("tokens_per_second", readings)["effect"] == pytest.approx(math.log(0.8), abs=0.002)
    assert effect("step_seconds_median", readings)["effect"] == pytest.approx(math.log(1.25), abs=0.002)
    assert effect("tokens_per_second", readings)["se"] < 0.002
    # One visit that had no baseline next to it, and ratios cannot be compared.
    assert effect("tokens_per_second", readings.replace({"reference_seconds": {1.0: math.nan}}))["se"] > 0.1


@pytest.mark.long
def test_visits_of_a_grid_have_the_baseline_or_none_has(
    tmp_path: Path, launcher: LocalLauncher, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet()
    grid, store = loaded(tmp_path), Store(tmp_path / "r")
    go(grid, tmp_path, launcher)
    steps = store.read("steps", columns=["trial_id", "block", "reference_seconds"]).to_pandas()
    assert steps.loc[steps["block"].notna(), "reference_seconds"].notna().all()
    assert steps.loc[steps["block"].isna(), "reference_seconds"].isna().all()
    (baseline,) = {trial.spec.id for trial in grid.trials if trial.baseline}
    assert set(visits.references(grid, store, launcher)) == {baseline}
    several = grid.with_specs({t.spec.id: t.spec.model_copy(update={"num_processes": 2}) for t in grid.trials})
    assert not visits.references(several, store, launcher)
    environment = launcher.environments("cpu")[0]
    peak = store.read("trials", columns=["trial_id", "peak_process_bytes"]).to_pandas()["peak_process_bytes"].max()
    for of_others, memory in ((0, 2 * int(peak) - 1), (3, 8 * int(peak) - 1)):
        smaller = environment.model_copy(update={"device_memory_bytes": memory, "concurrent_trials": of_others})
        monkeypatch.setattr(launcher, "environments", lambda _, smaller=smaller: (smaller,))
        monkeypatch.setattr(visits, "possible_ids", lambda trial, _: possible_ids(trial, LocalLauncher()))
        assert not visits.references(grid, store, launcher), "two of them do not fit into memory"


def test_a_grid_that_was_timed_alone_goes_on_so(
    tmp_path: Path, launcher: LocalLauncher, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet()
    with monkeypatch.context() as before:
        before.setattr(visits, "in_turn", lambda grid: False)
        go(loaded(tmp_path), tmp_path, launcher)
    go(loaded(tmp_path, GRID.replace("visits: 2", "visits: 3")), tmp_path, launcher)
    store = Store(tmp_path / "r")
    steps = store.read("steps", columns=["trial_id", "block", "reference_seconds"]).to_pandas()
    assert steps["block"].nunique() == 3
    assert steps["reference_seconds"].isna().all()


def test_a_failed_baseline_leaves_the_others_timed(tmp_path: Path, launcher: LocalLauncher, quiet: Quiet) -> None:
    quiet()
    text = GRID.replace("lora_r: 4}", "lora_r: 4, memory_budget: 4MiB}").replace(
        "gradient_checkpointing: [true]", "memory_budget: [1GiB]"
    )
    summary = go(loaded(tmp_path, text), tmp_path, launcher)
    assert sorted(record.status for record in summary.records) == ["ok", "oom", "oom"]
    rows = Store(tmp_path / "r").read("trials").to_pandas().set_index("status")
    assert rows.loc["ok", "timed_visits"] == 2
    steps = Store(tmp_path / "r").read("steps").to_pandas()
    assert steps["reference_seconds"].isna().all()


@pytest.mark.parametrize(
    ("repeats", "wanted", "groups"),
    [
        (1, 3, [((0,), 0)]),
        (2, 3, [((0,), 2), ((1,), 0)]),
        (3, 3, [((0,), 1), ((1,), 1), ((2,), 0)]),
        (5, 3, [((0,), 1), ((1,), 1), ((2, 3), 1), ((4,), 0)]),
        (2, 0, [((0, 1), 0)]),
    ],
)
def test_blocks_of_visits_are_spread_over_the_repeats(
    repeats: int, wanted: int, groups: list[tuple[tuple[int, ...], int]]
) -> None:
    assert [(tuple(among), blocks) for among, blocks in visits.stages(repeats, wanted)] == groups


@pytest.mark.long
def test_a_run_that_is_cut_off_has_speeds_rather_than_losses_of_a_second_repeat(
    tmp_path: Path, launcher: LocalLauncher, quiet: Quiet
) -> None:
    quiet()

    class Jobs(Watch):
        in_order = ""

        def trial(self, number: int, job: Job) -> None:
            super().trial(number, job)
            self.in_order += "t" if job.visit is None else "v"

    display = Jobs()
    text = GRID.replace("visits: 2", "visits: 3\nrepeats: 2")
    go(loaded(tmp_path, text), tmp_path, launcher, display)
    assert display.in_order == "ttt" + "vvv" * 2 + "tt" + "vvv"


def test_what_is_alone_in_its_block_changes_no_ratio() -> None:
    """A loop of another program that was watched, say."""
    rows = [
        {
            "trial": trial,
            "block": block,
            "visit": True,
            "tokens_per_second": 100.0 * (trial + 1),
            "reference_seconds": 2.0,
        }
        for trial in range(2)
        for block in range(2)
    ]
    alone = {"trial": 2, "block": 9, "visit": True, "tokens_per_second": 50.0, "reference_seconds": math.nan}
    values = logarithms(pandas.DataFrame([*rows, alone]), "tokens_per_second")
    assert values.tolist() == pytest.approx([math.log(x) for x in (200.0, 200.0, 400.0, 400.0, 50.0)])
    of_one_block = pandas.DataFrame(rows[::2])
    assert logarithms(of_one_block, "tokens_per_second").tolist() == pytest.approx([math.log(100.0), math.log(200.0)])


# ------------------------------------------------------------------------------------ figures


def test_speeds_are_of_undisturbed_steps_of_whole_visits() -> None:
    steps = [timed(n, 9.0, 50, block=None) for n in (1, 2)]  # of training
    steps += [timed(1, 1.0, 100), timed(2, 2.0, 300), timed(3, 3.0, 200), timed(4, 60.0, 100, disturbed=True)]
    steps += [timed(1, 50.0, 100, block=2), timed(2, 50.0, 100, block=2)]  # a visit that found too few
    figures = row_figures(steps)
    assert figures["tokens_per_second"] == pytest.approx(600 / 6)
    assert (figures["timed_steps"], figures["timed_visits"], figures["disturbed_steps"]) == (3, 1, 1)
    again = row_figures([*steps, timed(5, 1.0, 100), timed(6, 1.0, 100)])
    assert again["tokens_per_second"] == pytest.approx(600 / 6), "how often a step was taken does not count"


def test_without_undisturbed_steps_there_is_no_speed() -> None:
    figures = row_figures([timed(n, 1.0, 10, disturbed=True) for n in range(1, 9)])
    assert figures["tokens_per_second"] is None
    assert figures["disturbed_steps"] == 8


# ------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def launcher() -> Iterator[LocalLauncher]:
    with LocalLauncher() as started:
        yield started


def loaded(folder: Path, text: str = GRID) -> grids.Grid:
    (folder / "g.yml").write_text(text)
    return grids.load(folder / "g.yml")


def go(grid: grids.Grid, folder: Path, launcher: LocalLauncher, display: Watch | None = None) -> Summary:
    return run_grid(grid, Store(folder / "r"), launcher, display or Watch())


def what_is_left(grid: grids.Grid, folder: Path, launcher: LocalLauncher, capsys: pytest.CaptureFixture[str]) -> str:
    """What a run says whose time is up before it begins."""
    store = Store(folder / "r")
    run._print_summary(run_grid(grid, store, launcher, Watch(), until=time.monotonic()), store)
    return " ".join(capsys.readouterr().out.split())


def test_every_trial_is_timed_in_every_block(
    tmp_path: Path, launcher: LocalLauncher, quiet: Quiet, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet()
    left = what_is_left(loaded(tmp_path), tmp_path, launcher, capsys)
    assert "3 trials and 6 timing visits left; go on with the same command" in left
    assert "not timed well enough" not in left, "nothing was disturbed"
    display = Watch()
    summary = go(loaded(tmp_path), tmp_path, launcher, display)
    assert (display.total, display.visits) == (3, 6)
    assert (len(summary.records), summary.left, summary.untimed) == (3, 0, ())
    rows = Store(tmp_path / "r").read("trials").to_pandas().set_index("label")
    steps = Store(tmp_path / "r").read("steps").to_pandas()
    of_visits = steps[steps["block"].notna()]
    assert of_visits.groupby("trial_id")["block"].nunique().tolist() == [2, 2, 2]
    assert of_visits["block"].nunique() == 2, "all of them in the same blocks"
    assert rows["tokens_per_second"].notna().all()
    assert (rows["timed_visits"] == 2).all()
    assert (rows["timed_steps"] >= 6).all()
    assert not rows["disturbed"].any()
    assert not of_visits["tracked"].any()
    assert steps[steps["block"].isna()].groupby("trial_id").size().tolist() == [2, 2, 2], "steps of training"

    m = loading.load(tmp_path / "r")
    estimate = comparison.compare(m).estimates["tokens_per_second"]
    assert [(e.n, e.basis) for e in estimate.values()] == [(2, "visits")]
    assert m.floor is not None

    summary = go(loaded(tmp_path), tmp_path, launcher)
    assert (len(summary.records), summary.untimed) == (0, ())
    assert len(Store(tmp_path / "r").read("steps")) == len(steps), "nothing is timed again"
    more = loaded(tmp_path, GRID.replace("visits: 2", "visits: 3"))
    assert "3 timing visits left; go on with the same command" in what_is_left(more, tmp_path, launcher, capsys)
    go(more, tmp_path, launcher, display)
    assert (display.total, display.visits) == (0, 3), "only the third one is to come"
    assert (Store(tmp_path / "r").read("trials").to_pandas()["timed_visits"] == 3).all(), "a third one was added"


@pytest.mark.long
def test_a_further_level_is_announced_with_the_visits_of_the_baseline(
    tmp_path: Path, launcher: LocalLauncher, quiet: Quiet
) -> None:
    quiet()
    go(loaded(tmp_path), tmp_path, launcher)
    display = Watch()
    go(loaded(tmp_path, GRID.replace("vary:", "vary:\n  lora_r: [8]")), tmp_path, launcher, display)
    assert (display.total, display.visits) == (1, 6), "two of its own, and four of the baseline, which runs twice"
    made = Store(tmp_path / "r").read("steps").to_pandas().groupby("trial_id")["block"].nunique()
    assert sorted(made) == [2, 2, 4, 4]


def test_disturbed_visits_are_made_again_and_enter_no_speed(
    tmp_path: Path, launcher: LocalLauncher, quiet: Quiet
) -> None:
    seen: list[str] = []

    def first_of_checkpointing(record: Record) -> bool:
        seen.append(record.label)
        return record.label.startswith("gradient") and seen.count(record.label) == 1

    quiet(first_of_checkpointing)
    summary = go(loaded(tmp_path), tmp_path, launcher)
    assert summary.untimed == ()
    assert seen.count("gradient_checkpointing=true") == 3, "one more, at the end"
    assert seen.count("baseline") == 3, "in every block"
    row = Store(tmp_path / "r").read("trials").to_pandas().set_index("label").loc["gradient_checkpointing=true"]
    assert row["timed_visits"] == 2
    assert row["disturbed_steps"] >= 3
    assert not row["disturbed"]


def test_visits_that_fail_are_named_with_their_end(
    tmp_path: Path, launcher: LocalLauncher, quiet: Quiet, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    quiet()
    attempt = execution._last_attempt

    def out_of_memory(job: Job, context: Any) -> Record:
        record = attempt(job, context)
        if record.visit is None or record.label != "gradient_checkpointing=true":
            return record
        return record.model_copy(update={"status": "oom", "error": "more than there is", "log": "logs/visit.log"})

    monkeypatch.setattr(execution, "_last_attempt", out_of_memory)
    monkeypatch.setattr(grid_run, "MOST_FURTHER_BLOCKS", 0)
    summary = go(loaded(tmp_path, GRID.replace("visits: 2", "visits: 1")), tmp_path, launcher)
    assert summary.untimed == ("gradient_checkpointing=true",)
    run._print_summary(summary, Store(tmp_path / "r"))
    out = capsys.readouterr().out
    printed = " ".join(out.split())
    assert f"gradient_checkpointing=true(oom,see{tmp_path / 'r/logs/visit.log'})" in "".join(out.split())
    assert "their visits failed; their speeds enter no comparison. Time them again with the same command" in printed


@pytest.mark.long
def test_a_trial_that_is_never_quiet_is_named_and_not_compared(
    tmp_path: Path, launcher: LocalLauncher, quiet: Quiet
) -> None:
    quiet(lambda record: record.label.startswith("gradient"))
    summary = go(loaded(tmp_path), tmp_path, launcher)
    assert summary.untimed == ("gradient_checkpointing=true",)
    rows = Store(tmp_path / "r").read("trials").to_pandas().set_index("label")
    assert rows["disturbed"].to_dict() == {
        "baseline": False,
        "baseline again": False,
        "gradient_checkpointing=true": True,
    }
    assert pandas.isna(rows.loc["gradient_checkpointing=true", "tokens_per_second"])
    m = loading.load(tmp_path / "r")
    assert comparison.compare(m).estimates["tokens_per_second"] == {}
    text = " ".join(document.document(m, tmp_path / "r").caveats)
    assert "gradient_checkpointing=true" in text
    assert "enter no comparison" in text


# ------------------------------------------------------------------------------------ in one block with the baseline

RANKS = GRID.replace("gradient_checkpointing: [true]", "lora_r: [8, 16]")
Instant = Callable[[Callable[[Job], bool]], list[tuple[int, str]]]


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> Instant:
    """Trials and visits that take no time, of which a function says whether they are disturbed; what was visited, in
    which block.
    """

    def install(is_disturbed: Callable[[Job], bool]) -> list[tuple[int, str]]:
        visited: list[tuple[int, str]] = []

        def attempt(job: Job, context: Any) -> Record:
            if job.visit is None:
                return made(job, context.launcher)
            visited.append((job.visit.block, job.label))
            return made(job, context.launcher, disturbed=is_disturbed(job))

        monkeypatch.setattr(execution, "_last_attempt", attempt)
        return visited

    return install


def made(job: Job, launcher: LocalLauncher, *, disturbed: bool = False) -> Record:
    """What came of it: a second for each of three steps."""
    block = None if job.visit is None else job.visit.block
    steps = tuple(timed(n, 1.0, 100, block=block, disturbed=disturbed) for n in (1, 2, 3))
    (here,), now = launcher.environments("cpu"), dt.datetime.now(dt.UTC)
    metrics = {"optimizer_steps": 3} if block is None else {}
    return Record.of(
        job, environment=here, status="ok", started_at=now, metrics=metrics, steps=steps, disturbed=disturbed
    )


def shared_blocks(folder: Path) -> dict[str, int]:
    """Of each level of a report, the blocks in which its speed is compared with the baseline's."""
    m = loading.load(folder / "r")
    estimates = comparison.compare(m).estimates["tokens_per_second"]
    return {m.labels([config])[0]: estimate.n for config, estimate in estimates.items()}


def caveats(folder: Path) -> str:
    return " ".join(document.document(loading.load(folder / "r"), folder / "r").caveats)


def is_of_baseline(job: Job) -> bool:
    return job.label.startswith("baseline")


def test_blocks_without_an_undisturbed_baseline_are_made_again(
    tmp_path: Path, launcher: LocalLauncher, instant: Instant
) -> None:
    blocks: set[int] = set()

    def busy_at_first(job: Job) -> bool:
        assert job.visit
        blocks.add(job.visit.block)
        return len(blocks) <= 2 and is_of_baseline(job)

    visited = instant(busy_at_first)
    summary = go(loaded(tmp_path, RANKS), tmp_path, launcher)
    assert summary.untimed == ()
    assert shared_blocks(tmp_path) == {"lora_r=8": 2, "lora_r=16": 2}
    visited.clear()
    go(loaded(tmp_path, RANKS), tmp_path, launcher)
    assert not visited


@pytest.mark.parametrize("wanted", [1, 2])
def test_a_level_timed_before_an_interrupt_is_compared_after_it(
    tmp_path: Path, launcher: LocalLauncher, instant: Instant, capsys: pytest.CaptureFixture[str], wanted: int
) -> None:
    def until_a_level(job: Job) -> bool:
        if not is_of_baseline(job):
            signal.raise_signal(signal.SIGINT)
        return is_of_baseline(job)

    instant(until_a_level)
    grid = loaded(tmp_path, RANKS.replace("visits: 2", f"visits: {wanted}"))
    summary = go(grid, tmp_path, launcher)
    assert summary.interrupted
    assert summary.visits_left == 4 * wanted
    assert f"{4 * wanted} timing visits left" in what_is_left(grid, tmp_path, launcher, capsys)
    visited = instant(lambda job: False)
    assert go(grid, tmp_path, launcher).untimed == ()
    assert shared_blocks(tmp_path) == {"lora_r=8": wanted, "lora_r=16": wanted}
    assert len(visited) == 4 * wanted


def test_levels_are_timed_with_a_baseline_that_was_run_again(
    tmp_path: Path, launcher: LocalLauncher, instant: Instant, capsys: pytest.CaptureFixture[str]
) -> None:
    instant(lambda job: False)
    grid = loaded(tmp_path, RANKS)
    go(grid, tmp_path, launcher)
    run_grid(grid.only({"lora_r=8"}), Store(tmp_path / "r"), launcher, Watch(), rerun=frozenset({"ok"}))
    assert shared_blocks(tmp_path) == {"lora_r=8": 2}, "lora_r=16 was not in that run"
    assert "in no block of visits with the baseline, so their speeds are not compared: lora_r=16." in caveats(tmp_path)
    left = what_is_left(grid, tmp_path, launcher, capsys)
    assert "6 timing visits left" in left, "of lora_r=16, and of the baseline twice in each of its blocks"
    go(grid, tmp_path, launcher)
    assert shared_blocks(tmp_path) == {"lora_r=8": 2, "lora_r=16": 2}
    assert "in no block" not in caveats(tmp_path)


def test_levels_are_timed_again_where_the_baseline_lost_its_steps(
    tmp_path: Path, launcher: LocalLauncher, instant: Instant
) -> None:
    instant(lambda job: False)
    grid, store, display = loaded(tmp_path, RANKS), Store(tmp_path / "r"), Watch()
    go(grid, tmp_path, launcher)
    for row in store.read("trials").to_pylist():
        if row["label"].startswith("baseline"):
            (store.folder / "steps" / f"{row['trial_id']}.parquet").unlink()
    go(grid, tmp_path, launcher, display)
    assert (display.total, display.visits) == (2, 8), "announced beforehand"
    assert shared_blocks(tmp_path) == {"lora_r=8": 2, "lora_r=16": 2}


def test_levels_are_timed_with_the_baseline_of_an_edited_base(
    tmp_path: Path, launcher: LocalLauncher, instant: Instant
) -> None:
    visited = instant(lambda job: False)
    go(loaded(tmp_path, RANKS.replace("[8, 16]", "[8]")), tmp_path, launcher)
    go(loaded(tmp_path, RANKS), tmp_path, launcher)
    visited.clear()
    go(loaded(tmp_path, RANKS.replace("lora_r: 4}", "lora_r: 8}").replace("[8, 16]", "[4, 16]")), tmp_path, launcher)
    assert shared_blocks(tmp_path) == {"lora_r=4": 2, "lora_r=16": 2}
    assert "lora_r=4" not in [label for _, label in visited], "it was timed with lora_r=8 before"


def test_no_more_blocks_are_made_where_the_baseline_is_never_quiet(
    tmp_path: Path, launcher: LocalLauncher, instant: Instant
) -> None:
    visited = instant(is_of_baseline)
    summary = go(loaded(tmp_path, RANKS), tmp_path, launcher)
    assert {*summary.untimed} == {"baseline", "baseline again", "lora_r=8", "lora_r=16"}
    assert len({block for block, _ in visited}) <= 1 + 2 + grid_run.MOST_FURTHER_BLOCKS


def test_one_of_several_workers_visits_a_trial_in_a_block(tmp_path: Path, instant: Instant) -> None:
    visited = instant(lambda job: False)
    with LocalLauncher(workers=2) as two_workers:
        summary = go(loaded(tmp_path, RANKS), tmp_path, two_workers)
    assert len(visited) == len(set(visited)) == 8
    assert summary.untimed == ()
    assert Store(tmp_path / "r").damage() == {}


def test_each_visit_counts_where_there_is_no_baseline(
    tmp_path: Path, launcher: LocalLauncher, instant: Instant
) -> None:
    visited = instant(lambda job: False)
    grid = loaded(tmp_path, f"{RANKS}exclude: [{{lora_r: 4}}]\n")
    assert {trial.label for trial in grid.trials} == {"lora_r=8", "lora_r=16"}
    assert go(grid, tmp_path, launcher).untimed == ()
    assert sorted(label for _, label in visited) == ["lora_r=16"] * 2 + ["lora_r=8"] * 2


def test_what_another_runner_timed_meanwhile_is_left_out(
    tmp_path: Path, launcher: LocalLauncher, instant: Instant
) -> None:
    """It has no baseline in its block yet, as each runner times the baseline itself."""
    grid, store = loaded(tmp_path, RANKS.replace("visits: 2", "visits: 1")), Store(tmp_path / "r")
    others = {trial.label: trial for trial in grid.trials if not (trial.baseline or trial.twin)}
    done: list[str] = []

    def another_times_the_other(job: Job) -> bool:
        if not is_of_baseline(job) and not done:
            (other,) = others.keys() - {job.label}
            done.append(other)
            visit = Job(grid="g", spec=others[other].spec, label=other, visit=Visit(block=1, seconds=1.0))
            visits.keep(made(visit, launcher), store, NO_PREDICTIONS, 1)
        return False

    visited = instant(another_times_the_other)
    go(grid, tmp_path, launcher)
    first = min(block for block, _ in visited)
    assert done[0] not in [label for block, label in visited if block == first]
    assert shared_blocks(tmp_path) == {"lora_r=8": 1, "lora_r=16": 1}


@pytest.mark.parametrize(
    ("counts", "line"),
    [((1, 0, 0), "1 trial to run"), ((1, 2, 3), "1 trial to run, 2 recorded already; 3 visits to time it"),
     ((2, 0, 1), "2 trials to run; 1 visit to time them")],
)  # fmt: skip
def test_one_is_no_several(counts: tuple[int, int, int], line: str) -> None:
    display = PlainDisplay(Console(file=io.StringIO()))
    display.begin(*counts)
    assert display.console.file.getvalue() == line + "\n"  # type: ignore[attr-defined]  # it is the text above


def test_the_time_left_knows_that_visits_are_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    trial, visit, disturbed = (
        SimpleNamespace(visit=made, status="ok", disturbed=waited)
        for made, waited in ((None, False), (Visit(block=1, seconds=1.0), False), (Visit(block=1, seconds=1.0), True))
    )
    pace = Pace(trials=2, visits=4)
    left = [pace.seconds_left]
    made = ((trial, 60), (visit, 10), (trial, 60), (disturbed, 10), (visit, 10), (visit, 10), (visit, 10), (visit, 10))
    for each, seconds in made:
        clock[0] += seconds
        pace.finished(each)  # type: ignore[arg-type]  # a part of a record
        left.append(pace.seconds_left)
    assert left == [None, 60 + 4 * 60, 60 + 3 * 10, 3 * 10, 3 * 10, 2 * 10, 10, 0, 0], "a disturbed visit is made again"
    assert (pace.done, pace.total) == (8, 8), "the baseline was in its further block too"
    pace = Pace(trials=2, visits=4, visit_seconds=5.0)
    clock[0] += 60
    pace.finished(trial)  # type: ignore[arg-type]  # as above
    assert pace.seconds_left == 60 + 4 * 20, "a visit loads two models, and times each for five seconds"


def test_failed_trials_are_not_timed(tmp_path: Path, launcher: LocalLauncher, quiet: Quiet) -> None:
    quiet()
    text = GRID.replace("gradient_checkpointing: [true]", "memory_budget: [1MiB]")
    go(loaded(tmp_path, text), tmp_path, launcher)
    rows = Store(tmp_path / "r").read("trials").to_pandas().set_index("label")
    assert rows.loc["baseline", "timed_visits"] == 2
    failed = rows[rows["status"] == "oom"].iloc[0]
    assert pandas.isna(failed["timed_visits"])


def test_visits_can_be_left_out(tmp_path: Path) -> None:
    assert loaded(tmp_path, GRID.replace("visits: 2", "visits: 0")).timing.visits == NO_TIMING.visits
    assert loaded(tmp_path).timing == Timing(2, 0.05)


@pytest.mark.parametrize("given", ["visits: -1", "visits: true", "visits: 1.5", "visit_seconds: 0", "visit_seconds: x"])
def test_impossible_timings_are_refused(tmp_path: Path, given: str) -> None:
    key = given.split(":")[0]
    text = "\n".join(line for line in GRID.splitlines() if not line.startswith(f"{key}:")) + f"\n{given}\n"
    with pytest.raises(grids.InputError, match=key):
        loaded(tmp_path, text)


def test_only_trained_trials_lack_visits(tmp_path: Path, launcher: LocalLauncher) -> None:
    grid = loaded(tmp_path)
    assert visits.lacking(grid.trials, grid.timing, Store(tmp_path / "r"), launcher) == {}
