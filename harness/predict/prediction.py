"""Predictions of trials, and what follows from them: whether a trial fits, how long a step takes. No torch."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict

from harness._util.units import show_bytes
from harness.environment import DeviceType, Environment
from harness.predict import cards
from harness.predict.roofline import Rates, Work, predicted_seconds, roofline_seconds
from harness.record import Job, Phase, Record, Step
from harness.spec import TrialSpec

MARGIN: dict[DeviceType, float] = {"cpu": 0.005, "cuda": 0.06}
"""Fraction by which a measured peak may exceed its prediction, where there is no calibration. CPU: both come from
the same tracker. CUDA: what the allocator reserves beyond what is allocated; chosen on four published peaks
(tests/test_published.py)."""
Verdict = Literal["fits", "tight", "does not fit"]


class Prediction(BaseModel):
    """Predicted memory and work of a spec's training step."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    device_type: DeviceType
    """Device to train on."""
    peak_memory_bytes: int
    """Highest sum of live tensor storage over the training steps, in the process that holds most."""
    breakdown: dict[str, int]
    """That peak by component, `memory_<component>_bytes`."""
    phases: dict[Phase, int]
    """Highest sum within `forward`, `backward` and `optimizer`."""
    work: tuple[Work, ...]
    """Operations of one optimizer step on one device, recomputation included, communication not."""
    positions: int
    """Tokens of that step over all processes, padding included."""
    seconds: float
    """Time that the prediction took."""

    @property
    def flops(self) -> int:
        """Floating-point operations of a step."""
        return sum(w.flops * w.calls for w in self.work)


@dataclass(frozen=True)
class SpecPrediction:
    """A spec's prediction, or why there is none."""

    spec: TrialSpec
    prediction: Prediction | None
    error: str | None = None


def fits(peak: float, capacity: int, margin: float) -> Verdict:
    """Whether a predicted peak fits: `does not fit`, `tight` (without its margin only), or `fits`. All in bytes."""
    return "does not fit" if peak > capacity else "fits" if peak * (1 + margin) <= capacity else "tight"


def capacity_of(environment: Environment) -> int:
    """Bytes of a device that a trial may use; concurrent trials divide a machine's memory equally."""
    if environment.device_type == "cuda":
        return cards.of_device(environment.device_name, environment.device_memory_bytes).capacity
    return environment.device_memory_bytes // (1 + environment.concurrent_trials)


def capacity_for(spec: TrialSpec, environment: Environment) -> int:
    """Bytes that each process of a trial may use there: its budget, else what the device has."""
    if spec.memory_budget is not None:
        return spec.memory_budget
    return capacity_per_process(capacity_of(environment), spec, environment.device_type)


def capacity_per_process(capacity: int, spec: TrialSpec, device_type: DeviceType) -> int:
    """Bytes for each process of a trial: on a CPU they divide the capacity, on CUDA each has a card."""
    return capacity // spec.num_processes if device_type == "cpu" else capacity


LOCAL_MACHINE = "this machine"
"""Name of the capacity that the processes of a trial divide; every other capacity is that of one process."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of a run's trials, made before they start."""

    by_spec: Mapping[str, Prediction] = field(default_factory=dict)
    """By spec id, where there is one."""
    rates: Rates | None = None
    """Of the device, where they were measured."""

    @classmethod
    def of(cls, predicted: Iterable[SpecPrediction], rates: Rates | None) -> Predictions:
        """Those that could be made."""
        return cls({each.spec.id: each.prediction for each in predicted if each.prediction is not None}, rates)

    def infeasible_reason(self, spec: TrialSpec, environment: Environment) -> str | None:
        """Why a trial cannot fit in an environment; null where it may."""
        prediction = self.by_spec.get(spec.id)
        capacity = capacity_for(spec, environment)
        if prediction is None or prediction.peak_memory_bytes <= capacity:
            return None
        peak = prediction.peak_memory_bytes
        return f"its predicted peak of {show_bytes(peak)} is over the {show_bytes(capacity)} available"

    def skipped_record(self, job: Job, reason: str, *, environment: Environment, started_at: dt.datetime) -> Record:
        """The record of a trial that is not started."""
        record = Record.of(
            job,
            environment=environment,
            status="skipped",
            error_type="Infeasible",
            error=reason,
            started_at=started_at,
        )
        return self.with_predictions(record)

    def with_predictions(self, record: Record) -> Record:
        """The record with its predicted figures added."""
        prediction = self.by_spec.get(record.spec.id)
        if prediction is None:
            return record
        figures = {"predicted_peak_memory_bytes": prediction.peak_memory_bytes}
        return record.model_copy(update={"metrics": record.metrics | figures})

    def of_timing(self, spec: TrialSpec, steps: Sequence[Step], speed: float | None) -> dict[str, float | None]:
        """Predicted figures of a trial's timed steps.

        Args:
            spec: of the trial.
            steps: all of its steps; those without a block are not timed.
            speed: measured padded tokens per second; null: none.
        """
        prediction = self.by_spec.get(spec.id)
        timed = [step.padded_tokens for step in steps if step.block is not None]
        if prediction is None or self.rates is None or not timed:
            return {}
        # Per position: the longest step was predicted, and timed steps are shorter.
        per_position = predicted_seconds(prediction.work, self.rates) / prediction.positions
        least_seconds = roofline_seconds(prediction.work, self.rates) / prediction.positions
        return {
            "predicted_step_seconds": per_position * sum(timed) / len(timed),
            "roofline_share": None if speed is None else least_seconds * speed,
        }


NO_PREDICTIONS = Predictions()
