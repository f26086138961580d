"""Predicted peak memory of a trial: the same model and the same training step, on tensors that have no contents.

torch's FakeTensorMode knows every tensor's shape, type and storage, and computes nothing. The live-tensor tracker
follows it as it follows a real step, so that a prediction has the meaning of `peak_memory_bytes` on a CPU. The model
is built from its config alone: no weights are loaded or downloaded.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, UnsupportedOperatorException

from harness import data, model
from harness.data import Batch, Example
from harness.memory import LiveTensors
from harness.spec import TrialSpec
from harness.training import TRACKED_STEPS, Trainer


class Unpredictable(Exception):
    """The step of a model does something that cannot be followed without contents."""


@dataclass(frozen=True)
class Prediction:
    """What a training step of a spec will hold."""

    peak_memory_bytes: int
    """Highest sum of live tensor storage over the training steps."""
    shares: dict[str, int]
    """That peak by component, `memory_<component>_bytes`."""
    seconds: float
    """What the prediction took."""


def predict(spec: TrialSpec, *, trust_remote_code: bool = False) -> Prediction:
    """Replay the first optimizer steps of a spec, where the longest examples are, and follow what they hold.

    Raises:
        InputError: the model's config or the stories cannot be had.
        Unpredictable: an operation has no shape to be known without its contents; it is named.
    """
    began = time.perf_counter()
    steps, pad_id = _examples(spec, trust_remote_code)
    network = model.skeleton(spec, trust_remote_code=trust_remote_code)
    try:
        peak, shares = _replay(network, spec, steps, pad_id)
    except (DataDependentOutputException, UnsupportedOperatorException) as error:
        raise Unpredictable(f"{error.func} cannot be followed without contents") from error
    except NotImplementedError as error:
        raise Unpredictable(str(error).strip().splitlines()[0]) from error
    return Prediction(peak, shares, time.perf_counter() - began)


def _examples(spec: TrialSpec, trust_remote_code: bool) -> tuple[list[list[Example]], int]:
    tokenizer = model.load_tokenizer(spec, trust_remote_code=trust_remote_code)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    train = data.load(spec, tokenizer).train
    return data.optimizer_steps(spec, train, TRACKED_STEPS)[:TRACKED_STEPS], pad_id


# ------------------------------------------------------------------------------------ the replay


def _replay(
    network: Any, spec: TrialSpec, steps: Sequence[Sequence[Example]], pad_id: int
) -> tuple[int, dict[str, int]]:
    cpu = torch.device("cpu")
    tracker = LiveTensors("cpu")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tracker.component = "weights"
    with fake, tracker:
        fill(network)
    gc.collect()
    tracker.adopt((*network.parameters(), *network.buffers()), "weights")
    tracker.adopt(model.adapters(network, spec), "adapters")
    tracker.component = "activations"
    # Outside the mode: what an optimizer computes once at its making (8-bit tables) needs contents.
    trainer = Trainer(network, spec, cpu, len(steps), read=lambda tensor: 1.0)
    trainer.scaler = None  # it asks whether gradients are finite; it holds two numbers
    peak, shares = 0, dict(tracker.live)

    def replay(step: Sequence[Example], *, settled: bool) -> None:
        nonlocal peak, shares
        tracker.restart()
        with fake, tracker:
            batches = list(data.micro_batches(step, spec.micro_batch_size, pad_id, cpu))
            if settled and len(batches) > 1:  # what the first micro-batch leaves to the second
                _accumulate(network, tracker)
                batches = batches[:1]
            with _masks_known(batches):
                trainer.tracked_step(batches, tracker)
            del batches
        if tracker.peak >= peak:
            peak, shares = tracker.peak, dict(tracker.peak_shares)

    if len({len(example) for step in steps for example in step}) == 1 and len({*map(len, steps)}) == 1:
        # Every micro-batch holds the same: the last one of the last step meets all that there is to meet.
        with fake, tracker:
            _accumulate(network, tracker)
            tracker.component = "optimizer"
            trainer.update(0.0)
            tracker.component = "activations"
        if tracker.peak >= peak:
            peak, shares = tracker.peak, dict(tracker.peak_shares)
        steps = steps[-1:]
        replay(steps[0], settled=True)
    else:
        for step in steps:
            replay(step, settled=False)
    return peak, {f"memory_{name}_bytes": size for name, size in shares.items()}


def _accumulate(network: Any, tracker: LiveTensors) -> None:
    """Gradients as a backward pass leaves them."""
    for parameter in model.trainable(network):
        parameter.grad = torch.empty_like(parameter)
        tracker.adopt([parameter.grad], "gradients")


@contextlib.contextmanager
def _masks_known(batches: Sequence[Batch]) -> Iterator[None]:
    """Transformers looks at a mask's contents and leaves it out where nothing is padded: here the counts say so."""
    from transformers import masking_utils

    nothing_padded = all(batch.tokens == batch.padded_tokens for batch in batches)
    with mock.patch.multiple(masking_utils, is_tracing=lambda tensor=None: False, fast_all=lambda mask: nothing_padded):
        yield


# ------------------------------------------------------------------------------------ weights without contents


def fill(network: Any) -> None:
    """Give a skeleton's parameters and buffers storage on the CPU, in the form in which they are loaded.

    Under FakeTensorMode that takes no memory. What is shared stays shared.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    made: dict[int, Any] = {}
    for module in network.modules():
        if isinstance(module, Linear4bit):
            _fill_4bit(module)
        elif isinstance(module, Linear8bitLt):
            _fill_8bit(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    # The former is kept beside the new: its id must not be given to another.
                    made[id(parameter)] = parameter, torch.nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                if id(buffer) not in made:
                    made[id(buffer)] = buffer, torch.empty(buffer.shape, dtype=buffer.dtype)
                module._buffers[name] = made[id(buffer)][1]


_BLOCK, _OUTER_BLOCK = 64, 256
"""Weights to a scale, and scales to a scale of theirs (double quantisation): bitsandbytes' own."""


def _fill_4bit(module: Any) -> None:
    """Two weights to a byte, a scale to each block; with double quantisation the scales are bytes themselves."""
    from bitsandbytes.functional import QuantState

    former = module.weight
    blocks = -(-former.numel() // _BLOCK)
    outer: dict[str, Any] = {}
    if former.compress_statistics:
        scales = QuantState(
            absmax=torch.empty(-(-blocks // _OUTER_BLOCK)),
            blocksize=_OUTER_BLOCK,
            code=torch.empty(256),
            dtype=torch.float32,
        )
        outer = {"offset": torch.empty(()), "state2": scales}
    weight: Any = torch.nn.Parameter(torch.empty((-(-former.numel() // 2), 1), dtype=torch.uint8), requires_grad=False)
    weight.quant_state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if outer else torch.float32),
        shape=former.shape,
        dtype=module.compute_dtype,
        blocksize=_BLOCK,
        code=torch.empty(16),
        quant_type=former.quant_type,
        **outer,
    )
    module._parameters["weight"] = weight
    module.quant_state = weight.quant_state


def _fill_8bit(module: Any) -> None:
    """A byte to a weight, a scale to a row. `Int8Params` takes no tensor without contents: plain bytes stand in."""
    weight: Any = torch.nn.Parameter(torch.empty(module.weight.shape, dtype=torch.int8), requires_grad=False)
    weight.CB = weight.SCB = None
    module._parameters["weight"] = weight
    module.state.CB = weight.data
    module.state.SCB = torch.empty(module.weight.shape[0])
