"""Visits and repeats are added only while a comparison is undecided, and only those that can decide it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
from conftest import SMALL
from rows import keep
from test_launch import Watch, formula_grid

from harness.analysis import comparison, loading, sequential, stats
from harness.analysis.estimate import Estimate
from harness.analysis.sequential import until_decided
from harness.cli.run import _print_undecided
from harness.environment import current
from harness.grids import grid
from harness.grids.grid import Grid
from harness.launch.local import LocalLauncher
from harness.report import document
from harness.results.store import Store, looks_of
from harness.runner.grid_run import run_grid

SPEED, LOSS = "tokens_per_second", "eval_loss"
LABELS = ("lora_r=8", "lora_r=64")


def estimate(metric: str, unit: Any) -> Estimate:
    basis: Any = "visits" if metric == SPEED else "stories"
    return Estimate(metric, 1.0, None, None, 3, basis, 0.5, "not distinguishable", needed=9, unit=unit)


def looks(monkeypatch: pytest.MonkeyPatch, outcomes: list[Mapping[str, Mapping[str, Any]]]) -> None:
    """Each look finds one of these undecided, the last one for ever."""
    remaining = itertools.chain(outcomes, itertools.repeat(outcomes[-1]))

    class Compared:
        """Its configurations are named by their labels."""

        measurements = SimpleNamespace(labels=list, trials=pandas.DataFrame({LOSS: [2.0]}))

        def __init__(self, _: object) -> None:
            self.now = next(remaining)

        @property
        def estimates(self) -> dict[str, dict[str, Estimate]]:
            decided = {m: dict.fromkeys(LABELS, replace(estimate(m, None), verdict="worse")) for m in (SPEED, LOSS)}
            return {m: of | {x: estimate(m, u) for x, u in self.now.get(m, {}).items()} for m, of in decided.items()}

    monkeypatch.setattr(loading, "load", lambda *_, **__: None)
    monkeypatch.setattr(sequential, "compare", Compared)


@pytest.fixture
def grid_of(tmp_path: Path) -> Callable[[int], Grid]:
    base = ", ".join(f"{key}: {value}" for key, value in SMALL.items())
    file = tmp_path / "g.yml"
    file.write_text(f"name: g\nbase: {{{base}}}\nvary: {{lora_r: [8, 64]}}\nvisits: 2\n")
    return lambda repeats: grid.load(file, repeats=repeats)


class Runs:
    """What was run: the visits wanted, and the labels of the trials of each repeat."""

    def __init__(self, *, interrupted: bool = False) -> None:
        self.versions: list[tuple[int, dict[int, set[str]]]] = []
        self.looks: set[int] = set()
        self.interrupted = interrupted

    def __call__(self, now: Grid) -> bool:
        trials: dict[int, set[str]] = {}
        for trial in now.trials:
            trials.setdefault(trial.repeat, set()).add(trial.label)
        self.versions.append((now.timing.visits, trials))
        self.looks.add(now.looks)
        return not self.interrupted


BASELINE = {"baseline", "baseline again"}


def test_undecided_speeds_get_visits_alone(
    grid_of: Callable[[int], Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks(monkeypatch, [{SPEED: {"lora_r=8": "visits"}}])
    runs = Runs()
    left = until_decided(grid_of, 1, 4, runs, tmp_path)
    assert left is not None
    assert [visits for visits, _ in runs.versions] == [2, 3, 4], "up to the limit"
    assert [trials for _, trials in runs.versions[1:]] == [{0: BASELINE | {"lora_r=8"}}] * 2, "of what is open, no seed"
    assert set(left[SPEED]) == {"lora_r=8"}
    assert runs.looks == {4}, "as many looks as there may be"


def test_undecided_losses_get_seeds_where_seeds_decide(
    grid_of: Callable[[int], Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks(monkeypatch, [{LOSS: {"lora_r=8": "stories", "lora_r=64": "seeds"}}, {LOSS: {"lora_r=8": "stories"}}])
    runs = Runs()
    left = until_decided(grid_of, 1, 9, runs, tmp_path)
    assert left is not None
    assert len(runs.versions) == 2, "more repeats do not decide what stories would"
    visits, trials = runs.versions[1]
    assert trials == {0: BASELINE | {"lora_r=64"}, 1: {"baseline", "lora_r=64"}}
    assert visits == 2
    assert [each and each.unit for each in left[LOSS].values()] == ["stories"]


def test_visits_train_nothing_where_others_were_repeated(
    grid_of: Callable[[int], Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks(monkeypatch, [{LOSS: {"lora_r=64": "times"}}, {SPEED: {"lora_r=8": "visits"}}, {}])
    runs = Runs()
    assert until_decided(grid_of, 1, 9, runs, tmp_path) == {SPEED: {}, LOSS: {}}
    assert runs.versions[-1] == (3, {0: BASELINE | {"lora_r=8"}}), "lora_r=8 was not trained under a second seed"


def test_it_stops_when_interrupted(grid_of: Callable[[int], Grid], tmp_path: Path) -> None:
    runs = Runs(interrupted=True)
    assert until_decided(grid_of, 1, 9, runs, tmp_path) is None
    assert len(runs.versions) == 1


def test_what_is_not_run_is_not_chased(
    grid_of: Callable[[int], Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `--only`, or once a level has left the file: its rows stay in the folder."""
    looks(monkeypatch, [{SPEED: {"lora_r=8": "visits"}, LOSS: {"lora_r=8": "seeds"}}])
    runs = Runs()
    left = until_decided(lambda repeats: grid_of(repeats).only(["lora_r=64"]), 1, 9, runs, tmp_path)
    assert [trials for _, trials in runs.versions] == [{0: BASELINE | {"lora_r=64"}}], "which is decided"
    assert left == {SPEED: {}, LOSS: {}}


@pytest.mark.parametrize(("visits", "of_speed"), [(2, "speed not compared: lora_r=64, lora_r=8\n"), (0, "")])
def test_what_was_not_compared_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], visits: int, of_speed: str
) -> None:
    base = ", ".join(f"{key}: {value}" for key, value in SMALL.items())
    file = tmp_path / "g.yml"
    file.write_text(f"name: g\nbase: {{{base}}}\nvary: {{lora_r: [8, 64]}}\nvisits: {visits}\n")

    def run(now: Grid) -> bool:
        """The machine is too busy for visits, rank 64 does not fit, and rank 8 is clearly worse."""
        for t in now.trials:
            ended = {"status": "oom"} if t.label == "lora_r=64" else {LOSS: 3.0}
            losses = [] if t.label == "lora_r=64" else [3 + (t.label == "lora_r=8") + i / 100 for i in range(8)]
            keep(Store(tmp_path / "g"), t.spec, t.label, losses, twin=t.twin, baseline_id=t.baseline_id, **ended)
        return True

    left = until_decided(lambda repeats: grid.load(file, repeats=repeats), 2, 3, run, tmp_path / "g")
    _print_undecided(left, 3)
    assert capsys.readouterr().out == of_speed + "loss not compared: lora_r=64\n"


def test_rows_decide_what_is_repeated(tmp_path: Path) -> None:
    base = ", ".join(f"{key}: {value}" for key, value in SMALL.items())
    file = tmp_path / "g.yml"
    file.write_text(f"name: g\nbase: {{{base}}}\nvary: {{lora_r: [8, 64]}}\n")
    store = Store(tmp_path / "g")
    ran: list[list[tuple[str, int]]] = []

    def run(now: Grid) -> bool:
        done = store.completed()
        todo = [
            t for t in now.trials if not any(i.startswith(t.spec.id) and i.endswith("-twin") == t.twin for i in done)
        ]
        ran.append(sorted((t.label, t.repeat) for t in todo))
        for t in todo:
            # Rank 64 is clearly worse; of rank 8, each seed says something else.
            change = {"lora_r=64": 0.5, "lora_r=8": 0.05 * (-1) ** t.repeat}.get(t.label, 0.0)
            losses = [3 + story / 10 + change * (1 + story / 1000 + t.repeat / 1000) for story in range(8)]
            keep(store, t.spec, t.label, losses, twin=t.twin, baseline_id=t.baseline_id)
        store.describe(now.about, {current("cpu").id})
        return True

    left = until_decided(lambda repeats: grid.load(file, repeats=repeats), 2, 4, run, tmp_path / "g")
    assert left is not None
    assert set(left[LOSS]) == {"lora_r=8"}
    first, second, third = ran
    assert [label for label, _ in first].count("lora_r=64") == 2
    again = ["baseline", "lora_r=8"]
    assert second == [(label, 2) for label in again]
    assert third == [(label, 3) for label in again]
    for _ in range(2):
        m = loading.load(tmp_path / "g")
        assert m.alpha == stats.ALPHA / 3, "the terminal and every later report judge what the looks judged"
        undecided = comparison.compare(m).undecided(LOSS)
        assert undecided == {
            config: left[LOSS][label] for config, label in zip(undecided, m.labels(undecided), strict=True)
        }
        caveats = document.document(m, tmp_path / "g").caveats
        assert sum("looked at up to 3 times" in caveat and "98.33%" in caveat for caveat in caveats) == 1
        store.describe(grid.load(file).about)  # a later run that does not look
    assert looks_of(store.description(), "another") == 1, "rows that another machine adds were not looked at"
    (tmp_path / "g/grid.json").write_text('{"looks": 2}')
    assert loading.load(tmp_path / "g").alpha == stats.ALPHA / 2, "one number, as it was kept before, is of all"
    store.describe(grid.load(file).about, {"another"})
    assert loading.load(tmp_path / "g").alpha == stats.ALPHA / 2
    for odd in ('"many"', '{"": "many"}', "[3]", "true"):
        (tmp_path / "g/grid.json").write_text(f'{{"looks": {odd}}}')
        assert loading.load(tmp_path / "g").alpha == stats.ALPHA


def test_a_run_keeps_its_looks_for_its_environment(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.describe({"looks": 5}, {"another"})
    grid_of_three = replace(formula_grid(3), looks=3)
    run_grid(grid_of_three, store, LocalLauncher(), Watch(), until=time.monotonic())  # none begins
    here = current("cpu").id
    assert [looks_of(store.description(), each) for each in (here, "another", "a third")] == [3, 5, 1]
    run_grid(replace(grid_of_three, looks=2), store, LocalLauncher(), Watch(), until=time.monotonic())
    assert looks_of(store.description(), here) == 3, "rows that were looked at stay so"
