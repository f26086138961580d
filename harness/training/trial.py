"""One trial, a measured fine-tuning: load, evaluate, train, evaluate, save."""

from __future__ import annotations

import datetime as dt
import math
import random
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy
import torch

from harness._util.messages import first_line
from harness._util.redact import redact
from harness.environment import Environment
from harness.errors import is_disk_full
from harness.metrics import SCORES
from harness.record import DISK_FULL, Job, Phase, Record, Status, Step, StoryLoss
from harness.sources import models
from harness.spec import TrialSpec
from harness.training import batches, checkpoints, distributed, evaluation, model, saved_adapters
from harness.training.card_watch import CardWatch
from harness.training.clock import DeviceClock
from harness.training.memory import MemoryMeter
from harness.training.out_of_memory import out_of_memory
from harness.training.step import TRACKED_STEPS, Diverged, Trainer

OnProgress = Callable[[Literal["phase", "step"], Any], None]
"""Called with each `phase` (its name) and each `step` (done, total)."""


class DidNotTrain(Exception):
    """Training changed no weight."""


def run(
    job: Job,
    *,
    environment: Environment,
    folder: Path | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress = lambda kind, value: None,
) -> Record:
    """Execute a job in this process and measure it. Every error ends in a record too.

    Args:
        job: what to do.
        environment: of this process; its device is the trial's.
        folder: for the adapter, if the spec asks to save it.
        trust_remote_code: let a model from the hub run its own code.
        on_progress: called as the trial proceeds.
    """
    trial = _Trial(job.spec, torch.device(environment.device_type), folder, trust_remote_code, on_progress)
    return Record.of(job, environment=environment, **trial.run())


class _Trial:
    """State of a running trial."""

    def __init__(
        self,
        spec: TrialSpec,
        device: torch.device,
        folder: Path | None,
        trust_remote_code: bool,
        on_progress: OnProgress,
    ) -> None:
        self.spec = spec
        self.device = device
        self.clock = DeviceClock(device)
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self.on_progress = on_progress
        self.phase: Phase = "start"
        self.metrics: dict[str, float | int | None] = {}
        self.steps: list[Step] = []
        self.stories: list[StoryLoss] = []
        self.general: Sequence[batches.Example] = ()
        self.adapter_id: str | None = None
        self.pretrained = models.resolve(self.spec.base_model).pretrained

    def run(self) -> dict[str, Any]:
        """Outcome fields of the record."""
        started_at = dt.datetime.now(dt.UTC)
        started = time.perf_counter()
        status: Status = "ok"
        failure: dict[str, Any] = {}
        self._enter("start")
        meter = None
        try:
            meter = MemoryMeter(self.device, self.spec.memory_budget)
            self._execute(meter)
        except Exception as error:  # every end of a trial is a row
            traceback.print_exc()
            oom = out_of_memory(error, meter) if meter is not None else None
            status = _status(error, oom)
            kind = DISK_FULL if is_disk_full(error) else type(error).__name__
            failure = {"phase": self.phase, "error_type": kind, "error": one_line(error)}
            self.metrics.update(oom or {})
        self.metrics["trial_seconds"] = time.perf_counter() - started
        if status != "ok":
            self.metrics = {name: value for name, value in self.metrics.items() if name not in SCORES}
            self.stories = [s for s in self.stories if s.when == "before"]
        return {
            "status": status,
            **failure,
            "started_at": started_at,
            "metrics": self.metrics,
            "steps": tuple(self.steps),
            "stories": tuple(self.stories),
            "adapter_id": self.adapter_id,
        }

    def _execute(self, meter: MemoryMeter) -> None:
        _seed(self.spec.seed)
        self._enter("load")
        tokenizer = checkpoints.load_tokenizer(self.spec, trust_remote_code=self.trust_remote_code)
        self.pad_id = checkpoints.pad_id(tokenizer)
        stories = batches.load(self.spec, tokenizer)
        self.metrics |= {"truncated_examples": stories.truncated, "dropped_examples": stories.dropped}
        network = self._load(meter)
        self.general = batches.general(tokenizer) if self.spec.measure_forgetting and self.pretrained else []
        self._evaluate(network, stories, meter, "before")
        self._train(network, stories, meter)
        self._evaluate(network, stories, meter, "after")
        self.metrics["peak_process_bytes"] = meter.process()
        self._save(network)

    # -------------------------------------------------------------------------------- load

    def _load(self, meter: MemoryMeter) -> Any:
        started = time.perf_counter()
        meter.tracker.component = "weights"
        with meter.phase(breakdown=True):
            sharded = self.spec.sharding != "none"
            # The whole model may not fit on a card.
            device = torch.device("cpu") if sharded else self.device
            network = model.load(self.spec, device, trust_remote_code=self.trust_remote_code)
            if sharded:
                distributed.shard(network, self.spec.sharding, distributed.device_mesh(self.device))
            meter.adopt_model(network, model.adapters(network, self.spec))
        meter.tracker.component = "activations"
        self.metrics |= {
            "load_seconds": time.perf_counter() - started,
            "peak_load_bytes": meter.peak(),
            **model.sizes(network, self.spec),
        }
        return network

    # -------------------------------------------------------------------------------- evaluate

    def _evaluate(
        self, network: Any, stories: batches.Data, meter: MemoryMeter, when: Literal["before", "after"]
    ) -> None:
        loss = self._mean_loss(network, stories.held_out, meter, when, "held-out")
        general = self._mean_loss(network, self.general, meter, when, "general")
        if when == "before":
            self.metrics |= {"eval_loss_before": loss, "general_loss_before": general}
            return
        if loss is not None:
            self.metrics |= {
                "eval_loss": loss,
                "eval_perplexity": math.exp(loss),
                "evaluated_stories": len(stories.held_out),
            }
        if general is not None:
            self.metrics["forgetting"] = general - self.metrics["general_loss_before"]  # type: ignore[operator]  # set above

    def _mean_loss(
        self,
        network: Any,
        texts: Sequence[batches.Example],
        meter: MemoryMeter,
        when: Literal["before", "after"],
        kind: Literal["held-out", "general"],
    ) -> float | None:
        """Mean loss over the tokens of texts; null without texts, or with random weights."""
        if not texts:
            return None
        self._enter("evaluate")
        with meter.phase(breakdown=False):
            losses = evaluation.story_losses(network, texts, self.spec, self.pad_id, self.device)
        self.metrics["peak_evaluate_bytes"] = max(meter.peak(), self.metrics.get("peak_evaluate_bytes") or 0)
        if not self.pretrained:
            return None  # the loss of random weights is meaningless
        loss = evaluation.token_mean(losses)
        if loss is None or not math.isfinite(loss):
            raise Diverged(f"loss on {kind} texts is {loss} {when} training")
        self.stories += [StoryLoss(story_id=i, when=when, loss=x, tokens=n, kind=kind) for i, x, n in losses]
        return loss

    # -------------------------------------------------------------------------------- train

    def _train(self, network: Any, stories: batches.Data, meter: MemoryMeter) -> None:
        groups = batches.optimizer_steps(self.spec, stories.train, TRACKED_STEPS)
        if not model.trainable(network):
            raise DidNotTrain("the model has no trainable parameter")
        trainer = Trainer(network, self.spec, self.device, len(groups), self._enter)
        if distributed.rank() > 0:  # ranks drop out different neurons
            torch.manual_seed(self.spec.seed + distributed.rank())
        before = _weight_norms(network)
        meter.tracker.flops = 0
        meter.restart()
        peak, breakdown = 0, {}
        for number, group in enumerate(groups[:TRACKED_STEPS], start=1):
            with meter.phase(breakdown=True):
                self._step(trainer, group, number, len(groups), meter)
            if meter.peak() >= peak:
                peak = meter.peak()
                breakdown = meter.breakdown(peak)
        meter.restart()
        with CardWatch(self.device) as card:
            for number, group in enumerate(groups[TRACKED_STEPS:], start=TRACKED_STEPS + 1):
                self._step(trainer, group, number, len(groups), None)
        self.metrics |= card.metrics(sum(step.tokens for step in self.steps if not step.tracked))
        if self.device.type == "cuda":  # the allocator counts the timed steps too
            peak = max(peak, meter.peak())
        self.metrics |= {"peak_memory_bytes": peak, **breakdown, "peak_reserved_bytes": meter.reserved()}
        self._check_trained(before, _weight_norms(network))
        self._summarise(int(distributed.all_reduce_sum(torch.tensor(meter.tracker.flops, device=self.device))))

    def _step(
        self, trainer: Trainer, group: list[batches.Example], number: int, of: int, meter: MemoryMeter | None
    ) -> None:
        started = self.clock.now()
        micro_batches = list(batches.micro_batches(group, self.spec.micro_batch_size, self.pad_id, self.device))
        result = trainer.step(micro_batches) if meter is None else trainer.tracked_step(micro_batches, meter.tracker)
        self.steps.append(
            Step(
                step=number,
                tracked=meter is not None,
                seconds=self.clock.seconds_since(started),
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=result.learning_rate,
                **self._counts(micro_batches),
                peak_memory_bytes=meter.peak() if meter is not None else None,
            )
        )
        self.on_progress("step", (number, of))

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
        timed = [s for s in self.steps if not s.tracked]
        tracked = [s for s in self.steps if s.tracked]
        self.metrics |= {
            "optimizer_steps": len(self.steps),
            "timed_steps": len(timed),
            "trained_tokens": sum(s.tokens for s in self.steps),
            "flops_per_token": flops / sum(s.tokens for s in tracked),
        }
        if not timed:
            return
        seconds = sum(s.seconds for s in timed)
        speed = sum(s.tokens for s in timed) / seconds
        self.metrics |= {
            "tokens_per_second": speed,
            "supervised_tokens_per_second": sum(s.supervised_tokens for s in timed) / seconds,
            "padded_tokens_per_second": sum(s.padded_tokens for s in timed) / seconds,
            "samples_per_second": sum(s.samples for s in timed) / seconds,
            "step_seconds_median": float(numpy.median([s.seconds for s in timed])),
            "step_seconds_p95": float(numpy.percentile([s.seconds for s in timed], 95)),
            "flops_per_second": self.metrics["flops_per_token"] * speed,  # type: ignore[operator]  # set above
        }

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
