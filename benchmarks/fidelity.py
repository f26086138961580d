"""Does measuring change what is measured? Tokens/s of a trial over tokens/s of a bare PyTorch loop.

Both train the same model on the same batches in this process. Their steps alternate and are timed separately, so that a
drift of the machine's speed affects both equally; every other pair starts with the bare loop. The median of the ratios
should be 0.98 or more.

    python benchmarks/fidelity.py [--pairs 5] [--model random:smollm2-135m]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from harness import environment
from harness.record import Job
from harness.spec import TrialSpec
from harness.training import batches, checkpoints, half_matmul, model, trial

TIMED_STEPS = 16


class BareLoop:
    """The plainest loop that trains a spec, a step at a time."""

    def __init__(self, spec: TrialSpec) -> None:
        device = torch.device("cpu")
        torch.manual_seed(spec.seed)
        tokenizer = checkpoints.load_tokenizer(spec)
        stories = batches.load(spec, tokenizer)
        steps = batches.optimizer_steps(spec, stories.train, trial.TRACKED_STEPS)
        self.batches = [batches.collate(step, tokenizer.pad_token_id, device) for step in steps]
        self.network = model.load(spec, device)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=spec.learning_rate, weight_decay=0.0)
        self.seconds: list[float] = []

    def step(self) -> None:
        """Train on the next batch and record its time."""
        batch = self.batches[len(self.seconds)]
        began = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.network(**batch.inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began)

    @property
    def tokens_per_second(self) -> float:
        """Over the steps that a trial times too."""
        timed = slice(trial.TRACKED_STEPS, None)
        return sum(b.tokens for b in self.batches[timed]) / sum(self.seconds[timed])


def pair(spec: TrialSpec, *, bare_first: bool) -> tuple[float, float]:
    """Tokens per second of a trial as it records them, and of a bare loop whose steps alternate with the trial's."""
    bare = BareLoop(spec)

    def on_progress(kind: str, value: Any) -> None:
        if kind == "step" and len(bare.seconds) < len(bare.batches):
            bare.step()

    if bare_first:
        bare.step()
    job = Job(grid="fidelity", spec=spec, label="fidelity")
    record = trial.run(job, environment=environment.current("cpu"), on_progress=on_progress)
    speed = record.metrics.get("tokens_per_second")
    if record.status != "ok" or speed is None:
        raise SystemExit(f"the trial ended as {record.status}: {record.error}")
    return float(speed), bare.tokens_per_second


def main() -> None:
    """Print each pair and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--model", default="random:smollm2-135m")
    given = parser.parse_args()
    half_matmul.install()
    steps = trial.TRACKED_STEPS + TIMED_STEPS
    spec = TrialSpec(
        base_model=given.model,
        sequence_length=128,
        micro_batch_size=2,
        max_steps=steps,
        val_set_size=0,
        precision="bf16",
    )
    ratios = []
    for number in range(given.pairs):
        ours, theirs = pair(spec, bare_first=number % 2 == 1)
        ratios.append(ours / theirs)
        print(
            f"pair {number + 1}: trial {ours:7.1f} tok/s, bare loop {theirs:7.1f} tok/s, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.3f} of {len(ratios)} pairs (should be 0.98 or more)")


if __name__ == "__main__":
    main()
