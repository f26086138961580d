"""What the kernels of losses liger and cce allocate and multiply, where they cannot run.

Sources: liger-kernel (0.8), ops/fused_linear_cross_entropy.py; cut-cross-entropy (25.1), cce.py, cce_lse_forward.py,
cce_backward.py. Of N positions, a width of H and a vocabulary of V, Liger holds the logits of about NH/V positions, and
takes the gradients in the forward pass. The other holds N + V numbers in fp32 and the inputs, and computes the logits
again in the backward pass, in pieces that stay within the kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from harness.predict.cards import AMPERE, Capability
from harness.predict.replay import Replay
from harness.training.fused_loss import Kernel

_HALF = (torch.float16, torch.bfloat16)


def kernels(tracker: Replay, capability: Capability) -> dict[str, Kernel]:
    """Stand-ins for the kernels on fake tensors, by losses.

    Args:
        tracker: counts what they hold.
        capability: compute capability of the card.
    """
    in_place = capability >= AMPERE

    def liger(
        inputs: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return _Liger.apply(inputs, weight, targets, bias, tracker, in_place)  # type: ignore[no-any-return, no-untyped-call]

    def cce(inputs: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        return _Cut.apply(inputs, weight, targets, tracker)  # type: ignore[no-any-return, no-untyped-call]

    return {"liger": liger, "cce": cce}


class _Liger(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        bias: torch.Tensor | None,
        tracker: Replay,
        in_place: bool,
    ) -> torch.Tensor:
        (positions, width), vocabulary = inputs.shape, len(weight)
        wanted = -(-positions // -(-vocabulary // width))
        part = min(1 << (wanted - 1).bit_length(), positions)  # a power of two
        gradient = torch.zeros_like(inputs)
        training = ctx.needs_input_grad[0]  # a weight needs one without a graph too
        of_weight = torch.zeros_like(weight) if training and ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias) if training and bias is not None else None
        losses, _ = torch.zeros(positions), targets != 0
        in_one_type = not torch.is_autocast_enabled("cpu") or inputs.dtype is torch.get_autocast_dtype("cpu")
        buffer = torch.empty((part, vocabulary), dtype=inputs.dtype) if in_one_type else None
        for given, of_given in zip(inputs.split(part), gradient.split(part), strict=True):
            head = weight.t()
            logits = given @ head if buffer is None else torch.mm(given, head, out=buffer[: len(given)])
            if not training:
                continue
            if buffer is not None:
                torch.mm(logits, weight, out=of_given)
            else:
                of_given.copy_(logits @ weight)
            if of_weight is not None and in_place and logits.dtype in _HALF:
                converted = given.to(logits.dtype)
                with _uncounted(tracker):
                    torch.mm(logits.t(), converted)
                del converted
            elif of_weight is not None:
                of_weight += torch.mm(logits.t(), given).float()
            del logits
        ctx.save_for_backward(gradient, of_weight, of_bias)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        gradient, of_weight, of_bias = ctx.saved_tensors
        return gradient, of_weight, None, of_bias, None, None


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, tracker: Replay
    ) -> torch.Tensor:
        valid = targets.to(torch.int32)
        logarithms, of_targets = torch.empty(len(inputs)), torch.empty(len(inputs))
        means = torch.empty(len(weight)) if ctx.needs_input_grad[0] else None
        _logits(inputs, weight, tracker)
        ctx.save_for_backward(inputs, weight, valid, logarithms, means)
        ctx.tracker = tracker
        return of_targets.add_(logarithms).sum()

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        inputs, weight, _valid, _logarithms, means = ctx.saved_tensors
        order = torch.argsort(means).to(torch.int32)  # of the vocabulary, in which the kernel goes through it
        gradient = torch.zeros_like(inputs)
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        logits = _logits(inputs, weight, ctx.tracker)
        with _uncounted(ctx.tracker):
            torch.mm(logits, weight)
            if of_weight is not None:
                torch.mm(logits.t(), inputs)
        del order
        return gradient, of_weight, None, None


def _logits(inputs: torch.Tensor, weight: torch.Tensor, tracker: Replay) -> torch.Tensor:
    """Logits that are computed, and live within the kernel."""
    with _uncounted(tracker):
        return inputs @ weight.t()


@contextlib.contextmanager
def _uncounted(tracker: Replay) -> Iterator[None]:
    """Within, operations are counted, and not what they hold."""
    tracker.counting = False
    try:
        yield
    finally:
        tracker.counting = True
