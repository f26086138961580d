"""Gives a model on the device `meta` fake weights, in the formats in which real ones are loaded."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from harness.training import adapter_methods, quantisers


class Replica(torch.nn.Module):
    """Stands in for torch's DistributedDataParallel in one process: same memory, no communication.

    Buckets for all gradients exist from the first step on. Gradients become views of them in a step's last backward
    pass; until then they are separate tensors.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.module = model
        self._syncs = True
        for parameter in model.parameters():
            if parameter.requires_grad:
                bucket = torch.empty_like(parameter, requires_grad=False)
                parameter.register_post_accumulate_grad_hook(functools.partial(self._use_bucket, bucket))

    def _use_bucket(self, bucket: torch.Tensor, parameter: torch.Tensor) -> None:
        if self._syncs:
            parameter.grad = bucket

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within, gradients are not synchronised: for all micro-batches but a step's last."""
        self._syncs = False
        try:
            yield
        finally:
            self._syncs = True

    def forward(self, **inputs: Any) -> Any:
        """Call the model."""
        return self.module(**inputs)


def fill(network: Any) -> None:
    """Replace parameters and buffers on `meta` by CPU tensors in their loaded formats; tied weights stay tied, and
    adapters come last.

    Under FakeTensorMode this takes no memory.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    # `_parameters` and `_buffers` are private in torch (2.13). `Module.to_empty` does the same for layers of torch, and
    # would do for all once bitsandbytes (0.50) supports quantised layers there.

    # By id of the original, which is kept with its replacement so that its id is not used again.
    replacements: dict[int, Any] = {}
    of_adapters = {name.rpartition(".")[0] for name in adapter_methods.tensor_names(network)}
    for _, module in sorted(network.named_modules(), key=lambda pair: (pair[0] in of_adapters, natural(pair[0]))):
        if isinstance(module, Linear4bit):
            _fill_4bit(module)
        elif isinstance(module, Linear8bitLt):
            _fill_8bit(module)
        elif quantisers.of_hqq(module):
            _fill_hqq(module)
        elif quantisers.of_torchao(module._parameters.get("weight")):
            _fill_torchao(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                if id(parameter) not in replacements:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    replacements[id(parameter)] = parameter, torch.nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = replacements[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                if id(buffer) not in replacements:
                    replacements[id(buffer)] = buffer, torch.empty(buffer.shape, dtype=buffer.dtype)
                module._buffers[name] = replacements[id(buffer)][1]


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Parts of a name, numbers by their value and before words."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))


def scales(module: Any) -> list[torch.Tensor]:
    """Tensors that a quantised layer has next to its weight; none for other layers."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    if quantisers.of_hqq(module):
        return [module.meta["scale"], module.meta["zero"]]
    if isinstance(module, Linear8bitLt):
        return [module.state.SCB]  # type: ignore[list-item]  # set as the weights are
    if not isinstance(module, Linear4bit):
        return []
    outer: Any = module.quant_state
    nested = [outer.offset, outer.state2.absmax, outer.state2.code] if outer.state2 is not None else []
    return [outer.absmax, outer.code, *nested]


_HELD_BY_TORCHAO, _HELD_BY_HQQ = 8, 22
"""Bytes for each weight that quantising it takes, next to itself in 16 bit: fp32 copies, of HQQ's rounds in fp16 on a
card. As measured by the tracker, with the types of a card (torchao 0.18, HQQ 0.2.8)."""


def unpacked_bytes(module: Any) -> int:
    """Bytes that are held while the weight of a quantised layer is quantised, itself included."""
    held = _HELD_BY_HQQ if quantisers.of_hqq(module) else 0 if quantisers.of_bitsandbytes(module) else _HELD_BY_TORCHAO
    return int((2 + held) * module.in_features * module.out_features)


_BLOCK, _OUTER_BLOCK = 64, 256
"""Weights per scale, and scales per second-level scale (double quantisation): bitsandbytes' defaults (0.50)."""


def _fill_4bit(module: Any) -> None:
    """Two weights per byte and a scale per block; with double quantisation scales are bytes too."""
    from bitsandbytes.functional import QuantState

    meta = module.weight
    blocks = -(-meta.numel() // _BLOCK)
    outer: dict[str, Any] = {}
    if meta.compress_statistics:
        nested = QuantState(
            absmax=torch.empty(-(-blocks // _OUTER_BLOCK)),
            blocksize=_OUTER_BLOCK,
            code=torch.empty(256),
            dtype=torch.float32,
        )
        outer = {"offset": torch.empty(()), "state2": nested}
    weight: Any = torch.nn.Parameter(torch.empty((-(-meta.numel() // 2), 1), dtype=torch.uint8), requires_grad=False)
    weight.quant_state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if outer else torch.float32),
        shape=meta.shape,
        dtype=module.compute_dtype,
        blocksize=_BLOCK,
        code=torch.empty(16),
        quant_type=meta.quant_type,
        **outer,
    )
    module._parameters["weight"] = weight
    module.quant_state = weight.quant_state


def _fill_8bit(module: Any) -> None:
    """A byte per weight, a scale per row. A plain parameter: bitsandbytes' `Int8Params` (0.50) takes no fake tensor."""
    weight: Any = torch.nn.Parameter(torch.empty(module.weight.shape, dtype=torch.int8), requires_grad=False)
    weight.CB = weight.SCB = None
    module._parameters["weight"] = weight
    module.state.CB = weight.data
    module.state.SCB = torch.empty(module.weight.shape[0])


def _fill_hqq(module: Any) -> None:
    """Quantised as real weights are, in two rounds: from the second one on it holds as much in each.

    Patches truth of tensors in torch (2.13): HQQ (0.2.8) ends its rounds where an error has not fallen, which only
    values tell. Not needed once HQQ has a number of rounds as a setting.
    """
    shape, bias = module.meta["shape"], module.bias
    module.device, module.bias = "cpu", None
    del module.W_q
    module.quant_config["weight_quant_params"]["optimize"] = True
    with mock.patch.object(torch.Tensor, "__bool__", mock.Mock(side_effect=[True, False])):
        module.quantize(torch.empty(shape, dtype=module.compute_dtype), **module.quant_config)
    module.bias = bias


def _fill_torchao(module: Any) -> None:
    """Quantised as real weights are."""
    from torchao.quantization import quantize_

    module._parameters["weight"] = torch.nn.Parameter(
        torch.empty(module.weight.shape, dtype=module.weight.dtype), requires_grad=False
    )
    quantize_(module, quantisers.int8_of_torchao())
