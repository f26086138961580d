"""Cross entropy over parts of the tokens, so that the logits of a whole micro-batch never exist.

What comes after the decoder in the model's own code runs for each part of its output, and the gradients of the part's
loss are taken at once: of the decoder's output, which is as large as one layer's, and of what is trained in the head.
The backward pass only scales them. So a part's logits live for a moment, and nothing is computed twice.

Gradients of a head in 16 bit are summed over the parts in 16 bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from harness.training.batches import IGNORED
from harness.training.without_logits import LogitsOf


def losses(hidden: torch.Tensor, targets: torch.Tensor, logits_of: LogitsOf, *, causal: Any, size: int) -> torch.Tensor:
    """Sums of the cross entropies of each example in nats, or in training that of all of them.

    Args:
        hidden: the decoder's output, of shape (examples, length, width).
        targets: the next tokens, int64 of shape (examples, length).
        logits_of: the model's code for logits.
        causal: the model.
        size: positions of a part, at most.
    """
    if torch.is_grad_enabled():
        arguments = hidden.flatten(0, 1), targets.flatten(), logits_of, size, *_trained_beyond(causal)
        loss: torch.Tensor = _Summed.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss
    return torch.stack([_summed(*each, logits_of, size) for each in zip(hidden, targets, strict=True)])


def _trained_beyond(causal: Any) -> list[torch.nn.Parameter]:
    """What is trained in the head, whose weight may be the embeddings' too, and beside it."""
    modules = [module for module in causal.children() if module is not causal.base_model]
    trained = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(trained.values())


def _summed(hidden: torch.Tensor, targets: torch.Tensor, logits_of: LogitsOf, size: int) -> torch.Tensor:
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.stack([_cross_entropy(logits_of(part), wanted) for part, wanted in parts]).sum()


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_cross_entropy`, and its gradient in the logits' type: softmax - 1 at the target, else softmax.

    One array of the logits' shape is made, in fp32; torch's function and its gradient make three.
    """
    wanted = (targets != IGNORED).float()
    at = targets.clamp(min=0)[:, None]
    of_targets = logits.gather(1, at).float()
    top = logits.amax(dim=1, keepdim=True).float()
    powers = logits.float() - top if logits.dtype == torch.float32 else logits.float().sub_(top)
    powers.exp_()
    total = powers.sum(dim=1, keepdim=True)
    loss = ((total.log() + top - of_targets)[:, 0] * wanted).sum()
    gradient = powers.mul_(wanted[:, None] / total).scatter_add_(1, at, -wanted[:, None])
    return loss, gradient.to(logits.dtype)


class _Summed(torch.autograd.Function):
    """Sum of the cross entropies of all positions, with its gradient taken part by part in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        logits_of: LogitsOf,
        size: int,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        sums: list[torch.Tensor] = []
        losses = []
        for start in range(0, len(hidden), size):
            with torch.enable_grad():
                part = hidden[start : start + size].detach().requires_grad_()
                logits = logits_of(part)
            loss, of_logits = _loss_and_gradient(logits.detach(), targets[start : start + size])
            of_part, *of_trained = torch.autograd.grad(logits, [part, *trained], of_logits)
            gradient[start : start + size] = of_part
            sums = [a.add_(b) for a, b in zip(sums, of_trained, strict=True)] if sums else of_trained
            losses.append(loss)
            del logits, of_logits, of_part, of_trained  # before the next part's are made
        ctx.save_for_backward(gradient, *sums)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> Any:
        gradient, *sums = ctx.saved_tensors
        # In place: the graph is walked once.
        return gradient.mul_(scale), None, None, None, *(each.mul_(scale) for each in sums)
