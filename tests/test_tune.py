"""Searches through the real launcher; the trials compute a formula whose best values are known."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import formula
import numpy
import optuna
import pandas
import pytest
from rows import keep
from test_launch import Watch

from harness.analysis import loading, recommend
from harness.analysis.measurements import Measurements
from harness.errors import InputError, TrialsFailed
from harness.grids.document import Timing
from harness.launch.local import LocalLauncher
from harness.record import Job, Record
from harness.report import document
from harness.report import tuning as reporting
from harness.results.schema import spec_of
from harness.results.store import Store
from harness.sources import fingerprints
from harness.tuning import ownership, samplers, search_results, study
from harness.tuning.samplers import open_storage
from harness.tuning.study import Options, tune

made = formula.search


@pytest.fixture(scope="module")
def launcher() -> Iterator[LocalLauncher]:
    with LocalLauncher(child=formula.child, preload="harness.grids.search") as started:
        yield started


def trials(store: Store) -> pandas.DataFrame:
    return store.read("trials").to_pandas()


# ------------------------------------------------------------------------------------ the front


@pytest.mark.long
def test_the_front_is_reached_sooner_than_by_chance(launcher: LocalLauncher, tmp_path: Path) -> None:
    """One seed; `benchmarks/tune_front.py` has five."""
    store = Store(tmp_path / "tpe" / "t")
    tune(made(trials=60), store, launcher, Watch())
    after = formula.reached(trials(store))
    assert after is not None, "not within 5 % of the true front after 60 trials"
    store = Store(tmp_path / "random" / "t")
    tune(made(sampler="random", trials=after), store, launcher, Watch())
    assert formula.reached(trials(store)) is None


# ------------------------------------------------------------------------------------ what the study gets


def test_every_trial_is_a_row_and_every_end_is_reported(launcher: LocalLauncher, tmp_path: Path) -> None:
    search = made(sampler="random", seed=8, trials=20)
    store = Store(tmp_path / "t")
    messages: list[str] = []
    done = tune(search, store, launcher, Watch(), on_message=messages.append)
    rows = trials(store)
    study = optuna.load_study(study_name=done.study, storage=f"sqlite:///{store.folder / 'study.db'}")
    assert len(study.trials) == done.tried == 20
    assert set(rows[~rows["twin"]]["study"]) == {done.study}
    by_number = rows[~rows["twin"]].astype({"study_trial": int}).set_index("study_trial").sort_index()
    assert by_number.index.tolist() == list(range(20)), "a row for each trial, under its number"
    assert by_number.loc[0, "label"] == "baseline", "the configuration that one would take anyway comes first"
    states = {t.number: t.state.name for t in study.trials}
    for number, row in by_number.iterrows():
        trial = study.trials[number]
        spec = spec_of(row)
        assert search.place(spec) == trial.params
        if row["status"] == "diverged":
            assert states[number] == "FAIL"
            continue
        assert states[number] == "COMPLETE"
        memory, loss = formula.figures(spec)
        if row["status"] == "oom":
            assert trial.constraints == {"memory": pytest.approx(memory / formula.BUDGET - 1)}
            assert trial.constraints["memory"] > 0
        else:
            assert trial.values == pytest.approx([loss, memory])
            assert trial.constraints["memory"] <= 0
    assert {"ok", "oom", "diverged"} <= set(rows["status"]), "the formula has every end"
    assert any("best eval loss so far" in line for line in messages)


def test_going_on_adds_no_trial_twice(launcher: LocalLauncher, tmp_path: Path) -> None:
    store = Store(tmp_path / "t")
    first = tune(made(trials=3), store, launcher, Watch())
    again = Watch()
    same = tune(made(trials=3), store, launcher, again)
    assert (same.study, same.tried, again.seen) == (first.study, 3, [])
    more = tune(made(trials=5), store, launcher, Watch())
    assert (more.study, more.tried) == (first.study, 5)
    assert len(trials(store).query("~twin")) == 5


def test_an_interrupt_finishes_the_trial_and_two_give_it_back(launcher: LocalLauncher, tmp_path: Path) -> None:
    class Impatient(Watch):
        def __init__(self, at: int, times: int) -> None:
            super().__init__()
            self.at, self.times = at, times

        def event(self, kind: str, value: Any) -> None:
            if self.number == self.at:
                for _ in range(self.times):
                    os.kill(os.getpid(), signal.SIGINT)

        def trial(self, number: int, job: Any) -> None:
            self.number = number

    store = Store(tmp_path / "t")
    done = tune(made(trials=4), store, launcher, Impatient(2, 1))
    assert (done.tried, done.left) == (2, 2)
    with pytest.raises(KeyboardInterrupt):
        tune(made(trials=4), store, launcher, Impatient(1, 2))
    done = tune(made(trials=4), store, launcher, Watch())
    assert done.tried == 4
    assert len(trials(store).query("~twin")) == 4


def test_an_interrupt_amid_the_last_trial_leaves_the_confirmation(launcher: LocalLauncher, tmp_path: Path) -> None:
    class Impatient(Watch):
        def trial(self, number: int, job: Any) -> None:
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)

    done = tune(made(trials=2, confirm=1), Store(tmp_path / "t"), launcher, Impatient())
    assert (done.tried, done.left, done.interrupted) == (2, 3, True), "the baseline again, and a repeat of both"
    done = tune(made(trials=2, confirm=1), Store(tmp_path / "t"), launcher, Watch())
    assert (done.left, done.interrupted) == (0, False)
    assert len(trials(Store(tmp_path / "t"))) == 5
    done = tune(made(trials=2), Store(tmp_path / "u"), launcher, Impatient())
    assert (done.left, done.interrupted) == (0, False), "nothing at all was left"


def test_rows_that_are_lost_are_measured_again(launcher: LocalLauncher, tmp_path: Path) -> None:
    store, search = Store(tmp_path / "t"), made(trials=3)
    tune(search, store, launcher, Watch())
    before = trials(store).query("~twin").set_index("trial_id")
    (store.folder / "trials" / f"{before.index[1]}.parquet").write_bytes(b"PAR1")
    with pytest.warns(UserWarning, match="set aside"):
        store.set_aside()
    lines: list[str] = []
    done = tune(search, store, launcher, Watch(), on_message=lines.append)
    assert "rows of the study that were lost are measured again: 1 trial" in lines
    after = trials(store).query("~twin").set_index("trial_id")
    assert after["eval_loss"].to_dict() == before["eval_loss"].to_dict()
    assert (done.tried, done.left) == (3, 0), "it counts once"
    again = Watch()
    tune(search, store, launcher, again)
    assert again.seen == []


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_process_that_has_read_a_lost_row_measures_it_too(launcher: LocalLauncher, tmp_path: Path) -> None:
    """Another process queues what was lost, and this one, which runs already, takes it."""
    store, search = Store(tmp_path / "t"), made(trials=3)
    tune(search, store, launcher, Watch())
    process = study._StudyProcess(search, store, launcher, Watch(), Options(), lambda line: None)
    (lost,) = trials(store).query("label == 'baseline' and not twin")["trial_id"]
    (store.folder / "trials" / f"{lost}.parquet").unlink()
    study._StudyProcess(search, store, launcher, Watch(), Options(), lambda line: None)
    study._StudyProcess(search, store, launcher, Watch(), Options(), lambda line: None)
    assert process.optimize() == 0
    assert lost in set(trials(store)["trial_id"])
    assert process.outcome(0, 0).tried == 3
    assert len([t for t in process.study.trials if t.state.name == "COMPLETE"]) == 4, "it was queued once"


def test_a_study_that_is_kept_apart_may_have_rows_in_other_folders(launcher: LocalLauncher, tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'shared.db'}", Store(tmp_path / "t"))
    for folder in ("t", "u"):  # as on two machines
        done = tune(made(trials=2), Store(tmp_path / folder), launcher, Watch(), Options(storage))
        assert done.tried == 2
    rows = trials(Store(tmp_path / "u"))
    assert rows["study"].isna().all(), "the second one had nothing to search; it has measured the baseline"


@pytest.mark.parametrize(
    ("words", "number"),
    [("database or disk is full", errno.ENOSPC), ("attempt to write a readonly database", None)],
)
def test_a_storage_that_fails_amid_a_search_is_one_line(
    words: str, number: int | None, launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "t")
    tune(made(trials=1), store, launcher, Watch())

    def fail(*_: Any, **__: Any) -> None:
        raise optuna.exceptions.StorageInternalError("advice") from sqlite3.OperationalError(words)

    with monkeypatch.context() as broken:
        broken.setattr(optuna.storages.RDBStorage, "set_trial_state_values", fail)
        with pytest.raises(OSError, match=r"No space left|cannot be read or written: attempt to write") as error:
            tune(made(trials=2), store, launcher, Watch())
    assert error.value.errno == number
    assert "\n" not in str(error.value)
    assert tune(made(trials=2), store, launcher, Watch()).tried == 2


def test_what_ends_a_trial_is_shown_where_the_study_fails_too(
    launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "t/trials")

    def fail(*_: Any, **__: Any) -> None:
        raise optuna.exceptions.StorageInternalError("advice")

    store = Store(tmp_path / "t")
    with monkeypatch.context() as broken:
        broken.setattr(study, "execute", full)
        broken.setattr(study, "give_back", fail)
        with pytest.raises(OSError, match="No space left on device: 't/trials'"):
            tune(made(trials=2), store, launcher, Watch())
    monkeypatch.setattr(ownership, "is_gone", lambda owner: True)  # as the next process sees it
    assert tune(made(trials=2), store, launcher, Watch()).tried == 2


def test_the_report_is_of_the_search_that_ran_last(launcher: LocalLauncher, tmp_path: Path) -> None:
    """Even if the trials that it took over are older than all others."""
    folder = tmp_path / "t"
    done = [tune(made(sampler=name, trials=count), Store(folder), launcher, Watch()) for name, count in
            (("random", 4), ("tpe", 1))]  # fmt: skip
    m = loading.load(folder)
    results = search_results.read(m, folder)
    assert results is not None
    assert set(m.trials.set_index("config").loc[results.points.index, "study"]) == {done[1].study}


def test_searches_in_one_folder_have_their_trials_each(launcher: LocalLauncher, tmp_path: Path) -> None:
    """The second uses what the first has measured; the first is reported whole when it is gone on with."""
    store = Store(tmp_path / "t")

    def report(ranks: list[int]) -> tuple[str, set[str]]:
        search = made(space={"lora_r": ranks}, objectives=["eval_loss"], sampler="brute-force", trials=20)
        tune(search, store, launcher, Watch())
        results = search_results.read(loading.load(store.folder), store.folder)
        assert results is not None
        return results.label(results.winner).split(" ", 1)[-1], set(results.points["label"])

    first = report([4, 8, 16])
    assert (first[0], len(first[1])) == ("lora_r=16", 3)
    assert len(report([4, 16])[1]) == 2
    assert report([4, 8, 16]) == first


def test_a_search_that_was_stopped_before_a_visit_makes_it_later(
    launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial of the formula ends without a speed, as trainings do; a visit gives it one."""
    asked: list[str] = []

    def untimed(job: Job, context: Any) -> Record:
        record = execute(job, context)
        record = record.model_copy(update={"metrics": {**record.metrics, "tokens_per_second": None}})
        context.store.write(record)
        return record

    def visit(job: Job, context: Any, wanted: int) -> tuple[Any, dict[str, Any]]:
        asked.append(job.label)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return SimpleNamespace(disturbed=False), {"tokens_per_second": 100.0, "timed_visits": 1}

    execute = study.execute
    monkeypatch.setattr(study, "execute", untimed)
    monkeypatch.setattr(study, "visit", visit)
    search = dataclasses.replace(made(trials=3, objectives=["tokens_per_second"]), timing=Timing(1, 0.1))
    with pytest.raises(KeyboardInterrupt):
        tune(search, Store(tmp_path / "t"), launcher, Watch())
    assert asked[1] not in asked[2:]
    tune(search, Store(tmp_path / "t"), launcher, Watch())
    stopped = asked[1].split(" ", 1)[1]
    assert any(label.endswith(stopped) for label in asked[2:])


# ------------------------------------------------------------------------------------ killed, and two at once

RUNNER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import formula
import numpy
from test_launch import Watch
from test_tune import made
from harness.launch.local import LocalLauncher
from harness.results.store import Store
from harness.tuning.study import tune
with LocalLauncher(child=formula.child, preload="harness.grids.search") as launcher:
    tune(made(trials={trials}), Store(Path({folder!r})), launcher, Watch())
"""


def runner(folder: Path, count: int, **environment: str) -> subprocess.Popen[bytes]:
    code = RUNNER.format(tests=str(Path(__file__).parent), trials=count, folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | environment)


def test_a_killed_search_goes_on_and_counts_nothing_twice(launcher: LocalLauncher, tmp_path: Path) -> None:
    folder = tmp_path / "t"
    process = runner(folder, 8, FORMULA_SECONDS="0.2")
    deadline = time.monotonic() + 120
    while len(list(folder.glob("trials/*.parquet"))) < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = set(trials(Store(folder))["trial_id"])
    done = tune(made(trials=8), Store(folder), launcher, Watch())
    assert done.tried == 8
    rows = trials(Store(folder)).query("~twin")
    assert before <= set(rows["trial_id"])
    assert len(rows) == 8
    study = optuna.load_study(study_name=done.study, storage=f"sqlite:///{folder / 'study.db'}")
    finished = [t for t in study.trials if t.state.name == "COMPLETE"]
    failed = [t for t in study.trials if t.state.name == "FAIL" and "status" in t.user_attrs]
    assert len(finished) + len([t for t in failed if f"given back {t.number}" not in study.user_attrs]) == 8
    assert not [t for t in study.trials if t.state.name == "RUNNING"]


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    # A trial sleeps for much longer than its overhead on a busy machine.
    both = [runner(folder, 12, FORMULA_SECONDS="0.6") for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    rows = trials(Store(folder)).query("~twin")
    # The last proposal may have been made by both at once.
    assert 12 <= len(rows) <= 13
    assert rows["study"].nunique() == 1
    overlapping = rows.sort_values("started_at")["started_at"].diff().dt.total_seconds().dropna()
    assert (overlapping < 0.55).sum() >= 4, "they work at the same time"


def test_two_workers_share_a_search(launcher: LocalLauncher, tmp_path: Path) -> None:
    """They work at the same time and are interrupted together; their rows are of a machine with concurrent trials."""

    class Counting(Watch):
        def __init__(self, interrupted_at: int) -> None:
            super().__init__()
            self.at, self.now = interrupted_at, 0
            self.both = threading.Barrier(2)

        def trial(self, number: int, job: Any) -> None:
            self.now += 1
            if number <= 2:
                self.both.wait(timeout=60)  # one worker alone would never begin a second trial
            if number == self.at:
                os.kill(os.getpid(), signal.SIGINT)

        def finished(self, record: Any) -> None:
            self.now -= 1

        def child_display(self) -> Watch:
            return self

    store, both = Store(tmp_path / "t"), LocalLauncher(workers=2, child=formula.child)
    shown = Counting(interrupted_at=3)
    done = tune(made(trials=80), store, both, shown)
    assert 3 <= done.tried < 80, "an interrupt may take half a second"
    assert done.left == 80 - done.tried
    assert shown.now == 0, "both finish what they have begun"
    wanted = done.tried + 6
    done = tune(made(trials=wanted), store, both, Counting(interrupted_at=0))
    assert (done.tried, done.left) == (wanted, 0)
    rows = trials(store).query("~twin")
    assert len(rows) == rows["study_trial"].nunique() == wanted
    assert {json.loads(text)["concurrent_trials"] for text in rows["environment"]} == {1}


def test_a_worker_that_fails_ends_the_search(launcher: LocalLauncher, tmp_path: Path) -> None:
    class Unlucky(Watch):
        def trial(self, number: int, job: Any) -> None:
            if number == 2:
                raise OSError(28, "No space left on device")

        def child_display(self) -> Watch:
            return self

    store, both = Store(tmp_path / "t"), LocalLauncher(workers=2, child=formula.child)
    with pytest.raises(OSError, match="No space left"):
        tune(made(trials=50), store, both, Unlucky())
    assert len(trials(store)) < 4
    done = tune(made(trials=4), store, both, Watch())
    assert len(trials(store).query("~twin")) == done.tried == 4, "what it had asked for is given back"


# ------------------------------------------------------------------------------------ what ends a search


def test_a_search_that_fits_nothing_ends_early(launcher: LocalLauncher, tmp_path: Path) -> None:
    search = made(trials=100, constraints=["peak_memory_bytes <= 50MB"])
    store = Store(tmp_path / "t")
    with pytest.raises(
        InputError, match=r"none of 12 trials keeps within 47.68 MiB of memory; the nearest is \d+\.\d% "
    ):
        tune(search, store, launcher, Watch())
    assert len(trials(store)) == 12, "what was tried is kept"


def test_a_search_that_trains_nothing_ends_early(launcher: LocalLauncher, tmp_path: Path) -> None:
    space = {"learning_rate": {"low": 8.1e-3, "high": 9.9e-3}}
    with pytest.raises(TrialsFailed, match=r"none of 12 trials ended well \(diverged\)"):
        tune(made({"learning_rate": 9.5e-3}, space=space, trials=100), Store(tmp_path / "t"), launcher, Watch())


def test_brute_force_ends_with_the_space(launcher: LocalLauncher, tmp_path: Path) -> None:
    space = {"lora_r": [4, 8, 16], "gradient_checkpointing": [False, True]}
    store = Store(tmp_path / "t")
    done = tune(made(space=space, sampler="brute-force", trials=100), store, launcher, Watch())
    assert done.tried == 6
    assert len(trials(store).query("~twin")) == 6
    lines: list[str] = []
    again = tune(
        made(space=space, sampler="brute-force", trials=100), store, launcher, Watch(),
        Options(sources=(store.folder,)), lines.append,
    )  # fmt: skip
    assert (again.tried, again.left) == (6, 0), "nor does it begin anew"
    assert any("--from is read at the beginning" in line for line in lines)
    opened = optuna.load_study(study_name=done.study, storage=open_storage(None, store))
    opened.enqueue_trial(opened.trials[-1].params)  # as of a process that was stopped amid its last trial
    tune(made(space=space, sampler="brute-force", trials=100), store, launcher, Watch())
    assert not opened.get_trials(states=(optuna.trial.TrialState.WAITING,)), "what was queued again is not lost"
    with pytest.raises(InputError, match="brute-force needs a step for learning_rate"):
        tune(made(sampler="brute-force"), Store(tmp_path / "u"), launcher, Watch())


def test_a_small_space_is_exhausted(launcher: LocalLauncher, tmp_path: Path) -> None:
    store = Store(tmp_path / "t")
    tune(made(space={"lora_r": [4, 8]}, trials=5000), store, launcher, Watch())
    assert len(trials(store).query("~twin")) == 2


@pytest.mark.parametrize("sampler", ["gp", "nsga2"])
def test_the_other_samplers_work_too(sampler: str, launcher: LocalLauncher, tmp_path: Path) -> None:
    store = Store(tmp_path / "t")
    assert tune(made(sampler=sampler, trials=14), store, launcher, Watch()).tried == 14


def test_gp_goes_on_after_an_out_of_memory(launcher: LocalLauncher, tmp_path: Path) -> None:
    """It wants the same bounds of all trials, and the loss of one that ran out of memory is not known."""
    store = Store(tmp_path / "t")
    space = {"lora_r": {"low": 1, "high": 64, "log": True}}
    bounds = ["peak_memory_bytes <= 400MB", "eval_loss <= 5"]
    search = made({"lora_r": 64}, space=space, objectives=["eval_loss"], sampler="gp", constraints=bounds, trials=14)
    lines: list[str] = []
    tune(search, store, launcher, Watch(), on_message=lines.append)
    assert not [line for line in lines if "cannot be trained" in line]
    assert {"oom", "ok"} == set(trials(store)["status"])
    assert len(trials(store).query("~twin")) > 10, "the first ten of gp are drawn at random"


def test_gp_goes_on_with_a_study_whose_trials_had_different_bounds() -> None:
    """As those from before 2026-12: without a budget, no bound of a trial that ended well, one of an out-of-memory."""
    search = made(space={"lora_r": {"low": 1, "high": 64}}, objectives=["eval_loss"], constraints=[], sampler="gp")
    old = optuna.create_study(sampler=samplers.sampler(search))
    distributions = {"lora_r": samplers.distribution(search.parameters[0])}
    for rank in range(1, 61, 5):
        constraints = {"memory": 1e-3} if rank > 40 else {}
        params = {"lora_r": rank}
        old.add_trial(optuna.trial.create_trial(
            params=params, distributions=distributions, value=4 - rank / 64, constraints=constraints))  # fmt: skip
    assert 1 <= samplers.suggest(old.ask(), search.parameters[0]) <= 64


def test_an_error_of_a_sampler_is_none_of_the_space(
    launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("of the sampler")

    monkeypatch.setattr(study, "suggest", fail)
    with pytest.raises(ValueError, match="of the sampler"):
        tune(made(trials=2), Store(tmp_path / "t"), launcher, Watch())


def test_a_storage_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the study's storage cannot be opened") as error:
        open_storage("mysql://me:secret@nowhere/x", Store(tmp_path / "t"))
    assert "secret" not in str(error.value)


# ------------------------------------------------------------------------------------ warm start, rungs, confirmation


def test_a_warm_start_uses_rows_measured_before(launcher: LocalLauncher, tmp_path: Path) -> None:
    search = made(trials=4)
    plain = search.base.model_copy(update={"memory_budget": None})
    source = Store(tmp_path / "before")
    for label, changes in {
        "baseline": {}, "fits": {"lora_r": 8}, "too large": {"lora_r": 64}, "outside": {"sequence_length": 64},
    }.items():  # fmt: skip
        spec = plain.model_copy(update=changes)
        memory, loss = formula.figures(spec)
        keep(source, spec, label, [loss] * 3, peak_memory_bytes=memory, eval_loss=loss, tokens_per_second=9.0,
             **fingerprints.of(spec).columns)  # fmt: skip
    store = Store(tmp_path / "t")
    messages: list[str] = []
    done = tune(search, store, launcher, Watch(), Options(sources=(source.folder,)), messages.append)
    assert (done.warm, done.tried) == (3, 4)
    assert any("3 used, 1 outside the space" in line for line in messages)
    study = optuna.load_study(study_name=done.study, storage=f"sqlite:///{store.folder / 'study.db'}")
    warm = {t.user_attrs["label"]: t for t in study.trials if "source" in t.user_attrs}
    beyond = {label.split(", ")[0].split(" ", 1)[-1]: t.constraints["memory"] > 0 for label, t in warm.items()}
    assert beyond == {"baseline": False, "fits": False, "too large": True}
    rows = trials(store).query("~twin").set_index("label")
    assert rows.loc["baseline", "tokens_per_second"] == 9.0, "it is not measured again"
    copied = [label for label in rows.index if "measured before" in label]
    assert [label.split(" ", 1)[1] for label in copied] == ["fits, measured before"]
    stories = store.read("stories").to_pandas()
    assert (stories["trial_id"] == rows.loc[copied[0], "trial_id"]).sum() == 3, "its stories came along"


def test_halving_stops_the_worse_trials(launcher: LocalLauncher, tmp_path: Path) -> None:
    search = made(objectives=["eval_loss"], pruner="halving", trials=24)
    store = Store(tmp_path / "t")
    done = tune(search, store, launcher, Watch())
    study = optuna.load_study(study_name=done.study, storage=f"sqlite:///{store.folder / 'study.db'}")
    states = [t.state.name for t in study.trials]
    assert states.count("PRUNED") >= 8
    rows = trials(store).query("~twin and repeat == 0 and status == 'ok'")
    assert sorted(rows["train_samples"].unique()) == [4, 12, 36]
    whole = rows[rows["train_samples"] == 36]
    finished = {t.number for t in study.trials if t.state.name == "COMPLETE" and t.constraints["memory"] <= 0}
    assert set(whole["study_trial"]) == finished
    m = loading.load(store.folder)
    summary = reporting.summarize(m, store.folder)
    assert summary is not None
    assert any("Successive halving stopped" in sentence for sentence in summary.sentences)


def test_halving_judges_bounds_by_the_whole_training(launcher: LocalLauncher, tmp_path: Path) -> None:
    """A ninth of the training has a loss beyond the bound, whatever the rank, and the whole has not."""
    store = Store(tmp_path / "t")
    figures = {rank: formula.figures(made({"lora_r": rank}).base.model_copy(update={"train_samples": n}))[1]
               for rank, n in ((64, 36), (60, 4))}  # fmt: skip
    bound = (figures[64] + figures[60]) / 2
    search = made(
        {"lora_r": 64}, space={"lora_r": [60, 62, 64], "lora_dropout": [0.0, 0.1]}, objectives=["eval_loss"],
        pruner="halving", trials=6, constraints=[f"eval_loss <= {bound:.3f}"], sampler="random",
    )  # fmt: skip
    done = tune(search, store, launcher, Watch())
    rows = trials(store).query("~twin").set_index("train_samples")["eval_loss"]
    assert rows[4].min() > bound > rows[36].min()
    opened = optuna.load_study(study_name=done.study, storage=open_storage(None, store))
    states = {t.state.name for t in opened.trials}
    assert states <= {"COMPLETE", "PRUNED"}
    whole = [t.user_attrs["rows"] for t in opened.trials if t.state.name == "COMPLETE"]
    assert all(len(rungs) == 3 for rungs in whole), "no trial was given up for what a ninth of it shows"


def test_the_winner_is_compared_in_fresh_repeats(launcher: LocalLauncher, tmp_path: Path) -> None:
    store = Store(tmp_path / "t")
    search = made(trials=10, confirm=2)
    tune(search, store, launcher, Watch())
    m = loading.load(store.folder)
    read = search_results.read(m, store.folder)
    assert read is not None
    assert set(read.fresh.trials["repeat"]) == {1, 2}
    fresh = read.fresh.trials.groupby("config")["eval_loss"].mean()
    assert fresh[read.winner] == fresh.reindex(read.confirmed.index).min(), "by the fresh repeats alone"
    assert set(read.rivals) == {"the baseline", "the runner-up"}
    assert read.repeats == 2
    for rival in read.rivals.values():
        assert read.estimate("eval_loss", rival).value == pytest.approx(fresh[read.winner] - fresh[rival])
    sentences = reporting.summarize(m, store.folder).sentences  # type: ignore[union-attr]
    assert any("Against the runner-up" in s and "in 2 fresh repeats" in s for s in sentences)


def test_an_unconfirmed_winner_is_reported_as_such(launcher: LocalLauncher, tmp_path: Path) -> None:
    store = Store(tmp_path / "t")
    tune(made(trials=4), store, launcher, Watch())
    summary = reporting.summarize(loading.load(store.folder), store.folder)
    assert summary is not None
    assert any("not confirmed in fresh repeats" in sentence for sentence in summary.sentences)
    assert any("Nothing is confirmed" in sentence for sentence in summary.sentences)
    trials = store.read("trials").to_pandas()
    assert not trials["twin"].any(), "and nothing is trained for it"
    assert set(trials["repeat"]) == {0}


def test_a_search_from_before_a_key_existed_is_still_reported() -> None:
    folder = Path(__file__).parent.parent / "results/tune"
    summary = reporting.summarize(loading.load(folder, "e345ecc4"), folder)
    assert summary is not None
    assert any(sentence.startswith("Take #") for sentence in summary.sentences)
    assert len(summary.tables[0].rows) == 3


@pytest.fixture(scope="module")
def recorded() -> tuple[Path, Measurements]:
    folder = Path(__file__).parent.parent / "results/tune"
    return folder, loading.load(folder, "e345ecc4")


def test_the_winner_is_judged_once(recorded: tuple[Path, Measurements]) -> None:
    """In its sentence, in the table of rivals, in that of techniques, and by `harness recommend`."""
    folder, m = recorded
    content = document.document(m, folder)
    against = next(s for s in content.summary if s.startswith("Against the baseline"))
    rivals = next(t for t in content.tables if t.id == "tuning").rows
    of_rivals = next(row for row in rivals if row[0].text == "the baseline")
    (winner,) = [
        row for row in content.tables[0].rows if content.recommended and row[0].text == content.recommended.label
    ]
    for of_rival, of_technique in zip(of_rivals[2:5], winner[3:8:2], strict=True):
        assert of_rival.text == of_technique.text
    assert winner[7].text.split(") ")[0] in against
    assert content.recommended is not None
    assert recommend.recommend(m).label == content.recommended.label


def test_a_finalist_whose_fresh_repeats_all_fail_is_reported(recorded: tuple[Path, Measurements]) -> None:
    folder, m = recorded
    read = search_results.read(m, folder)
    assert read is not None
    runner_up = read.rivals["the runner-up"]
    failed = (m.trials["config"] == runner_up) & (m.trials["repeat"] > 0)
    trials = m.trials.copy()
    trials.loc[failed, ["status", "phase"]] = ["timeout", "forward"]
    trials.loc[failed, ["eval_loss", "tokens_per_second", "peak_memory_bytes"]] = numpy.nan
    configs = m.configs.copy()
    configs.loc[runner_up, ["status", "phase"]] = ["timeout", "forward"]
    content = document.document(dataclasses.replace(m, trials=trials, configs=configs), folder)
    shown = f"{read.label(runner_up)} (timeout in forward)"
    (row,) = [row for row in content.tables[0].rows if row[0].text == shown]
    assert [cell.text for cell in row[2:]] == ["–"] * 6 + ["0"]


def test_fresh_repeats_choose_the_winner(launcher: LocalLauncher, tmp_path: Path) -> None:
    """The best of the search is worse in each fresh repeat: it is not taken, and its figures are not shown."""
    store = Store(tmp_path / "t")
    tune(made(trials=10, confirm=2), store, launcher, Watch())
    m = loading.load(store.folder)
    before = search_results.read(m, store.folder)
    assert before is not None
    worse = (m.trials["config"] == before.winner) & (m.trials["repeat"] > 0)
    trials = m.trials.assign(eval_loss=m.trials["eval_loss"] + 0.5 * worse)
    of_worse = m.stories["trial"].isin(trials.index[worse])
    changed = dataclasses.replace(m, trials=trials, stories=m.stories.assign(loss=m.stories["loss"] + 0.5 * of_worse))
    after = search_results.read(changed, store.folder)
    assert after is not None
    assert before.winner == before.ranked.index[0] == after.ranked.index[0]
    assert after.winner == before.rivals["the runner-up"]
    taken = next(s for s in reporting.summarize(changed, store.folder).sentences if s.startswith("Take "))  # type: ignore[union-attr]
    fresh = trials[(trials["config"] == after.winner) & (trials["repeat"] > 0)]["eval_loss"].mean()
    assert f"eval loss {fresh:.4f}" in taken


def test_importances(launcher: LocalLauncher, tmp_path: Path) -> None:
    """Checkpointing has no part in the loss of the formula, the learning rate has the largest."""
    store = Store(tmp_path / "t")
    tune(made(trials=30, sampler="random"), store, launcher, Watch())
    read = search_results.read(loading.load(store.folder), store.folder)
    assert read is not None
    shares = search_results.importances(read, "eval_loss")
    assert max(shares, key=lambda name: shares[name]) in ("learning_rate", "lora_r")
    assert shares["gradient_checkpointing"] == min(shares.values())
    memory = search_results.importances(read, "peak_memory_bytes")
    assert max(memory, key=lambda name: memory[name]) == "lora_r"
