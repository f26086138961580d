"""Gives a model on the device `meta` fake weights, in the formats in which real ones are loaded."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft.tuners.lora.dora import DoraLinearLayer
from transformers.pytorch_utils import Conv1D

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


@dataclass(frozen=True)
class Reading:
    """What memory holds besides a model's weights while they are loaded into it."""

    stored: torch.dtype
    """Type of the weights in the checkpoint: one that is converted is there in it for a moment."""
    unquantised: torch.dtype | None
    """Type of a weight while it is quantised; null: it is quantised already."""
    upcasts: bool
    """Whether what is not quantised is loaded in 16 bit, and made fp32 once all is there."""


def fill(network: Any, reading: Reading | None = None) -> None:
    """Replace parameters and buffers on `meta` by CPU tensors in their loaded formats; tied weights stay tied, and
    adapters come last.

    Under FakeTensorMode this takes no memory.

    Args:
        network: with parameters on `meta`.
        reading: how they are read; null: nothing else is held.
    """
    filling = _Filling(network, reading)
    of_adapters = {name.rpartition(".")[0] for name in adapter_methods.tensor_names(network)}
    modules = list(network.named_modules())
    for name, module in sorted(modules, key=lambda pair: natural(pair[0])):
        if name not in of_adapters:
            filling.fill_base(name, module)
    filling.convert()
    for name, module in modules:
        if name in of_adapters:
            filling.fill_adapter(name, module)
    filling.convert(torch.float32)
    filling.convert()


class _Filling:
    """Makes the tensors of a model in the order in which loading does.

    `_parameters` and `_buffers` of modules are private in torch (2.13). `Module.to_empty` does the same for layers of
    torch, and would do for all once bitsandbytes (0.50) supports quantised layers there.
    """

    def __init__(self, network: Any, reading: Reading | None) -> None:
        self._network, self._reading = network, reading
        # Of several names of a tied weight the first one is in checkpoints.
        self._names = {id(parameter): name for name, parameter in network.named_parameters()}
        # By id of the original, which is kept with its replacement so that its id is not used again. A tensor of
        # another type than the original's is still to be converted.
        self._tensors: dict[int, tuple[Any, torch.Tensor]] = {}
        self._made: dict[int, Any] = {}

    def fill_base(self, name: str, module: Any) -> None:
        """A module of the base model, without what it has of one that comes later."""
        self._quantise(module)
        for own, parameter in _on_meta(module._parameters).items():
            upcast = self._reading is not None and self._reading.upcasts and parameter.dtype is torch.float32
            dtype = torch.bfloat16 if upcast else parameter.dtype
            if self._names[id(parameter)] == (f"{name}.{own}" if name else own):
                self._tensors[id(parameter)] = parameter, self._read(parameter.shape, dtype)
        self._replace(module)

    def fill_adapter(self, name: str, module: Any) -> None:
        """A module of an adapter. Those of LoRA are made in the type of their layer's weights, and left on `meta`: peft
        (0.21) casts them to fp32 once all are there.
        """
        owner, of_lora, _ = name.partition(".lora_")
        converts = self._reading is not None and bool(of_lora)
        layer = self._network.get_submodule(owner).get_base_layer() if converts else None
        for parameter in _on_meta(module._parameters).values():
            dtype = _dtype_of(layer) if converts else parameter.dtype
            if id(parameter) not in self._tensors:
                self._tensors[id(parameter)] = parameter, torch.empty(parameter.shape, dtype=dtype)
        if not converts:
            self._replace(module)
        elif isinstance(module, DoraLinearLayer):
            torch.empty(_bytes_for_norms(layer), dtype=torch.uint8)

    def convert(self, dtype: torch.dtype | None = None) -> None:
        """Convert what is in another type than its own, one tensor after another.

        Args:
            dtype: to convert to; null: to its own.
        """
        for module in self._network.modules():
            for parameter in _on_meta(module._parameters).values():
                wanted = parameter.dtype if dtype is None else dtype
                if id(parameter) in self._tensors and self._tensors[id(parameter)][1].dtype is not wanted:
                    self._tensors[id(parameter)] = parameter, torch.empty(parameter.shape, dtype=wanted)
            self._replace(module)

    def _read(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A weight out of the checkpoint, which is held in the type that it is stored in until it is converted."""
        stored = self._reading.stored if self._reading is not None and dtype.is_floating_point else dtype
        held = torch.empty(shape, dtype=stored) if stored is not dtype else None
        tensor = torch.empty(shape, dtype=dtype)
        del held
        return tensor

    def _quantise(self, module: Any) -> None:
        """The weight of a layer, if it is quantised."""
        if isinstance(module, Linear4bit | Linear8bitLt):
            unquantised = self._unquantised(module)
            (_fill_4bit if isinstance(module, Linear4bit) else _fill_8bit)(module)
            del unquantised
        elif quantisers.of_hqq(module):
            _fill_hqq(module)
        elif quantisers.of_torchao(module._parameters.get("weight")):
            _fill_torchao(module)

    def _unquantised(self, module: Any) -> list[torch.Tensor]:
        """What bitsandbytes (0.50) holds on a CPU while it quantises a weight."""
        if self._reading is None or self._reading.unquantised is None:
            return []
        held = [self._read(module.weight.shape, self._reading.unquantised)]
        if issubclass(module.source_cls, Conv1D):  # stored transposed: it is copied
            held.append(torch.empty_like(held[0]))
        if isinstance(module, Linear8bitLt):
            held.append(torch.empty_like(held[0], dtype=torch.float16))
            held[1:] = held[-1:]  # made of the transposed copy, which is let go of
        return held

    def _replace(self, module: Any) -> None:
        """Put what is in its own type in the place of what is on `meta`."""
        for name, parameter in _on_meta(module._parameters).items():
            _, tensor = self._tensors.get(id(parameter), (None, None))
            if tensor is not None and tensor.dtype is parameter.dtype:
                made = self._made.setdefault(id(parameter), torch.nn.Parameter(tensor, parameter.requires_grad))
                module._parameters[name] = made
        for name, buffer in _on_meta(module._buffers).items():
            if id(buffer) not in self._tensors:
                self._tensors[id(buffer)] = buffer, torch.empty(buffer.shape, dtype=buffer.dtype)
            _, module._buffers[name] = self._tensors[id(buffer)]


def _on_meta(tensors: dict[str, Any]) -> dict[str, Any]:
    """Those that are there, and on `meta`."""
    return {name: each for name, each in tensors.items() if each is not None and each.device.type == "meta"}


def _dtype_of(layer: Any) -> torch.dtype:
    """The type in which peft (0.21) makes an adapter of a layer: that of its weights or its arithmetic."""
    if isinstance(layer, Linear8bitLt):
        return torch.float32
    computes: torch.dtype | None = getattr(layer, "compute_dtype", None)  # of 4-bit layers, and HQQ's
    return computes or next(layer.parameters()).dtype


def _bytes_for_norms(layer: Any) -> int:
    """Bytes that the norms of a layer's weights take when DoRA (peft 0.21) begins: three of its size in its type; of a
    quantised one four, and a copy of what bitsandbytes unpacks. As measured by the tracker.
    """
    of_linear = hasattr(layer, "in_features")
    weights = int(layer.in_features * layer.out_features if of_linear else layer.weight.numel())
    if isinstance(layer, Linear8bitLt):
        return 4 * 4 * weights
    if isinstance(layer, Linear4bit):
        return 4 * _dtype_of(layer).itemsize * weights + weights // 2 + 4 * (weights // _BLOCK)
    return 3 * _dtype_of(layer).itemsize * weights


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Parts of a name, numbers by their value and before words."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))


def scales(module: Any) -> list[torch.Tensor]:
    """Tensors that a quantised layer has next to its weight; none for other layers."""
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
