"""Predictions of trials, and what follows from them: whether a trial fits, how long a step takes. No torch."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict

from harness._util.units import show_bytes
from harness.environment import DeviceType, Environment
from harness.predict import cards
from harness.predict.roofline import Rates, Work, predicted_seconds, roofline_seconds
from harness.record import Job, Phase, Record, Step
from harness.spec.trial import FACTS, TrialSpec

MARGIN: dict[DeviceType, float] = {"cpu": 0.005, "cuda": 0.06}
"""Fraction by which what is needed may exceed its prediction, where there is no calibration. CPU: both come from the
same tracker. CUDA: the reserve of a run is not repeatable, and depends on what came before; it exceeded its prediction
by 5.4 % at most in measurements of others (docs/memory.md, "Against what others measured")."""
SURELY_SHORT = 0.02
"""Fraction below the least that it can do with, on CUDA, by which a capacity is surely too small: what is allocated was
predicted within 0.6 % there."""
Verdict = Literal["fits", "tight", "does not fit"]


_OF_STEPS = frozenset(
    {
        "datasets",
        "eval_sequence_length",
        "gradient_accumulation_steps",
        "group_by_length",
        "micro_batch_size",
        "optimizer",
        "pad_to_sequence_len",
        "sequence_length",
        "test_datasets",
    }
)
"""Keys with an effect on the memory of steps, and none on the model that they train."""


def model_key(spec: TrialSpec) -> str:
    """Equal for specs whose models are the same when they are loaded."""
    values = {k: v for k, v in spec.canonical().items() if FACTS[k].memory and k not in _OF_STEPS}
    return json.dumps(values | {"freezes_a": spec.optimizer == "lora_fa"}, sort_keys=True)


class Prediction(BaseModel):
    """Predicted memory and work of a spec's training step."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    device_type: DeviceType
    """Device to train on."""
    peak_memory_bytes: int
    """Highest sum of live tensor storage over the training steps, in the process that holds most."""
    peak_load_bytes: int
    """The same while the model is loaded."""
    peak_evaluate_bytes: int | None
    """The same while held-out stories are evaluated; null: there are none."""
    peak_reserved_bytes: int | None = None
    """What torch's allocator takes from the driver for all of these where memory is plenty; null on a CPU."""
    least_reserved_bytes: int | None = None
    """What it must be able to take at least: it gives cached segments back where memory is short. Null on a CPU."""
    breakdown: dict[str, int]
    """That peak by component, `memory_<component>_bytes`."""
    phases: dict[Phase, int]
    """Highest sum within `forward`, `backward` and `optimizer`."""
    work: tuple[Work, ...]
    """Operations of one optimizer step on one device, recomputation included, communication not."""
    assumed_length: int | None = None
    """Tokens that every example was taken to have, since the model has no tokenizer; null: it has."""
    positions: int
    """Tokens of that step over all processes, padding included."""
    seconds: float
    """Time that the prediction took."""

    @property
    def highest_bytes(self) -> int:
        """Highest sum of live tensor storage: while loading, evaluating or training."""
        return max(self.peak_memory_bytes, self.peak_load_bytes, self.peak_evaluate_bytes or 0)

    @property
    def needed_bytes(self) -> int:
        """What a trial takes where memory is plenty: the allocator's reserve, on a CPU live tensors."""
        return self.highest_bytes if self.peak_reserved_bytes is None else self.peak_reserved_bytes

    @property
    def least_bytes(self) -> int:
        """What a trial must be able to take at least."""
        return self.highest_bytes if self.least_reserved_bytes is None else self.least_reserved_bytes

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


def fits(prediction: Prediction, capacity: int, margin: float, factor: float = 1.0) -> Verdict:
    """Whether a trial fits: surely, surely not, or `tight`, where it depends on the allocator's cache or on the error
    of the prediction.

    Args:
        prediction: of the trial.
        capacity: bytes that it may take, on CUDA without the context.
        margin: fraction by which its need may exceed the prediction.
        factor: by which a calibration corrects the prediction.
    """
    if factor * prediction.needed_bytes * (1 + margin) <= capacity:
        return "fits"
    short = SURELY_SHORT if prediction.device_type == "cuda" else 0.0
    return "does not fit" if capacity < factor * prediction.least_bytes * (1 - short) else "tight"


def capacity_of(environment: Environment) -> int:
    """Bytes of a device that a trial may use; concurrent trials divide a machine's memory equally."""
    if environment.device_type == "cuda":
        card = cards.of_device(environment.device_name, environment.device_memory_bytes)
        return card.capacity
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
        if prediction is None or prediction.least_bytes <= capacity:
            return None
        what = "peak" if prediction.least_reserved_bytes is None else "reserve"
        return (
            f"its predicted {what} of {show_bytes(prediction.least_bytes)} is over the {show_bytes(capacity)} available"
        )

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
        figures = {
            "predicted_peak_memory_bytes": prediction.peak_memory_bytes,
            "predicted_reserved_bytes": prediction.peak_reserved_bytes,
        }
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
