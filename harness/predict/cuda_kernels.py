"""What kernels of CUDA hold for a moment, or choose, where those of a CPU do not.

Sources, in pytorch/pytorch (2.6 to 2.13): aten/src/ATen/native/cuda/SoftMax.cu (`softmax_backward_cuda_out` multiplies
gradient and output into a tensor of their size), aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (which attention
kernel takes which inputs), aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp (`mha_bwd`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from harness._util.units import MIB
from harness.predict.cards import AMPERE, HOPPER, Capability

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_torch_attention = torch.nn.functional.scaled_dot_product_attention
_FLASH_HEAD = 256
"""Widest head that the flash kernel takes."""


def transient_bytes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Bytes that an operation's kernel allocates next to its outputs, and releases when it ends."""
    if func is _aten._softmax_backward_data.default:
        return int(args[0].numel() * args[0].element_size())
    if func is _aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        query, key, mask = args[1], args[2], kwargs.get("attn_mask")
        return _flash_backward_bytes(query, key) if mask is None and query.dtype in _HALF else 0
    return 0


def _flash_backward_bytes(query: torch.Tensor, key: torch.Tensor) -> int:
    """The query's gradient in fp32, a sum for each position, and keys' and values' gradients of each query head.

    Lengths are rounded up to 128, widths of heads to 32.
    """
    examples, heads, length, width = query.shape
    positions = examples * heads * -(-length // 128) * 128
    sums = 4 * positions * (-(-width // 32) * 32 + 1)
    expanded = 2 * key.element_size() * examples * heads * key.shape[-2] * width if key.shape[1] != heads else 0
    return sums + expanded


def attention(capability: Capability) -> Callable[..., torch.Tensor]:
    """`scaled_dot_product_attention` that computes in steps, and keeps the scores, where no fused kernel takes the
    inputs.

    Args:
        capability: compute capability of the card.
    """

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        cast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if cast else query.dtype
        if _is_fused(query, key, attn_mask, dtype, capability):
            return _torch_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        inputs = [tensor.to(dtype) for tensor in (query, key, value)]
        with torch.autocast("cpu", enabled=False):
            output: torch.Tensor = _aten._scaled_dot_product_attention_math.default(
                *inputs, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )[0]
            return output

    return scaled_dot_product_attention


def _is_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    dtype: torch.dtype,
    capability: Capability,
) -> bool:
    flash = mask is None and dtype in _HALF and capability >= AMPERE and query.shape[-1] <= _FLASH_HEAD
    # The memory-efficient kernel takes masks and fp32, not groups of heads; bf16 from Ampere on.
    efficient = query.shape[-3] == key.shape[-3] and (dtype is not torch.bfloat16 or capability >= AMPERE)
    return flash or efficient


def workspace_bytes(capability: Capability) -> int:
    """Bytes that cuBLAS holds for each thread that multiplies, one of the forward and one of the backward pass.

    torch's `parseChosenWorkspaceSize` (aten/src/ATen/cuda/CublasHandlePool.cpp): 32 MiB on Hopper, and on Blackwell in
    versions of 2026; else two of 4 MiB and eight of 16 KiB.
    """
    return 32 * MIB if capability >= HOPPER else 2 * 4 * MIB + 8 * MIB // 64
