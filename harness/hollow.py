"""Weights without contents, stored as they are when they are loaded: of one process, or of one among several."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch


class Replica(torch.nn.Module):
    """A model as each of several processes has it, without the others.

    As in torch's DistributedDataParallel, room for all gradients is there from the first step on; they move into it in
    a step's last backward pass, and are beside it until then.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.module = model
        self._sends = True
        for parameter in model.parameters():
            if parameter.requires_grad:
                move = functools.partial(self._move, torch.empty_like(parameter, requires_grad=False))
                parameter.register_post_accumulate_grad_hook(move)

    def _move(self, room: torch.Tensor, parameter: torch.Tensor) -> None:
        if self._sends:
            parameter.grad = room

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around a forward and backward pass that is not a step's last."""
        self._sends = False
        try:
            yield
        finally:
            self._sends = True

    def forward(self, **inputs: Any) -> Any:
        """What the model makes of them."""
        return self.module(**inputs)


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
