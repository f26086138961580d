"""One measured fine-tuning, in the order things happen: load, evaluate, train, evaluate, save."""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import os
import random
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy
import torch

from harness import data, distributed, environment, evaluate_model, model, model_source
from harness.card_watch import CardWatch
from harness.errors import says_disk_full
from harness.memory import MemoryMeter, out_of_memory
from harness.metrics import SCORES
from harness.private import withheld
from harness.results import DISK_FULL, Job, Phase, Record, Status, Step, StoryLoss
from harness.training import TRACKED_STEPS, Diverged, Trainer

Tell = Callable[[Literal["phase", "step"], Any], None]
"""Told each `phase` by name, and each `step` as (done, of)."""


class DidNotTrain(Exception):
    """The steps went by and nothing was learnt."""


def run(
    job: Job,
    *,
    folder: Path | None = None,
    trust_remote_code: bool = False,
    tell: Tell = lambda kind, value: None,
) -> Record:
    """Execute a job in this process and measure it. Whatever goes wrong ends in a record too.

    Args:
        job: what to do.
        folder: where an adapter is kept, if the spec asks for it.
        trust_remote_code: let a model from the hub run its own code.
        tell: told how far it is.
    """
    device_type = environment.resolve_device(job.spec.device)
    trial = _Trial(job, torch.device(device_type), folder, trust_remote_code, tell)
    outcome = trial.run()
    return Record.of(job, environment=environment.current(device_type), **outcome)


class _Trial:
    """The state of a running trial: what `run` does step by step."""

    def __init__(
        self, job: Job, device: torch.device, folder: Path | None, trust_remote_code: bool, tell: Tell
    ) -> None:
        self.spec = job.spec
        self.job = job
        self.device = device
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self.tell = tell
        self.phase: Phase = "start"
        self.metrics: dict[str, float | int | None] = {}
        self.steps: list[Step] = []
        self.stories: list[StoryLoss] = []
        self.general: Sequence[data.Example] = ()
        self.adapter_id: str | None = None
        self.pretrained = model_source.resolve(self.spec.base_model).pretrained

    def run(self) -> dict[str, Any]:
        """The fields of a record that an execution decides."""
        started_at = dt.datetime.now(dt.UTC)
        started = time.perf_counter()
        status: Status = "ok"
        failure: dict[str, Any] = {}
        self._enter("start")
        meter = None
        try:
            meter = MemoryMeter(self.device, self.spec.memory_budget)
            self._execute(meter)
        except Exception as error:  # a trial's end is a row, whatever it is
            traceback.print_exc()
            oom = out_of_memory(error, meter) if meter is not None else None
            status = _status(error, oom)
            kind = DISK_FULL if says_disk_full(error) else type(error).__name__
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
        tokenizer = model.load_tokenizer(self.spec, trust_remote_code=self.trust_remote_code)
        self.pad_id = model.pad_id(tokenizer)
        stories = data.load(self.spec, tokenizer)
        self.metrics |= {"truncated_examples": stories.truncated, "dropped_examples": stories.dropped}
        network = self._load(meter)
        self.general = data.general(tokenizer) if self.spec.measure_forgetting and self.pretrained else []
        self._evaluate(network, stories, meter, "before")
        self._train(network, stories, meter)
        self._evaluate(network, stories, meter, "after")
        self.metrics["peak_process_bytes"] = meter.process()
        self._save(network)

    # -------------------------------------------------------------------------------- load

    def _load(self, meter: MemoryMeter) -> Any:
        began = time.perf_counter()
        meter.tracker.component = "weights"
        with meter.phase(split=True):
            shared_out = self.spec.sharding != "none"
            # The whole might have no room on a card.
            device = torch.device("cpu") if shared_out else self.device
            network = model.load(self.spec, device, trust_remote_code=self.trust_remote_code)
            if shared_out:
                distributed.share_out(network, self.spec.sharding, distributed.mesh(self.device))
            meter.adopt_model(network, model.adapters(network, self.spec))
        meter.tracker.component = "activations"
        self.metrics |= {
            "load_seconds": time.perf_counter() - began,
            "peak_load_bytes": meter.peak(),
            **model.sizes(network, self.spec),
        }
        return network

    # -------------------------------------------------------------------------------- evaluate

    def _evaluate(self, network: Any, stories: data.Data, meter: MemoryMeter, when: Literal["before", "after"]) -> None:
        loss = self._judge(network, stories.held_out, meter, when, "held-out")
        general = self._judge(network, self.general, meter, when, "general")
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

    def _judge(
        self,
        network: Any,
        texts: Sequence[data.Example],
        meter: MemoryMeter,
        when: Literal["before", "after"],
        kind: Literal["held-out", "general"],
    ) -> float | None:
        """Mean loss over the tokens of some texts; null where there are none or the weights are random."""
        if not texts:
            return None
        self._enter("evaluate")
        with meter.phase(split=False):
            losses = evaluate_model.story_losses(network, texts, self.spec, self.pad_id, self.device)
        self.metrics["peak_evaluate_bytes"] = max(meter.peak(), self.metrics.get("peak_evaluate_bytes") or 0)
        if not self.pretrained:
            return None  # a loss of random weights means nothing
        loss = evaluate_model.token_mean(losses)
        if loss is None or not math.isfinite(loss):
            raise Diverged(f"loss on {kind} texts is {loss} {when} training")
        self.stories += [StoryLoss(story_id=i, when=when, loss=x, tokens=n, kind=kind) for i, x, n in losses]
        return loss

    # -------------------------------------------------------------------------------- train

    def _train(self, network: Any, stories: data.Data, meter: MemoryMeter) -> None:
        groups = data.optimizer_steps(self.spec, stories.train, TRACKED_STEPS)
        if not model.trainable(network):
            raise DidNotTrain("the model has no trainable parameter")
        trainer = Trainer(network, self.spec, self.device, len(groups), self._enter)
        if distributed.number() > 0:  # each process drops out other neurons
            torch.manual_seed(self.spec.seed + distributed.number())
        before = _fingerprint(network)
        meter.tracker.flops = 0
        meter.restart()
        peak, shares = 0, {}
        for number, group in enumerate(groups[:TRACKED_STEPS], start=1):
            with meter.phase(split=True):
                self._step(trainer, group, number, len(groups), meter)
            if meter.peak() >= peak:
                peak = meter.peak()
                shares = meter.shares(peak)
        meter.restart()
        with CardWatch(self.device) as card:
            for number, group in enumerate(groups[TRACKED_STEPS:], start=TRACKED_STEPS + 1):
                self._step(trainer, group, number, len(groups), None)
        self.metrics |= card.metrics(sum(step.tokens for step in self.steps if not step.tracked))
        if self.device.type == "cuda":  # the allocator has seen the timed steps too
            peak = max(peak, meter.peak())
        self.metrics |= {"peak_memory_bytes": peak, **shares, "peak_reserved_bytes": meter.reserved()}
        self._refuse_untrained(before, _fingerprint(network))
        self._summarise(int(distributed.total(torch.tensor(meter.tracker.flops, device=self.device))))

    def _step(
        self, trainer: Trainer, group: list[data.Example], number: int, of: int, meter: MemoryMeter | None
    ) -> None:
        began = self._now()
        batches = list(data.micro_batches(group, self.spec.micro_batch_size, self.pad_id, self.device))
        result = trainer.step(batches) if meter is None else trainer.tracked_step(batches, meter.tracker)
        self.steps.append(
            Step(
                step=number,
                tracked=meter is not None,
                seconds=self._since(began),
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=result.learning_rate,
                **self._counts(batches),
                peak_memory_bytes=meter.peak() if meter is not None else None,
            )
        )
        self.tell("step", (number, of))

    def _counts(self, batches: list[data.Batch]) -> dict[str, int]:
        """What all processes' micro-batches of a step hold."""
        names = ("samples", "tokens", "supervised_tokens", "padded_tokens")
        sums = [sum(getattr(batch, name) for batch in batches) for name in names]
        if distributed.count() > 1:
            sums = distributed.total(torch.tensor(sums, device=self.device)).tolist()
        return dict(zip(names, sums, strict=True))

    def _now(self) -> Any:
        """This moment, on the clock of the device: work that is queued on a card has its time there."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, moment: Any) -> float:
        """Seconds since then, once what was queued is done."""
        now = self._now()
        if self.device.type == "cpu":
            return float(now - moment)
        now.synchronize()
        return float(moment.elapsed_time(now)) / 1000

    def _refuse_untrained(self, before: list[float], after: list[float]) -> None:
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
        weights = model.adapter_weights(network)  # of which each process may hold a part
        if self.folder is None:
            return
        aside = self.folder / f".{self.spec.id}.{os.getpid()}.aside"
        try:
            model.save_adapter(network, self.spec, weights, aside)
            self.adapter_id = _content(aside)
            folder = self.folder / self.adapter_id
            if not folder.is_dir():  # the same bytes may have been kept before
                os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _enter(self, phase: Phase) -> None:
        if phase != self.phase or phase == "start":
            self.phase = phase
            self.tell("phase", phase)


def _content(folder: Path) -> str:
    """16 hex digits of the hash of a folder's weights and configuration."""
    digest = hashlib.sha256()
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.json"))):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _fingerprint(network: Any) -> list[float]:
    """A norm for each trained weight: enough to see whether any changed, without a copy of them."""
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(p, dtype=torch.float32) for p in model.trainable(network)]
        return torch.stack([distributed.whole(norm) for norm in norms]).tolist()


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
    """The first line of an error, short, without what is the user's own."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return withheld(lines[0])[:500]
