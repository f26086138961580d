"""Trials in processes of their own: every end is a row, and the grid goes on."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import formula
import psutil
import pytest

from harness import environment
from harness._util.processes import ProcessIdentity
from harness.errors import InputError
from harness.grids import document
from harness.grids.grid import Grid, Trial
from harness.launch import exit_status
from harness.launch.launcher import Launcher
from harness.launch.local import LocalLauncher
from harness.launch.logs import MOST_BYTES
from harness.launch.watchdog import Watchdog
from harness.record import Job, Record, trial_id
from harness.results.store import Store
from harness.runner.execution import Policy
from harness.runner.grid_run import Summary, pending, run_grid
from harness.runner.leases import EXPIRES_SECONDS, Leases
from harness.sources.models import ARCHITECTURES
from harness.spec.trial import TrialSpec

Small = Callable[..., TrialSpec]


class Watch:
    """A display that keeps its events, and does something at a phase of one trial."""

    def __init__(self, label: str = "", phase: str = "", act: Callable[[], None] = lambda: None) -> None:
        self.label, self.phase, self.act = label, phase, act
        self.running = ""
        self.seen: list[tuple[str, str, Any]] = []
        self.times: list[float] = []

    def begin(self, total: int, skipped: int, visits: int = 0, visit_seconds: float = 0.0) -> None:
        self.total, self.skipped, self.visits = total, skipped, visits

    def trial(self, number: int, job: Job) -> None:
        self.running = job.label
        self.launched = time.time()

    def event(self, kind: str, value: Any) -> None:
        self.seen.append((self.running, kind, value))
        if (self.running, value) == (self.label, self.phase):
            self.phase = ""
            self.act()

    def retried(self, record: Record) -> None:
        self.seen.append((record.label, "retried", record.status))

    def finished(self, record: Record) -> None:
        pass

    def waiting(self, count: int) -> None:
        self.seen.append(("", "waiting", count))

    def interrupted(self) -> None:
        self.seen.append((self.running, "interrupted", None))

    def child_display(self) -> Watch:
        return Watch(self.label, self.phase, self.act)


class Acts(Watch):
    """Does something at a phase of each of several trials, once or so many times."""

    def __init__(self, phase: str, acts: dict[str, Callable[[], None]], times: int = 1) -> None:
        super().__init__()
        self.at, self.acts, self.left = phase, acts, dict.fromkeys(acts, times)

    def event(self, kind: str, value: Any) -> None:
        super().event(kind, value)
        if value == self.at and self.left.get(self.running, 0):
            self.left[self.running] -= 1
            self.acts[self.running]()


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with LocalLauncher() as started:
        yield started


def grid_of(**specs: TrialSpec) -> Grid:
    return Grid("test", "test", "list", tuple(Trial(s, label, None, None) for label, s in specs.items()))


def go(grid: Grid, store: Store, launcher: Launcher, watch: Watch | None = None, **options: Any) -> Summary:
    return run_grid(grid, store, launcher, watch or Watch(), **options)


def workers() -> list[psutil.Process]:
    """Processes forked from the fork server."""
    servers = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    return [child for server in servers for child in server.children()]


def pending_id(spec: TrialSpec) -> str:
    return trial_id(spec, environment.current("cpu"))


def kill_server() -> None:
    for worker in workers():
        parent = worker.parent()
        assert parent is not None
        parent.kill()


def kill_worker() -> None:
    for worker in workers():
        os.kill(worker.pid, signal.SIGKILL)


def stop_worker() -> None:
    for worker in workers():
        worker.suspend()


def crash_worker() -> None:
    for worker in workers():
        os.kill(worker.pid, signal.SIGSEGV)


@pytest.mark.long
def test_every_end_is_a_row_and_the_rest_completes(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    grid = grid_of(
        first=small(),
        murdered=small(seed=1),
        crashes=small(seed=3),
        raises=small(excess_length="raise"),
        too_large=small(memory_budget=4_000_000),
        explodes=small(learning_rate=1e30),
        last=small(seed=2),
    )
    endless = grid_of(endless=small(train_samples=5_000))
    store = Store(tmp_path)
    shared = set(Path("/dev/shm").iterdir())  # noqa: S108 - where a process could leave something
    acts = {"murdered": kill_worker, "crashes": crash_worker}
    go(grid, store, launcher, Acts("backward", acts))
    go(grid_of(hangs=small(seed=4)), store, launcher, Acts("backward", {"hangs": stop_worker}), policy=Policy(stall=3))
    go(endless, store, launcher, policy=Policy(timeout=10))  # to load it takes a few seconds on slow cores

    rows = {row["label"]: row for row in store.read("trials").to_pylist()}
    ends = {label: (row["status"], row["phase"]) for label, row in rows.items()}
    # From outside a trial is cut off in whichever part of a step it is by then.
    cut = {label: ends.pop(label) for label in ("murdered", "crashes", "hangs", "endless")}
    assert {label: status for label, (status, _) in cut.items()} == {
        "murdered": "killed", "crashes": "killed", "hangs": "timeout", "endless": "timeout",
    }  # fmt: skip
    assert {phase for _, phase in cut.values()} <= {"forward", "backward", "optimizer"}
    assert ends == {
        "first": ("ok", None),
        "raises": ("failed", "load"),
        "too_large": ("oom", "forward"),
        "explodes": ("diverged", "forward"),
        "last": ("ok", None),
    }
    kinds = {label: row["error_type"] for label, row in rows.items() if row["status"] in ("killed", "timeout")}
    assert kinds == {"murdered": "SIGKILL", "crashes": "SIGSEGV", "hangs": "Stall", "endless": "Timeout"}
    assert "excess_length" in rows["raises"]["error"]
    held, asked = rows["too_large"]["oom_reached_bytes"], rows["too_large"]["oom_requested_bytes"]
    assert held <= 4_000_000 < held + asked
    assert rows["endless"]["trial_seconds"] >= 6
    assert rows["endless"]["peak_process_bytes"] > 2**27
    assert "Segmentation fault" in (tmp_path / rows["crashes"]["log"]).read_text()
    assert "Traceback" in (tmp_path / rows["raises"]["log"]).read_text()
    for label, row in rows.items():
        assert (row["trained_tokens"] is not None) == (row["status"] == "ok"), label
        assert (row["log"] is None) == (row["status"] == "ok"), label
    assert not workers(), "no process is left behind"
    assert set(Path("/dev/shm").iterdir()) <= shared, "nor shared memory"  # noqa: S108

    again = Watch()
    assert go(grid, store, launcher, again).skipped == 7
    assert again.total == 0
    assert [t.label for t in pending(grid, store, launcher, frozenset({"killed", "oom"}))] == [
        "murdered",
        "crashes",
        "too_large",
    ]


@pytest.mark.long
def test_a_lost_worker_is_tried_again(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    """Killed, and lost with its server; not what crashes by itself or fails."""
    store = Store(tmp_path)
    acts = {"killed": kill_worker, "orphaned": kill_server, "crashes": crash_worker}
    grid = grid_of(killed=small(), orphaned=small(seed=1), crashes=small(seed=2), raises=small(excess_length="raise"))
    watch = Acts("forward", acts)
    go(grid, store, launcher, watch, policy=Policy(retries=2))
    rows = {row["label"]: row for row in store.read("trials").to_pylist()}
    assert {label: (row["status"], row["attempt"]) for label, row in rows.items()} == {
        "killed": ("ok", 2),
        "orphaned": ("ok", 2),
        "crashes": ("killed", 1),
        "raises": ("failed", 1),
    }
    assert [label for label, kind, _ in watch.seen if kind == "retried"] == ["killed", "orphaned"]

    # For ever is not tried either, and what takes too long only where it is asked for.
    always = Acts("forward", {"k": kill_worker}, times=9)
    go(grid_of(k=small(seed=5)), store, launcher, always, policy=Policy(retries=1))
    assert store.recent_row(pending_id(small(seed=5)))["attempt"] == 2  # type: ignore[index]  # it is there
    for asked, attempts in ((False, 1), (True, 2)):
        slow = Acts("forward", {"s": stop_worker}, times=9)
        policy = Policy(stall=0.6, retries=1, retry_timeouts=asked)
        go(grid_of(s=small(seed=6)), store, launcher, slow, policy=policy, rerun=frozenset({"timeout"}))
        assert store.recent_row(pending_id(small(seed=6)))["attempt"] == attempts  # type: ignore[index]  # as above


def test_a_server_that_dies_while_it_starts_a_worker(
    small: Small, tmp_path: Path, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial is lost, and tried again with another server."""
    start, failures = BaseProcess.start, [EOFError("unexpected EOF"), ConnectionResetError(104, "reset")]

    def failing(process: Any) -> None:
        if failures:
            raise failures.pop()
        start(process)

    monkeypatch.setattr(BaseProcess, "start", failing)
    (record,) = go(grid_of(one=small()), Store(tmp_path), launcher, policy=Policy(retries=2)).records
    assert (record.status, record.attempt) == ("ok", 3)


def test_a_worker_that_takes_long_to_die_died_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts the kill at once; the process looks alive until it has given its memory back."""
    clock, killed = [0.0], [0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(exit_status, "oom_kills", lambda: (killed[0],))

    def ended_after(seconds: float) -> str:
        clock[0], killed[0] = 0.0, 0
        watchdog = Watchdog(None, None)
        watchdog.begin(os.getpid())
        for _ in range(100):
            clock[0] += 1
            watchdog.look()
        killed[0] += 1
        for _ in range(int(seconds)):
            clock[0] += 1
            watchdog.look()
        return exit_status.classify_exit(-signal.SIGKILL, watchdog.oom_kills_before, tmp_path / "log").status

    assert (ended_after(0), ended_after(3)) == ("oom", "oom")
    assert ended_after(60) == "killed", "a minute earlier it was another process"


def test_a_kill_by_the_kernel_is_out_of_memory(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    """In a control group of its own, so that the kernel finds nobody else to end."""
    group = Path("/sys/fs/cgroup/memory/harness-test")
    if not (group.parent / "memory.limit_in_bytes").exists():
        group = Path("/sys/fs/cgroup/harness-test")
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    try:
        limits = [group / "memory.limit_in_bytes", group / "memory.max"]

        def confine() -> None:
            for worker in workers():
                (group / "cgroup.procs").write_text(str(worker.pid))
            next(limit for limit in limits if limit.exists()).write_text(str(2**24))

        grid = grid_of(huge=small(base_model="random:smollm2-135m", max_steps=3, train_samples=None))
        go(grid, Store(tmp_path), launcher, Acts("load", {"huge": confine}))
    except PermissionError:
        pytest.skip("a control group gets no process here")
    finally:
        group.rmdir()
    row = Store(tmp_path).read("trials").to_pylist()[0]
    assert (row["status"], row["error_type"], row["phase"]) == ("oom", "HostOutOfMemory", "load")
    assert "the kernel ended the worker" in row["error"]


def test_out_of_memory_in_each_phase(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    """By a budget that is passed there; when saving by an allocator that has none left."""
    wide = ARCHITECTURES["tiny"] | {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
    (tmp_path / "wide.json").write_text(json.dumps(wide))
    # So many weights that state and gradients of all are more than the activations of a few tokens.
    heavy = {"base_model": f"random:{tmp_path / 'wide.json'}", "adapter": "none", "micro_batch_size": 1}
    budgets = {"load": 300_000, "evaluate": 1_000_000, "forward": 4_000_000, "backward": 7_500_000}
    specs = {phase: small(memory_budget=budget) for phase, budget in budgets.items()}
    specs["optimizer"] = small(memory_budget=110_000_000, **heavy)
    store = Store(tmp_path / "g")
    go(grid_of(**specs, enough=small(memory_budget=8_000_000)), store, launcher)
    go(grid_of(save=small(save_adapter=True)), store, LocalLauncher(child=without_memory_to_save))
    go(grid_of(after=small(seed=1)), store, launcher)

    rows = {row["label"]: row for row in store.read("trials").to_pylist()}
    ends = {label: (row["status"], row["phase"]) for label, row in rows.items()}
    assert ends.pop("enough") == ends.pop("after") == ("ok", None)
    assert ends == {phase: ("oom", phase) for phase in (*budgets, "optimizer", "save")}
    for phase in (*budgets, "optimizer"):
        held, asked = (rows[phase][f"oom_{what}_bytes"] for what in ("reached", "requested"))
        assert held <= rows[phase]["memory_budget"] < held + asked, phase
    assert rows["save"]["oom_requested_bytes"] == 2**50
    assert rows["save"]["adapter_id"] is None
    assert not list((store.folder / "adapters").iterdir())


def without_memory_to_save(job: str, options: dict[str, Any], channel: Any) -> None:
    import torch

    from harness.training import saved_adapters, worker

    def write(network: Any, spec: TrialSpec, folder: Path, *, weights: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "half").write_text("half")
        torch.empty(2**50, dtype=torch.uint8)  # more than any machine has

    saved_adapters.write = write
    worker.main(job, options, channel)


def test_a_log_has_a_limit_and_no_secrets(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: Launcher
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "open-sesame-1")
    go(grid_of(one=small()), Store(tmp_path), LocalLauncher(child=chatty))
    row = Store(tmp_path).read("trials").to_pylist()[0]
    assert (row["status"], row["error_type"]) == ("failed", "WorkerExit")
    assert row["error"].endswith("the last word")
    text = (tmp_path / row["log"]).read_text()
    assert 0.8 * MOST_BYTES < len(text) < MOST_BYTES + 1000
    assert text.startswith("the first word\n~/secret and https://[hidden]@host\n")
    assert "bytes left out]" in text
    assert "sesame" not in text


def chatty(job: str, options: dict[str, Any], channel: Any) -> None:
    print("the first word")
    print(f"{Path.home()}/secret and https://me:open-sesame-1@host", flush=True)
    for number in range(100_000):
        print(f"line {number} open-sesame-1 hf_abcdefghijklmnopqrst")
    print("the last word", flush=True)
    os._exit(3)


def test_a_full_disk_stops_the_run_and_loses_nothing(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    """A disk that has no room for an adapter, then none for a row, then enough."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        store = Store(disk / "g")
        grid = grid_of(one=small(), two=small(save_adapter=True, lora_r=512), three=small(seed=1))
        with pytest.raises(OSError, match="No space left on device"):
            go(grid, store, launcher)
        assert store.completed().keys() == {pending_id(small())}, "the adapter had no room, and no row says it failed"
        assert not [*(disk / "g/adapters").iterdir()], "nor is half of it left"
        first = store.start_times()

        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        with pytest.raises(OSError, match="No space left on device"):
            go(grid_of(three=small(seed=1)), store, launcher)
        assert store.start_times() == first
        assert not store.damage()

        (disk / "filler").unlink()
        subprocess.run(["/bin/mount", "-o", "remount,size=64m", disk], check=True)
        assert {r.status for r in go(grid, store, launcher).records} == {"ok"}
        assert len(store.start_times()) == 3
        assert first.items() <= store.start_times().items()
    finally:
        subprocess.run(["/bin/umount", "-l", disk], check=True)


def test_an_interrupt_finishes_the_running_trial_and_two_stop_it(
    small: Small, tmp_path: Path, launcher: Launcher
) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    grid = grid_of(one=small(), two=small(seed=1), three=small(seed=2))
    store = Store(tmp_path)
    summary = go(grid, store, launcher, Watch("one", "forward", interrupt))
    assert [r.status for r in summary.records] == ["ok"]
    assert summary.left == 2

    def twice() -> None:
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        go(grid, store, launcher, Watch("two", "forward", twice))
    assert len(store.completed()) == 1, "the finished trial is kept, the stopped one is not recorded"
    assert not workers()
    assert go(grid, store, launcher).skipped == 1
    assert len(store.completed()) == 3


def test_a_worker_leaves_when_its_runner_is_gone(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from harness.launch.launcher import Attempt\n"
        "from harness.launch.local import LocalLauncher\n"
        "from harness.record import Job\n"
        "job = Job.model_validate_json(sys.argv[1])\n"
        "with LocalLauncher() as launcher:\n"
        "    options = {'folder': 'adapters', 'trust_remote_code': False, 'placement': None}\n"
        "    attempt = Attempt(job, options, Path(sys.argv[2]))\n"
        "    launcher.run(attempt, lambda kind, value: print(kind, flush=True))\n"
    )
    job = Job(grid="test", spec=small(train_samples=1_000_000), label="endless")
    runner = subprocess.Popen(
        [sys.executable, "-c", script, job.model_dump_json(), str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert runner.stdout is not None
    assert any(line == "step\n" for line in runner.stdout), "it trains"
    family = psutil.Process(runner.pid).children(recursive=True)
    runner.kill()
    runner.wait()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive


def test_same_spec_same_losses_in_every_process(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    grid = grid_of(one=small(lora_dropout=0.1))
    losses = []
    for name in ("a", "b"):
        store = Store(tmp_path / name)
        go(grid, store, launcher)
        losses.append(store.read("steps")["loss"].to_pylist())
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_adapter_is_kept_when_asked(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    spec = small(save_adapter=True)
    go(grid_of(one=spec), Store(tmp_path), launcher)
    row = Store(tmp_path).read("trials").to_pylist()[0]
    folder = tmp_path / "adapters" / row["adapter_id"]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "random:tiny"
    assert (folder / "adapter_config.json").is_file()
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        saved = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 - no mapping
    assert row["adapter_bytes"] == saved == 4 * row["trainable_parameters"]


# ------------------------------------------------------------------------------------ several workers


def test_trials_side_by_side_share_the_machine(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    """Each has a core of its own, records that another one ran, and has the peak of a trial that ran alone. They are of
    several repeats, between which nothing is timed."""
    listed = grid_of(**{f"t{seed}": small(seed=seed) for seed in range(4)})
    repeats = tuple(replace(trial, repeat=trial.spec.seed) for trial in listed.trials)
    grid = replace(listed, trials=repeats, timing=document.NO_TIMING)
    both, alone = Store(tmp_path / "both"), Store(tmp_path / "alone")
    cores: list[tuple[int, ...]] = []
    watch = Watch("t0", "backward", lambda: cores.extend(tuple(w.cpu_affinity() or ()) for w in workers()))
    two_workers = LocalLauncher(workers=2)
    summary = go(grid, both, two_workers, watch)
    assert cores
    assert {len(each) for each in cores} == {len(os.sched_getaffinity(0)) // 2}
    assert len(set(cores)) == len(cores), "each has cores of its own"
    assert (len(summary.records), summary.left, summary.by_others) == (4, 0, 0)
    go(grid, alone, launcher)
    records = {record.label: record for record in summary.records}
    for record in records.values():
        assert record.status == "ok"
        assert record.environment.concurrent_trials == 1
        assert record.environment.cpu_cores == len(os.sched_getaffinity(0)) // 2
    begun = sorted((r.started_at, r.metrics["trial_seconds"]) for r in records.values())
    assert (begun[1][0] - begun[0][0]).total_seconds() < (begun[0][1] or 0), "they overlap"
    assert {r["environment_id"] for r in both.read("trials").to_pylist()}.isdisjoint(
        r["environment_id"] for r in alone.read("trials").to_pylist()
    ), "speeds of concurrent trials are not compared with others"
    peaks = [{r["label"]: r["peak_memory_bytes"] for r in s.read("trials").to_pylist()} for s in (both, alone)]
    assert peaks[0] == peaks[1]
    assert go(grid, both, two_workers).skipped == 4
    assert len(pending(grid, both, launcher)) == 4, "alone they would be other measurements"


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,)])
def test_an_interrupt_stops_all_workers(small: Small, tmp_path: Path, numbers: tuple[signal.Signals, ...]) -> None:
    endless = {f"e{seed}": small(seed=seed, train_samples=1_000_000) for seed in range(3)}

    def stop() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            go(grid_of(**endless), Store(tmp_path), LocalLauncher(workers=2), Watch("e0", "forward", stop))
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, former)
    assert not workers()
    assert not Store(tmp_path).completed()
    assert not list((tmp_path / "leases").glob("*.json"))


def test_a_disk_error_of_one_worker_ends_the_run(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    class Full(Store):
        def write(self, record: Record) -> None:
            if record.label == "bad":
                raise OSError(28, "No space left on device")
            super().write(record)

    grid = grid_of(bad=small(), **{f"t{seed}": small(seed=seed) for seed in range(1, 9)})
    with pytest.raises(OSError, match="No space left"):
        go(grid, Full(tmp_path), LocalLauncher(workers=2))
    assert len(Store(tmp_path).completed()) < 8, "nothing further is begun"


@pytest.mark.parametrize(
    ("count", "cards", "says"),
    [
        (1000, [], "1000 workers, and"),
        (2, ["H100"], "2 workers, and 1 cards; give --workers 1 at most"),
        (2, ["H100", "L4"], r"the cards differ \(H100, L4\)"),
    ],
)
def test_a_machine_too_small_for_the_workers(
    count: int, cards: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible = tuple({"token": str(i), "name": name, "memory_bytes": 1, "driver": "1"} for i, name in enumerate(cards))
    monkeypatch.setattr(environment, "cards", lambda: visible)
    with pytest.raises(InputError, match=says):
        environment.divide_machine(count, "cuda" if cards else "cpu")


def test_a_card_and_its_cores_for_each_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    visible = tuple({"token": str(i), "name": "H100", "memory_bytes": 1, "driver": "1"} for i in (2, 5))
    monkeypatch.setattr(environment, "cards", lambda: visible)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4})
    assert environment.divide_machine(2, "cuda") == [
        environment.Placement(cores=(0, 1), card="2", concurrent_trials=1),
        environment.Placement(cores=(2, 3), card="5", concurrent_trials=1),
    ]


# ------------------------------------------------------------------------------------ several runners

RUNNER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import formula
from test_launch import Watch, formula_grid
from harness.launch.local import LocalLauncher
from harness.results.store import Store
from harness.runner.execution import Policy
from harness.runner.grid_run import run_grid
with LocalLauncher(child=formula.child, preload="harness.grids.search") as launcher:
    print("ready", flush=True)
    sys.stdin.readline()
    grid, store = formula_grid({trials}), Store(Path({folder!r}))
    summary = run_grid(grid, store, launcher, Watch(), Policy(retries=1000), rerun=frozenset({{"killed"}}))
    print(len(summary.records), summary.by_others, summary.left, flush=True)
"""


def formula_grid(trials: int) -> Grid:
    specs = [TrialSpec.model_validate(formula.BASE | {"lora_r": 1 + i}) for i in range(trials)]
    return Grid("g", "G", "list", tuple(Trial(s, f"lora_r={s.lora_r}", None, None) for s in specs))


def command(folder: Path, trials: int) -> list[str]:
    return [sys.executable, "-c", RUNNER.format(tests=str(Path(__file__).parent), folder=str(folder), trials=trials)]


def runner(folder: Path, trials: int, seconds: float) -> subprocess.Popen[str]:
    """A runner that waits for a line, then runs a grid whose trials sleep."""
    started = subprocess.Popen(
        command(folder, trials), env=os.environ | {"FORMULA_SECONDS": str(seconds)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def counts(process: subprocess.Popen[str]) -> list[int]:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return [int(number) for number in out.split()]


def test_two_runners_share_the_trials(tmp_path: Path) -> None:
    """Each of 40 trials is done by one of them."""
    both = [runner(tmp_path, 40, 0.15) for _ in range(2)]
    for each in both:
        begin(each)
    both_counts = [counts(each) for each in both]
    done = [records for records, _, _ in both_counts]
    assert sum(done) == 40
    assert all(records + by_others == 40 and left == 0 for records, by_others, left in both_counts)
    assert min(done) >= 8, "both had their share"
    assert len(Store(tmp_path).read("trials")) == 40
    assert not list((tmp_path / "leases").glob("*.json"))


def test_a_killed_runner_loses_and_doubles_nothing(tmp_path: Path) -> None:
    killed, other = (runner(tmp_path, 16, 0.2) for _ in range(2))
    begin(killed)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "trials").glob("*.parquet"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    killed.kill()  # in the middle of a trial
    killed.wait()
    before = Store(tmp_path).start_times()
    assert len(list((tmp_path / "leases").glob("*.json"))) == 1
    begin(other)
    assert counts(other) == [16 - len(before), 0, 0]
    after = Store(tmp_path).start_times()
    assert len(after) == 16
    assert before.items() <= after.items(), "what was finished is not run again"


def test_random_kills_lose_and_double_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short one of `benchmarks/chaos.py`, which trains."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    chaos = importlib.import_module("chaos")
    store = Store(tmp_path / "g")
    calm = {"env": os.environ | {"FORMULA_SECONDS": "0.3"}, "stdin": subprocess.DEVNULL}
    toll = chaos.disturb(command(store.folder, 18), store, 18, kills=10, seed=1, typical=0.3, **calm)
    assert toll.kills.total() >= 3, "they came before the grid was done"
    assert min(toll.kills["worker"], toll.kills["runner"]) >= 1
    assert (toll.lost, toll.redone, toll.unreadable) == (set(), set(), 0)
    rows = store.read("trials").to_pylist()
    assert sorted(row["lora_r"] for row in rows) == list(range(1, 19))
    assert {row["eval_loss"] for row in rows} == {formula.figures(t.spec)[1] for t in formula_grid(18).trials}
    assert len(list((store.folder / "trials").glob("*.parquet"))) == 1, "compacted"
    assert not list((store.folder / "leases").glob("*.json"))


def test_a_clock_that_is_set_frees_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """Psutil says when a process began by the clock of now."""
    me = ProcessIdentity.current()
    booted = psutil.boot_time()
    began = psutil.Process().create_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: booted + 60)
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: began + 60)
    assert me.is_alive()
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: began + 90)
    assert me.is_alive() is False, "another process, of the same number"


def test_a_lease_of_another_machine_holds_until_it_is_stale(tmp_path: Path) -> None:
    remote, here = Leases(tmp_path), Leases(tmp_path)
    remote._me = remote._me.model_copy(update={"host": "another", "pid": 1})
    assert remote.take("t")
    assert not here.take("t")
    assert here.take("u")
    assert not remote.take("u")
    assert not here.none_held()
    old = time.time() - EXPIRES_SECONDS - 1
    os.utime(tmp_path / "leases/t.json", (old, old))
    assert here.none_held()
    assert here.take("t")
    (tmp_path / "leases/u.json").write_bytes(b"half")
    assert remote.take("u"), "what nobody can read holds nothing"
