"""Two runners on one results folder, and one alone: how long until a grid whose trials sleep is done.

    python benchmarks/sharing.py [--trials 40] [--seconds 0.3]

Sleeping trials leave the processor alone: what is measured is how the runners share, not what the machine can do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from harness.results.store import Store

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from test_launch import begin, counts, runner


def seconds_of(runners: int, trials: int, seconds: float) -> tuple[float, list[int]]:
    """How long so many runners take together, and how many trials each of them did."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "g"
        started = [runner(folder, trials, seconds) for _ in range(runners)]
        began = time.monotonic()
        for each in started:
            begin(each)
        done = [counts(each)[0] for each in started]
        took = time.monotonic() - began
        if len(Store(folder).read("trials")) != trials or sum(done) != trials:
            raise SystemExit(f"{sum(done)} trials were done, {trials} asked for")
    return took, done


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.3)
    given = parser.parse_args()
    alone, _ = seconds_of(1, given.trials, given.seconds)
    together, done = seconds_of(2, given.trials, given.seconds)
    print(f"one runner   {alone:6.2f} s for {given.trials} trials of {given.seconds:g} s")
    print(f"two runners  {together:6.2f} s, {done[0]} and {done[1]} trials")
    print(f"ratio {together / alone:.2f} (0.70 or less is asked)")


if __name__ == "__main__":
    main()
