"""A child that computes a formula instead of training: memory and loss with a front that is known exactly."""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from harness import environment
from harness.grids.search import Search
from harness.grids.search_file import parse
from harness.record import Job, Record, StoryLoss
from harness.spec.trial import TrialSpec

if TYPE_CHECKING:  # each child imports this file again
    import pandas

BUDGET = 700_000_000
WORST_LOSS = 5.0

BASE: dict[str, Any] = {
    "base_model": "smollm2-135m-instruct", "device": "cpu", "train_samples": 36, "lora_r": 4, "learning_rate": 1e-4,
}  # fmt: skip
SPACE: dict[str, Any] = {
    "lora_r": {"low": 1, "high": 64, "log": True},
    "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "lora_dropout": {"low": 0.0, "high": 0.5},
    "gradient_checkpointing": [False, True],
}


def search(base: dict[str, Any] | None = None, **given: Any) -> Search:
    """A search over the formula: loss and memory within the budget; keywords replace keys of `tune:`."""
    defaults = {
        "space": SPACE, "objectives": ["eval_loss", "peak_memory_bytes"], "trials": 20, "confirm": 0,
        "constraints": [f"peak_memory_bytes <= {BUDGET / 1e6:.0f}MB"],
    }  # fmt: skip
    return parse("t", "T", BASE | (base or {}), defaults | given)


def figures(spec: TrialSpec) -> tuple[int, float]:
    """Bytes and nats: rank buys loss with memory, checkpointing saves memory, the rest has one best value."""
    rank = math.log2(spec.lora_r) / 6
    rate = (math.log10(spec.learning_rate) + 5) / 3
    memory = (200 + 900 * rank**2) * (0.8 if spec.gradient_checkpointing else 1.0) * 1e6
    samples = spec.train_samples or 1
    loss = 4 - 1.5 * rank + 4 * (rate - 0.6) ** 2 + 2 * (spec.lora_dropout - 0.1) ** 2 + 1.0 / samples
    return int(memory), loss


def child(job_text: str, options: dict[str, Any], channel: Connection) -> None:
    """Answer as a worker does: phases, then a record."""
    job = Job.model_validate_json(job_text)
    memory, loss = figures(job.spec)
    here = environment.current("cpu")
    if options["placement"] is not None:
        placement = environment.Placement(**options["placement"])
        placement.apply()
        here = here.placed(placement)
    channel.send_bytes(json.dumps(["phase", "load"]).encode())
    time.sleep(float(os.environ.get("FORMULA_SECONDS", "0")))
    outcome: dict[str, Any]
    if job.spec.memory_budget is not None and memory > job.spec.memory_budget:
        held = job.spec.memory_budget - 1_000_000
        outcome = {
            "status": "oom", "phase": "forward", "error_type": "OutOfBudget", "error": "budget passed",
            "metrics": {"oom_reached_bytes": held, "oom_requested_bytes": memory - held},
        }  # fmt: skip
    elif job.spec.learning_rate > 8e-3:
        outcome = {"status": "diverged", "phase": "forward", "error_type": "Diverged", "error": "loss is inf"}
    else:
        stories = tuple(
            StoryLoss(story_id=str(i), when="after", loss=loss + 0.1 * math.sin(7 * i + job.spec.seed), tokens=10)
            for i in range(6)
        )
        outcome = {
            "status": "ok", "stories": stories,
            "metrics": {
                "peak_memory_bytes": memory, "eval_loss": loss, "tokens_per_second": 100.0 + job.spec.seed,
                "trial_seconds": 0.5 + (job.spec.train_samples or 0) / 10,
            },
        }  # fmt: skip
    record = Record.of(job, environment=here, started_at=dt.datetime.now(dt.UTC), **outcome)
    channel.send_bytes(json.dumps(["record", record.model_dump(mode="json")]).encode())
    os._exit(0)


# ------------------------------------------------------------------------------------ how good a front is


def volume(points: Iterable[tuple[float, float]]) -> float:
    """Area between a front of (bytes, nats) and the worst that counts."""
    area, best = 0.0, WORST_LOSS
    for memory, loss in sorted(points):
        if memory <= BUDGET and loss < best:
            area += (BUDGET - memory) * (best - loss)
            best = loss
    return area


def true_volume() -> float:
    """Of the front that the formula has: every rank at the best of everything else."""
    values = BASE | {"learning_rate": 10 ** (0.6 * 3 - 5), "lora_dropout": 0.1, "gradient_checkpointing": True}
    return volume(figures(TrialSpec.model_validate(values | {"lora_r": rank})) for rank in range(1, 65))


def reached(rows: pandas.DataFrame) -> int | None:
    """Trials after which the volume is within 5 % of the true one; null: it never is."""
    ok = rows[(rows["status"] == "ok") & ~rows["twin"]].sort_values("study_trial")
    seen: list[tuple[float, float]] = []
    for row in ok.to_dict("records"):
        seen.append((row["peak_memory_bytes"], row["eval_loss"]))
        if volume(seen) >= 0.95 * true_volume():
            return int(row["study_trial"]) + 1
    return None
