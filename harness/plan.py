"""Predicted peak memory and work of a trial: the same model and the same step, on tensors that have no contents.

torch's FakeTensorMode knows every tensor's shape, type and storage, and computes nothing. The live-tensor tracker
follows it as it follows a real step, so that a prediction has the meaning of `peak_memory_bytes`. The model is built
from its config alone: no weights are loaded or downloaded.
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

from harness import data, distributed, hollow, model
from harness.data import Batch, Example
from harness.errors import InputError
from harness.prediction import DeviceType, Prediction
from harness.replay import Replay
from harness.roofline import Work
from harness.spec import TrialSpec
from harness.target import WORKSPACE, as_on
from harness.training import TRACKED_STEPS, StepResult, Trainer

_CPU = torch.device("cpu")
_WHOLE = 16_384
"""Tokens within which a story is whole."""


class Unpredictable(Exception):
    """The step of a model does something that cannot be followed without contents."""


def predict(
    spec: TrialSpec, device_type: DeviceType, *, full_length: bool = False, trust_remote_code: bool = False
) -> Prediction:
    """Replay the first optimizer steps of a spec, where the longest examples are, and follow what they hold.

    Args:
        spec: what would be trained.
        device_type: where it would be.
        full_length: as if every example filled the sequence, however long the stories are.
        trust_remote_code: let models from the hub run their own code.

    Raises:
        InputError: the model's config or the stories cannot be had.
        Unpredictable: an operation has no shape to be known without its contents; it is named.
    """
    began = time.perf_counter()
    steps, pad_id = _examples(spec, full_length, trust_remote_code)
    try:
        network = model.skeleton(spec, trust_remote_code=trust_remote_code)
        with distributed.pretended(0, spec.num_processes):  # the first has the longest examples
            found = _Replaying(network, spec, device_type, pad_id).follow(steps)
    except (DataDependentOutputException, UnsupportedOperatorException) as error:
        raise Unpredictable(f"{error.func} cannot be followed without contents") from error
    except NotImplementedError as error:
        raise Unpredictable(str(error).strip().splitlines()[0]) from error
    return found.model_copy(update={"seconds": time.perf_counter() - began})


def _examples(spec: TrialSpec, full_length: bool, trust_remote_code: bool) -> tuple[list[list[Example]], int]:
    try:
        tokenizer = model.load_tokenizer(spec, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except (OSError, ValueError):  # a folder with a config alone; bytes stand in, and make examples rather longer
        tokenizer = model.byte_tokenizer()
    pad_id = model.pad_id(tokenizer)
    # To fill any sequence, the stories are read as they are: a short one would leave nothing of them.
    read = spec.model_copy(update={"sequence_length": _WHOLE, "eval_sequence_length": _WHOLE}) if full_length else spec
    train = data.load(read, tokenizer).train
    if full_length:
        train = tuple(_filled(example, spec.sequence_length) for example in train)
    return data.optimizer_steps(spec, train, TRACKED_STEPS)[:TRACKED_STEPS], pad_id


def _filled(example: Example, length: int) -> Example:
    ids = example.input_ids * math.ceil(length / len(example))
    return replace(example, input_ids=ids[:length], completion_start=min(example.completion_start, length - 1))


class _Replaying:
    """A skeleton on its way through the first steps."""

    def __init__(self, network: Any, spec: TrialSpec, device_type: DeviceType, pad_id: int) -> None:
        self.network, self.spec, self.device_type, self.pad_id = network, spec, device_type, pad_id
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = Replay(device_type, self.fake)
        self.peak, self.shares = 0, dict(self.tracker.live)

    def follow(self, steps: Sequence[Sequence[Example]]) -> Prediction:
        """Give the model weights without contents, then take the steps."""
        tracker = self.tracker
        tracker.component = "weights"
        # Of real numbers, which are none under the mode.
        mesh = distributed.mesh(_CPU) if self.spec.sharding != "none" else None
        with self.fake, tracker:
            hollow.fill(self.network)
            if mesh is not None:
                distributed.share_out(self.network, self.spec.sharding, mesh)
        gc.collect()
        tracker.adopt((*self.network.parameters(), *self.network.buffers()), "weights")
        tracker.adopt(model.adapters(self.network, self.spec), "adapters")
        tracker.component = "activations"
        # Outside the mode: what an optimizer computes once at its making (8-bit tables) needs contents.
        trainer = Trainer(
            self.network,
            self.spec,
            _CPU,
            len(steps),
            on_phase=tracker.enter,
            read=lambda tensor: 1.0,
            wrap=self._replicated,
        )
        trainer.scaler = None  # it asks whether gradients are finite; it holds two numbers
        tracker.phases.clear()
        tracker.take_work()
        with as_on(self.device_type, trainer.optimizer, tracker):
            work = self._alike(trainer, steps[-1]) if self._are_alike(steps) else self._each(trainer, steps)
        processes = self.spec.num_processes
        if self.device_type == "cpu":  # it does everybody's
            work = [each.model_copy(update={"calls": each.calls * processes}) for each in work]
        workspace = WORKSPACE[self.device_type]
        self.shares["activations"] += workspace
        return Prediction(
            device_type=self.device_type,
            peak_memory_bytes=self.peak + workspace,
            shares={f"memory_{name}_bytes": size for name, size in self.shares.items()},
            phases={phase: size + workspace for phase, size in tracker.phases.items()},
            work=tuple(work),
            positions=processes * sum(batch.padded_tokens for batch in self._batches(steps[-1])),
            seconds=0.0,
        )

    def _replicated(self, network: Any, device: torch.device) -> Any:
        """The model as torch's DistributedDataParallel has it, where each of several processes has all of it."""
        if self.spec.num_processes == 1 or self.spec.sharding != "none":
            return network
        self.tracker.component = "gradients"
        with self.fake, self.tracker:
            replica = hollow.Replica(network)
        self.tracker.component = "activations"
        return replica

    def _are_alike(self, steps: Sequence[Sequence[Example]]) -> bool:
        """Whether every micro-batch of every step holds the same, and there is a step before the last."""
        lengths = {len(example) for step in steps for example in step}
        sizes = {len(step) for step in steps}
        whole = all(size % self.spec.micro_batch_size == 0 for size in sizes)
        if self.spec.num_processes > 1 and self.spec.sharding == "none":  # gradients lie elsewhere in the last one
            return False
        return len(steps) == TRACKED_STEPS and len(lengths) == len(sizes) == 1 and whole

    def _each(self, trainer: Trainer, steps: Sequence[Sequence[Example]]) -> list[Work]:
        """One step after another."""
        work: list[Work] = []
        for step in steps:
            self._step(trainer, self._batches(step))
            work = self.tracker.take_work()
        return work

    def _alike(self, trainer: Trainer, step: Sequence[Example]) -> list[Work]:
        """Every micro-batch holds the same: the last one of the last step meets all that there is to meet.

        That is the optimizer's state of the step before, and the gradients of the micro-batches before.
        """
        batches = self._batches(step)
        self._update(trainer)
        self.tracker.take_work()  # the optimizer's state is made once
        self._update(trainer)
        update = self.tracker.take_work()
        if len(batches) > 1:
            self._accumulate()
        # The second update holds what the first did (but for state of later tensors: a hundredth of a per mille).
        with mock.patch.object(trainer, "update", _forget(trainer)):
            self._step(trainer, batches[:1])
        return update + self.tracker.take_work(times=len(batches))

    def _update(self, trainer: Trainer) -> None:
        self._accumulate()
        self.tracker.restart()
        with self.fake, self.tracker:
            self.tracker.component = "optimizer"
            self.tracker.enter("optimizer")
            trainer.update(0.0)
            self.tracker.component = "activations"
        self._keep_peak()

    def _step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        self.tracker.restart()
        with self.fake, self.tracker, _masks_known(batches):
            # A batch of real numbers becomes one without contents where it is made under the mode.
            batches = [_hollow_batch(batch) for batch in batches]
            trainer.tracked_step(batches, self.tracker)
            del batches
        self._keep_peak()

    def _keep_peak(self) -> None:
        if self.tracker.peak >= self.peak:
            self.peak, self.shares = self.tracker.peak, dict(self.tracker.peak_shares)

    def _batches(self, step: Sequence[Example]) -> list[Batch]:
        return list(data.micro_batches(step, self.spec.micro_batch_size, self.pad_id, _CPU))

    def _accumulate(self) -> None:
        """Gradients as a backward pass leaves them."""
        with self.fake, self.tracker:
            for parameter in model.trainable(self.network):
                parameter.grad = torch.empty_like(parameter)
                self.tracker.adopt([parameter.grad], "gradients")


def _hollow_batch(batch: Batch) -> Batch:
    return replace(batch, inputs={name: torch.empty_like(tensor) for name, tensor in batch.inputs.items()})


def _forget(trainer: Trainer) -> Any:
    def update(loss: float) -> StepResult:
        trainer.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, None, 0.0)

    return update


@contextlib.contextmanager
def _masks_known(batches: Sequence[Batch]) -> Iterator[None]:
    """Transformers looks at a mask's contents and leaves it out where nothing is padded: here the counts say so."""
    from transformers import masking_utils

    nothing_padded = all(batch.tokens == batch.padded_tokens for batch in batches)
    with mock.patch.multiple(masking_utils, is_tracing=lambda tensor=None: False, fast_all=lambda mask: nothing_padded):
        yield
