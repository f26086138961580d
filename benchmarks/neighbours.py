"""Speeds of a grid on a quiet machine, and the same while another process burns one core for thirds of the time.

    python benchmarks/neighbours.py [--grid grids/short.yml] [--keep FOLDER]

Three others of the short grid are compared with its baseline: first undisturbed, then beside a process that spins
on a core for random thirds of the time. No verdict on speed may turn into another, disturbed trials are named, and the
noise between the two runs of the baseline stays small: 3 % quiet, 5 % disturbed. Visits are as many and as long as they
are where a grid says nothing of them; those of the short grid are shorter. It needs a machine with nothing else to do.
The cost of reading the counters is measured too, as a share of a step.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from harness.analysis import comparison, loading
from harness.analysis.estimate import Estimate
from harness.cli.console import out
from harness.cli.progress import display
from harness.grids.document import DEFAULT_TIMING
from harness.grids.grid import Grid, load
from harness.launch.local import LocalLauncher
from harness.results.store import Store
from harness.runner.grid_run import run_grid

OTHERS = ("precision=bf16", "gradient_checkpointing=true", "lora_r=64")
PERIOD_SECONDS = 12.0
"""The neighbour works for a random third of each."""
MOST_QUIET, MOST_DISTURBED, MOST_OVERHEAD = 0.03, 0.05, 0.005


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Within, another process spins on a core for a third of each period, at a random moment of it."""
    pid = os.fork()
    if pid == 0:
        generator = random.Random(0)
        while True:
            idle = generator.uniform(0, PERIOD_SECONDS * 2 / 3)
            time.sleep(idle)
            end = time.perf_counter() + PERIOD_SECONDS / 3
            while time.perf_counter() < end:
                pass
            time.sleep(PERIOD_SECONDS * 2 / 3 - idle)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def measure(grid: Grid, folder: Path, *, disturbed: bool) -> tuple[dict[str, Estimate], float, set[str], int]:
    """Estimates of speed by label, the noise floor, labels of trials that were not timed well enough, and the number of
    disturbed steps.
    """
    beginning = busy_core() if disturbed else contextlib.nullcontext()
    with LocalLauncher() as launcher, display(out) as progress, beginning:
        summary = run_grid(grid, Store(folder), launcher, progress)
    m = loading.load(folder)
    estimates = comparison.compare(m).estimates["tokens_per_second"]
    named = {label: estimates[config] for config, label in zip(estimates, m.labels(estimates), strict=True)}
    floor = math.inf if m.floor is None else math.expm1(m.floor)
    return named, floor, set(summary.untimed), int(m.trials["disturbed_steps"].fillna(0).sum())


def overhead() -> float:
    """Seconds that reading the counters takes, in a process with threads like a trial's."""
    import torch

    from harness.training.waiting import Waiting

    a = torch.randn(512, 512)
    (a @ a).sum()  # starts the threads
    waiting, times = Waiting(), []
    for _ in range(200):
        began = time.perf_counter()
        waiting.since_last()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    """Print both runs and whether they agree; exit code 1 where they do not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, default=Path("grids/short.yml"))
    parser.add_argument("--keep", type=Path, help="folder for the rows; null: they are thrown away")
    given = parser.parse_args()
    # Nothing is learnt here: one step is trained, and nothing is evaluated.
    grid = load(given.grid, overrides={"train_samples": 4, "val_set_size": 0}).only(set(OTHERS))
    grid = dataclasses.replace(grid, timing=DEFAULT_TIMING)
    with tempfile.TemporaryDirectory() as name:
        folder = given.keep or Path(name)
        quiet, quiet_floor, _, quiet_steps = measure(grid, folder / "quiet", disturbed=False)
        busy, busy_floor, untimed, busy_steps = measure(grid, folder / "neighbour", disturbed=True)
        steps = Store(folder / "quiet").read("steps").to_pandas()
    failures = []
    for label in OTHERS:
        one, two = quiet.get(label), busy.get(label)
        print(f"{label}: quiet {_shown(one)}; with a neighbour {_shown(two)}")
        words = {each.verdict for each in (one, two) if each is not None} - {"not distinguishable"}
        if len(words) > 1 or (two is None and label not in untimed):
            failures.append(f"the verdict on {label}")
    shortest = float(steps.loc[steps["block"].notna(), "seconds"].min())
    overhead_of_step = overhead() / shortest
    print(f"noise floor: quiet {quiet_floor:.2%} ({MOST_QUIET:.0%} is asked), with a neighbour {busy_floor:.2%}")
    print(
        f"disturbed steps: quiet {quiet_steps}, with a neighbour {busy_steps}; not timed: {sorted(untimed) or 'none'}"
    )
    print(
        f"reading the counters: {overhead_of_step:.4%} of the shortest step, {shortest:.2f} s "
        f"({MOST_OVERHEAD:.1%} is asked)"
    )
    failures += [
        what
        for what, value, most in (
            ("quiet floor", quiet_floor, MOST_QUIET),
            ("floor with a neighbour", busy_floor, MOST_DISTURBED),
            ("overhead", overhead_of_step, MOST_OVERHEAD),
        )
        if value > most
    ]
    print("failed: " + ", ".join(failures) if failures else "all as asked")
    sys.exit(bool(failures))


def _shown(estimate: Estimate | None) -> str:
    if estimate is None or estimate.low is None or estimate.high is None:
        return "not compared"
    return f"×{estimate.value:.3f} ({estimate.low:.3f}–{estimate.high:.3f}) {estimate.text}"


if __name__ == "__main__":
    main()
