"""Jobs of a scheduler: what tests/test_contract.py does not show of them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import SMALL
from test_cli import Ask
from test_launch import Watch, go, grid_of

from harness.errors import InputError
from harness.launch.scheduler import SubmititLauncher, serve
from harness.results.store import Store
from harness.runner.execution import Policy
from harness.spec.trial import TrialSpec

Small = Callable[..., TrialSpec]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SubmititLauncher]:
    with SubmititLauncher("local", cpus=1, folder=tmp_path_factory.mktemp("jobs")) as entered:
        yield entered


def kill_jobs() -> None:
    """As when a node fails, or a job is pre-empted: all of its processes at once."""
    for child in psutil.Process().children():
        if "submitit.local._local" in child.cmdline():
            for process in (*child.children(recursive=True), child):
                process.send_signal(signal.SIGKILL)


def test_a_lost_job_ends_its_trial_and_another_one_tries_again(
    small: Small, tmp_path: Path, launcher: SubmititLauncher
) -> None:
    lost = go(
        grid_of(one=small(train_samples=50_000)), Store(tmp_path / "a"), launcher, Watch("one", "load", kill_jobs)
    )
    (record,) = lost.records
    assert (record.status, record.error_type, record.phase) == ("killed", "WorkerExit", "load")
    assert "the job was lost (job " in str(record.error)
    watch = Watch("one", "load", kill_jobs)
    again = go(grid_of(one=small()), Store(tmp_path / "b"), launcher, watch, policy=Policy(retries=1))
    assert [(r.status, r.attempt) for r in again.records] == [("ok", 2)]
    assert again.records[0].node == os.uname().nodename


def test_one_job_takes_one_trial_after_another(small: Small, tmp_path: Path, launcher: SubmititLauncher) -> None:
    done = go(grid_of(one=small(), two=small(seed=1)), Store(tmp_path), launcher)
    assert [r.status for r in done.records] == ["ok", "ok"]
    jobs = [p for p in psutil.Process().children() if "submitit.local._local" in p.cmdline()]
    assert len(jobs) == 1
    assert {r.environment.id for r in done.records} == {e.id for e in launcher.environments("cpu")}


def test_a_job_that_comes_back_under_its_number_ends(tmp_path: Path) -> None:
    """A cluster may requeue it: the trial that it had is lost, and tried again in another job."""
    (tmp_path / "environment.json").touch()
    serve(str(tmp_path), "cpu", None, {}, 0.01)
    assert [each.name for each in tmp_path.iterdir()] == ["environment.json"]


def test_an_array(small: Small, tmp_path: Path) -> None:
    """All jobs are asked for at once, and take the trials between them."""
    jobs = tmp_path / "jobs"
    others = psutil.Process().children()
    with SubmititLauncher("local", workers=2, cpus=1, array=True, folder=jobs) as launcher:
        asked = [p for p in psutil.Process().children() if "submitit.local._local" in p.cmdline() and p not in others]
        assert len(asked) == 2
        specs = {f"t{seed}": small(seed=seed) for seed in range(4)}
        done = go(grid_of(**specs), Store(tmp_path / "g"), launcher)
        assert [r.status for r in done.records] == ["ok"] * 4
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in asked)


def test_from_the_command_line(ask: Ask, tmp_path: Path) -> None:
    keys = SMALL | {"device": "cpu", "train_samples": 4}
    (tmp_path / "g.yml").write_text(f"name: g\nvisits: 0\nbase: {keys}\nvary: {{lora_r: [8]}}\n")
    command = ("run", "g.yml", "--engine", "submitit", "--partition", "local", "--workers", "2", "--cpus", "1",
               "--array")  # fmt: skip
    code, _, errors = ask(*command)
    assert code == 0, errors
    rows = Store(tmp_path / "results/g").read("trials").to_pylist()
    assert {row["label"]: row["status"] for row in rows} == {
        "baseline": "ok", "baseline again": "ok", "lora_r=8": "ok",
    }  # fmt: skip
    assert not (tmp_path / ".harness-jobs").exists()
    assert "nothing to run" in ask(*command)[1]


def test_what_cannot_be(ask: Ask, tmp_path: Path) -> None:
    if shutil.which("sbatch") is None:
        with pytest.raises(InputError, match="there is no sbatch here"), SubmititLauncher():
            pass
    (tmp_path / "g.yml").write_text(f"name: g\nbase: {SMALL}\n")
    for options, message in {
        ("--partition", "gpu"): "--partition goes with --engine submitit",
        ("--engine", "ray", "--job-minutes", "5"): "--job-minutes goes with --engine submitit",
        ("--array",): "--array goes with --engine submitit",
        ("--cpus", "1"): "--cpus goes with --engine ray or submitit",
        ("--engine", "submitit", "--workers", "auto"): "say how many jobs",
    }.items():
        code, _, errors = ask("run", "g.yml", *options)
        assert code == 2
        assert message in " ".join(errors.split())
