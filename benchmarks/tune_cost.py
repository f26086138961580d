"""Cost of a search against trying everything: seconds of trials, and whether it finds the same best cell.

    python benchmarks/tune_cost.py [--trials 16]

Real fine-tunings of SmolLM2 on the bundled stories over a space of 48 cells, within a memory budget. First every
cell (brute-force), then the default sampler with a third of the trials, each in a folder of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import pandas
from rich.console import Console
from rich.table import Table

from harness.analysis import loading
from harness.analysis.crossed import crossed
from harness.cli.progress import display
from harness.grids.search import Search
from harness.grids.search_file import parse
from harness.launch.local import LocalLauncher
from harness.results.store import Store
from harness.tuning.study import tune

BASE = {
    "base_model": "smollm2-135m-instruct", "sequence_length": 96, "eval_sequence_length": 96, "val_set_size": 8.0,
    "micro_batch_size": 2, "train_samples": 12, "lora_r": 16, "learning_rate": 5e-4, "lr_scheduler": "constant",
}  # fmt: skip
SPACE = {
    "precision": ["fp32", "bf16", "nf4"],
    "lora_r": [4, 16],
    "lora_alpha": [16, 64],
    "learning_rate": [1e-4, 5e-4, 2e-3, 5e-3],
}


def search(sampler: str, trials: int) -> Search:
    """Lowest loss of the space within a budget that rules some of it out."""
    tune_section = {
        "space": SPACE, "objectives": ["eval_loss"], "constraints": ["peak_memory_bytes <= 800MiB"], "confirm": 0,
        "sampler": sampler, "trials": trials,
    }  # fmt: skip
    return parse("cost", "cost", BASE, tune_section)


def run(sampler: str, trials: int, folder: Path, console: Console) -> pandas.DataFrame:
    """The rows of a search, its best first."""
    store = Store(folder)
    with LocalLauncher() as launcher, display(console) as shown:
        tune(search(sampler, trials), store, launcher, shown)
    rows = store.read("trials").to_pandas()
    return rows[~rows["twin"] & rows["study"].notna()].sort_values("eval_loss")


def story_losses(folder: Path, label: str) -> pandas.DataFrame:
    """Loss and tokens of each story in a trial."""
    m = loading.load(folder)
    trial = m.trials.index[(m.trials["label"] == label) & ~m.trials["twin"]][0]
    return m.stories[m.stories["trial"] == trial].set_index("story")[["loss", "tokens"]]


def verdict(best: pandas.DataFrame, chosen: pandas.DataFrame) -> tuple[str, float]:
    """The chosen cell against the best of all, story by story, and the lower bound of their difference."""
    differences = chosen.assign(loss=chosen["loss"] - best["loss"]).dropna().reset_index()
    effect = crossed(differences.assign(comparison=0, repeat=0)).loc[0]
    if differences["loss"].abs().max() < 1e-6:
        return "the same cell", 0.0
    value, low, high = (float(effect[name]) for name in ("effect", "low", "high"))
    return f"{value:+.4f} ({low:+.4f} to {high:+.4f}) nats: {'not distinguishable' if low <= 0 else 'worse'}", low


def main() -> int:
    """Print both; 1 where the search is worse, or costs more than 35 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--results", type=Path, help="Folder for the rows; a run continues from it.")
    given = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = given.results or Path(temporary)
        every = run("brute-force", 48, root / "cost-all", console)
        some = run("tpe", given.trials, root / "cost-tpe", console)
        fraction = some["trial_seconds"].sum() / every["trial_seconds"].sum()
        table = Table("", "cells", "seconds", "best", "eval loss", title="Searching a space of 48 cells")
        for name, rows in (("all of them", every), ("tpe", some)):
            best = rows.iloc[0]
            seconds = f"{rows['trial_seconds'].sum():.0f}"
            table.add_row(name, str(len(rows)), seconds, best["label"], f"{best['eval_loss']:.4f}")
        Console().print(table)
        best_losses = story_losses(root / "cost-all", every.iloc[0]["label"])
        text, low = verdict(best_losses, story_losses(root / "cost-tpe", some.iloc[0]["label"]))
        print(f"trial-seconds: {fraction:.0%} of all; the chosen cell against the best: {text}")
        return int(fraction > 0.35 or low > 0)


if __name__ == "__main__":
    sys.exit(main())
