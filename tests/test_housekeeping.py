"""Looking after results: what is damaged is named, folders are joined, leftovers go, and nothing that was measured."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_results import record

from harness.results.store import Store
from harness.runner.leases import Leases
from harness.spec.trial import TrialSpec

Small = Callable[..., TrialSpec]
Command = Callable[..., tuple[int, str, str]]
GRID = "name: g\nbase: {base_model: random:tiny, lora_r: 4}\nvary: {lora_r: [8, 16], lora_alpha: [32]}\n"


@pytest.fixture
def harness(ask: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`ask` with a cache of its own, and Python's way of showing warnings put back afterwards."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("warnings.showwarning", None)  # the command sets its own
    return ask


@pytest.fixture
def store(small: Small, tmp_path: Path) -> Store:
    """Three trials, one of which failed and one of which kept an adapter."""
    kept = Store(tmp_path / "results/g")
    kept.write(record(small(), adapter_id="0123456789abcdef"))
    kept.write(record(small(seed=1)))
    failed = {"status": "failed", "phase": "load", "error": "x", "error_type": "X", "metrics": {}, "log": "logs/x.log"}
    kept.write(record(small(seed=2), **failed))
    return kept


def fill(folder: Path, *names: str, hours: float = 2.0) -> None:
    """Files that were last written so long ago."""
    then = time.time() - 3600 * hours
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("a" * 1000)
        for entry in (folder / name, (folder / name).parent):
            os.utime(entry, (then, then))


def test_the_doctor_names_what_is_damaged(harness: Command, store: Store, small: Small) -> None:
    code, printed, _ = harness("doctor", "results")
    assert code == 0
    assert "yes g: trials: 2 ok, 1 failed" in printed
    name = f"{record(small()).trial_id}.parquet"
    (store.folder / "trials" / name).write_bytes(b"PAR1")
    code, printed, warned = harness("doctor", "results/g")
    assert code == 1
    assert f"no  g/trials/{name}: not a readable parquet file" in printed
    assert "sets it aside" in printed
    assert not warned
    code, printed, warned = harness("ls", "g")
    assert code == 0
    assert len(warned.splitlines()) == 1, "one warning"
    assert f"{name}: not a readable" in warned


def test_folders_are_joined(harness: Command, store: Store, small: Small, tmp_path: Path) -> None:
    other = Store(tmp_path / "laptop/g")
    other.write(record(small(seed=7)))
    Store(tmp_path / "laptop/h").write(record(small()))
    code, printed, _ = harness("merge-results", "laptop", "results")
    assert code == 0
    assert "laptop/g into results/g: 1 trials added, 0 replaced by later records, 0 there already" in printed
    assert len(store.read("trials")) == 4
    assert len(Store(tmp_path / "results/h").read("trials")) == 1
    code, printed, _ = harness("merge-results", "laptop/g", "laptop/h", "both")
    assert code == 0
    assert len(Store(tmp_path / "both").read("trials")) == 2
    for arguments, says in (
        (("results",), "two folders or more"),
        (("results", "results"), "cannot be joined to itself"),
        (("nowhere", "results"), "nothing is recorded there"),
    ):
        code, _, error = harness("merge-results", *arguments)
        assert (code, len(error.splitlines())) == (2, 1)
        assert says in error


def test_cleaning_takes_leftovers_and_no_results(harness: Command, store: Store, tmp_path: Path) -> None:
    kept = ("logs/x.log", "adapters/0123456789abcdef/adapter_model.safetensors")
    recent = ("adapters/.b.1.aside/half", "adapters/aaaaaaaaaaaaaaaa/adapter_model.safetensors")
    left = ("logs/y.log", "adapters/fedcba9876543210/adapter_model.safetensors", "adapters/.a.1.aside/half",
            "trials/.b.parquet.1.aside", "leases/gone.json")  # fmt: skip
    fill(store.folder, *kept, *left)
    fill(store.folder, *recent, hours=0.0)
    fill(tmp_path / "cache", "rates-1.json", "vega-1.js", "random-tiny-1/model.safetensors", "thesis.txt")
    before = store.read("trials")

    code, printed, _ = harness("clean", "--dry-run")
    assert code == 0
    assert "5 files and folders, 4.88 KiB would be freed" in printed
    assert all((store.folder / name).exists() for name in (*kept, *recent, *left))

    assert Leases(store.folder).take("t")
    code, printed, _ = harness("clean")
    assert "0 files and folders" in printed, "a runner is running there"
    (store.folder / "leases/t.json").unlink()

    code, printed, _ = harness("clean")
    assert "5 files and folders, 4.88 KiB freed" in printed
    assert all((store.folder / name).exists() for name in (*kept, *recent)), "somebody may be at the recent ones"
    assert not any((store.folder / name).exists() for name in left)
    assert store.read("trials").equals(before)
    code, printed, _ = harness("clean", "--cache")
    assert "3 files and folders" in printed
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["thesis.txt"], "what is not ours stays"

    fill(store.folder, "adapters/fedcba9876543210/adapter_model.safetensors", "set-aside/trials-1-a.parquet")
    code, printed, _ = harness("clean")
    assert "0 files and folders" in printed, "a row that was set aside may name it"


def test_only_some_trials_and_the_baseline(harness: Command, tmp_path: Path) -> None:
    (tmp_path / "g.yml").write_text(GRID)
    _, printed, _ = harness("run", "g.yml", "--dry-run", "--only", "lora_r=*")
    assert "4 trials, 4 to run" in printed
    assert [label in printed for label in ("lora_r=8", "lora_r=16", "baseline again", "lora_alpha")] == [True] * 3 + [
        False
    ]
    _, printed, _ = harness("run", "g.yml", "--dry-run", "--only", "lora_r=8", "--only", "lora_alpha=32")
    assert "4 trials" in printed
    code, _, error = harness("run", "g.yml", "--dry-run", "--only", "lora_r=9")
    assert code == 2
    assert "unknown trial 'lora_r=9'; did you mean lora_r=8?" in error
    assert len(error.splitlines()) == 1


def test_a_full_disk_is_one_line(harness: Command, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results/g/trials/x.parquet")

    monkeypatch.setattr("os.replace", full)
    code, _, error = harness("merge-results", "results/g", "results/h")
    assert code == 1
    assert error == (
        "harness: No space left on device: results/g/trials/x.parquet; what was finished is kept: free some space, "
        "and run the same again\n"
    )
