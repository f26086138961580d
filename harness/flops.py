"""Floating-point operations of a step, by the formulas of torch's own counter."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# torch's table lacks its CPU attention and bitsandbytes' products; shapes stand where tensors stood.
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class FlopCounter(TorchDispatchMode):
    """Counts operations of matrix products and attention that run under it; a multiply and an add are two.

    torch's FlopCounterMode counts the same, and hooks every module to say where; here only the sum
    is wanted, beside a memory tracker that the hooks would disturb.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch declares no types for its modes
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet is _attention:
            self.total += sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
        elif packet is _attention_backward:
            self.total += sdpa_backward_flop_count(*(a.shape for a in args[:4]))
        elif func.namespace == "bitsandbytes" and packet.__name__ in ("int8_mixed_scaled_mm", "int8_scaled_mm"):
            quantised = [a for a in args if isinstance(a, torch.Tensor) and a.dtype is torch.int8]
            (rows, inner), columns = quantised[0].shape, quantised[1].shape[0]
            self.total += 2 * rows * inner * columns
        return out
