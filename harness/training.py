"""The training step and its optimizer: the one place where a model learns."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harness import distributed
from harness.data import Batch
from harness.memory import Component, LiveTensors
from harness.model import autocast, compute_dtype, trainable
from harness.results import Phase
from harness.spec import TrialSpec

TRACKED_STEPS = 2
"""Optimizer steps whose memory is followed and whose time does not count. Two: the optimizer's state
is there from the second on."""


class Diverged(Exception):
    """A loss or a gradient is not finite: training is over."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step says of itself."""

    loss: float
    """Nats per supervised token of the effective batch, before the update."""
    grad_norm: float | None
    """Before clipping; null where the loss scaler skipped the update."""
    learning_rate: float


class Trainer:
    """A model's optimizer, schedule and scaler, and the step that uses them.

    Args:
        model: trained in place.
        spec: what to do.
        device: where the model is.
        steps: optimizer steps that the schedule spans.
        on_phase: told `forward`, `backward` and `optimizer` as each begins.
        read: how a number is had from a tensor; a tensor without contents has none to give.
        wrap: what makes of it a model that others train too.
    """

    def __init__(
        self,
        model: Any,
        spec: TrialSpec,
        device: torch.device,
        steps: int,
        on_phase: Callable[[Phase], None] = lambda phase: None,
        read: Callable[[torch.Tensor], float] = float,
        wrap: Callable[[Any, torch.device], Any] = distributed.wrapped,
    ) -> None:
        self.model = wrap(model, device)
        self._module = model
        self.spec = spec
        self.device = device
        self.optimizer = _optimizer(model, spec)
        self.scheduler = _scheduler(self.optimizer, spec, steps)
        self.scaler = torch.amp.GradScaler(device.type) if compute_dtype(spec) is torch.float16 else None
        self._parameters = trainable(model)
        self.on_phase = on_phase
        self._read = read

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over the micro-batches of one effective batch, or this process's share of them.

        The loss is the sum over all supervised tokens divided by their number, so that the
        micro-batching changes nothing but memory and time.

        Raises:
            Diverged: loss or gradient is not finite.
        """
        supervised = distributed.total(torch.tensor(sum(b.supervised_tokens for b in batches), device=self.device))
        losses = []
        for batch in batches:
            with distributed.accumulating(self.model, last=batch is batches[-1]):
                self.on_phase("forward")
                with autocast(self.spec, self.device):
                    loss = self.model(**batch.inputs, num_items_in_batch=supervised).loss
                self.on_phase("backward")
                shared = loss * distributed.count() if distributed.count() > 1 else loss  # they are averaged
                (shared if self.scaler is None else self.scaler.scale(shared)).backward()
                losses.append(loss.detach())
                del loss, shared  # their graph, else freed only when the next micro-batch's loss replaces it
        total = self._read(distributed.total(torch.stack(losses).sum()))
        if not math.isfinite(total):
            self.on_phase("forward")  # that is where it arose
            raise Diverged(f"loss is {total}")
        self.on_phase("optimizer")
        return self.update(total)

    def tracked_step(self, batches: Sequence[Batch], tracker: LiveTensors) -> StepResult:
        """A step under the tracker, which tells gradients and the optimizer's state from activations.

        A gradient counts as such from the moment it is accumulated. What the optimizer allocates is its state; what
        a step leaves behind there stays so.
        """
        report = self.on_phase

        # Torch's DistributedDataParallel makes room for gradients before the model's own forward pass.
        first: Component = "activations" if self.model is self._module else "gradients"
        components: dict[Phase, Component] = {"optimizer": "optimizer", "forward": first}

        def enter(phase: Phase) -> None:
            report(phase)
            tracker.component = components.get(phase, "activations")

        def begin(*_: Any) -> None:
            tracker.component = "activations"

        def adopt(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                tracker.adopt([parameter.grad], "gradients")

        hooks = [self._module.register_forward_pre_hook(begin)]
        hooks += [p.register_post_accumulate_grad_hook(adopt) for p in self._parameters]
        self.on_phase = enter
        try:
            return self.step(batches)
        finally:
            self.on_phase = report
            tracker.component = "activations"
            for hook in hooks:
                hook.remove()

    def update(self, loss: float) -> StepResult:
        """Clip the gradients that are there, let the optimizer take its step, and forget them.

        Raises:
            Diverged: the gradient is not finite.
        """
        rate = float(self.optimizer.param_groups[0]["lr"])
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        limit = self.spec.max_grad_norm or math.inf
        norm: float | None = self._read(distributed.whole(torch.nn.utils.clip_grad_norm_(self._parameters, limit)))
        if norm is not None and not math.isfinite(norm):
            if self.scaler is None:
                self.on_phase("backward")
                raise Diverged(f"gradient norm is {norm}")
            norm = None  # the scaler skips this update and tries a smaller scale
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, norm, rate)


def _optimizer(model: Any, spec: TrialSpec) -> torch.optim.Optimizer:
    """From transformers' own table of names; no weight decay on biases and norms, as its Trainer does."""
    from transformers import Trainer as HuggingFaceTrainer
    from transformers import TrainingArguments
    from transformers.trainer_pt_utils import get_parameter_names

    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # named, never written
        optim=spec.optimizer,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        report_to=[],
        use_cpu=True,  # it builds no model and moves nothing; this keeps it from looking for a card
    )
    factory, options = HuggingFaceTrainer.get_optimizer_cls_and_kwargs(arguments, model)
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], patterns))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": spec.weight_decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    return factory([g for g in groups if g["params"]], **options)  # type: ignore[no-any-return]  # a class of optimizers


def _scheduler(optimizer: torch.optim.Optimizer, spec: TrialSpec, steps: int) -> Any:
    from transformers import get_scheduler

    return get_scheduler(
        spec.lr_scheduler,
        optimizer,
        num_warmup_steps=math.ceil(spec.warmup_ratio * steps),
        num_training_steps=steps,
    )
