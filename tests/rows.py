"""Rows for tests of what is made of rows."""

from __future__ import annotations

import datetime as dt
from typing import Any

from conftest import SMALL

from harness.environment import current
from harness.record import Job, Record, Step, StoryLoss
from harness.results.store import Store
from harness.spec.trial import TrialSpec

_OF_JOB = ("twin", "factor", "level", "data_fingerprint", "base_fingerprint", "study", "study_trial")


def keep(store: Store, spec: TrialSpec, label: str, losses: list[float], **figures: Any) -> None:
    """Record a trial of a grid whose baseline is SMALL, with a loss for each story and figures by name."""
    given = {name: figures.pop(name) for name in _OF_JOB if name in figures}
    environment = figures.pop("environment", current("cpu"))
    status = figures.pop("status", "ok")
    started_at = figures.pop("started_at", dt.datetime(2026, 1, 1, tzinfo=dt.UTC))
    baseline_id = figures.pop("baseline_id", TrialSpec.model_validate(SMALL | {"seed": spec.seed}).id)
    repeat = figures.pop("repeat", spec.seed)
    tokens = figures.pop("story_tokens", 10)
    rates = figures.pop("rates", ())
    adapter_id = figures.pop("adapter_id", None)
    tasks = figures.pop("tasks", ())
    blocks = figures.pop("blocks", (None,))  # of timing visits, each of which takes the steps; null: they are trained
    failure = {} if status == "ok" else {"phase": "forward", "error": "no", "error_type": "X"}
    counts = tokens if isinstance(tokens, list) else [tokens] * len(losses)
    stories = [
        StoryLoss(story_id=str(i), when="after", loss=x, tokens=n)
        for i, (x, n) in enumerate(zip(losses, counts, strict=True))
    ]
    steps = [
        Step(step=i, tracked=False, seconds=100 / rate, loss=3.0 - i / 10, grad_norm=1.0, learning_rate=1e-4, samples=2,
             tokens=100, supervised_tokens=50, padded_tokens=120, peak_memory_bytes=None, block=block)
        for block in blocks
        for i, rate in enumerate(rates, start=1)
    ]  # fmt: skip
    job = Job(grid="g", spec=spec, label=label, baseline_id=baseline_id, repeat=repeat,
              **({"factor": None if label == "baseline" else "f"} | given))  # fmt: skip
    store.write(
        Record.of(
            job, environment=environment, status=status, **failure, started_at=started_at,
            metrics=figures, stories=tuple(stories), steps=tuple(steps), tasks=tasks, adapter_id=adapter_id,
        )
    )  # fmt: skip
