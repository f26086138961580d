"""Two runners on one results folder, beside one: how long until a grid whose trials sleep is done.

    python benchmarks/sharing.py [--trials 40] [--seconds 0.3]

Sleeping trials leave the processor alone: what is measured is how the runners share, not what the machine can do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from harness.results import Store

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from test_launch import let_go, runner, said


def seconds_of(runners: int, trials: int, seconds: float) -> tuple[float, list[int]]:
    """How long so many runners take together, and how many trials each of them did."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "g"
        started = [runner(folder, trials, seconds) for _ in range(runners)]
        began = time.monotonic()
        for each in started:
            let_go(each)
        shares = [said(each)[0] for each in started]
        took = time.monotonic() - began
        if len(Store(folder).read("trials")) != trials or sum(shares) != trials:
            raise SystemExit(f"{sum(shares)} trials were done, {trials} asked for")
    return took, shares


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.3)
    given = parser.parse_args()
    alone, _ = seconds_of(1, given.trials, given.seconds)
    together, shares = seconds_of(2, given.trials, given.seconds)
    print(f"one runner   {alone:6.2f} s for {given.trials} trials of {given.seconds:g} s")
    print(f"two runners  {together:6.2f} s, {shares[0]} and {shares[1]} trials")
    print(f"ratio {together / alone:.2f} (0.70 or less is asked)")


if __name__ == "__main__":
    main()
