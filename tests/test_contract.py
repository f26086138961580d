"""What every launcher keeps to: the same records, the same failures, the same resume, whoever runs the trials."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from test_launch import Watch, go, grid_of

from harness.launch.cluster import RayLauncher
from harness.launch.inline import InlineLauncher
from harness.launch.launcher import Launcher
from harness.launch.local import LocalLauncher
from harness.launch.scheduler import SubmititLauncher
from harness.results.store import Store
from harness.runner.execution import Policy
from harness.runner.grid_run import pending
from harness.sources import fingerprints
from harness.spec.trial import TrialSpec
from harness.training import checkpoints

Small = Callable[..., TrialSpec]


@pytest.fixture(scope="module", params=["inline", "local", "ray", "submitit"])
def launcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Each of them in turn."""
    made: dict[str, Callable[[], Launcher]] = {
        "inline": InlineLauncher,
        "local": LocalLauncher,
        "ray": lambda: RayLauncher(cpus=1, most_workers=1),
        "submitit": lambda: SubmititLauncher("local", cpus=1, folder=tmp_path_factory.mktemp("jobs")),
    }
    with made[request.param]() as entered:
        if request.param == "inline":
            # The first trial of a process makes a few constants that libraries keep.
            go(grid_of(first=TrialSpec.model_validate(SMALL)), Store(tmp_path_factory.mktemp("first")), entered)
        yield entered


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a trial in a process of this machine."""
    with LocalLauncher() as local:
        spec = TrialSpec.model_validate(SMALL | {"save_adapter": True})
        store = Store(tmp_path_factory.mktemp("reference"))
        go(grid_of(one=spec), store, local)
    return {"losses": store.read("steps")["loss"].to_pylist(), "row": store.read("trials").to_pylist()[0]}


def test_the_same_record(small: Small, tmp_path: Path, launcher: Launcher, reference: dict[str, Any]) -> None:
    store = Store(tmp_path)
    watch = Watch()
    go(grid_of(one=small(save_adapter=True)), store, launcher, watch)
    row = store.read("trials").to_pylist()[0]
    assert row["status"] == "ok", row["error"]
    assert store.read("steps")["loss"].to_pylist() == reference["losses"]
    for name in ("peak_memory_bytes", "adapter_bytes", "trained_tokens", "flops_per_token", "adapter_id"):
        assert row[name] == reference["row"][name], name
    assert row["log"] is None
    assert (tmp_path / "adapters" / row["adapter_id"] / "adapter_model.safetensors").is_file()
    assert [value for _, kind, value in watch.seen if kind == "phase" and value in ("load", "evaluate", "save")] == [
        "load", "evaluate", "evaluate", "save",
    ]  # fmt: skip


def test_the_same_loss_before_training(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    """Once measured it travels to the next trial, to the bit."""
    base = tmp_path / "base"
    shutil.copytree(checkpoints.checkpoint_folder("random:tiny"), base)
    checkpoints.byte_tokenizer().save_pretrained(base)
    store = Store(tmp_path / "g")
    go(grid_of(first=small(base_model=str(base))).with_contents(fingerprints.of), store, launcher)
    (row,) = store.read("trials").to_pylist()
    stories = store.read("stories").to_pylist()
    mark = {"loss": 0.1 + 0.2}  # no loss of this model: who has it did not measure
    store.replace_rows(row["trial_id"], {"stories": [s | mark if s["when"] == "before" else s for s in stories]})
    grid = grid_of(second=small(base_model=str(base), lora_r=8)).with_contents(fingerprints.of)
    (second,) = go(grid, store, launcher).records
    assert (second.status, second.metrics["eval_loss_before"]) == ("ok", pytest.approx(mark["loss"]))
    assert [s.loss for s in second.stories if s.when == "before"] == [mark["loss"]] * 2


def test_the_same_failures(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    grid = grid_of(
        raises=small(excess_length="raise", sequence_length=32),
        too_large=small(memory_budget=3_000_000),
        explodes=small(learning_rate=1e30),
        after=small(),
    )
    store = Store(tmp_path)
    go(grid, store, launcher, policy=Policy(retries=2))
    rows = {row["label"]: row for row in store.read("trials").to_pylist()}
    assert {label: (row["status"], row["phase"], row["attempt"]) for label, row in rows.items()} == {
        "raises": ("failed", "load", 1),
        "too_large": ("oom", "forward", 1),
        "explodes": ("diverged", "forward", 1),
        "after": ("ok", None, 1),
    }
    held, asked = (rows["too_large"][f"oom_{what}_bytes"] for what in ("reached", "requested"))
    assert held <= 3_000_000 < held + asked
    assert "Traceback" in (tmp_path / rows["raises"]["log"]).read_text()


def test_the_same_resume(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    grid = grid_of(**{f"t{seed}": small(seed=seed) for seed in range(3)})
    store = Store(tmp_path)
    watch = Watch("t1", "load", lambda: os.kill(os.getpid(), signal.SIGINT))
    first = go(grid, store, launcher, watch)
    assert ([r.label for r in first.records], first.left) == (["t0", "t1"], 1), "an interrupt finishes what is running"
    assert [trial.label for trial in pending(grid, store, launcher)] == ["t2"]
    second = go(grid, store, launcher)
    assert ([r.label for r in second.records], second.skipped) == (["t2"], 2)
    assert go(grid, store, launcher).records == ()
    assert len(store.start_times()) == 3
    again = go(grid, store, launcher, rerun=frozenset({"ok"}), limit=1)
    assert len(again.records) == 1
    assert len(store.start_times()) == 3


def test_the_same_stop(small: Small, tmp_path: Path, launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two interrupts stop what is running, and nothing of it is recorded."""

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not any(kind == "interrupted" for _, kind, _ in watch.seen):  # two at once are one
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    watch = Watch("e0", "load", twice)
    store = Store(tmp_path)
    if not isinstance(launcher, InlineLauncher):
        monkeypatch.setattr(launcher, "workers", 2)
    endless = {f"e{seed}": small(train_samples=50_000, seed=seed) for seed in range(launcher.workers)}
    with pytest.raises(KeyboardInterrupt):
        go(grid_of(**endless), store, launcher, watch)
    assert not store.completed()
    assert not list((tmp_path / "leases").glob("*.json"))
    (record,) = go(grid_of(after=small()), store, launcher).records
    assert record.status == "ok", "what it held is free again"


def test_the_same_end_of_what_takes_too_long(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    if isinstance(launcher, InlineLauncher):
        pytest.skip("nothing watches the runner's own process")
    grid = grid_of(endless=small(train_samples=50_000))
    (record,) = go(grid, Store(tmp_path), launcher, policy=Policy(timeout=3)).records
    assert (record.status, record.error_type) == ("timeout", "Timeout")
