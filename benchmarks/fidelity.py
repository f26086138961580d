"""Does measuring change what is measured? Tokens/s of a trial over tokens/s of a bare PyTorch loop.

Both train the same model on the same batches in this process, in turn, and count the same steps;
pairs begin with the one and the other alternately. The median of the ratios should be 0.98 or more.

    python benchmarks/fidelity.py [--pairs 5] [--model random:smollm2-135m]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from harness import data, half_matmul, model, trial
from harness.results import Job
from harness.spec import TrialSpec

TIMED_STEPS = 16


def measured(spec: TrialSpec) -> float:
    """Tokens per second as a trial records them."""
    record = trial.run(Job(grid="fidelity", spec=spec, label="fidelity"))
    speed = record.metrics.get("tokens_per_second")
    if record.status != "ok" or speed is None:
        raise SystemExit(f"the trial ended as {record.status}: {record.error}")
    return float(speed)


def bare(spec: TrialSpec) -> float:
    """Tokens per second of the plainest loop that trains the same thing."""
    device = torch.device("cpu")
    torch.manual_seed(spec.seed)
    tokenizer = model.load_tokenizer(spec)
    stories = data.load(spec, tokenizer)
    size = spec.effective_batch_size
    samples = data.total_samples(spec, len(stories.train))
    order = data.training_order(stories.train, samples, trial.TRACKED_STEPS * size, spec.seed)
    batches = [data.collate(order[i : i + size], tokenizer.pad_token_id, device) for i in range(0, samples, size)]
    network = model.load(spec, device)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=0.0)

    def step(inputs: dict[str, Any]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = network(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for batch in batches[: trial.TRACKED_STEPS]:
        step(batch.inputs)
    began = time.perf_counter()
    for batch in batches[trial.TRACKED_STEPS :]:
        step(batch.inputs)
    return sum(b.tokens for b in batches[trial.TRACKED_STEPS :]) / (time.perf_counter() - began)


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
    bare(spec)  # both find the same warm machine
    ratios = []
    for pair in range(given.pairs):
        if pair % 2:
            theirs, ours = bare(spec), measured(spec)
        else:
            ours, theirs = measured(spec), bare(spec)
        ratios.append(ours / theirs)
        print(
            f"pair {pair + 1}: trial {ours:7.1f} tok/s, bare loop {theirs:7.1f} tok/s, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.3f} of {len(ratios)} pairs (0.98 or more is asked)")


if __name__ == "__main__":
    main()
