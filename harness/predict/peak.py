"""Predicts peak memory and operations of a spec: its training step is replayed on fake tensors.

Under torch's FakeTensorMode tensors have shape, type and storage, and nothing is computed. The live-tensor tracker of
real trials follows the step, so that a prediction means the same as `peak_memory_bytes`. The model is built from its
config: no weights are loaded or downloaded.

FakeTensorMode is private API of torch (2.13, `torch._subclasses`); a public one would replace it.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from harness._util.messages import first_line
from harness.environment import DeviceType
from harness.errors import InputError
from harness.predict import fake_weights, loaded_model, masks, reserve
from harness.predict.cards import AMPERE, Capability
from harness.predict.compiled_layers import compiled_without_kernels
from harness.predict.emulation import answer_questions, emulate_kernels, emulate_optimizer
from harness.predict.loaded_model import LoadedModel
from harness.predict.prediction import Prediction
from harness.predict.repeated_layers import Irregular
from harness.predict.replay import operation_of
from harness.predict.roofline import Work
from harness.predict.trace import Live, as_first_step, as_later_update, requests
from harness.spec.keys import LOW_RANK_OPTIMIZERS
from harness.spec.trial import TrialSpec
from harness.training import (
    batches,
    checkpoints,
    compilation,
    device_limits,
    distributed,
    evaluation,
    limits,
    model,
    order,
)
from harness.training.batches import Batch, Example
from harness.training.step import StepResult, Trainer

_CPU = torch.device("cpu")
_ANY_STORY = 16_384
"""Tokens that no story exceeds."""
_ANY_ID = 0
"""Padding, whose value nothing reads."""


_read: dict[str, batches.Data] = {}
"""The data that were read last."""


class Unpredictable(Exception):
    """A model's step needs the values of tensors, or has an operation without shapes."""


def predict(
    spec: TrialSpec,
    device_type: DeviceType,
    *,
    capability: Capability = AMPERE,
    full_length: bool = False,
    expandable_segments: bool = False,
    trust_remote_code: bool = False,
) -> Prediction:
    """Replay those micro-batches of a spec of which one holds most memory, chosen from all its steps.

    Args:
        spec: what to train.
        device_type: device to train on.
        capability: compute capability of a CUDA device.
        full_length: as if every example filled the sequence; where `pad_to_sequence_len` does not say otherwise, with
            padding in micro-batches of several.
        expandable_segments: of torch's allocator, by PYTORCH_CUDA_ALLOC_CONF.
        trust_remote_code: let models from the hub run their own code.

    Raises:
        InputError: the model's config or the stories are not available, or the device cannot do what the spec says.
        Unpredictable: an operation cannot be replayed on fake tensors; the message names it. Or layers are compiled,
            for a card.
    """
    started = time.perf_counter()
    device_limits.refuse_on(spec, device_type)
    if spec.torch_compile and device_type == "cuda":
        raise Unpredictable("torch_compile: what compiled layers keep on a card is the choice of a compiler for cards")
    if spec.attention == "flex_attention":
        raise Unpredictable("attention flex_attention: it is compiled, and by a compiler for cards")
    tokenizer = _tokenizer(spec, trust_remote_code)
    assumed = tokenizer is None
    full_length = full_length or assumed
    data = _data(spec, tokenizer or checkpoints.byte_tokenizer(), full_length)
    steps = order.optimizer_steps(spec, data.train)

    def replayed(*, all_layers: bool) -> tuple[Prediction, reserve.Traces | None]:
        loaded = loaded_model.loaded(
            spec, device_type, capability, all_layers=all_layers, trust_remote_code=trust_remote_code
        )
        # Rank 0 has the widest micro-batches.
        compiled = compiled_without_kernels() if spec.torch_compile else contextlib.nullcontext()
        with compiled, distributed.fake_process_group(0, spec.num_processes), loaded as its_model:
            limits.check_lengths(spec, *limits.lengths_of(data), limits.of_model(its_model.network))
            return _StepReplay(its_model, spec, device_type, capability, full_length=full_length).run(
                steps, data.held_out
            )

    try:
        try:
            every = spec.num_processes > 1 or spec.optimizer_in_backward or spec.torch_compile
            prediction, traces = replayed(all_layers=every)
        except Irregular:
            prediction, traces = replayed(all_layers=True)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise Unpredictable(f"{error.func} cannot be replayed on fake tensors") from error
    except NotImplementedError as error:
        raise Unpredictable(first_line(error)) from error
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        operation = "torch_compile" if spec.torch_compile else operation_of(error)
        if isinstance(error, InputError) or operation is None:
            raise
        raise Unpredictable(f"{operation}: {first_line(error)}") from error
    if traces is not None:
        prediction = reserve.with_reserve(prediction, traces, expandable_segments=expandable_segments)
    length = spec.sequence_length if assumed else None
    return prediction.model_copy(update={"seconds": time.perf_counter() - started, "assumed_length": length})


def _tokenizer(spec: TrialSpec, trust_remote_code: bool) -> Any:
    """The spec's tokenizer; null where there is none, and lengths are not known."""
    try:
        return checkpoints.load_tokenizer(spec, trust_remote_code=trust_remote_code)
    except checkpoints.NoTokenizer:
        return None


def _data(spec: TrialSpec, tokenizer: Any, full_length: bool) -> batches.Data:
    if full_length:  # stories are read whole: a short sequence would leave no completion of them
        whole = {"sequence_length": _ANY_STORY, "eval_sequence_length": _ANY_STORY}
        data = _loaded(spec.model_copy(update=whole), tokenizer)
        return replace(
            data,
            train=tuple(_filled(example, spec.sequence_length) for example in data.train),
            held_out=tuple(_filled(example, batches.evaluated_length(spec)) for example in data.held_out),
        )
    return _loaded(spec, tokenizer)


def _loaded(spec: TrialSpec, tokenizer: Any) -> batches.Data:
    """The data of a spec, which those of a grid mostly share; they are taken to stay the same while it is planned."""
    key = batches.key(spec)
    if key not in _read:
        _read.clear()
        _read[key] = batches.load(spec, tokenizer)
    return _read[key]


def _filled(example: Example, length: int) -> Example:
    ids = example.input_ids * math.ceil(length / len(example))
    start = min(example.completions[0][0], length - 1)
    return replace(example, input_ids=ids[:length], completions=((start, length),))


class _StepReplay:
    """Takes steps of a spec, or parts of them."""

    def __init__(
        self,
        loaded: LoadedModel,
        spec: TrialSpec,
        device_type: DeviceType,
        capability: Capability,
        *,
        full_length: bool,
    ) -> None:
        self.loaded, self.spec, self.full_length = loaded, spec, full_length
        self.network, self.fake, self.tracker = loaded.network, loaded.fake, loaded.tracker
        self.tracker.updates_in = ("backward", "optimizer") if spec.optimizer_in_backward else ("optimizer",)
        self.device_type, self.capability = device_type, capability

    def run(
        self, steps: Sequence[Sequence[Example]], held_out: Sequence[Example]
    ) -> tuple[Prediction, reserve.Traces | None]:
        """Evaluate, then take what holds most of the steps; with the traces on CUDA."""
        tracker = self.tracker
        answered = answer_questions(self.spec.adapter)
        with emulate_kernels(self.device_type, self.capability, tracker), answered:
            if held_out:
                self._evaluate(held_out)
                gc.collect()  # what is left in cycles would count until the collector happens to run
            evaluated = tracker.take_trace()
            trainer = self._trainer(len(steps))
            tracker.take_work()
            # DDP moves gradients to buckets in the last micro-batch of a step: there whole steps are replayed.
            ddp = self.spec.num_processes > 1 and self.spec.sharding == "none"
            with emulate_optimizer(self.device_type, trainer.optimizer, tracker):
                work, positions = (self._replay_steps if ddp else self._replay_micro_batches)(trainer, steps)
        processes = self.spec.num_processes
        if self.device_type == "cpu":  # the CPU executes those of all processes
            work = [each.model_copy(update={"calls": each.calls * processes}) for each in work]
        elif self.spec.tf32 and self.capability >= AMPERE:
            work = [each.model_copy(update={"dtype": "tf32"}) if each.dtype == "float32" else each for each in work]
        trained = tracker.take_trace()
        live = Live()
        load_peak, evaluation_peak, peak = live.run(self.loaded.trace), live.run(evaluated), live.run(trained)
        prediction = Prediction(
            device_type=self.device_type,
            peak_memory_bytes=peak.size,
            peak_load_bytes=load_peak.size,
            peak_evaluate_bytes=evaluation_peak.size if held_out else None,
            breakdown={f"memory_{name}_bytes": size for name, size in peak.breakdown.items()},
            phases=peak.phases,
            work=tuple(work),
            positions=processes * positions,
            seconds=0.0,
        )
        traces = self.loaded.requests, requests(evaluated), requests(trained)
        return prediction, traces if self.device_type == "cuda" else None

    def _trainer(self, steps: int) -> Trainer:
        # Outside the fake mode: a new 8-bit optimizer computes its tables from values.
        trainer = Trainer(
            self.network,
            self.spec,
            _CPU,
            steps,
            on_phase=self.tracker.enter,
            read=lambda tensor: 1.0,
            wrap=self._replica,
        )
        self._make_counters_readable(trainer.optimizer)
        self.tracker.adopt(trainer.optimizer_state(), "optimizer")
        trainer.scaler = None  # it reads whether gradients are finite; its state is two numbers
        return trainer

    def _make_counters_readable(self, optimizer: torch.optim.Optimizer) -> None:
        """Counters of steps that an optimizer has before the first one are made as those that it makes in it."""
        with self.fake, self.tracker:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and not value.dim():
                        state[name] = torch.tensor(0.0)

    def _evaluate(self, held_out: Sequence[Example]) -> None:
        """Evaluate the heaviest micro-batches of held-out examples."""
        spec = self.spec.model_copy(update={"pad_to_sequence_len": None, "sample_packing": False, "num_processes": 1})
        of_all = order.kinds(held_out, spec)
        self.network.eval()
        for kind in order.heaviest(replace(each, later=False) for each in of_all):
            number = next(n for n, each in enumerate(of_all) if replace(each, later=False) == kind)
            start = number * spec.micro_batch_size
            batch = batches.collate(held_out[start : start + spec.micro_batch_size], _ANY_ID, _CPU)
            counted = masks.from_counts([self._needs_mask(batch)])
            uncompiled = compilation.uncompiled(self.spec)
            with self.fake, self._repeated_layers(), self.tracker, counted as enter, uncompiled:
                self.tracker.enter("evaluate")
                enter()
                evaluation.summed_losses(self.network, _fake_batch(batch), self.spec, _CPU)
                distributed.reshard(self.network)
        self.network.train()

    def _repeated_layers(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self.loaded.layers is None else self.loaded.layers.replayed_once()

    def _replica(self, network: Any, device: torch.device) -> Any:
        """The model as in DistributedDataParallel, where several processes hold all weights each."""
        if self.spec.num_processes == 1 or self.spec.sharding != "none":
            return network
        self.tracker.component = "gradients"
        with self.fake, self.tracker:
            replica = fake_weights.Replica(network)
        self.tracker.component = "activations"
        return replica

    def _replay_steps(self, trainer: Trainer, steps: Sequence[Sequence[Example]]) -> tuple[list[Work], int]:
        """One of the heaviest steps after another; returns the work of the last full one, and its positions."""
        work, positions = list[Work](), 0
        chosen = [steps[number] for number in order.heaviest_steps(steps, self.spec)]
        for step in chosen:
            batches = self._batches(step)
            self.tracker.take_work()
            self._step(trainer, batches, range(len(batches)))
            if len(step) == max(map(len, chosen)):
                work, positions = self.tracker.take_work(), sum(batch.padded_tokens for batch in batches)
        return work, positions

    def _replay_micro_batches(self, trainer: Trainer, steps: Sequence[Sequence[Example]]) -> tuple[list[Work], int]:
        """Each of the heaviest kinds of micro-batches once: those of the first step, which finds no optimizer state in
        memory, the update, and those of all later steps.

        Returns:
            The work of a step whose micro-batches are all like the heaviest, and its positions.
        """
        if self._is_covered(steps[0], steps[1:]):
            return self._replay_later_steps(trainer, steps[1:])
        for part in filter(None, (steps[:1], steps[1:])):
            work, positions, update = self._replay_part(trainer, part)
        return update + work, positions

    def _replay_later_steps(self, trainer: Trainer, steps: Sequence[Sequence[Example]]) -> tuple[list[Work], int]:
        """One replay of an update, and one of micro-batches, for those of the first step and of the later ones."""
        trace = self.tracker.trace
        with self.fake, self.tracker:
            self.tracker.hold_workspace("forward")
        evaluated = len(trace)
        self._accumulate()
        accumulated, first = len(trace), self._gradient_keys()
        self.tracker.take_work()
        with self.tracker.work_of_later_calls():
            self._update(trainer)
        update, updated = self.tracker.take_work(), len(trace)
        work, positions = self._replay_kinds(trainer, steps)
        replayed = len(trace)
        self._accumulate()
        trace += as_later_update(trace[accumulated:updated], dict(zip(first, self._gradient_keys(), strict=True)))
        lasting = self.tracker.workspace_keys()
        first_step = as_first_step(trace[updated:replayed], lasting)
        trace[updated:replayed] = [entry for entry in trace[updated:replayed] if entry[1] not in lasting]
        trace[evaluated:evaluated] = first_step
        return update + work, positions

    def _is_covered(self, first: Sequence[Example], later: Sequence[Sequence[Example]]) -> bool:
        """Whether a later step has what is heaviest in the first one, so that the trace of both can be of one replay.

        Kept outputs are of the step before, shards are gathered and resharded by what came before, and some updates are
        of another kind than the first one, or within the backward pass.
        """
        alike = self.spec.optimizer not in LOW_RANK_OPTIMIZERS and not self.spec.optimizer_in_backward
        if self.spec.keep_outputs or self.spec.num_processes > 1 or not alike:
            return False
        of_later = {kind for step in later for kind in order.kinds(step, self.spec)}
        return of_later.issuperset(order.heaviest(order.kinds(first, self.spec)))

    def _replay_part(self, trainer: Trainer, steps: Sequence[Sequence[Example]]) -> tuple[list[Work], int, list[Work]]:
        """The heaviest micro-batches of some steps, and an update: work and positions, and the work of the update."""
        work, positions = self._replay_kinds(trainer, steps)
        self.tracker.take_work()
        self._update(trainer)  # the first one also creates the optimizer's state
        return work, positions, self.tracker.take_work()

    def _replay_kinds(self, trainer: Trainer, steps: Sequence[Sequence[Example]]) -> tuple[list[Work], int]:
        """A micro-batch of each of the heaviest kinds; returns the work and the positions of a step that is made of the
        largest of them.
        """
        of_step = [order.kinds(step, self.spec) for step in steps]
        heaviest = order.heaviest(kind for each in of_step for kind in each)
        processes = self.spec.num_processes
        # The last step of an epoch may have fewer, and one that takes over a rest has more.
        most = -(-max(map(len, of_step)) // processes)
        micro_batches = min(most, self.spec.gradient_accumulation_steps)
        work, positions = list[Work](), 0
        for kind in sorted(heaviest, key=lambda each: each.later):  # gradients come with the first later one
            number = next(n for n, each in enumerate(of_step) if kind in each)
            if kind.later:
                self._accumulate()
            else:
                trainer.optimizer.zero_grad(set_to_none=True)
            self.tracker.take_work()
            with mock.patch.object(trainer, "update", _without_update):
                self._step(trainer, self._batches(steps[number]), [of_step[number].index(kind) // processes])
            if kind.examples * kind.width >= positions:
                work, positions = self.tracker.take_work(times=micro_batches), kind.examples * kind.width
        return work, positions * micro_batches

    def _update(self, trainer: Trainer) -> None:
        self._accumulate()
        with self.fake, self.tracker:
            self.tracker.component = "optimizer"
            self.tracker.enter("optimizer")
            trainer.update(0.0)
            self.tracker.component = "activations"

    def _step(self, trainer: Trainer, batches: Sequence[Batch], chosen: Sequence[int]) -> None:
        """A step over some of its micro-batches, while the inputs of all of them are held."""
        needed = [self._needs_mask(batches[number]) for number in chosen]
        with (
            self.fake,
            self._repeated_layers(),
            self.tracker,
            masks.from_counts(needed) as enter_forward,
            masks.before_forward(trainer, enter_forward),
        ):
            batches = [_fake_batch(batch) for batch in batches]
            trainer.tracked_step([batches[number] for number in chosen], self.tracker)
            del batches

    def _needs_mask(self, batch: Batch) -> bool:
        assumed = self.full_length and self.spec.pad_to_sequence_len is None and not self.spec.sample_packing
        return masks.is_needed(batch, self.network) or (assumed and batch.samples > 1)

    def _batches(self, step: Sequence[Example]) -> list[Batch]:
        return list(batches.micro_batches(step, self.spec, _ANY_ID, _CPU))

    def _accumulate(self) -> None:
        """Gradients as a backward pass leaves them, where there are none yet."""
        if self.spec.optimizer_in_backward:
            return
        with self.fake, self.tracker:
            for parameter in (each for each in model.trainable(self.network) if each.grad is None):
                parameter.grad = self.tracker.empty_like(parameter)
                self.tracker.adopt([parameter.grad], "gradients")

    def _gradient_keys(self) -> list[int]:
        """Keys of all gradients in the trace."""
        gradients = (parameter.grad for parameter in model.trainable(self.network))
        return [self.tracker.key_of(gradient) for gradient in gradients if gradient is not None]


def _fake_batch(batch: Batch) -> Batch:
    """The batch as fake tensors, if called under FakeTensorMode."""
    return replace(batch, inputs={name: _fake(value) for name, value in batch.inputs.items()})


def _fake(value: Any) -> Any:
    return torch.empty_like(value) if isinstance(value, torch.Tensor) else value


def _without_update(loss: float, auxiliary_loss: float | None = None) -> StepResult:
    """In place of a trainer's update: gradients stay."""
    return StepResult(loss, auxiliary_loss, None, 0.0)
