"""The commands as functions of Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pandas
import pytest
from conftest import SMALL
from test_cli import ROOT

import harness
from harness.errors import InputError, TrialsFailed
from harness.results.store import Store
from harness.spec.trial import TrialSpec

RANKS = {"name": "ranks", "title": "<Ranks>", "base": SMALL | {"device": "cpu", "train_samples": 4}, "visits": 0,
         "vary": {"lora_r": (8,)}}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_grid_in_python(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = harness.Grid(RANKS)
    assert set(grid.specs) == {"baseline", "lora_r=8"}
    assert grid.specs["lora_r=8"].lora_r == 8
    assert sorted(grid.trials["label"]) == ["baseline", "baseline again", "lora_r=8"]
    assert "&lt;Ranks&gt;" in grid._repr_html_()
    results = harness.run(grid, quiet=True, engine="inline", predict=False)
    assert capsys.readouterr().out == ""
    assert [*here.glob(".*.yml")] == []
    rows = Store(here / "results/ranks").read("trials").to_pandas()
    assert results.trials["trial_id"].tolist() == rows["trial_id"].tolist()
    assert set(rows["status"]) == {"ok"}
    assert rows["predicted_peak_memory_bytes"].isna().all()
    again = harness.run(RANKS, quiet=True, engine="inline", predict=False, only=["lora_r=*"])
    assert len(again.trials) == 3
    folder = harness.write_report("results/ranks")
    assert (folder / "report.html").is_file()
    assert capsys.readouterr().out == ""


def test_plans(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = harness.plan(RANKS, memory=["1GiB", "1MiB"])
    assert isinstance(planned, pandas.DataFrame)
    assert set(planned["label"]) == {"baseline", "lora_r=8"}
    (one,) = harness.plan(TrialSpec.model_validate(SMALL)).to_dict("records")
    of_grid = planned.set_index("label").loc["baseline", "predicted_peak_memory_bytes"]
    assert one["predicted_peak_memory_bytes"] == pytest.approx(of_grid, rel=0.05)
    assert capsys.readouterr().out == ""


def test_paths_of_a_configuration_begin_at_its_file(here: Path) -> None:
    (here / "there").mkdir()
    rows = [{"instruction": f"Tell {n}", "output": f"Once there were {n} foxes. " * 5} for n in range(24)]
    (here / "there/own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = SMALL | {"datasets": [{"path": "own.jsonl"}]}
    (here / "there/own.yml").write_text(json.dumps({"name": "own", "base": base, "design": "list"}))
    grid = harness.Grid(here / "there/own.yml")
    (of_grid,) = harness.plan(grid)["predicted_peak_memory_bytes"]
    (of_spec,) = harness.plan(next(iter(grid.specs.values())))["predicted_peak_memory_bytes"]
    assert of_spec == of_grid


def test_what_is_not_valid_is_an_exception(here: Path) -> None:
    with pytest.raises(InputError, match="needs a name"):
        harness.Grid({"base": SMALL})
    with pytest.raises(InputError, match=r"^ranks: .*lora_rr"):
        harness.Grid(RANKS | {"vary": {"lora_rr": [1]}})
    with pytest.raises(InputError, match="dry_run: it runs what is there"):
        harness.run(RANKS, dry_run=True)
    with pytest.raises(InputError, match="largest: it searches for one number"):
        harness.plan(RANKS, largest="micro_batch_size")
    with pytest.raises(InputError, match="no-such-option"):
        harness.run(RANKS, no_such_option=1)
    with pytest.raises(InputError, match="no such folder"):
        harness.write_report("results/none")
    with pytest.raises(TrialsFailed, match="none of"):
        harness.run(RANKS | {"name": "oom"}, memory="1MiB", quiet=True, engine="inline", predict=False)
    assert [*here.glob(".*.yml")] == []


def test_an_interrupt_is_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.grids.grid.load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harness.plan(TrialSpec.model_validate(SMALL))


def test_numbers_of_numpy(here: Path) -> None:
    grid = harness.Grid(RANKS | {"vary": {"lora_r": numpy.array([8, 16]), "seed": [numpy.int64(3)]}})
    assert {"lora_r=8", "lora_r=16", "seed=3"} < set(grid.specs)


def test_the_examples_of_this_repository_are_grids() -> None:
    for file in (ROOT / "examples").glob("*.yml"):
        assert harness.Grid(file).specs
