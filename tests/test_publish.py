"""Results in a folder that the hub can show, read back by its own library."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import datasets
import pandas
import pytest
import yaml
from test_cli import ROOT, Ask, harness

from harness.analysis import loading
from harness.report import document, publishing
from harness.results.store import Store

FORGETTING = ROOT / "results/forgetting"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "rows"
    done = harness("publish", str(FORGETTING), "--to", str(folder), "--license", "cc-by-4.0", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_rows_are_those_that_were_recorded(published: Path, tmp_path: Path) -> None:
    for table in ("trials", "steps", "stories"):
        rows = Store(FORGETTING).read(table)
        assert pandas.read_parquet(published / f"data/{table}.parquet").equals(rows.to_pandas())
        (split,) = datasets.load_dataset(str(published), table, cache_dir=str(tmp_path)).values()
        assert split.num_rows == rows.num_rows
        assert split.column_names == rows.column_names
    (default,) = datasets.load_dataset(str(published), cache_dir=str(tmp_path)).values()
    assert default.num_rows == Store(FORGETTING).read("trials").num_rows


def test_the_rows_of_one_environment_go_without_those_of_others(tmp_path: Path, ask: Ask) -> None:
    code, _, errors = ask("publish", str(ROOT / "results/biases"), "--to", str(tmp_path), "--environment", "bd5fabe1")
    assert code == 0, errors
    trials = pandas.read_parquet(tmp_path / "data/trials.parquet")
    assert set(trials["environment_id"]) == {"bd5fabe1"}
    steps = pandas.read_parquet(tmp_path / "data/steps.parquet")
    assert set(steps["trial_id"]) == set(trials["trial_id"])
    counts = f"- `trials` ({len(trials)} rows)"
    assert counts in (tmp_path / "README.md").read_text()


def test_the_card_says_what_it_is(published: Path) -> None:
    _, front, text = (published / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["license"] == "cc-by-4.0"
    assert about["pretty_name"] == "What is learnt and what is forgotten"
    assert {each["config_name"] for each in about["configs"]} == {"trials", "steps", "stories"}
    assert "full fine-tuning" in text
    assert json.loads(text.split("```json\n")[1].split("```")[0])["device_type"] == "cpu"
    assert (published / "report/report.html").is_file()


def test_a_licence_is_named_only_where_it_was_given() -> None:
    """Whose rows they are, decides."""
    content = document.document(loading.load(FORGETTING), FORGETTING)
    about = yaml.safe_load(publishing.card(content, {"trials": 1}).split("---\n")[1])
    assert "license" not in about


def test_plots_that_there_no_longer_are_go_from_the_hub(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Mock()
    hub.return_value.create_repo.return_value = "https://hub/me/rows"
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    code, _, errors = ask("publish", str(FORGETTING), "--to", "me/rows", "--public")
    assert code == 0, errors
    patterns = hub.return_value.upload_folder.call_args.kwargs["delete_patterns"]
    for former in ("data/answers.parquet", "report/plots/loss.svg", "report/tables/costs.csv"):
        assert any(fnmatch.fnmatch(former, pattern) for pattern in patterns), former


@pytest.mark.parametrize(("token", "reason"), [("", "hf auth login"), ("hf_none", "the hub does not take it (")])
def test_without_the_hub_it_says_what_would_do(tmp_path: Path, token: str, reason: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness", "publish", str(FORGETTING), "--to", "me/rows"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_TOKEN": token},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--to ./me/rows" in done.stderr
    assert reason in done.stderr
    assert not (tmp_path / "me").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((str(FORGETTING), "--to", "here", "--public"), "--public is for the hub, and here is a folder"),
        ((str(FORGETTING), "--to", "file"), "--to file is a file"),
        (("nowhere",), "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_published_is_one_line(ask: Ask, tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    (tmp_path / "file").touch()
    code, _, errors = ask("publish", *arguments)
    assert code == 2
    assert text in errors
