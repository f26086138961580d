"""What a launcher adds to a trial: forked here, or as a task of a Ray cluster; and a fresh Python for comparison.

And what `harness --help` takes, beside a Python that imports what prints it.

python benchmarks/startup.py [--trials 10]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness.launch.cluster import RayLauncher
from harness.launch.launcher import Attempt, Launcher, WorkerOptions
from harness.launch.local import LocalLauncher
from harness.record import Job
from harness.spec.trial import TrialSpec


def forked(launcher: LocalLauncher, seed: int, folder: Path) -> float:
    """Seconds from the launch to the first event of the trial."""
    events: list[float] = []

    def on_event(kind: str, value: object) -> None:
        events.append(time.perf_counter())

    began = time.perf_counter()
    record = launcher.run(Attempt(job(seed), options(folder), folder / "log"), on_event)
    if record.status != "ok":
        raise SystemExit(f"the trial ended as {record.status}: {record.error}")
    return events[0] - began


def through_ray(count: int, folder: Path) -> list[float]:
    """Seconds that trials take through a cluster on this machine beyond their own; of the later ones."""
    with RayLauncher(cpus=1, device="cpu") as launcher:
        return [overhead(launcher, seed, folder) for seed in range(count + 2)][2:]


def overhead(launcher: Launcher, seed: int, folder: Path) -> float:
    """Seconds from launch to record, without those of the trial."""
    began = time.perf_counter()
    record = launcher.run(Attempt(job(seed), options(folder), folder / "log"), lambda kind, value: None)
    seconds = record.metrics["trial_seconds"]
    if record.status != "ok" or seconds is None:
        raise SystemExit(f"the trial ended as {record.status}: {record.error}")
    return time.perf_counter() - began - seconds


def options(folder: Path) -> WorkerOptions:
    """Of a worker with the whole machine."""
    return {"folder": str(folder / "adapters"), "trust_remote_code": False, "placement": None}


def job(seed: int) -> Job:
    """A trial of one step."""
    spec = TrialSpec(
        base_model="random:tiny", sequence_length=256, max_steps=1, val_set_size=0, seed=seed, device="cpu"
    )
    return Job(grid="startup", spec=spec, label="startup")


def fresh() -> float:
    """Seconds of a new Python until it has imported what a trial needs and says so."""
    began = time.perf_counter()
    command = [sys.executable, "-c", "import harness.launch.preload; print('here', flush=True)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return time.perf_counter() - began


def processor_seconds(*arguments: str) -> float:
    """Least processor time of five calls of this Python: wall time depends on what else runs."""
    return min(_processor_seconds(arguments) for _ in range(5))


def _processor_seconds(arguments: Sequence[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the first start, the later ones, and fresh processes for comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    count = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as folder:
        with LocalLauncher() as launcher:
            first, *later = [forked(launcher, seed, Path(folder)) for seed in range(count + 1)]
            local = [overhead(launcher, seed, Path(folder)) for seed in range(count)]
        cluster = through_ray(count, Path(folder))
    fresh_ones = [fresh() for _ in range(3)]
    print(f"first trial, with the server's own start   {first:6.2f} s")
    print(f"{count} later trials: median                   {statistics.median(later):6.3f} s, "
          f"slowest {max(later):.3f} s (0.2 s or less is asked)")  # fmt: skip
    print(f"beyond the trial itself: local median {statistics.median(local):.3f} s (0.2 s or less is asked), "
          f"Ray {statistics.median(cluster):.3f} s, slowest {max(cluster):.3f} s (0.5 s or less)")  # fmt: skip
    of_help, bare = (
        processor_seconds("-m", "harness", "--help"),
        processor_seconds("-c", "import typer, typer.rich_utils"),
    )
    print(
        f"harness --help: {of_help:.2f} s (0.5 s or less is asked), x{of_help / bare:.2f} of importing typer and rich"
    )
    print(f"fresh process: median of {len(fresh_ones)}                {statistics.median(fresh_ones):6.2f} s")


if __name__ == "__main__":
    main()
