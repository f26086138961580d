"""One trial, a measured fine-tuning: load, evaluate, train, evaluate, save. And a visit, which times some steps."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import importlib
import random
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy
import torch

from harness._util.messages import first_line
from harness._util.redact import redact
from harness.environment import DeviceType, Environment
from harness.errors import is_disk_full
from harness.metrics import SCORES
from harness.record import (
    DISK_FULL,
    NO_CONTENTS,
    Job,
    LossesBefore,
    Phase,
    Record,
    Status,
    Step,
    Visit,
)
from harness.sources import fingerprints
from harness.spec.keys import INITIALISED_LATER
from harness.spec.trial import TrialSpec
from harness.training import (
    batches,
    checkpoints,
    compilation,
    distributed,
    formats,
    initialisations,
    limits,
    model,
    order,
    packing,
    saved_adapters,
)
from harness.training.card_watch import CardWatch
from harness.training.clock import DeviceClock
from harness.training.evaluator import Evaluator
from harness.training.memory import MemoryMeter
from harness.training.out_of_memory import out_of_memory
from harness.training.schedule import VisitSchedule
from harness.training.step import Diverged, StepResult, Trainer
from harness.training.timed_steps import TimedSteps
from harness.training.waiting import Waiting, is_disturbed

OnProgress = Callable[[Literal["phase", "step"], Any], None]
"""Called with each `phase` (its name) and each `step` (done, total)."""


class ContentsChanged(Exception):
    """The data or the base are not those that the run began with."""


class DidNotTrain(Exception):
    """Training changed no weight."""


def run(
    job: Job,
    *,
    environment: Environment,
    folder: Path | None = None,
    trust_remote_code: bool = False,
    losses_before: Mapping[str, Any] = MappingProxyType({}),
    on_progress: OnProgress = lambda kind, value: None,
) -> Record:
    """Execute a job in this process and measure it. Every error ends in a record too.

    Args:
        job: what to do.
        environment: of this process; its device is the trial's.
        folder: for the adapter, if the spec asks to save it.
        trust_remote_code: let a model from the hub run its own code.
        losses_before: recorded losses of the same untrained model, fields of a `LossesBefore` by environment id. They
            are taken over if they are of this trial's texts and base, and measured anew if not.
        on_progress: called as the trial proceeds.
    """
    there = losses_before.get(environment.id)
    recorded = None if there is None else LossesBefore.model_validate(there)
    trial = _Trial(job, environment.device_type, folder, trust_remote_code, recorded, on_progress)
    return Record.of(job, environment=environment, **trial.run())


@dataclasses.dataclass(frozen=True)
class _Taken:
    """A timed step."""

    result: StepResult
    seconds: float
    waited: float | None


class _Trial:
    """State of a running trial."""

    def __init__(
        self,
        job: Job,
        device_type: DeviceType,
        folder: Path | None,
        trust_remote_code: bool,
        recorded: LossesBefore | None,
        on_progress: OnProgress,
    ) -> None:
        self.spec = job.spec
        self.contents = job.contents
        self.visit = job.visit
        self.device_type: DeviceType = device_type
        self.device = torch.device(device_type)
        self.clock = DeviceClock(self.device)
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self.on_progress = on_progress
        self.phase: Phase = "start"
        self.metrics: dict[str, float | int | None] = {}
        self.steps: list[Step] = []
        self.evaluator = Evaluator(self.spec, self.device, recorded)
        self.adapter_id: str | None = None
        self.attention_kernel: str | None = None
        self.base_formats: dict[str, float] | None = None
        self.disturbed = False
        self.compilations = compilation.Compilations()

    def run(self) -> dict[str, Any]:
        """Outcome fields of the record."""
        started_at = dt.datetime.now(dt.UTC)
        started = time.perf_counter()
        status: Status = "ok"
        failure: dict[str, Any] = {}
        self._enter("start")
        meter = None
        try:
            meter = MemoryMeter(self.device, self.spec.memory_budget, compiled=self.spec.compiles)
            # Visits compile what the trial has compiled: they take it from the cache.
            compiling = compilation.counted(self._compiled(), self.device_type, empty_cache=self.visit is None)
            with compiling as self.compilations:
                self._execute(meter)
        except Exception as error:  # every end of a trial is a row
            traceback.print_exc()
            oom = out_of_memory(error, meter) if meter is not None else None
            status = _status(error, oom)
            kind = DISK_FULL if is_disk_full(error) else type(error).__name__
            failure = {"phase": self.phase, "error_type": kind, "error": one_line(error)}
            self.metrics.update(oom or {})
        if self.spec.torch_compile:
            self.metrics |= self.compilations.metrics
        self.metrics["trial_seconds"] = time.perf_counter() - started
        if status != "ok":
            self.metrics = {name: value for name, value in self.metrics.items() if name not in SCORES}
        kept = ("before", "after") if status == "ok" else ("before",)
        return {
            "status": status,
            **failure,
            "started_at": started_at,
            "metrics": self.metrics,
            "steps": tuple(self.steps),
            "stories": tuple(story for story in self.evaluator.stories if story.when in kept),
            "tasks": tuple(item for item in self.evaluator.tasks if item.when in kept),
            "adapter_id": self.adapter_id,
            "attention_kernel": self.attention_kernel,
            "base_formats": self.base_formats,
            "disturbed": self.disturbed,
        }

    def _compiled(self) -> TrialSpec:
        """The spec, or that of the reference where its layers are the only compiled ones."""
        reference = None if self.visit is None else self.visit.reference
        return reference if reference is not None and not self.spec.torch_compile else self.spec

    def _execute(self, meter: MemoryMeter) -> None:
        _seed(self.spec.seed)
        self._enter("load")
        self._refuse_changed_contents()
        tokenizer = checkpoints.load_tokenizer(self.spec, trust_remote_code=self.trust_remote_code)
        stories = batches.load(self.spec, tokenizer)
        self.metrics |= stories.metrics
        order.check_schedules(self.spec, len(stories.train))
        network = self._load(meter)
        self._refuse_changed_contents()  # again: they may have changed while they were read
        model_limits = limits.of_model(network)
        limits.check(self.spec, limits.of_texts(stories, tokenizer), model_limits)
        self.pad_id = checkpoints.pad_id(tokenizer, model_limits.embeddings)
        if self.visit is not None:
            self._time(network, stories, meter, self.visit)
            return
        self._initialise(network, stories, meter)
        self._evaluate(network, stories, tokenizer, meter, "before")
        self._train(network, stories, meter)
        self._evaluate(network, stories, tokenizer, meter, "after")
        self.metrics["peak_process_bytes"] = meter.process()
        self._save(network)

    # -------------------------------------------------------------------------------- load

    def _refuse_changed_contents(self) -> None:
        if self.contents == NO_CONTENTS:
            return
        if changed := fingerprints.of(self.spec).changed(self.contents, self.spec):
            raise ContentsChanged(
                f"{' and '.join(changed)} changed since the run began; running again measures the new content"
            )

    def _load(self, meter: MemoryMeter) -> Any:
        started = time.perf_counter()
        # Its modules make tensors as they are imported, which within the phase would count as the model's.
        importlib.import_module("peft")
        meter.tracker.component = "weights"
        with meter.phase(breakdown=True):
            sharded = self.spec.sharding != "none"
            # The whole model may not fit on a card.
            device = torch.device("cpu") if sharded else self.device
            network = model.load(self.spec, device, trust_remote_code=self.trust_remote_code)
            if sharded:
                distributed.shard(network, self.spec.sharding, distributed.device_mesh(self.device))
            meter.adopt_model(network, model.adapters(network))
        meter.tracker.component = "activations"
        self.metrics |= {
            "load_seconds": time.perf_counter() - started,
            "peak_load_bytes": meter.peak(),
            **model.sizes(network, self.spec),
            "weights_in_format": formats.fraction_in(network, model.format_of_linear_weights(self.spec)),
        }
        if self.spec.torch_compile:
            compilation.compile_layers(network)
        self.attention_kernel = packing.attention(network)
        self.base_formats = formats.byte_fractions(network)
        return network

    def _initialise(self, network: Any, stories: batches.Data, meter: MemoryMeter) -> None:
        """Give LoRA the values that loading could not, for which a timing visit has no use."""
        how = self.spec.init_lora_weights
        if how not in INITIALISED_LATER:
            return
        started = time.perf_counter()
        # Without autocasting, which would decompose matrices in 16 bit too.
        with meter.phase(breakdown=False), torch.no_grad(), compilation.uncompiled(self.spec):
            data = (stories.train, self.pad_id, self.device)
            if how == "eva":
                initialisations.eva(network, *data, size=self.spec.micro_batch_size)
            elif how == "corda":
                initialisations.corda(network, *data)
            else:
                initialisations.loftq(network, self._original)
        meter.adopt_model(network, model.adapters(network))
        network.train()
        self.metrics["peak_load_bytes"] = max(self.metrics["peak_load_bytes"] or 0, meter.peak())
        for name in ("adapter_seconds", "load_seconds"):
            self.metrics[name] = (self.metrics[name] or 0.0) + time.perf_counter() - started

    def _original(self) -> Any:
        """The base before it was quantised, where there is room for it."""
        spec = model.unquantised(self.spec)
        return model.base(spec, torch.device("cpu"), trust_remote_code=self.trust_remote_code)

    # -------------------------------------------------------------------------------- evaluate

    def _evaluate(
        self, network: Any, stories: batches.Data, tokenizer: Any, meter: MemoryMeter, when: Literal["before", "after"]
    ) -> None:
        if stories.held_out or stories.general or self.spec.evaluate_tasks:
            self._enter("evaluate")
        try:
            self.evaluator.of(network, stories, tokenizer, self.pad_id, meter, when)
        finally:
            self.metrics |= self.evaluator.figures

    # -------------------------------------------------------------------------------- train

    def _train(self, network: Any, stories: batches.Data, meter: MemoryMeter) -> None:
        steps = order.optimizer_steps(self.spec, stories.train)
        if not model.trainable(network):
            raise DidNotTrain("the model has no trainable parameter")
        trainer = Trainer(network, self.spec, self.device, len(steps), self._enter)
        if distributed.rank() > 0:  # ranks drop out different neurons
            torch.manual_seed(self.spec.seed + distributed.rank())
        before = _weight_norms(network)
        meter.tracker.adopt(trainer.optimizer_state(), "optimizer")
        meter.tracker.flops = 0
        meter.restart()
        # On CUDA the allocator sees every step, and the tracker adds the components of the peak. Where rates are looked
        # for, memory is not compared, and tracking takes up to half as long as a step.
        every = self.device.type == "cpu" and self.spec.held_out_part == "comparison"
        tracked = range(len(steps)) if every else order.heaviest_steps(steps, self.spec)
        peak, breakdown = 0, dict[str, int]()
        for number, step in enumerate(steps):
            with meter.phase(breakdown=True) if number in tracked else contextlib.nullcontext():
                self._step(trainer, step, number + 1, len(steps), meter if number in tracked else None)
            if meter.peak() >= peak:
                peak = meter.peak()
                breakdown = meter.breakdown(peak) if number in tracked else breakdown
        self.metrics |= {"peak_memory_bytes": peak, **breakdown, "peak_reserved_bytes": meter.reserved()}
        trainer.end()
        self._check_trained(before, _weight_norms(network))
        self._summarise(int(distributed.all_reduce_sum(torch.tensor(meter.tracker.flops, device=self.device))))

    def _step(
        self, trainer: Trainer, examples: list[batches.Example], number: int, of: int, meter: MemoryMeter | None
    ) -> None:
        started = self.clock.now()
        micro_batches = self._micro_batches(examples)
        result = trainer.step(micro_batches) if meter is None else trainer.tracked_step(micro_batches, meter.tracker)
        seconds = self.clock.seconds_since(started)
        peak = meter.peak() if meter is not None else None
        self._record_step(number, micro_batches, result, seconds, tracked=meter is not None, peak_memory_bytes=peak)
        self.on_progress("step", (number, of))

    def _micro_batches(self, examples: list[batches.Example]) -> list[batches.Batch]:
        return list(batches.micro_batches(examples, self.spec, self.pad_id, self.device))

    def _record_step(
        self, number: int, micro_batches: list[batches.Batch], result: StepResult, seconds: float, **fields: Any
    ) -> None:
        counts = self._counts(micro_batches)
        self.steps.append(Step(step=number, seconds=seconds, **dataclasses.asdict(result), **counts, **fields))

    def _counts(self, batches: list[batches.Batch]) -> dict[str, int]:
        """Samples and tokens of a step, over all ranks."""
        names = ("samples", "tokens", "supervised_tokens", "padded_tokens")
        sums = [sum(getattr(batch, name) for batch in batches) for name in names]
        if distributed.world_size() > 1:
            sums = distributed.all_reduce_sum(torch.tensor(sums, device=self.device)).tolist()
        return dict(zip(names, sums, strict=True))

    def _check_trained(self, before: list[float], after: list[float]) -> None:
        norms = [s.grad_norm for s in self.steps if s.grad_norm is not None]
        if not any(norms):
            raise DidNotTrain("every gradient is zero" if norms else "the loss scaler skipped every step")
        if before == after:
            raise DidNotTrain("no trained weight changed; the learning rate may be below the format's resolution")

    def _summarise(self, flops: int) -> None:
        tracked = [s for s in self.steps if s.tracked]
        self.metrics |= {
            "optimizer_steps": sum(s.grad_norm is not None for s in self.steps),
            "trained_tokens": sum(s.tokens for s in self.steps),
            "flops_per_token": flops / sum(s.tokens for s in tracked) if self.spec.counts_operations else None,
        }

    # -------------------------------------------------------------------------------- time

    def _time(self, network: Any, stories: batches.Data, meter: MemoryMeter, visit: Visit) -> None:
        """Repeat a few steps until enough undisturbed ones are timed; give up where the machine does not get quiet."""
        reference = None
        if visit.reference is not None:  # first: graphs of compiled layers depend on those before them
            reference = TimedSteps.load(visit.reference, self.device, trust_remote_code=self.trust_remote_code)
        own = TimedSteps(network, self.spec, stories, self.pad_id, self.device, on_phase=self._enter)
        with meter.phase(breakdown=False):
            own.warm_up(meter.tracker)
        self.metrics["peak_timed_bytes"] = meter.peak()
        schedule = VisitSchedule(len(own.steps), visit.seconds)
        with CardWatch(self.device) as card:
            waiting = Waiting()
            for step in schedule:
                graphs = len(self.compilations.graphs)
                turns = [own] if reference is None else [own, reference]
                taken = {each: self._take(each, step, waiting) for each in (turns, turns[::-1])[len(self.steps) % 2]}
                compiled = len(self.compilations.graphs) > graphs
                too_long = any(is_disturbed(each.waited, each.seconds) for each in taken.values())
                disturbed = self._any_rank(compiled or too_long or card.disturbed_since_last())
                seconds, of_reference = taken[own].seconds, None if reference is None else taken[reference].seconds
                self._record_step(
                    len(self.steps) + 1, own.steps[step], taken[own].result, seconds, tracked=False,
                    peak_memory_bytes=None, block=visit.block, waited_seconds=taken[own].waited,
                    reference_seconds=of_reference, disturbed=disturbed,
                )  # fmt: skip
                both = seconds if of_reference is None else (seconds + of_reference) / 2
                schedule.record(step, self._mean_over_ranks(both), disturbed=disturbed)
                self.on_progress("step", (len(self.steps), max(len(self.steps), len(own.steps))))
        self.disturbed = not schedule.is_complete
        self.metrics |= card.metrics(sum(step.tokens for step in self.steps))
        if self.device.type == "cuda":  # the allocator counts all of them
            self.metrics["peak_timed_bytes"] = meter.peak()

    def _take(self, steps: TimedSteps, number: int, waiting: Waiting) -> _Taken:
        waiting.since_last()  # what comes between steps is not theirs
        started = self.clock.now()
        result = steps.take(number)
        seconds = self.clock.seconds_since(started)
        return _Taken(result, seconds, waiting.since_last())

    def _any_rank(self, value: bool) -> bool:
        """Whether it holds in any process: all go through the same steps."""
        return bool(distributed.all_reduce_sum(torch.tensor(int(value), device=self.device)))

    def _mean_over_ranks(self, value: float) -> float:
        return float(distributed.all_reduce_sum(torch.tensor(value, device=self.device))) / distributed.world_size()

    # -------------------------------------------------------------------------------- save

    def _save(self, network: Any) -> None:
        if not self.spec.save_adapter or self.spec.adapter == "none":
            return
        self._enter("save")
        self.adapter_id = saved_adapters.save(network, self.spec, self.folder)

    def _enter(self, phase: Phase) -> None:
        if phase != self.phase or phase == "start":
            self.phase = phase
            self.on_progress("phase", phase)


def _weight_norms(network: Any) -> list[float]:
    """Norm of each trained weight: shows whether any changed, without a copy of them."""
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(p, dtype=torch.float32) for p in model.trainable(network)]
        return torch.stack([distributed.full_tensor(norm) for norm in norms]).tolist()


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _status(error: BaseException, oom: dict[str, int | None] | None) -> Status:
    if oom is not None:
        return "oom"
    if isinstance(error, Diverged):
        return "diverged"
    return "did_not_train" if isinstance(error, DidNotTrain) else "failed"


def one_line(error: BaseException) -> str:
    """First line of an error, shortened and redacted."""
    return redact(first_line(error))[:500]
