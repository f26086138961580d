"""Trials until a search has 95 % of a front that is known exactly: the default sampler against a random one.

    python benchmarks/tune_front.py [--seeds 5] [--trials 60]

Every trial goes through the real launcher, in a process of its own that computes a formula (tests/formula.py):
memory and loss of four parameters within a budget, trials beyond it ending out of memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import formula
from test_launch import Watch

from harness.launch.local import LocalLauncher
from harness.results.store import Store
from harness.tuning.study import tune


def trials_needed(launcher: LocalLauncher, sampler: str, seed: int, trials: int) -> int | None:
    """Trials after which 95 % of the front's volume is there; null: not within `trials`."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "t")
        tune(formula.search(sampler=sampler, seed=seed, trials=trials), store, launcher, Watch())
        return formula.reached(store.read("trials").to_pandas())


def main() -> int:
    """Print the comparison; 1 where a seed misses the front or random is sooner in more than one of five."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=60)
    given = parser.parse_args()
    table = Table("seed", "tpe", "random", title=f"Trials until 95 % of the front, of {given.trials}")
    missed = sooner = 0
    with LocalLauncher(child=formula.child, preload="harness.grids.search") as launcher:
        for seed in range(given.seeds):
            tpe, random = (trials_needed(launcher, name, seed, given.trials) for name in ("tpe", "random"))
            missed += tpe is None
            sooner += tpe is not None and (random is None or random > tpe)
            table.add_row(str(seed), *(str(n) if n is not None else "not reached" for n in (tpe, random)))
    Console().print(table)
    print(f"the default sampler is sooner for {sooner} of {given.seeds} seeds")
    return int(missed > 0 or sooner < 0.8 * given.seeds)


if __name__ == "__main__":
    sys.exit(main())
