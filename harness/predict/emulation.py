"""Emulates a device's memory use in a step that is replayed on fake CPU tensors.

On CUDA, dropout keeps a mask of bytes, the optimizer updates all its tensors at once, paged state is outside the
allocator, autocast computes layer norms in fp32, and the allocator rounds up. Attention keeps the same on both (output
and log-sum-exp). bitsandbytes' int8 product has other temporaries (int8_on_cuda).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast
from unittest import mock

import torch
from torch import _meta_registrations
from torch._subclasses.fake_tensor import FakeTensor

from harness.environment import DeviceType
from harness.predict import cuda_kernels, fused_kernels, int8_on_cuda
from harness.predict.cards import Capability
from harness.predict.replay import Replay
from harness.training import fused_loss, quantisers

_PAGED_ABOVE = 100_000
"""Elements of the smallest optimizer state that bitsandbytes (0.50) pages: optim/optimizer.py, get_state_buffer."""


@contextlib.contextmanager
def emulate_kernels(device_type: DeviceType, capability: Capability, tracker: Replay) -> Iterator[None]:
    """Within, a model on the CPU holds what it would hold on the device."""
    kernels = _kernels_of_cuda(capability) if device_type == "cuda" else contextlib.nullcontext()
    int8 = int8_on_cuda.emulate() if device_type == "cuda" else int8_on_cuda.without_outliers()
    fused = mock.patch.dict(fused_loss.KERNELS, fused_kernels.kernels(tracker, capability))
    with kernels, fused, int8, _grouped_products_of_any_type(), _dequantised_for_dora(), _offloaded_uncounted(tracker):
        yield


@contextlib.contextmanager
def _kernels_of_cuda(capability: Capability) -> Iterator[None]:
    # Patches torch (2.13): on CPU and CUDA, dropout keeps different tensors for the backward pass, autocast treats
    # layer norms differently, and attention has other kernels. Not needed once fake tensors of the device `cuda` work
    # without a CUDA build of torch.
    attention = cuda_kernels.attention(capability)
    functions = mock.patch.multiple(
        torch.nn.functional, dropout=_dropout, layer_norm=_layer_norm, scaled_dot_product_attention=attention
    )
    with functions, mock.patch.object(torch, "is_autocast_enabled", _is_autocast_enabled):
        yield


@contextlib.contextmanager
def emulate_optimizer(device_type: DeviceType, optimizer: torch.optim.Optimizer, tracker: Replay) -> Iterator[None]:
    """Within, an optimizer on the CPU holds what it would hold on the device."""
    if device_type == "cpu":
        yield
        return
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused") and "triton" not in group:
            group["foreach"] = True  # torch's default on CUDA; optimi's is a kernel that updates a weight in place
    with _paged_state_uncounted(optimizer, tracker):
        yield


_ANSWERS = {"loha": True, "lokr": True, "cpt": False, "vblora": False}
"""What forward passes of methods of peft (0.21) ask of values, answered as in a first step: whether a layer's adapter
is not dropped, whether a prompt has moved too far, whether vectors of a bank are chosen for good."""


@contextlib.contextmanager
def answer_questions(method: str) -> Iterator[None]:
    """Within, fake tensors answer what the forward pass of an adapter's method asks of their values."""
    if method not in _ANSWERS:
        yield
        return
    truth = torch.Tensor.__bool__

    def answer(tensor: torch.Tensor) -> bool:
        return _ANSWERS[method] if isinstance(tensor, FakeTensor) else truth(tensor)

    with mock.patch.object(torch.Tensor, "__bool__", answer):
        yield


def _grouped_products_of_any_type() -> AbstractContextManager[Any]:
    """Within, products with a group of experts have shapes in every type, as they have values.

    Patches torch (2.13), whose shapes of them are for bf16 alone; a CPU multiplies them in any type.
    """

    def shape(mat_a: Any, mat_b: Any, offs: Any = None, out_dtype: Any = None, **others: Any) -> Any:
        return _meta_registrations._create_grouped_mm_output_tensor(mat_a, mat_b, offs, out_dtype)

    return mock.patch.object(_meta_registrations, "_meta_grouped_mm_common", shape)


def _dequantised_for_dora() -> AbstractContextManager[Any]:
    """Within, DoRA dequantises fake weights as it does real ones.

    Patches peft (0.21), which knows bitsandbytes' weights by the names of their classes.
    """
    return mock.patch("peft.tuners.lora.dora.dequantize_module_weight", _dequantised)


def _offloaded_uncounted(tracker: Replay) -> AbstractContextManager[Any]:
    """Within, what checkpointed layers keep in the memory of the host is not counted, only its copies on the device.

    Patches transformers (5.23), whose layers call torch's `save_on_cpu` for it: on fake tensors both are on one device.
    """

    class OnHost(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, **_: Any) -> None:
            super().__init__(_to_host, torch.empty_like)

    def _to_host(tensor: torch.Tensor) -> torch.Tensor:
        tracker.counting = False
        try:
            return torch.empty_like(tensor)
        finally:
            tracker.counting = True

    return mock.patch("transformers.modeling_utils.save_on_cpu", OnHost, create=True)  # older releases have none


def _dequantised(module: Any) -> torch.Tensor:
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    if isinstance(module, Linear4bit):
        return functional.dequantize_4bit(module.weight.data, module.quant_state)
    if isinstance(module, Linear8bitLt):
        scales = cast("torch.Tensor", module.state.SCB)
        return cast("torch.Tensor", functional.int8_vectorwise_dequant(module.weight.data, scales))
    return quantisers.dequantised(module)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA's kernel: it keeps a mask of one byte per element, a CPU one of the input's type."""
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


_torch_is_autocast_enabled = torch.is_autocast_enabled


def _is_autocast_enabled(device_type: str = "cuda") -> bool:
    """What peft asks without a device before it converts an adapter's input: autocast of CUDA, replayed as a CPU's."""
    return _torch_is_autocast_enabled("cpu" if device_type == "cuda" else device_type)


_torch_layer_norm = torch.nn.functional.layer_norm


def _layer_norm(
    input: torch.Tensor,
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """In fp32 under autocast, as on CUDA; not so on a CPU."""
    if torch.is_autocast_enabled("cpu"):
        input = input.float()
        weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
    return _torch_layer_norm(input, normalized_shape, weight, bias, eps)


@contextlib.contextmanager
def _paged_state_uncounted(optimizer: torch.optim.Optimizer, tracker: Replay) -> Iterator[None]:
    """Within, state that the optimizer pages to the host is not counted."""
    if not getattr(optimizer, "is_paged", False):
        yield
        return

    def uncounted(make: Any) -> Any:
        def call(parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
            tracker.counting = parameter.numel() < _PAGED_ABOVE
            try:
                return make(parameter, dtype=dtype)
            finally:
                tracker.counting = True

        return call

    # Patches bitsandbytes (0.50), which makes paged state in these methods; a hook there would replace it.
    names = [name for name in ("get_state_buffer", "_get_state_double_buffer") if hasattr(optimizer, name)]
    with mock.patch.multiple(optimizer, **{name: uncounted(getattr(optimizer, name)) for name in names}):
        yield
