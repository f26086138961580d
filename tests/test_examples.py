"""The examples run, and the pages of the documentation are built, as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_cli import ROOT, harness

from harness.results.store import Store

EXAMPLES = ROOT / "examples"


def test_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    book = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(book)
    assert not any(cell.get("outputs") for cell in book.cells), "outputs are of one machine"
    NotebookClient(book, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert sum("text/html" in output.get("data", {}) for output in outputs) >= 5
    assert any("vega" in str(output.get("data")) for output in outputs), "a plot"
    labels = set(Store(tmp_path / "results/quickstart").read("trials")["label"].to_pylist())
    assert labels == {"baseline", "baseline again", "lora_r=2", "lora_r=32", "gradient_checkpointing=true"}
    assert (tmp_path / "reports/quickstart/report.html").is_file()


@pytest.mark.long
def test_trl_with_a_grid(tmp_path: Path) -> None:
    """TRL's SFTTrainer by the example's own script, over a model of a second; the bundled one is for benchmarks."""
    grid = (EXAMPLES / "watch.yml").read_text()
    for one, other in {
        "smollm2-135m-instruct": "random:tiny",
        "path: storyteller": "path: storyteller-openings",
        "train_samples: 48": "train_samples: 24",
        "sequence_length: 96": "sequence_length: 256",
        "val_set_size: 8": "val_set_size: 2",
    }.items():
        assert one in grid
        grid = grid.replace(one, other)
    (tmp_path / "watch.yml").write_text(grid + "visits: 0\n")
    done = harness("run", "watch.yml", "--no-predict", "--engine", "inline", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for own in ([], ["--plain-loss"]):
        trained = subprocess.run(
            [sys.executable, str(EXAMPLES / "watch_trl.py"), "--grid", "watch.yml", *own],
            cwd=tmp_path, capture_output=True, text=True, env=environment,
        )  # fmt: skip
        assert trained.returncode == 0, trained.stderr
    rows = {row["label"]: row for row in Store(tmp_path / "results/watch").read("trials").to_pylist()}
    steps = Store(tmp_path / "results/watch").read("steps").to_pandas().set_index(["trial_id", "step"])
    for name, of_grid in {"SFTTrainer": "loss=chunked", "SFTTrainer, plain loss": "baseline"}.items():
        mine, grids = rows[f"{name} (watched)"], rows[of_grid]
        assert mine["optimizer_steps"] == grids["optimizer_steps"]
        assert mine["trainable_parameters"] == grids["trainable_parameters"]
        for part in ("weights", "adapters", "gradients", "optimizer"):
            assert mine[f"memory_{part}_bytes"] == grids[f"memory_{part}_bytes"]
        assert mine["flops_per_token"] == pytest.approx(grids["flops_per_token"], rel=0.01)
        first, same = steps.loc[(mine["trial_id"], 1)], steps.loc[(grids["trial_id"], 1)]
        assert first["tokens"] == same["tokens"]
        assert first["loss"] == pytest.approx(same["loss"], abs=1e-5)
    plain, own_head, grids = (
        rows[name] for name in ("SFTTrainer, plain loss (watched)", "SFTTrainer (watched)", "baseline")
    )
    assert plain["peak_memory_bytes"] == pytest.approx(grids["peak_memory_bytes"], rel=0.01)
    # Its head multiplies into a buffer as wide as a part of a large vocabulary, whatever this model's is.
    assert own_head["memory_activations_bytes"] > rows["loss=chunked"]["memory_activations_bytes"]
    done = harness("report", "results/watch", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "SFTTrainer, plain loss (watched)" in (tmp_path / "reports/watch/report.md").read_text()


def test_the_reference_is_built(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/reference/index.html").read_text()
    for name in ("cli.python.Grid", "watching.watch.watch", "report.notebook.load", "adapters.merge.merge_lora",
                 "watching.trainer.WatchCallback", "cli.python.plan"):  # fmt: skip
        assert f'id="harness.{name}"' in page
    assert "rtx4090" in page
