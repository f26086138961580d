"""Floating-point operations of one operator call, by the formulas of torch's own counter."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_products = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.baddbmm: 1}
"""Nearly all that is counted, and where the two matrices begin among the arguments. The formula in the registry takes a
fifth of a millisecond to find the shapes."""
_grouped = (torch.ops.aten._grouped_mm, torch.ops.aten._scaled_grouped_mm)
"""Products of experts: each with its own rows, inner numbers or columns, as many as the whole has."""


def operations(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of a matrix product or an attention (a multiply and an add are two); else 0.

    Torch's FlopCounterMode counts the same, but its module hooks hold memory, which would be tracked. Its registry
    (torch 2.13, undocumented, by `_overloadpacket`) lacks attention of a CPU, the products of experts, torch's int8
    product, and bitsandbytes' int8 and 4-bit products (0.50), added here; each can go once the registry has it.

    Args:
        func: operator overload from a dispatch mode.
        args: its arguments.
        kwargs: its keyword arguments.
        out: its result.
    """
    packet = func._overloadpacket
    if (first := _products.get(packet)) is not None:
        left, right = args[first : first + 2]
        return int(2 * left.numel() * right.shape[-1])
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet is _attention:
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if packet is _attention_backward:
        return int(sdpa_backward_flop_count(*(a.shape for a in args[:4])))
    if packet in _grouped:
        left, right = args[:2]
        whole = left.dim() == 2 or right.dim() == 3  # else the experts differ in columns, and each has its left matrix
        return int(2 * left.numel() * right.shape[-1] // (1 if whole else left.shape[0]))
    if packet is torch.ops.aten._int_mm:
        return int(2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1])
    if func.namespace == "bitsandbytes" and packet.__name__ in ("int8_mixed_scaled_mm", "int8_scaled_mm"):
        (rows, inner), (columns, _) = (a.shape for a in args if isinstance(a, torch.Tensor) and a.dtype is torch.int8)
        return int(2 * rows * inner * columns)
    if func.namespace == "bitsandbytes" and packet.__name__ == "gemm_4bit":
        columns, inner = args[2]  # of the weight, before it was packed
        return int(2 * (args[0].numel() // inner) * inner * columns)
    return 0
