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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, UnsupportedOperatorException

from harness._util.messages import first_line
from harness.environment import DeviceType
from harness.predict import fake_weights
from harness.predict.emulation import WORKSPACE, emulate_device
from harness.predict.prediction import Prediction
from harness.predict.replay import Replay
from harness.predict.roofline import Work
from harness.record import Phase
from harness.spec import TrialSpec
from harness.training import batches, checkpoints, distributed, model, order
from harness.training.batches import Batch, Example
from harness.training.step import StepResult, Trainer

_CPU = torch.device("cpu")
_ANY_STORY = 16_384
"""Tokens that no story exceeds."""
_ANY_ID = 0
"""Padding, whose value nothing reads."""


class Unpredictable(Exception):
    """A model's step needs the values of tensors, or has an operation without shapes."""


def predict(
    spec: TrialSpec, device_type: DeviceType, *, full_length: bool = False, trust_remote_code: bool = False
) -> Prediction:
    """Replay those micro-batches of a spec of which one holds most memory, chosen from all its steps.

    Args:
        spec: what to train.
        device_type: device to train on.
        full_length: as if every example filled the sequence.
        trust_remote_code: let models from the hub run their own code.

    Raises:
        InputError: the model's config or the stories are not available.
        Unpredictable: an operation cannot be replayed on fake tensors; the message names it.
    """
    started = time.perf_counter()
    steps = _steps(spec, full_length, trust_remote_code)
    try:
        network = model.skeleton(spec, trust_remote_code=trust_remote_code)
        with distributed.fake_process_group(0, spec.num_processes):  # rank 0 has the widest micro-batches
            prediction = _StepReplay(network, spec, device_type).run(steps)
    except (DataDependentOutputException, UnsupportedOperatorException) as error:
        raise Unpredictable(f"{error.func} cannot be replayed on fake tensors") from error
    except NotImplementedError as error:
        raise Unpredictable(first_line(error)) from error
    return prediction.model_copy(update={"seconds": time.perf_counter() - started})


def _steps(spec: TrialSpec, full_length: bool, trust_remote_code: bool) -> list[list[Example]]:
    try:
        tokenizer = checkpoints.load_tokenizer(spec, trust_remote_code=trust_remote_code)
    except checkpoints.NoTokenizer:  # examples in bytes are longer, if anything
        tokenizer = checkpoints.byte_tokenizer()
    if full_length:  # stories are read whole: a short sequence would leave no completion of them
        whole = {"sequence_length": _ANY_STORY, "eval_sequence_length": _ANY_STORY}
        train = batches.load(spec.model_copy(update=whole), tokenizer).train
        train = tuple(_filled(example, spec.sequence_length) for example in train)
    else:
        train = batches.load(spec, tokenizer).train
    return order.optimizer_steps(spec, train)


def _filled(example: Example, length: int) -> Example:
    ids = example.input_ids * math.ceil(length / len(example))
    start = min(example.completions[0][0], length - 1)
    return replace(example, input_ids=ids[:length], completions=((start, length),))


class _StepReplay:
    """Takes steps of a spec, or parts of them, with a model on `meta`."""

    def __init__(self, network: Any, spec: TrialSpec, device_type: DeviceType) -> None:
        self.network, self.spec, self.device_type = network, spec, device_type
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = Replay(device_type, self.fake)
        self.peak, self.breakdown = 0, dict(self.tracker.live)

    def run(self, steps: Sequence[Sequence[Example]]) -> Prediction:
        """Give the model fake weights, then take what holds most of the steps."""
        tracker = self.tracker
        tracker.component = "weights"
        # Made outside the fake mode: it reads the ranks from a tensor.
        mesh = distributed.device_mesh(_CPU) if self.spec.sharding != "none" else None
        with self.fake, tracker:
            fake_weights.fill(self.network)
            if mesh is not None:
                distributed.shard(self.network, self.spec.sharding, mesh)
        gc.collect()
        tracker.adopt((*self.network.parameters(), *self.network.buffers()), "weights")
        tracker.adopt(model.adapters(self.network, self.spec), "adapters")
        tracker.component = "activations"
        # Outside the fake mode: a new 8-bit optimizer computes its tables from values.
        trainer = Trainer(
            self.network,
            self.spec,
            _CPU,
            len(steps),
            on_phase=tracker.enter,
            read=lambda tensor: 1.0,
            wrap=self._replica,
        )
        trainer.scaler = None  # it reads whether gradients are finite; its state is two numbers
        tracker.phases.clear()
        tracker.take_work()
        with emulate_device(self.device_type, trainer.optimizer, tracker):
            # DDP moves gradients to buckets in the last micro-batch of a step: there whole steps are replayed.
            ddp = self.spec.num_processes > 1 and self.spec.sharding == "none"
            work, positions = (self._replay_steps if ddp else self._replay_micro_batches)(trainer, steps)
        processes = self.spec.num_processes
        if self.device_type == "cpu":  # the CPU executes those of all processes
            work = [each.model_copy(update={"calls": each.calls * processes}) for each in work]
        workspace = WORKSPACE[self.device_type]
        self.breakdown["activations"] += workspace
        return Prediction(
            device_type=self.device_type,
            peak_memory_bytes=self.peak + workspace,
            breakdown={f"memory_{name}_bytes": size for name, size in self.breakdown.items()},
            phases={phase: size + workspace for phase, size in tracker.phases.items()},
            work=tuple(work),
            positions=processes * positions,
            seconds=0.0,
        )

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
        """One of the heaviest steps after another; returns the work of the last one, and its positions."""
        batches: list[Batch] = []
        chosen = [steps[number] for number in order.heaviest_steps(steps, self.spec)]
        for step in chosen:
            batches = self._batches(step)
            self.tracker.take_work()
            self._step(trainer, batches, range(len(batches)))
        return self.tracker.take_work(), sum(batch.padded_tokens for batch in batches)

    def _replay_micro_batches(self, trainer: Trainer, steps: Sequence[Sequence[Example]]) -> tuple[list[Work], int]:
        """Each of the heaviest kinds of micro-batches once: those of the first step, which finds no optimizer state in
        memory, the update, and those of all later steps.

        Returns:
            The work of a step whose micro-batches are all like the heaviest, and its positions.
        """
        first, later = steps[:1], steps[1:]
        with mock.patch.object(trainer, "update", _without_update(trainer)):
            work, positions = self._replay_kinds(trainer, first)
        for _ in range(min(2, len(steps))):  # the first update also creates the optimizer's state
            self.tracker.take_work()
            self._update(trainer)
        update = self.tracker.take_work()
        if later:
            with mock.patch.object(trainer, "update", _without_update(trainer)):
                work, positions = self._replay_kinds(trainer, later)
        return update + work, positions

    def _replay_kinds(self, trainer: Trainer, steps: Sequence[Sequence[Example]]) -> tuple[list[Work], int]:
        """A micro-batch of each of the heaviest kinds; returns the work and the positions of a step that is made of the
        largest of them.
        """
        of_step = [order.kinds(step, self.spec) for step in steps]
        heaviest = order.heaviest(kind for each in of_step for kind in each)
        processes = self.spec.num_processes
        micro_batches = -(-len(of_step[0]) // processes)
        work, positions = list[Work](), 0
        for kind in sorted(heaviest, key=lambda each: each.later):  # gradients come with the first later one
            number = next(n for n, each in enumerate(of_step) if kind in each)
            if kind.later:
                self._accumulate()
            self.tracker.take_work()
            self._step(trainer, self._batches(steps[number]), [of_step[number].index(kind) // processes])
            if kind.examples * kind.width >= positions:
                work, positions = self.tracker.take_work(times=micro_batches), kind.examples * kind.width
        return work, positions * micro_batches

    def _update(self, trainer: Trainer) -> None:
        self._accumulate()
        self.tracker.restart()
        with self.fake, self.tracker:
            self.tracker.component = "optimizer"
            self.tracker.enter("optimizer")
            trainer.update(0.0)
            self.tracker.component = "activations"
        self._keep_peak()

    def _step(self, trainer: Trainer, batches: Sequence[Batch], chosen: Sequence[int]) -> None:
        """A step over some of its micro-batches, while the inputs of all of them are held."""
        self.tracker.restart()
        with self.fake, self.tracker, _masks_from_counts(trainer, [batches[number] for number in chosen]):
            batches = [_fake_batch(batch) for batch in batches]
            trainer.tracked_step([batches[number] for number in chosen], self.tracker)
            del batches
        self._keep_peak()

    def _keep_peak(self) -> None:
        if self.tracker.peak >= self.peak:
            self.peak, self.breakdown = self.tracker.peak, dict(self.tracker.peak_breakdown)

    def _batches(self, step: Sequence[Example]) -> list[Batch]:
        return list(batches.micro_batches(step, self.spec, _ANY_ID, _CPU))

    def _accumulate(self) -> None:
        """Gradients as a backward pass leaves them."""
        with self.fake, self.tracker:
            for parameter in model.trainable(self.network):
                parameter.grad = torch.empty_like(parameter)
                self.tracker.adopt([parameter.grad], "gradients")


def _fake_batch(batch: Batch) -> Batch:
    """The batch as fake tensors, if called under FakeTensorMode."""
    return replace(batch, inputs={name: torch.empty_like(tensor) for name, tensor in batch.inputs.items()})


def _without_update(trainer: Trainer) -> Any:
    def update(loss: float, auxiliary_loss: float | None = None) -> StepResult:
        trainer.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, auxiliary_loss, None, 0.0)

    return update


@contextlib.contextmanager
def _masks_from_counts(trainer: Trainer, batches: Sequence[Batch]) -> Iterator[None]:
    """Within, transformers omits the masks of micro-batches without padding, as it does by a mask's values in a real
    step.

    Patches transformers (5.23), which treats fake tensors as tracing and keeps every mask. A public way to say that
    nothing is padded would replace it.
    """
    from transformers import masking_utils

    unpadded = iter([batch.tokens == batch.padded_tokens for batch in batches])
    nothing_padded, report = False, trainer.on_phase

    def enter(phase: Phase) -> None:
        nonlocal nothing_padded
        if phase == "forward":  # of the next micro-batch; a failed loss enters it once more
            nothing_padded = next(unpadded, nothing_padded)
        report(phase)

    trainer.on_phase = enter
    try:
        with mock.patch.multiple(
            masking_utils, is_tracing=lambda tensor=None: False, fast_all=lambda mask: nothing_padded
        ):
            yield
    finally:
        trainer.on_phase = report
