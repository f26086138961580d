"""Recorded, tracked and predicted peaks over combinations of length, micro-batch, accumulation, seed and precision.

    python benchmarks/peaks.py [--combinations 40]

Of each combination a small model is trained under a tracker on every step: the recorded peak is the highest of them, to
the byte; the steps that are chosen beforehand as the heaviest hold it too, within 0.1 %; it was predicted within 0.1 %;
and a budget one byte below it ends the trial as out of memory.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from harness import environment
from harness.predict import peak
from harness.record import Job, Record
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, half_matmul, order, trial

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import SMALL

TOLERANCE = 0.001


def combinations(count: int) -> Iterator[TrialSpec]:
    """So many specs, in which every level of every factor occurs about equally often."""
    generator = random.Random(0)
    levels = {
        "sequence_length": (264, 296, 360, 500, 712),
        "micro_batch_size": (1, 2, 3, 4),
        "gradient_accumulation_steps": (1, 2, 3),
        "seed": tuple(range(8)),
        "precision": ("fp32", "bf16", "bf16-mixed", "nf4"),
        "adapter": ("lora", "none"),
        "train_samples": (5, 7, 11, 16, 23),
    }
    columns = {}
    for key, values in levels.items():
        column = list(itertools.islice(itertools.cycle(values), count))
        generator.shuffle(column)
        columns[key] = column
    for values in zip(*columns.values(), strict=True):
        given = dict(zip(columns, values, strict=True))
        if given["precision"] == "nf4":
            given["adapter"] = "lora"
        yield TrialSpec.model_validate(SMALL | {"val_set_size": 0.0} | given)


def faults(spec: TrialSpec) -> list[str]:
    """What is wrong with the peak of a spec; empty where all is as it should be."""
    record = _run(spec)
    if record.status != "ok":
        return [f"{record.status}: {record.error}"]
    of_steps = [step.peak_memory_bytes or 0 for step in record.steps]
    recorded = int(record.metrics["peak_memory_bytes"] or 0)
    tokenizer = checkpoints.load_tokenizer(spec)
    steps = order.optimizer_steps(spec, batches.load(spec, tokenizer).train)
    chosen = max(of_steps[number] for number in order.heaviest_steps(steps, spec))
    predicted = peak.predict(spec, "cpu").peak_memory_bytes
    wrong = []
    if recorded != max(of_steps) or not all(step.tracked for step in record.steps):
        wrong.append(f"{recorded} recorded, {max(of_steps)} held")
    if abs(chosen / recorded - 1) > TOLERANCE:
        wrong.append(f"the steps chosen as the heaviest hold {chosen} of {recorded}")
    if abs(predicted / recorded - 1) > TOLERANCE:
        wrong.append(f"{predicted} predicted, {recorded} recorded")
    limited = _run(spec.model_copy(update={"memory_budget": recorded - 1}))
    if limited.status != "oom":
        wrong.append(f"a budget one byte below its peak was passed: {limited.status}")
    return wrong


def _run(spec: TrialSpec) -> Record:
    return trial.run(Job(grid="peaks", spec=spec, label="peaks"), environment=environment.current("cpu"))


def main() -> None:
    """Print each combination; exit code 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--combinations", type=int, default=40)
    given = parser.parse_args()
    half_matmul.install()
    _run(next(combinations(1)))  # the first trial of a process makes constants that libraries keep
    failed = 0
    for number, spec in enumerate(combinations(given.combinations), start=1):
        wrong = faults(spec)
        failed += bool(wrong)
        shape = f"{spec.micro_batch_size}x{spec.gradient_accumulation_steps} of {spec.sequence_length}"
        about = f"{shape}, {spec.train_samples} samples, seed {spec.seed}, {spec.precision}, {spec.adapter}"
        print(f"[{number}] {about}: {'; '.join(wrong) or 'as it should be'}", flush=True)
    print(f"{failed} of {given.combinations} combinations have a fault")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
