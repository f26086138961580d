"""What differs on the device for which a step is replayed: the replay itself runs on CPU tensors without contents.

On CUDA dropout keeps a mask of bytes, the optimizer works on all its tensors at once, paged state lives outside the
allocator, autocast takes layer norms in fp32, and the allocator rounds; the attention of a CPU and of CUDA keep the
same (output and log-sum-exp). Of bitsandbytes' int8 product the CPU's way is followed: what CUDA's keeps for the
backward pass is the same, its short-lived buffers are not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from harness.prediction import DeviceType
from harness.replay import Replay

WORKSPACE: dict[DeviceType, int] = {"cpu": 0, "cuda": 32 * 2**20}
"""Bytes that cuBLAS holds inside the allocator: 32 MiB on compute capability 9.0, 8.1 MiB before."""

_PAGED_ABOVE = 100_000
"""Elements from which bitsandbytes pages a tensor of optimizer state (optim/optimizer.py, get_state_buffer)."""


@contextlib.contextmanager
def as_on(device_type: DeviceType, optimizer: torch.optim.Optimizer, tracker: Replay) -> Iterator[None]:
    """Within, a step on the CPU holds what it would hold on the target."""
    if device_type == "cpu":
        yield
        return
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # torch's own choice on CUDA
    functions = mock.patch.multiple(torch.nn.functional, dropout=_dropout, layer_norm=_layer_norm)
    with functions, _paged_elsewhere(optimizer, tracker):
        yield


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """As CUDA's kernel: a mask of one byte to an element, where a CPU keeps one of the input's type."""
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


_plain_layer_norm = torch.nn.functional.layer_norm


def _layer_norm(
    input: torch.Tensor,
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """In fp32 under autocast, as CUDA's list of operations has it; a CPU's has not."""
    if torch.is_autocast_enabled("cpu"):
        input = input.float()
        weight, bias = (None if given is None else given.float() for given in (weight, bias))
    return _plain_layer_norm(input, normalized_shape, weight, bias, eps)


@contextlib.contextmanager
def _paged_elsewhere(optimizer: torch.optim.Optimizer, tracker: Replay) -> Iterator[None]:
    make = getattr(optimizer, "get_state_buffer", None)
    if make is None or not getattr(optimizer, "is_paged", False):
        yield
        return

    def make_uncounted(parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
        tracker.counting = parameter.numel() < _PAGED_ABOVE
        try:
            return make(parameter, dtype=dtype)
        finally:
            tracker.counting = True

    with mock.patch.object(optimizer, "get_state_buffer", make_uncounted):
        yield
