"""What `harness.watch` costs the timed steps of a loop, and how a watched SFTTrainer stands beside a grid's trial.

    python benchmarks/watching.py [--steps 120] [--trl]

The cost: steps of one loop over the bundled model, every other one of them watched; 1 % at most is asked.
With --trl, examples/watch_trl.py after its grid, in a folder of its own: peaks within 1 %, first losses within 1e-3.
Their speeds are minutes apart there, in which a machine may have changed more than they differ. So SFTTrainer with the
loss of transformers' Trainer is watched once more, and after each of its steps the grid's own step trains on the same
examples: tokens per second within 3 %.
"""

from __future__ import annotations

import argparse
import math
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
from transformers import AutoModelForCausalLM, TrainerCallback

import harness
from harness.grids import grid
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, model, order
from harness.training.checkpoints import checkpoint_folder
from harness.training.clock import DeviceClock
from harness.training.step import Trainer
from harness.watching.watch import TRACKED_STEPS

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 50
"""Steps of SFTTrainer, each with one of the grid's."""


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

    def step(self) -> float:
        """One step, and its seconds."""
        started = time.perf_counter()
        self.model(**self._batch).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - started


def cost(steps: int) -> tuple[float, float]:
    """A watched step over one that is not: the mean of the ratio, and the half width of its 95 % interval.

    Two equal loops take their steps in turn; each is the watched one for half of them.
    """
    loops = [Loop(), Loop()]
    logarithms = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat, (watched, plain) in enumerate((loops, loops[::-1])):
            with harness.watch(watched.model, "cost", results=folder, repeat=repeat):
                for _ in range(TRACKED_STEPS + 1):
                    watched.step(), plain.step()
                for number in range(steps // 2):
                    first, second = (watched, plain) if number % 2 else (plain, watched)
                    seconds = {first: first.step(), second: second.step()}
                    logarithms.append(math.log(seconds[watched] / seconds[plain]))
    return _mean(logarithms)


def _mean(logarithms: list[float]) -> tuple[float, float]:
    """Of ratios, from their logarithms, and the half width of its 95 % interval."""
    half = 1.96 * statistics.stdev(logarithms) / math.sqrt(len(logarithms))
    return math.exp(statistics.mean(logarithms)), half


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


class GridSteps(TrainerCallback):
    """After each step of a Trainer, the same step as a grid's trial makes it, on a model of its own."""

    def __init__(self, spec: TrialSpec) -> None:
        device = torch.device("cpu")
        tokenizer = checkpoints.load_tokenizer(spec)
        steps = order.optimizer_steps(spec, batches.load(spec, tokenizer).train)
        size = spec.micro_batch_size
        self._steps = iter(
            [batches.collate(step[at : at + size], tokenizer.pad_token_id, device) for at in range(0, len(step), size)]
            for step in steps
        )
        torch.manual_seed(spec.seed)
        self._trainer = Trainer(model.load(spec, device), spec, device, len(steps))
        self._clock = DeviceClock(device)
        self.seconds: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Train and time the grid's."""
        step = next(self._steps)
        started = self._clock.now()
        self._trainer.step(step)
        self.seconds.append(self._clock.seconds_since(started))


def in_turn(folder: Path) -> tuple[float, float]:
    """Speed of SFTTrainer over that of the grid's steps on the same examples, step by step: the mean of the ratio, and
    the half width of its 95 % interval.
    """
    sys.path.insert(0, str(ROOT / "examples"))
    from watch_trl import GRID, make_trainer

    spec = next(trial.spec for trial in grid.load(GRID).trials if trial.baseline)
    spec = spec.model_copy(update={"train_samples": PAIRS * spec.effective_batch_size})
    of_grid = GridSteps(spec)
    watch = harness.WatchCallback("in turn", results=folder / "results/in-turn", spec=spec)
    make_trainer(spec, str(folder / "output"), plain_loss=True, callbacks=[watch, of_grid]).train()
    steps = harness.load(folder / "results/in-turn").rows("steps").sort_values("step")
    pairs = zip(of_grid.seconds, steps["seconds"].tolist(), steps["tracked"].tolist(), strict=True)
    logarithms = [math.log(grid_step / watched) for grid_step, watched, tracked in pairs if not tracked]
    return _mean(logarithms)


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="of each kind")
    parser.add_argument("--trl", action="store_true", help="the example beside its grid: ten minutes more")
    given = parser.parse_args()
    out = Console()
    out.print("a watched step over one that is not: ×{:.4f} ± {:.4f}".format(*cost(given.steps)))
    if given.trl:
        with tempfile.TemporaryDirectory() as folder:
            out.print(
                "speed of SFTTrainer over the grid's steps, in turn: ×{:.4f} ± {:.4f}".format(*in_turn(Path(folder)))
            )
            out.print(with_a_grid(Path(folder)).to_string())


if __name__ == "__main__":
    main()
