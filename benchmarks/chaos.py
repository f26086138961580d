"""Kill workers, their server and the runner at random moments, start the runner anew, and look what became of the rows.

    python benchmarks/chaos.py [--kills 100] [--trials 60] [--seed 0]

The grid is then compared with one that nobody disturbed: every trial once, with the same losses to the last bit.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from harness.results.store import Store


@dataclass
class Toll:
    """What was done to a grid, and what became of it."""

    kills: Counter[str] = field(default_factory=Counter)
    """By victim."""
    runners: int = 0
    """How often the runner was started."""
    redone: set[str] = field(default_factory=set)
    """Trials that were finished, and done again."""
    lost: set[str] = field(default_factory=set)
    """Trials that were finished, and are not there."""
    unreadable: int = 0
    """Parts."""


def disturb(
    runner: Sequence[str], store: Store, trials: int, kills: int, seed: int, typical: float, **options: Any
) -> Toll:
    """Run a grid to its end, killing so many processes on the way.

    Args:
        runner: command that runs what is pending.
        store: where it keeps its rows.
        trials: how many there are.
        kills: how many processes are killed, spread over the trials.
        seed: of victims and moments.
        typical: seconds of a trial.
        options: of the process.
    """
    chance, toll = random.Random(seed), Toll()
    finished: dict[str, Any] = {}
    while True:
        toll.runners += 1
        before = toll.kills.total()
        process = subprocess.Popen(runner, stdout=subprocess.DEVNULL, **options)
        while process.poll() is None and toll.kills.total() < kills:
            if "worker" not in _victims(process.pid):
                time.sleep(0.005)
                continue
            # In haste while many kills are left; then so that some trials outlive what is meant for them.
            hasty = 2 * (kills - toll.kills.total()) > trials - len(finished)
            time.sleep(chance.uniform(0, (0.5 if hasty else 1.6) * typical))
            kind = chance.choices(["worker", "runner", "server"], [7, 2, 1])[0]
            victims = _victims(process.pid)  # on a slow machine, other ones than before
            _look(store, toll, finished)
            toll.kills[kind] += _kill(victims.get(kind, []))
        code = process.wait()
        # What looks at the models before a run is a child of the server too, and is refused as bad input when killed.
        if code not in (0, -9) and not (code == 2 and toll.kills.total() > before):
            raise SystemExit(f"the runner left with {code}")
        _look(store, toll, finished)
        if code == 0:
            return toll


def _victims(runner: int) -> dict[str, list[psutil.Process]]:
    """The runner, its fork server and the worker, as far as they are there."""
    processes: dict[str, list[psutil.Process]] = {}
    try:
        parent = psutil.Process(runner)
        processes["runner"] = [parent]
        servers = [child for child in parent.children() if "forkserver" in " ".join(child.cmdline())]
        workers = [child for server in servers for child in server.children()]
    except psutil.Error:
        return {}
    return processes | ({"server": servers} if servers else {}) | ({"worker": workers} if workers else {})


def _kill(processes: list[psutil.Process]) -> int:
    """How many there were to kill: a worker may have ended in time."""
    killed = 0
    for process in processes:
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            process.kill()
            killed += alive
        except psutil.NoSuchProcess:
            continue
    return killed


def _look(store: Store, toll: Toll, finished: dict[str, Any]) -> None:
    """Compare what is finished now with what was finished before."""
    now = store.start_times()
    statuses = store.completed()
    toll.lost |= finished.keys() - now.keys()
    toll.redone |= {trial for trial, mark in finished.items() if now.get(trial, mark) != mark}
    finished |= {trial: mark for trial, mark in now.items() if statuses.get(trial) == "ok"}
    toll.unreadable = max(toll.unreadable, len(store.damage()))


def losses(store: Store) -> dict[tuple[str, int], float]:
    """Of each step of each trial."""
    steps = store.read("steps").to_pylist()
    return {(step["trial_id"], step["step"]): step["loss"] for step in steps}


def main() -> None:
    """Print the toll, and fail where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grid = folder / "chaos.yml"
        base = {"base_model": "random:tiny", "precision": "fp32", "sequence_length": 256, "train_samples": 8,
                "val_set_size": 2, "lora_r": 4, "device": "cpu", "lora_dropout": 0.1}  # fmt: skip
        levels = [{"seed": 1 + number} for number in range(given.trials)]
        grid.write_text(
            yaml.safe_dump({"name": "chaos", "base": base, "visits": 1, "visit_seconds": 0.5, "trials": levels})
        )

        def command(results: str) -> list[str]:
            arguments = ["run", str(grid), "--results", str(folder / results), "--no-predict"]
            return [sys.executable, "-m", "harness", *arguments, "--retries", "1000", "--rerun", "killed"]

        quiet = Store(folder / "quiet" / "chaos")
        subprocess.run(command("quiet"), check=True, stdout=subprocess.DEVNULL)
        began = time.monotonic()
        typical = statistics.median(row["trial_seconds"] for row in quiet.read("trials").to_pylist())
        wanted, began = quiet.completed().keys(), time.monotonic()
        whole, kills, rounds = True, 0, 0
        while kills < given.kills:  # a grid may be done before the last kill: then another one begins
            rounds += 1
            store = Store(folder / f"round-{rounds}" / "chaos")
            left = given.kills - kills
            toll = disturb(command(store.folder.parent.name), store, len(wanted), left, given.seed + rounds, typical)
            kills += toll.kills.total()
            whole = _judge(toll, store, quiet) and whole
    print(f"{kills} kills in {rounds} rounds of {len(wanted)} trials, {time.monotonic() - began:.0f} s")
    if not whole:
        raise SystemExit(1)


def _judge(toll: Toll, store: Store, quiet: Store) -> bool:
    """Say what became of a disturbed grid; whether it is as if nothing had happened."""
    rows, wanted = store.read("trials").to_pylist(), quiet.completed().keys()
    ok = sum(row["status"] == "ok" for row in rows)
    same = losses(quiet) == losses(store) and {row["trial_id"] for row in rows} == wanted
    killed = ", ".join(f"{count} of the {victim}" for victim, count in toll.kills.most_common())
    print(f"{toll.kills.total()} kills ({killed}); the runner was started {toll.runners} times")
    print(f"{len(rows)} rows of {len(wanted)} trials, {ok} ok, up to {max(r['attempt'] for r in rows)} attempts at one")
    print(f"{len(toll.lost)} lost, {len(toll.redone)} done again, {toll.unreadable} parts unreadable")
    print(f"losses of every step {'equal' if same else 'DIFFER FROM'} those of the undisturbed run", flush=True)
    return ok == len(rows) == len(wanted) and not toll.lost and not toll.redone and not toll.unreadable and same


if __name__ == "__main__":
    main()
