"""Does measuring change what is measured? Tokens/s of a timing visit over tokens/s of a bare PyTorch loop.

Both train the same model on the same batches in this process. Their steps alternate and are timed separately, so that a
drift of the machine's speed affects both equally. The median of the ratios should be 0.98 or more.

    python benchmarks/fidelity.py [--pairs 5] [--model random:smollm2-135m]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from harness import environment
from harness.record import Job, Visit
from harness.results import timing
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, half_matmul, model, order, trial

SECONDS = 20.0
"""Of timed steps in each visit."""


class BareLoop:
    """The plainest loop that trains on the steps that a visit times."""

    def __init__(self, spec: TrialSpec) -> None:
        device = torch.device("cpu")
        torch.manual_seed(spec.seed)
        tokenizer = checkpoints.load_tokenizer(spec)
        steps = order.timed_steps(spec, batches.load(spec, tokenizer).train)
        self.batches = [batches.collate(step, tokenizer.pad_token_id, device) for step in steps]
        self.network = model.load(spec, device)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=spec.learning_rate, weight_decay=0.0)
        self.seconds: list[list[float]] = [[] for _ in steps]

    def step(self, number: int) -> None:
        """Train on one of the batches and record its time."""
        began = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.network(**self.batches[number].inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds[number].append(time.perf_counter() - began)

    @property
    def tokens_per_second(self) -> float:
        """As `results.timing.speeds`: each batch once, at its mean."""
        return sum(batch.tokens for batch in self.batches) / sum(map(statistics.mean, self.seconds))


def pair(spec: TrialSpec) -> tuple[float, float]:
    """Tokens per second of a visit as it records them, and of a bare loop whose steps alternate with the visit's."""
    bare = BareLoop(spec)
    for number in range(len(bare.batches)):
        bare.step(number)  # warms up, as the visit does
    bare.seconds = [[] for _ in bare.batches]

    def on_progress(kind: str, value: Any) -> None:
        if kind == "step":
            bare.step((value[0] - 1) % len(bare.batches))

    job = Job(grid="fidelity", spec=spec, label="fidelity", visit=Visit(block=1, seconds=SECONDS))
    record = trial.run(job, environment=environment.current("cpu"), on_progress=on_progress)
    # Both loops run on the same machine in turns: steps that waited count for both.
    steps = [step.model_copy(update={"disturbed": False}) for step in record.steps]
    speed = timing.row_figures(steps)["tokens_per_second"]
    if record.status != "ok" or speed is None:
        raise SystemExit(f"the visit ended as {record.status}: {record.error}")
    return float(speed), bare.tokens_per_second


def main() -> None:
    """Print each pair and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--model", default="random:smollm2-135m")
    given = parser.parse_args()
    half_matmul.install()
    spec = TrialSpec(
        base_model=given.model,
        sequence_length=128,
        micro_batch_size=2,
        max_steps=16,
        val_set_size=0,
        precision="bf16",
    )
    ratios = []
    for number in range(given.pairs):
        ours, theirs = pair(spec)
        ratios.append(ours / theirs)
        print(
            f"pair {number + 1}: visit {ours:7.1f} tok/s, bare loop {theirs:7.1f} tok/s, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.3f} of {len(ratios)} pairs (should be 0.98 or more)")


if __name__ == "__main__":
    main()
