"""What is predicted of a trial, and what follows from it: whether it fits, how long a step takes. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from harness import cards, environment
from harness.metrics import show_bytes
from harness.results import Job, Phase, Record
from harness.roofline import Rates, Work, expected_seconds, least_seconds
from harness.spec import TrialSpec

DeviceType = Literal["cpu", "cuda"]

MARGIN: dict[DeviceType, float] = {"cpu": 0.005, "cuda": 0.06}
"""Share by which a need may exceed its prediction, where no measured rows say better. On a CPU the same tracker
follows both. On CUDA: what the allocator reserves above what is asked of it; chosen on four published peaks
(tests/test_published.py)."""

Verdict = Literal["fits", "tight", "no"]


class Prediction(BaseModel):
    """What a training step of a spec will hold and do."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    device_type: DeviceType
    """Where it would be trained."""
    peak_memory_bytes: int
    """Highest sum of live tensor storage over the training steps, in the process that holds most."""
    shares: dict[str, int]
    """That peak by component, `memory_<component>_bytes`."""
    phases: dict[Phase, int]
    """Highest sum within `forward`, `backward` and `optimizer`."""
    work: tuple[Work, ...]
    """Operations of one optimizer step on one device, recomputation included; not what processes send each other."""
    positions: int
    """Positions of that step, of all processes, padding included."""
    seconds: float
    """What the prediction took."""

    @property
    def flops(self) -> int:
        """Floating-point operations of a step."""
        return sum(w.flops * w.calls for w in self.work)


def fits(peak: float, room: int, margin: float) -> Verdict:
    """Whether a predicted peak fits: surely not, perhaps (within the margin), or yes."""
    return "no" if peak > room else "fits" if peak * (1 + margin) <= room else "tight"


def room_of(device: environment.Environment) -> int:
    """Bytes of a device that a trial may take; of a machine its share, where others run beside."""
    if device.device_type == "cuda":
        return device.device_memory_bytes - cards.CONTEXT_BYTES
    return device.device_memory_bytes // (1 + device.neighbours)


def room_for(spec: TrialSpec) -> int:
    """Bytes that a trial may take here: its budget, else what the device has."""
    if spec.memory_budget is not None:
        return spec.memory_budget
    here = environment.current(environment.resolve_device(spec.device))
    return room_of_each(room_of(here), spec, here.device_type)


def room_of_each(room: int, spec: TrialSpec, device_type: DeviceType) -> int:
    """What each process of a trial may take of a machine's memory, or of its card's."""
    return room // spec.num_processes if device_type == "cpu" else room


HERE = "this machine"
"""Name of the room that the processes of a trial divide; others are what each of them has."""


@dataclass(frozen=True)
class Expected:
    """What is known of the trials of a run before they begin."""

    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    """By spec id; what could not be predicted is not there."""
    rates: Rates | None = None
    """Of the device, where they were measured."""

    def infeasible(self, spec: TrialSpec) -> str | None:
        """Why a trial need not be started; null where it may fit."""
        predicted = self.predictions.get(spec.id)
        if predicted is None or predicted.peak_memory_bytes <= room_for(spec):
            return None
        return (
            f"its predicted peak of {show_bytes(predicted.peak_memory_bytes)} is over the {show_bytes(room_for(spec))} "
            "that there are"
        )

    def skipped(self, job: Job, reason: str, **outcome: Any) -> Record:
        """The record of a trial that was not started."""
        here = environment.current(environment.resolve_device(job.spec.device))
        about = {"status": "skipped", "error_type": "Infeasible", "error": reason}
        return self.beside(Record.of(job, environment=here, **about, **outcome))

    def beside(self, record: Record) -> Record:
        """The record with what was predicted beside what was measured."""
        predicted = self.predictions.get(record.spec.id)
        if predicted is None:
            return record
        figures: dict[str, float | int | None] = {"predicted_peak_memory_bytes": predicted.peak_memory_bytes}
        timed = [step for step in record.steps if not step.tracked]
        if self.rates is not None and timed:
            # Per position: timed steps are shorter than the longest, which was predicted.
            mean = sum(step.padded_tokens for step in timed) / len(timed)
            expected = expected_seconds(predicted.work, self.rates) / predicted.positions
            figures["predicted_step_seconds"] = expected * mean
            speed = record.metrics.get("padded_tokens_per_second")
            if speed is not None:
                figures["roofline_share"] = least_seconds(predicted.work, self.rates) / predicted.positions * speed
        return record.model_copy(update={"metrics": record.metrics | figures})


NOTHING_EXPECTED = Expected()
"""Nothing was predicted."""
