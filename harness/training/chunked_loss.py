"""Cross entropy over parts of the tokens, so that the logits of a whole micro-batch never exist.

The decoder runs once, as ever. What comes after it in the model's own code (the head, an adapter on it, a scale, a
softcap) then runs for each part of its output, and the gradients of the part's loss are taken at once: of the decoder's
output, which is as large as one layer's, and of what is trained in the head. The backward pass only scales them. So a
part's logits live for a moment, and nothing is computed twice.

Gradients of a head in 16 bit are summed over the parts in 16 bit.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from harness.errors import InputError
from harness.training.batches import IGNORED

LogitsOf = Callable[[torch.Tensor], torch.Tensor]


def refuse_if_impossible(causal: Any) -> None:
    """Check that a model's code computes logits of a part of its decoder's output.

    Raises:
        InputError: it does not.
    """
    takes_part = "logits_to_keep" in inspect.signature(causal.forward).parameters
    if causal.base_model_prefix not in dict(causal.named_children()) or not takes_part:
        raise InputError(_all_at_once(causal))


@contextlib.contextmanager
def losses_for_logits(causal: Any, labels: torch.Tensor, size: int) -> Iterator[None]:
    """Within, a forward pass of a causal language model has no logits: in their place its outputs have the sums of the
    cross entropies of each example in nats, or in training that of all of them. Their `loss` stays free: AdaLoRA adds
    to it what is there.

    Args:
        causal: without the wrapper of its adapters, whose layers it has.
        labels: int64 of shape (examples, length); position t predicts label t + 1.
        size: positions of a part, at most.

    Replaces the model's `forward`, and its decoder while a part is computed: transformers (5.23) has no function from
    the decoder's output to logits, which would let both go.
    """
    forward = causal.forward

    def without_logits(*arguments: Any, **options: Any) -> Any:
        with _outputs_of(causal.base_model, causal.get_decoder()) as made:
            outputs = forward(*arguments, **options, logits_to_keep=1)  # with the auxiliary loss, if there is one
        if not made:
            raise InputError(_all_at_once(causal))
        decoder, output = made[-1]  # what is called by the model's own forward pass returns last
        name = next(name for name, module in causal.named_modules() if module is decoder)
        parent, _, own = name.rpartition(".")

        def logits_of(part: torch.Tensor) -> torch.Tensor:
            replaced = type(output)(last_hidden_state=part[None])
            with mock.patch.dict(causal.get_submodule(parent)._modules, {own: lambda *_, **__: replaced}):
                logits: torch.Tensor = forward().logits.flatten(0, 1)
            return logits

        # Tokens of an adapter's prompt may stand before the others.
        targets = F.pad(labels[:, 1:], (output[0].shape[1] - labels.shape[1], 1), value=IGNORED)
        kept = {"logits": _losses(output[0], targets, logits_of, _trained_beyond(causal), size)}
        if getattr(outputs, "aux_loss", None) is not None:
            kept["aux_loss"] = outputs.aux_loss
        return type(outputs)(**kept)

    with mock.patch.object(causal, "forward", without_logits):
        yield


def _all_at_once(causal: Any) -> str:
    return f"loss chunked: {type(causal).__name__} computes its logits all at once; use loss: full"


@contextlib.contextmanager
def _outputs_of(*modules: Any) -> Iterator[list[tuple[Any, Any]]]:
    """Within, collects those of the modules that are called, each with its output, in the order of their returns."""
    made: list[tuple[Any, Any]] = []
    distinct = {id(module): module for module in modules if module is not None}.values()
    hooks = [
        module.register_forward_hook(lambda module, _, output: made.append((module, output))) for module in distinct
    ]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()


def _trained_beyond(causal: Any) -> list[torch.nn.Parameter]:
    """What is trained in the head, whose weight may be the embeddings' too, and beside it."""
    modules = [module for module in causal.children() if module is not causal.base_model]
    trained = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(trained.values())


def _losses(
    hidden: torch.Tensor, targets: torch.Tensor, logits_of: LogitsOf, trained: Sequence[torch.Tensor], size: int
) -> torch.Tensor:
    if torch.is_grad_enabled():
        flat = hidden.flatten(0, 1), targets.flatten()
        loss: torch.Tensor = _Summed.apply(*flat, logits_of, size, *trained)  # type: ignore[no-untyped-call]
        return loss
    return torch.stack([_summed(*each, logits_of, size) for each in zip(hidden, targets, strict=True)])


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
