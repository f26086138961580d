"""The training step, and the optimizer, schedule and loss scaler that it uses."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harness.record import Phase
from harness.spec.trial import TrialSpec
from harness.training import adapter_methods, distributed, loss, optimizers, order
from harness.training.batches import Batch
from harness.training.live_tensors import Component, LiveTensors
from harness.training.model import autocast, compute_dtype, trainable

_SMALLEST_SCALE = 2.0**-16
"""Of the loss: below it, gradients that are not finite are not the scale's."""


class Diverged(Exception):
    """A loss or a gradient is not finite."""


@dataclass(frozen=True)
class StepResult:
    """Figures of one optimizer step."""

    loss: float
    """Nats per supervised token of the effective batch, before the update."""
    auxiliary_loss: float | None
    """Of the model's own, at its weight, which is added to it; null where it has none."""
    grad_norm: float | None
    """Before clipping; null where the loss scaler has no scale at which it is finite, and there was no update."""
    learning_rate: float
    """That of the update, after warm-up by the schedule or by the optimizer."""


class Trainer:
    """Trains a model step by step.

    Args:
        model: trained in place.
        spec: what to do.
        device: of the model.
        steps: optimizer steps of the schedule.
        on_phase: called with `forward`, `backward` and `optimizer` as each starts.
        read: reads a tensor's value, which fake tensors do not have.
        wrap: wraps the model for data parallelism.
    """

    def __init__(
        self,
        model: Any,
        spec: TrialSpec,
        device: torch.device,
        steps: int,
        on_phase: Callable[[Phase], None] = lambda phase: None,
        read: Callable[[torch.Tensor], float] = float,
        wrap: Callable[[Any, torch.device], Any] = distributed.wrap_ddp,
    ) -> None:
        self.model = wrap(model, device)
        self._module = model
        self.spec = spec
        self.device = device
        adapter_methods.set_steps(model, steps)
        self.optimizer = optimizers.make(model, spec, order.warm_up_steps(spec, steps))
        optimizers.set_averaged(self.optimizer, False)
        self.scheduler = _scheduler(self.optimizer, spec, steps)
        self.scaler = torch.amp.GradScaler(device.type) if compute_dtype(spec) is torch.float16 else None
        self._parameters = trainable(model)
        self.on_phase = on_phase
        self._updates = 0
        self._on_retry: Callable[[], None] = lambda: None
        self._read = read
        self._kept_outputs: Any = None

    def optimizer_state(self) -> list[torch.Tensor]:
        """Tensors of the optimizer's state, which some optimizers (Adagrad) have before the first step; no counters."""
        return [tensor for state in self.optimizer.state.values() for tensor in _tensors(state)]

    def end(self) -> None:
        """Leave the weights as they are to be evaluated and kept."""
        optimizers.set_averaged(self.optimizer, True)

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over the micro-batches of one effective batch, or this rank's slice of them.

        What is minimised is the cross entropy of all supervised tokens divided by their number, and the mean by tokens
        of a model's auxiliary loss, so that the micro-batching changes nothing but memory and time.

        Where gradients overflow in fp16, they are taken again at a smaller scale of the loss: trainers that skip such
        updates lose the first steps of a training, and with them a part of the schedule.

        Raises:
            Diverged: loss or gradient is not finite.
        """
        result = self._try_step(batches)
        while self.scaler is not None and result.grad_norm is None and self.scaler.get_scale() > _SMALLEST_SCALE:
            self._on_retry()
            result = self._try_step(batches)
        return result

    def _try_step(self, batches: Sequence[Batch]) -> StepResult:
        counts = [(batch.supervised_tokens, batch.tokens) for batch in batches]
        own = torch.tensor([sum(column) for column in zip(*counts, strict=True)], device=self.device)
        supervised, tokens = distributed.all_reduce_sum(own)
        losses = []
        for batch in batches:
            with distributed.gradient_sync(self.model, last=batch is batches[-1]):
                self.on_phase("forward")
                terms = self._terms(batch, supervised, tokens)
                total = functools.reduce(operator.add, terms)
                self.on_phase("backward")
                # DDP and FSDP average gradients over ranks; the loss is a sum.
                summed = total * distributed.world_size() if distributed.world_size() > 1 else total
                (summed if self.scaler is None else self.scaler.scale(summed)).backward()
                losses.append([term.detach() for term in terms])
                del terms, total, summed  # frees the graph now, not when the next micro-batch's loss replaces it
        values = [
            self._read(distributed.all_reduce_sum(torch.stack(column).sum())) for column in zip(*losses, strict=True)
        ]
        if not math.isfinite(sum(values)):
            self.on_phase("forward")  # where it arose
            raise Diverged(f"loss is {sum(values)}")
        self.on_phase("optimizer")
        return self.update(*values)

    def _terms(self, batch: Batch, supervised: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
        """A micro-batch's part of the loss, and of the auxiliary loss where the model has one.

        Args:
            batch: the micro-batch.
            supervised: supervised tokens of the effective batch.
            tokens: its non-padding tokens.
        """
        with autocast(self.spec, self.device), loss.auxiliary_by_example(self._module):
            outputs, summed = loss.forward(self.model, self._module, batch.inputs, self.spec)
            self._kept_outputs = outputs if self.spec.keep_outputs else None
            terms = [summed / supervised]
            auxiliary = loss.auxiliary(self._module, outputs)
        return terms if auxiliary is None else [*terms, auxiliary * batch.tokens / tokens]

    def tracked_step(self, batches: Sequence[Batch], tracker: LiveTensors) -> StepResult:
        """A step under the tracker, with the component of each storage.

        A gradient is one from its accumulation on. What the optimizer allocates is its state, in later steps too.
        """
        report = self.on_phase

        # DistributedDataParallel allocates buckets for gradients before the model's own forward pass.
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
            elif parameter in self.optimizer.state:  # updated already, in the backward pass
                tracker.adopt(_tensors(self.optimizer.state[parameter]), "optimizer")

        flops = tracker.flops

        def again() -> None:
            tracker.flops = flops

        hooks = [self._module.register_forward_pre_hook(begin)]
        hooks += [p.register_post_accumulate_grad_hook(adopt) for p in self._parameters]
        self.on_phase, self._on_retry = enter, again
        try:
            return self.step(batches)
        finally:
            self.on_phase, self._on_retry = report, lambda: None
            tracker.component = "activations"
            for hook in hooks:
                hook.remove()

    def update(self, loss: float, auxiliary_loss: float | None = None) -> StepResult:
        """Clip the gradients, step the optimizer, and free the gradients.

        Raises:
            Diverged: the gradient is not finite.
        """
        rate = self.optimizer.param_groups[0]["lr"]
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if isinstance(self.optimizer, optimizers.UpdatesInBackward):
            total_norm = self.optimizer.take_norm()
        else:
            total_norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.spec.max_grad_norm or math.inf)
        norm: float | None = self._read(distributed.full_tensor(total_norm))
        if norm is not None and not math.isfinite(norm):
            if self.scaler is None:
                self.on_phase("backward")
                raise Diverged(f"gradient norm is {norm}")
            norm = None  # the scaler skips this update and takes a smaller scale
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        # That of an optimizer that warms up itself is known once it has stepped.
        rate = float(self.optimizer.param_groups[0].get("scheduled_lr", rate))
        if norm is not None:
            self.scheduler.step()
            self._updates += 1
            adapter_methods.after_update(self._module, self._updates)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, auxiliary_loss, norm, rate)


def _tensors(state: Any) -> list[torch.Tensor]:
    """Those of a parameter's state, without counters."""
    return [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]


def _scheduler(optimizer: torch.optim.Optimizer, spec: TrialSpec, steps: int) -> Any:
    from transformers import get_scheduler

    return get_scheduler(
        spec.schedule,
        optimizer,
        num_warmup_steps=order.warm_up_steps(spec, steps),
        num_training_steps=steps,
    )
