"""Measures the optimizer steps of any training loop, by hooks of its model and its optimizers."""

from __future__ import annotations

import contextlib
import inspect
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from harness.errors import InputError
from harness.record import Phase, Step
from harness.training import live_tensors, memory
from harness.training.batches import IGNORED
from harness.training.clock import DeviceClock
from harness.training.waiting import Waiting, is_disturbed

_Number = int | torch.Tensor
"""A count that may still be on the device: reading it would wait for all queued work."""


@dataclass
class _MicroBatch:
    """One forward pass in training."""

    samples: _Number
    tokens: _Number
    supervised_tokens: _Number
    padded_tokens: int
    shape: tuple[int, int]
    divisor: _Number | None
    """What its summed loss is divided by: the tokens of the effective batch, of all processes; null: its own."""
    loss: torch.Tensor | None = None


@dataclass
class _Open:
    """A step that has begun."""

    started: Any
    tracked: bool = False
    learning_rate: float = 0.0
    seconds: float | None = None
    """Until the end of the last optimizer's step so far; null: none has ended. So are the peak and the operations:
    what comes after it is not of the step.
    """
    peak: int | None = None
    breakdown: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    waited: float | None = 0.0
    interrupted: bool = False
    """Whether the model was evaluated amid it, as after an epoch that ends with a part of a step."""
    reported: tuple[float, float | None] | None = None
    """Loss and norm of the gradients, as the loop's own program logs them."""
    micro_batches: list[_MicroBatch] = field(default_factory=list)


class _Hook:
    """A hook of a model that nothing outlives: copies of the model and files of it have one that does nothing."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        # Where the model is compiled as a whole, not with it.
        self._call = None if call is None else torch.compiler.disable(call)

    def __call__(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class Loop:
    """The steps of a training loop. A step is what lies between a first forward pass with gradients and the end of an
    optimizer's step; what a loop does between steps (loading data, evaluating, saving) is not measured.

    The first steps are tracked, tensor by tensor, and so is each later micro-batch on a CPU that is larger than those:
    they hold most. All other steps are timed, and bear the hooks alone. On CUDA the allocator's counters give the peak
    of every step; they are reset at the beginning of each.

    Args:
        model: whose forward passes count; it may be wrapped later, for data parallelism.
        tracked_steps: how many of the first steps are tracked.
        block: of the timed steps, see `Visit`.
    """

    def __init__(self, model: torch.nn.Module, tracked_steps: int, block: int) -> None:
        self.model = model
        self._take_device()
        self.steps: list[Step] = []
        self.phase: Phase = "start"
        self.peak_memory_bytes = 0
        self.breakdown: dict[str, int] = {}
        self.reserved: int | None = None
        self.shapes: Counter[tuple[int, int]] = Counter()
        """Rows and columns of the micro-batches."""
        self.counts: Counter[int] = Counter()
        """Micro-batches of the steps."""
        self.autocast: torch.dtype | None = None
        """Type that forward passes are autocast to; null: they are not."""
        self.diverged: str | None = None
        """Which step's loss was not finite, the first of them; null: none."""
        self.optimizer: torch.optim.Optimizer | None = None
        self.learning_rate: float | None = None
        """That a schedule multiplies; null: there is none."""
        self._tracked_steps = tracked_steps
        self._block = block
        self._trained: list[torch.nn.Parameter] = []
        self._ids: set[int] = set()
        self._begun = False
        self._step: _Open | None = None
        self.tracking = contextlib.ExitStack()
        """What slows torch while a step is tracked, which is closed at its end."""
        self._is_tracking = False
        self._largest = 0
        self._flops = 0
        self._positional: Sequence[str] = ()
        self._hooks = contextlib.ExitStack()

    def start(self) -> None:
        """Watch the model."""
        # Hooks of all optimizers would keep a model for ever whose training was abandoned.
        before, after = weakref.WeakMethod(self._before_update), weakref.WeakMethod(self._after_update)
        handles = [
            self.model.register_forward_pre_hook(_Hook(self._before_forward), with_kwargs=True),
            self.model.register_forward_hook(_Hook(self._after_forward), with_kwargs=True),
            register_optimizer_step_pre_hook(_weak(before)),
            register_optimizer_step_post_hook(_weak(after)),
        ]
        inner = (each for each in self.model.modules() if each is not self.model)
        with_weights = next((each for each in inner if any(True for _ in each.parameters(recurse=False))), None)
        if with_weights is not None:
            handles.append(with_weights.register_forward_pre_hook(_Hook(self._within_forward)))
        for handle in handles:
            self._hooks.callback(handle.remove)
        self._positional = _positional(self.model)
        weakref.finalize(self, self._hooks.close)

    def _take_device(self) -> None:
        self.device = next(self.model.parameters()).device
        self.meter = memory.MemoryMeter(self.device, None, compiled=True)  # layers may be, before or later
        self._clock = DeviceClock(self.device)

    def _begin(self) -> None:
        """Count what the model holds. Until its first step a loop may move it, and add adapters."""
        if next(self.model.parameters()).device != self.device:
            self._take_device()
        self._begun = True
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._ids = {id(p) for p in self._trained}
        tracker = self.meter.tracker
        tracker.adopt(_held_by(self.model), "weights")
        if len(self._trained) < len(list(self.model.parameters())):  # else the weights are what is trained
            tracker.adopt(self._trained, "adapters")
        self._waiting = Waiting()

    def stop(self) -> None:
        """Leave the model as it was."""
        self._hooks.close()
        self._end_step()
        self.reserved = self.meter.reserved()

    def report(self, loss: float, grad_norm: float | None) -> None:
        """Take over what the loop's own program logs of the step that has just ended, or that is about to.

        Args:
            loss: nats per supervised token.
            grad_norm: before clipping.
        """
        if self._step is not None:
            self._step.reported = (loss, grad_norm)

    @property
    def flops(self) -> int:
        """Operations of the tracked steps."""
        return self._flops

    # -------------------------------------------------------------------------------- hooks

    def _before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._step is not None and self._step.seconds is not None:
            self._end_step()
        if not (module.training and torch.is_grad_enabled()):
            if self._step is not None:
                self._step.interrupted = True
            return
        if not self._begun:
            self._begin()
        if self._step is None:
            self.meter.restart()
            self._waiting.since_last()  # what comes between steps is not theirs
            self._step = _Open(self._clock.now())
        self.phase = "forward"
        self.autocast = self._autocast()
        micro_batch = _micro_batch(dict(zip(self._positional, args, strict=False)) | kwargs)
        self._step.micro_batches.append(micro_batch)
        if not self._is_tracking and self._holds_most(micro_batch):
            self._step.tracked = True
            self.meter.tracker.flops = 0
            self._track()
            self.meter.restart()
        if self._is_tracking:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            self.meter.tracker.adopt([t for t in tensors if t.device.type == self.device.type], "activations")

    def _within_forward(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Autocast again: accelerate enters it within the model's `forward`."""
        if not torch.compiler.is_compiling() and self._step is not None and self._step.seconds is None:
            self.autocast = self._autocast() or self.autocast

    def _autocast(self) -> torch.dtype | None:
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def _holds_most(self, micro_batch: _MicroBatch) -> bool:
        if len(self.steps) < self._tracked_steps:
            return True
        return self.device.type == "cpu" and micro_batch.padded_tokens > self._largest

    def _after_forward(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._step is None or not (module.training and torch.is_grad_enabled()):
            return
        self.phase = "backward"
        self._step.micro_batches[-1].loss = _loss(output)

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._step is None or not self._is_ours(optimizer):
            return
        self.phase = "optimizer"
        if self.optimizer is None or self._step.seconds is None:
            self.optimizer = optimizer
            group = optimizer.param_groups[0]
            self._step.learning_rate = float(group["lr"])
            self.learning_rate = float(group["initial_lr"]) if "initial_lr" in group else None
        if self._step.tracked and not self._is_tracking:  # a second optimizer of the step
            self._track()
        self.meter.tracker.component = "optimizer"
        if self._is_tracking:  # of a training that was resumed
            self.meter.tracker.adopt(_tensors_of(optimizer.state), "optimizer")

    def _after_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._step is None or not self._is_ours(optimizer):
            return
        step, tracker = self._step, self.meter.tracker
        tracker.component = "activations"
        step.seconds = self._clock.seconds_since(step.started)
        if step.tracked or self.device.type == "cuda":
            step.peak, step.flops = self.meter.peak(), tracker.flops
            step.breakdown = self.meter.breakdown(step.peak) if step.tracked else {}
        self._stop_tracking()
        waited = self._waiting.since_last()
        step.waited = None if waited is None or step.waited is None else step.waited + waited

    def _is_ours(self, optimizer: torch.optim.Optimizer) -> bool:
        # What is frozen may be among them, before all others.
        return any(id(p) in self._ids for group in optimizer.param_groups for p in group["params"])

    # -------------------------------------------------------------------------------- steps

    def _track(self) -> None:
        """Track from here to the end of the step, what is held already too."""
        tracker = self.meter.tracker
        self._is_tracking = True
        tracker.adopt([p.grad for p in self._trained if p.grad is not None], "gradients")
        if self.optimizer is not None:
            tracker.adopt(_tensors_of(self.optimizer.state), "optimizer")

        def adopt(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                tracker.adopt([parameter.grad], "gradients")

        for parameter in self._trained:
            self.tracking.callback(parameter.register_post_accumulate_grad_hook(adopt).remove)
        self.tracking.enter_context(tracker)

    def _stop_tracking(self) -> None:
        self.tracking.close()
        self._is_tracking = False

    def _end_step(self) -> None:
        step, self._step = self._step, None
        self._stop_tracking()
        if step is None or step.seconds is None:  # no optimizer has seen its gradients
            return
        peak = step.peak
        self._flops += step.flops if step.tracked else 0
        if peak is not None and peak >= self.peak_memory_bytes:
            if step.tracked:
                self.breakdown = step.breakdown
            elif self.breakdown:  # of a card's allocator; what is trained, and its state, were there already
                self.breakdown["memory_activations_bytes"] += peak - self.peak_memory_bytes
            self.peak_memory_bytes = peak
        if step.tracked and self.steps:  # the first step has no state of an optimizer yet
            self._largest = max(self._largest, *(each.padded_tokens for each in step.micro_batches))
        reported, norm = step.reported or (None, None)
        loss = _mean_loss(step.micro_batches)
        loss = reported if loss is None else loss
        if loss is not None and not math.isfinite(loss):
            self.diverged = self.diverged or f"loss of step {len(self.steps) + 1} is {loss}"
        self.shapes.update(each.shape for each in step.micro_batches)
        self.counts[len(step.micro_batches)] += 1
        self.steps.append(
            Step(
                step=len(self.steps) + 1,
                tracked=step.tracked,
                seconds=step.seconds,
                loss=_finite(loss),
                grad_norm=_finite(norm),
                learning_rate=step.learning_rate,
                samples=sum(int(each.samples) for each in step.micro_batches),
                tokens=sum(int(each.tokens) for each in step.micro_batches),
                supervised_tokens=sum(int(each.supervised_tokens) for each in step.micro_batches),
                padded_tokens=sum(each.padded_tokens for each in step.micro_batches),
                peak_memory_bytes=peak,
                block=None if step.tracked else self._block,
                waited_seconds=step.waited,
                disturbed=not step.tracked and (step.interrupted or is_disturbed(step.waited, step.seconds)),
            )
        )


def _weak(method: weakref.WeakMethod[Callable[..., None]]) -> Callable[..., None]:
    def call(*args: Any) -> None:
        if (alive := method()) is not None:
            alive(*args)

    return call


def _positional(model: Any) -> list[str]:
    """Names of what a model may be given by its position; a wrapper that has none passes on to what it wraps."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, each in inspect.signature(model.forward).parameters.items() if each.kind in kinds]
    if names:
        return ["input_ids", *names[1:]]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "_orig_mod", None)
    return ["input_ids"] if inner is None else _positional(inner)


def _micro_batch(given: Mapping[str, Any]) -> _MicroBatch:
    """What a forward pass is given, in the names of transformers' models.

    Raises:
        InputError: it has no tokens.
    """
    ids = given.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise InputError("harness.watch: the model is called without input_ids of shape (examples, tokens)")
    labels, mask, positions = (given.get(name) for name in ("labels", "attention_mask", "position_ids"))
    tokens: _Number = ids.numel()
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        tokens = mask.sum()
    samples: _Number = len(ids)
    if len(ids) == 1 and isinstance(positions, torch.Tensor) and positions.numel() == ids.numel():
        samples = (positions == 0).sum()  # several examples in one row
    supervised = tokens
    if isinstance(labels, torch.Tensor) and labels.shape == ids.shape:
        supervised = (labels[:, 1:] != IGNORED).sum()
    divisor = given.get("num_items_in_batch")
    return _MicroBatch(samples, tokens, supervised, ids.numel(), (ids.shape[0], ids.shape[1]), divisor)


def _loss(output: Any) -> torch.Tensor | None:
    """The loss that a forward pass gives, as models of transformers do; null: the loop computes its own."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss.detach() if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None


def _mean_loss(micro_batches: list[_MicroBatch]) -> float | None:
    """Nats per supervised token of an effective batch; null where a micro-batch gave none."""
    total, tokens = 0.0, 0
    for each in micro_batches:
        if each.loss is None:
            return None
        own = int(each.supervised_tokens)
        tokens += own
        if own:  # the mean over no token is not a number
            total += float(each.loss) * (own if each.divisor is None else float(each.divisor))
    return total / tokens if tokens else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _held_by(model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, and what belongs to quantised ones: scales and tables, which are neither."""
    held = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        held += _tensors_of(vars(parameter))
    for module in model.modules():
        held += _tensors_of(getattr(module, "meta", None))  # HQQ's
        held += _tensors_of(getattr(module, "state", None))  # bitsandbytes' 8-bit layers
        held += _tensors_of(getattr(module, "quant_state", None))
    return held


def _tensors_of(value: Any, depth: int = 4) -> list[torch.Tensor]:
    """The tensors in a value, its items and attributes, but for counters."""
    return list(_walk(value, depth))


def _walk(value: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield from (part for part in live_tensors.parts(value) if part.dim())
    elif isinstance(value, Mapping) and depth:
        for each in value.values():
            yield from _walk(each, depth - 1)
    elif isinstance(value, list | tuple) and depth:
        for each in value:
            yield from _walk(each, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
        yield from _walk(vars(value), depth - 1)
