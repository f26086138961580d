"""What bitsandbytes' int8 product allocates on CUDA, where it is another than on a CPU.

A CPU dequantises the weight and multiplies in 16 bit. CUDA quantises the input, row by row, and multiplies in int8. Of
an input of T x K numbers and a weight of N x K, bitsandbytes (0.50) allocates in the forward pass, in bytes (functions
`MatMul8bitLt` of autograd/_functions.py, and `int8_vectorwise_quant`, `int8_mm_dequant` of backends/cuda/ops.py,
`int8_mixed_scaled_mm` of backends/default/ops.py):

1. an fp16 copy of the input, 2TK (none where it is fp16), until it is quantised: T scales in fp32, the int8 input of
   TK, and to look for outliers the magnitudes, 2TK, and a mask, TK;
2. the product in int32, 4TN, dequantised to fp16, 2TN, and converted to the input's type, 2TN.

It keeps the input for the backward pass, which is the CPU's: the weight in the input's type, 2NK, for its gradient.

Columns of the input with a magnitude of `llm_int8_threshold` (6.0) or more are multiplied in 16 bit, and kept: 2T each.
Which these are, only values tell; here there are none. In published models they are a few of thousands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def emulate() -> Iterator[None]:
    """Within, int8 layers on the CPU allocate what they would on CUDA.

    Patches bitsandbytes (0.50), which chooses by the device of the input. Not needed once fake tensors of the device
    `cuda` work without a CUDA build of torch.
    """
    from bitsandbytes import functional
    from bitsandbytes.autograd import _functions

    with (
        mock.patch.object(_functions, "MatMul8bitFp", _functions.MatMul8bitLt),
        mock.patch.object(functional, "int8_vectorwise_quant", _quantised),
        mock.patch.object(torch.ops.bitsandbytes, "int8_mixed_scaled_mm", _product),
    ):
        yield


@contextlib.contextmanager
def without_outliers() -> Iterator[None]:
    """Within, int8 layers on the CPU have no columns with outliers, which only values tell, where they evaluate.

    Patches bitsandbytes (0.50).
    """
    from bitsandbytes import functional

    with (
        mock.patch.object(functional, "int8_vectorwise_quant", _quantised),
        mock.patch.object(torch.ops.bitsandbytes, "int8_mixed_scaled_mm", _product_of_cpu),
    ):
        yield


def _product_of_cpu(
    inputs: torch.Tensor,
    quantised: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    weight_scales: torch.Tensor,
    outliers: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    kept = torch.empty(0, dtype=inputs.dtype)
    product = torch.ops.bitsandbytes.int8_scaled_mm.default
    return product(quantised, weight, scales, weight_scales, bias=bias, dtype=inputs.dtype), kept


def _quantised(inputs: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Inputs of shape (T, K) in fp16 as int8, their T scales, and the numbers of the columns with outliers."""
    scales = torch.empty(inputs.shape[0], dtype=torch.float32)
    quantised = torch.empty(inputs.shape, dtype=torch.int8)
    outliers = inputs.abs() >= threshold if threshold > 0 else None
    return quantised, scales, None if outliers is None else torch.empty(0, dtype=torch.int64)


def _product(
    inputs: torch.Tensor,
    quantised: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    weight_scales: torch.Tensor,
    outliers: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of shape (T, N) in the inputs' type, and the inputs of the columns with outliers."""
    kept = torch.empty(0, dtype=inputs.dtype)
    product = torch._int_mm(quantised, weight.t())
    dequantised = torch.empty_like(product, dtype=torch.float16)
    if bias is not None and bias.dtype != torch.float16:
        dequantised.add_(bias)
    return dequantised.to(inputs.dtype), kept
