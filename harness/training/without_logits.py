"""Takes a causal language model's loss from its decoder's output, so that the logits of a micro-batch need not exist.

The decoder runs once, as ever. What comes after it in the model's own code (the head, an adapter on it, a scale, a
softcap) can then be called for any part of its output.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from harness.errors import InputError
from harness.training.batches import IGNORED

LogitsOf = Callable[[torch.Tensor], torch.Tensor]
"""From decoder's output of shape (positions, width) to logits of shape (positions, vocabulary), by the model's code."""
Losses = Callable[[torch.Tensor, torch.Tensor, LogitsOf], torch.Tensor]
"""From decoder's output of shape (examples, length, width), the next tokens of shape (examples, length) and the model's
code for logits: the sums of the cross entropies of each example in nats, or in training that of all of them."""


def base_of(network: Any) -> Any:
    """The model without the wrapper of its adapters."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def refuse_if_impossible(causal: Any, loss: str) -> None:
    """Check that a model's code computes logits of a part of its decoder's output.

    Raises:
        InputError: it does not.
    """
    takes_part = "logits_to_keep" in inspect.signature(causal.forward).parameters
    if causal.base_model_prefix not in dict(causal.named_children()) or not takes_part:
        raise InputError(_all_at_once(causal, loss))


@contextlib.contextmanager
def losses_for_logits(causal: Any, labels: torch.Tensor, losses: Losses, name: str) -> Iterator[None]:
    """Within, a forward pass of a causal language model has no logits: in their place its outputs have the losses.
    Their `loss` stays free: AdaLoRA adds to it what is there.

    Args:
        causal: without the wrapper of its adapters, whose layers it has.
        labels: int64 of shape (examples, length); position t predicts label t + 1.
        losses: what is taken.
        name: of the loss, for errors.

    Raises:
        InputError: the model's code computes its logits all at once, or its forward pass was not called.

    Replaces the model's `forward`, and its decoder while logits are computed: transformers (5.23) has no function from
    the decoder's output to logits, which would let both go.
    """
    forward, called = causal.forward, False

    def without_logits(*arguments: Any, **options: Any) -> Any:
        nonlocal called
        called = True
        with _outputs_of(causal.base_model, causal.get_decoder()) as made:
            outputs = forward(*arguments, **options, logits_to_keep=1)  # with the auxiliary loss, if there is one
        if not made:
            raise InputError(_all_at_once(causal, name))
        decoder, output = made[-1]  # what is called by the model's own forward pass returns last
        path = next(path for path, module in causal.named_modules() if module is decoder)
        parent, _, own = path.rpartition(".")

        def logits_of(part: torch.Tensor) -> torch.Tensor:
            replaced = type(output)(last_hidden_state=part[None])
            with mock.patch.dict(causal.get_submodule(parent)._modules, {own: lambda *_, **__: replaced}):
                logits: torch.Tensor = forward().logits.flatten(0, 1)
            return logits

        # Tokens of an adapter's prompt may stand before the others.
        targets = F.pad(labels[:, 1:], (output[0].shape[1] - labels.shape[1], 1), value=IGNORED)
        kept = {"logits": losses(output[0], targets, logits_of)}
        if getattr(outputs, "aux_loss", None) is not None:
            kept["aux_loss"] = outputs.aux_loss
        return type(outputs)(**kept)

    with mock.patch.object(causal, "forward", without_logits):
        yield
    if not called:
        raise InputError(
            f"loss {name}: what calls {type(causal).__name__} keeps a forward pass of its own; use loss: full"
        )


def _all_at_once(causal: Any, loss: str) -> str:
    return f"loss {loss}: {type(causal).__name__} computes its logits all at once; use loss: full"


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
