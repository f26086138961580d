"""What is gained by leaving out padding: story tokens per second of `sample_packing` and `group_by_length`.

    python benchmarks/padding.py [--rounds 5] [--micro-batch 4] [--precision fp32]

The timed steps of each are taken in turn, within one process; padding is what the plain steps have more than tokens.
0.9 of what that allows is asked of packing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, model, order
from harness.training.batches import Batch
from harness.training.step import Trainer

_CPU = torch.device("cpu")
_WAYS = {"padded": {}, "sample_packing": {"sample_packing": True}, "group_by_length": {"group_by_length": True}}


@dataclass
class Way:
    """One way of making micro-batches, with a model of its own, and the seconds of its rounds."""

    trainer: Trainer
    steps: list[list[Batch]]
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of the stories in a round."""
        return sum(batch.tokens for step in self.steps for batch in step)

    @property
    def positions(self) -> int:
        """The same with padding."""
        return sum(batch.padded_tokens for step in self.steps for batch in step)

    @property
    def speed(self) -> float:
        """Story tokens per second, by the median round."""
        return self.tokens / statistics.median(self.seconds)

    def take(self) -> None:
        """One round over all steps."""
        started = time.perf_counter()
        for step in self.steps:
            self.trainer.step(step)
        self.seconds.append(time.perf_counter() - started)


def way(spec: TrialSpec) -> Way:
    """A model and its timed steps, of which each has been taken once."""
    torch.manual_seed(spec.seed)
    tokenizer = checkpoints.load_tokenizer(spec)
    examples = batches.load(spec, tokenizer).train
    network = model.load(spec, _CPU)
    steps = [list(batches.micro_batches(step, spec, 0, _CPU)) for step in order.timed_steps(spec, examples)]
    made = Way(Trainer(network, spec, _CPU, 1000), steps)
    made.take()
    made.seconds.clear()
    return made


def main() -> None:
    """Print the speeds, and which part of the possible gain each has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--precision", default="fp32")
    given = parser.parse_args()
    base = {
        "base_model": "smollm2-135m-instruct",
        "datasets": [{"path": "storyteller-openings"}],
        "val_set_size": 0,
        "precision": given.precision,
        "micro_batch_size": given.micro_batch,
        "train_samples": 64,
    }
    ways = {name: way(TrialSpec.model_validate(base | keys)) for name, keys in _WAYS.items()}
    for _ in range(given.rounds):
        for each in ways.values():
            each.take()
    plain = ways["padded"]
    table = Table(
        title=f"SmolLM2-135M, {given.precision}, micro-batch {given.micro_batch}, {given.rounds} rounds in turn"
    )
    for heading in ("steps", "positions", "padding", "story tokens/s", "gain", "allowed", "of it"):
        table.add_column(heading, justify="left" if heading == "steps" else "right")
    for name, each in ways.items():
        gain, allowed = each.speed / plain.speed, plain.positions / each.positions
        figures = (f"{each.speed:.1f}", f"x{gain:.3f}", f"x{allowed:.3f}", f"{gain / allowed:.2f}")
        table.add_row(name, f"{each.positions:,}", f"{1 - each.tokens / each.positions:.1%}", *figures)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
