"""What trackers are sent, read back by their own libraries."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rows import keep
from test_cli import Ask, harness

from harness.environment import current
from harness.errors import InputError
from harness.metrics import METRICS
from harness.report import trackers
from harness.results.store import Store
from harness.spec.trial import TrialSpec

Small = Callable[..., TrialSpec]


@pytest.fixture
def grid(small: Small, tmp_path: Path) -> Path:
    """Two configurations, one of which has failed once; the page is a file."""
    folder = tmp_path / "results/ranks"
    store = Store(folder)
    for seed in range(2):
        for label, spec, loss in (("baseline", small(seed=seed), 3.0), ("lora_r=8", small(seed=seed, lora_r=8), 2.5)):
            memory = 1000 if label == "baseline" else 900
            keep(store, spec, label, [loss + 0.01 * seed, loss], rates=(10, 20, 30), peak_memory_bytes=memory,
                 eval_loss=loss, trial_seconds=2.5)  # fmt: skip
    keep(store, small(lora_r=64), "lora_r=64", [], status="failed")
    keep(store, small(lora_r=8, seed=2), "lora_r=8", [], status="oom", oom_reached_bytes=5)
    store.describe({"title": "Ranks"})
    (tmp_path / "report.html").write_text("<p>the page</p>")
    return folder


def expected(folder: Path) -> dict[str, trackers.TrackedRun]:
    runs = {run.name: run for run in trackers.runs_of(folder)}
    rows = {row["trial_id"]: row for row in Store(folder).read("trials").to_pylist()}
    assert set(runs) == {"baseline", "baseline (repeat 1)", "lora_r=8", "lora_r=8 (repeat 1)",
                         "lora_r=8 (repeat 2)", "lora_r=64"}  # fmt: skip
    for run in runs.values():
        of_row = {name: rows[run.id][name] for name in METRICS if rows[run.id][name] is not None}
        assert of_row == {name: value for name, value in run.figures.items() if "/" not in name}
    effects = {name: x for name, x in runs["lora_r=8"].figures.items() if name.startswith("effect/")}
    assert effects["effect/peak_memory_bytes"] == pytest.approx(0.9)
    assert effects["effect/eval_loss/low"] <= effects["effect/eval_loss"] <= effects["effect/eval_loss/high"]
    assert not runs["lora_r=64"].ended_well
    assert all(name.startswith("oom_") for name in runs["lora_r=8 (repeat 2)"].figures), "no effect is its own"
    return runs


def sent_twice(folder: Path, tracker: str, place: str) -> str:
    page = folder.parent.parent / "report.html"
    first, _ = trackers.send(folder, tracker, place=place, page=page)
    second, where = trackers.send(folder, tracker, place=place, page=page)
    assert first == second == 6
    return where


def test_mlflow(grid: Path, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = sent_twice(grid, "mlflow", f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("ranks")
    made = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    for name, run in expected(grid).items():
        assert {k: v for k, v in made[name].data.metrics.items() if not k.startswith("train/")} == run.figures
        assert made[name].data.params == {key: str(value) for key, value in run.parameters.items()}
        assert made[name].data.tags["trial_id"] == run.id
        assert made[name].info.status == ("FINISHED" if run.ended_well else "FAILED")
        losses = client.get_metric_history(made[name].info.run_id, "train/loss") if run.steps else []
        assert [(m.step, m.value) for m in losses] == [(n, step["loss"]) for n, step in run.steps]
    assert len(made) == 6
    shutil.rmtree("mlruns", ignore_errors=True)


def test_tensorboard(grid: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    root = Path(sent_twice(grid, "tensorboard", str(tmp_path / "runs")))
    folders = {folder.name.rsplit("-", 1)[0]: folder for folder in root.iterdir()}
    assert len(folders) == 6
    for run in expected(grid).values():
        (folder,) = [each for each in root.iterdir() if each.name.endswith(run.id)]
        events = accumulator.EventAccumulator(str(folder)).Reload()
        scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        assert {tag for tag in scalars if not tag.startswith("train/")} == set(run.figures)
        for name, value in run.figures.items():
            assert [event.value for event in scalars[name]] == [pytest.approx(value)]
        losses = [(event.step, event.value) for event in scalars.get("train/loss", [])]
        assert losses == [(n, pytest.approx(step["loss"])) for n, step in run.steps]


def test_trackio(grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    # Its folder is read when it is imported: a process of its own.
    for _ in range(2):
        done = harness("export", str(grid), "--to", "trackio", "--place", str(tmp_path / "store"), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "6 trials sent to trackio" in done.stdout
    script = (
        "import json, trackio\n"
        "from trackio.sqlite_storage import SQLiteStorage as store\n"
        "runs = list(trackio.Api().runs('ranks'))\n"
        "print(json.dumps({r.name: [r.config, store.get_logs('ranks', r.name)] for r in runs}, default=str))\n"
    )
    read = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env=os.environ | {"TRACKIO_DIR": str(tmp_path / "store")})  # fmt: skip
    assert read.returncode == 0, read.stderr
    made = json.loads(read.stdout.splitlines()[-1])
    assert len(made) == 6
    for run in expected(grid).values():
        config, logs = made[f"{run.name} {run.id}"]
        assert {key: config[key] for key in run.parameters} == run.parameters
        logged = {name: row[name] for row in logs for name in row}
        assert {name: logged[name] for name in run.figures} == pytest.approx(run.figures)
        losses = [row["train/loss"] for row in logs if "train/loss" in row]
        assert losses == pytest.approx([step["loss"] for _, step in run.steps])


def test_wandb_offline(grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    done = harness("export", str(grid), "--to", "wandb", "--place", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = {}
    for file in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb"):
        name, config, summary, losses = read_wandb(file)
        made[name] = (config, summary, losses)
    assert len(made) == 6
    for name, run in expected(grid).items():
        config, summary, losses = made[name]
        assert {key: config[key] for key in run.parameters} == run.parameters
        assert {key: summary[key] for key in run.figures} == pytest.approx(run.figures)
        assert losses == pytest.approx([step["loss"] for _, step in run.steps])


def records(file: Path) -> Iterator[bytes]:
    """Those of an offline run, in LevelDB's log format: blocks of 32 KiB, in which records have a header of 7 bytes."""
    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def read_wandb(file: Path) -> tuple[str, dict[str, Any], dict[str, Any], list[float]]:
    from wandb.proto import wandb_internal_pb2

    name, config, summary, losses = "", {}, {}, []
    for data in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            name = record.run.display_name
            config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        for update in record.config.update:
            config[update.key] = json.loads(update.value_json)
        for update in record.summary.update:
            summary["".join(update.nested_key) or update.key] = json.loads(update.value_json)
        row = {"".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        losses += [row["train/loss"]] if "train/loss" in row else []
    return name, config, summary, losses


def test_effects_are_those_of_each_environment(grid: Path, small: Small) -> None:
    """A trial of another machine is compared with the baseline of that machine."""
    here = {run.name: run.figures.get("effect/eval_loss") for run in trackers.runs_of(grid)}
    other = current("cpu").model_copy(update={"cpu_name": "another"})
    for label, r, loss in (("baseline", 4, 2.0), ("another", 16, 2.5)):
        keep(Store(grid), small(lora_r=r), label, [loss] * 8, environment=other, eval_loss=loss)
    both = {run.name: run.figures.get("effect/eval_loss") for run in trackers.runs_of(grid)}
    assert both["another"] == pytest.approx(0.5)
    assert both["lora_r=8"] == here["lora_r=8"] is not None


def test_a_tracker_that_fails_costs_a_warning(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise ConnectionError("nobody answers")

    monkeypatch.setitem(trackers._SENDERS, "tensorboard", broken)
    with pytest.warns(trackers.TrackerFailed, match="tensorboard: nobody answers; harness export sends"):
        assert trackers.send_or_warn(grid, "tensorboard") is None


def test_what_is_refused(ask: Ask, grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="did you mean mlflow"):
        trackers.send(grid, "mflow")
    with pytest.raises(InputError, match="no trials are recorded"):
        trackers.send(tmp_path / "none", "tensorboard")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'finetune-harness\[wandb\]'"):
        trackers.check("wandb")
    assert ask("export", str(grid))[0] == 2
    code, _, errors = ask("run", "none.yml", "--report-to", "mflow")
    assert code == 2
    assert "did you mean mlflow" in " ".join(errors.split())


def test_a_run_reports(ask: Ask, tmp_path: Path) -> None:
    from conftest import SMALL

    keys = SMALL | {"device": "cpu", "train_samples": 4}
    (tmp_path / "g.yml").write_text(json.dumps({"name": "g", "visits": 0, "base": keys, "vary": {"lora_r": [8]}}))
    command = ("run", "g.yml", "--engine", "inline", "--no-predict", "--report-to", "tensorboard")
    code, _, errors = ask(*command)
    assert code == 0, errors
    assert len(list((tmp_path / "runs/g").glob("*/events.*"))) == 3
