"""What `harness.watch` costs the timed steps of a loop, and how a watched SFTTrainer stands beside a grid's trial.

    python benchmarks/watching.py [--rounds 8] [--steps 6] [--trl]

The cost: steps of one loop over the bundled model with and without it in turn, in one process; 1 % at most is asked.
With --trl, examples/watch_trl.py after its grid, in a folder of its own: peaks within 1 %, first losses within 1e-3,
and on a quiet machine tokens per second within 3 %.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

import harness
from harness.training.checkpoints import checkpoint_folder
from harness.watching.watch import TRACKED_STEPS

ROOT = Path(__file__).resolve().parent.parent


class Loop:
    """A plain training of LoRA over the bundled model, two examples of 96 tokens a step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(checkpoint_folder("smollm2-135m-instruct"), dtype=torch.float32)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        self.model: Any = get_peft_model(base, LoraConfig(r=16, target_modules=targets)).train()
        self._optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        ids = torch.randint(0, 49152, (2, 96))
        self._batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    def seconds(self, steps: int) -> list[float]:
        """Of each step."""
        taken = []
        for _ in range(steps):
            started = time.perf_counter()
            self.model(**self._batch).loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            taken.append(time.perf_counter() - started)
        return taken


def cost(rounds: int, steps: int) -> list[float]:
    """By round, the median step with `harness.watch` divided by the median of as many without."""
    loop = Loop()
    loop.seconds(2)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            plain = loop.seconds(steps) if number % 2 else []
            with harness.watch(loop.model, f"round {number}", results=folder):
                watched = loop.seconds(TRACKED_STEPS + steps)[TRACKED_STEPS:]
            plain = plain or loop.seconds(steps)
            ratios.append(statistics.median(watched) / statistics.median(plain))
    return ratios


def with_a_grid(folder: Path) -> pandas.DataFrame:
    """Peak, tokens per second and first loss of the grid's trials and of TRL's."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    grid, script = (str(ROOT / "examples" / name) for name in ("watch.yml", "watch_trl.py"))
    for words in (["-m", "harness", "run", grid], [script], [script, "--plain-loss"]):
        subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=True)
    results = harness.load(folder / "results/watch")
    steps = results.rows("steps")
    first = steps[steps["step"] == 1].drop_duplicates("trial_id").set_index("trial_id")["loss"]
    shown = results.trials.set_index("label")[["trial_id", "peak_memory_bytes", "tokens_per_second"]]
    return shown.assign(first_loss=shown["trial_id"].map(first)).drop(columns="trial_id")


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a round")
    parser.add_argument("--trl", action="store_true", help="the example beside its grid: five minutes more")
    given = parser.parse_args()
    out = Console()
    ratios = sorted(cost(given.rounds, given.steps))
    out.print(
        f"a watched step takes {statistics.median(ratios) - 1:+.2%} ({ratios[0] - 1:+.2%} to {ratios[-1] - 1:+.2%})"
    )
    if given.trl:
        with tempfile.TemporaryDirectory() as folder:
            out.print(with_a_grid(Path(folder)).to_string())


if __name__ == "__main__":
    main()
