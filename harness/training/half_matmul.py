"""16-bit matrix products at fp32 speed on a CPU without 16-bit instructions.

On such a CPU PyTorch (2.13) multiplies bf16 and fp16 matrices in plain loops: a training step takes 20 times as long as
in fp32, which measures those loops and not the technique. Here each product is computed in fp32 on blocks of the
operands and rounded once, as 16-bit hardware does (its products of 16-bit numbers are exact, its sums are fp32).
Inputs, outputs and tensors saved by autograd stay 16 bit, and so does their memory; the blocks are bounded workspace.
`Environment.half_matmul` records where this is in use.

It overrides kernels of `aten` through `torch.library`. Fast 16-bit products in PyTorch on such CPUs would let it go.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from harness.environment import half_matmul

_HALF = (torch.bfloat16, torch.float16)
_BLOCK = 2**22
"""Elements of an operand that are converted at a time: 16 MiB of fp32."""
_UNBLOCKED = (
    "bmm",
    "addmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
"""Operations whose operands are small enough to be converted whole (a head's attention, a bias)."""
_UNBLOCKED_INTO = ("bmm.out", "addmm.out", "baddbmm.out")
"""The same as compiled code calls them, into a buffer of its own."""

# The library must outlive its registrations, which call the kernels that they replace.
_library: torch.library.Library | None = None
_kernels: dict[str, Any] = {}


def install() -> bool:
    """Replace the CPU's 16-bit products in this process, where the processor needs it. Later calls do nothing.

    Returns:
        Whether they are replaced.
    """
    global _library
    if half_matmul() != "fp32-blocks":
        return False
    if _library is None:
        # Torch warns about each kernel that is replaced.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _library = torch.library.Library("aten", "IMPL")
            for name in ("mm", "mm.out", *_UNBLOCKED, *_UNBLOCKED_INTO):
                _kernels[name] = torch.library.get_kernel(f"aten::{name}", "CPU")
            _library.impl("mm", _mm, "CPU", with_keyset=True)
            _library.impl("mm.out", _mm_into, "CPU", with_keyset=True)
            for name in _UNBLOCKED:
                _library.impl(name, _in_fp32(name), "CPU", with_keyset=True)
            for name in _UNBLOCKED_INTO:
                _library.impl(name, _in_fp32_into(name), "CPU", with_keyset=True)
    return True


def _mm(keys: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left` (m, k) times `right` (k, n), in blocks of rows and columns. k is not split: elements are rounded once."""
    if left.dtype not in _HALF:
        return _kernels["mm"].call_boxed(keys, left, right)  # type: ignore[no-any-return]  # a boxed kernel
    return _in_blocks(keys, left, right, left.new_empty(len(left), right.shape[1]))


def _mm_into(keys: Any, left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """The same into a tensor that is there."""
    if left.dtype not in _HALF:
        return _kernels["mm.out"].call_boxed(keys, left, right, out=out)  # type: ignore[no-any-return]  # as above
    return _in_blocks(keys, left, right, out)


def _in_blocks(keys: Any, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    (m, k), n = left.shape, right.shape[1]
    step = max(1, _BLOCK // max(1, k))
    for i in range(0, m, step):
        rows = left[i : i + step].float()
        for j in range(0, n, step):
            out[i : i + step, j : j + step] = _kernels["mm"].call_boxed(keys, rows, right[:, j : j + step].float())
    return out


def _in_fp32(name: str) -> Any:
    """The CPU kernel `name`, with 16-bit operands computed in fp32."""

    def call(keys: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor))
        if dtype not in _HALF:
            return _kernels[name].call_boxed(keys, *args, **kwargs)
        out = _kernels[name].call_boxed(keys, *map(_to_fp32, args), **{k: _to_fp32(v) for k, v in kwargs.items()})
        if isinstance(out, torch.Tensor):
            return out.to(dtype)
        # Attention returns its output and the log-sum-exp, which stays fp32; its backward pass three gradients.
        rounded = 3 if name.endswith("backward") else 1
        return tuple(o.to(dtype) if i < rounded else o for i, o in enumerate(out))

    return call


def _in_fp32_into(name: str) -> Any:
    """The same of a kernel that writes into `out`."""
    plain = name.removesuffix(".out")

    def call(keys: Any, *args: Any, out: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if out.dtype not in _HALF:
            return _kernels[name].call_boxed(keys, *args, out=out, **kwargs)  # type: ignore[no-any-return]  # as above
        named = {key: _to_fp32(value) for key, value in kwargs.items()}
        return out.copy_(_kernels[plain].call_boxed(keys, *map(_to_fp32, args), **named))

    return call


def _to_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALF else value
