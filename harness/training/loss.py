"""Cross entropy, the one loss of training, evaluation, prediction and inference.

A model's own `.loss` is not used: models of own code take means over their micro-batch, and auxiliary losses are added
once for each of them. What is minimised then depends on how an effective batch is cut.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from harness.errors import InputError
from harness.spec.trial import TrialSpec
from harness.training import adapter_methods, chunked_loss, fused_loss, packing
from harness.training.batches import IGNORED
from harness.training.without_logits import Losses, base_of, losses_for_logits

_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef", "aux_loss_alpha", "moe_loss_weight")
"""Names of the weight of an auxiliary loss, in models and their configs."""


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies in nats, in fp32, over all positions whose next label is not `IGNORED`.

    Args:
        logits: of shape (examples, length, vocabulary); position t predicts label t + 1. Those of an adapter's prompt
            may stand before them.
        labels: int64 of shape (examples, length).
    """
    targets = F.pad(labels[:, 1:], (logits.shape[1] - labels.shape[1], 1), value=IGNORED)
    return F.cross_entropy(
        logits.float().view(-1, logits.shape[-1]), targets.view(-1), ignore_index=IGNORED, reduction="sum"
    )


def forward(wrapped: Any, network: Any, inputs: Mapping[str, Any], spec: TrialSpec) -> tuple[Any, torch.Tensor]:
    """The outputs of a micro-batch's forward pass, and the sum of the cross entropies of all its positions in nats.

    Args:
        wrapped: the network as it is called, in a wrapper for data parallelism or not.
        network: with or without adapters.
        inputs: of a batch, with its labels.
        spec: which loss.
    """
    outputs = _outputs(wrapped, network, inputs, spec)
    if spec.loss != "full":
        return outputs, outputs.logits
    return outputs, summed_cross_entropy(outputs.logits, inputs["labels"])


def by_example(network: Any, inputs: Mapping[str, Any], spec: TrialSpec) -> list[torch.Tensor]:
    """The sum of the cross entropies of each example in nats, without a graph."""
    outputs = _outputs(network, network, inputs, spec)
    if spec.loss != "full":
        return list(outputs.logits)
    # One example at a time keeps the fp32 copy of the logits small.
    rows = zip(outputs.logits, inputs["labels"], strict=True)
    return [summed_cross_entropy(logits[None], labels[None]) for logits, labels in rows]


def _outputs(wrapped: Any, network: Any, inputs: Mapping[str, Any], spec: TrialSpec) -> Any:
    causal = base_of(network)
    given = packing.inputs(causal, {name: value for name, value in inputs.items() if name != "labels"})
    if spec.loss == "full":
        return wrapped(**given)
    with losses_for_logits(causal, inputs["labels"], _losses(causal, spec), spec.loss):
        return wrapped(**given)


def _losses(causal: Any, spec: TrialSpec) -> Losses:
    if spec.loss == "chunked":
        return functools.partial(chunked_loss.losses, causal=causal, size=spec.loss_chunk_size)
    return functools.partial(fused_loss.losses, causal=causal, loss=spec.loss)


def auxiliary(network: Any, outputs: Any) -> torch.Tensor | None:
    """The auxiliary loss of a micro-batch: balance of a router's experts at the model's own weight, and what the method
    of the adapter adds; null: neither.

    Args:
        network: with or without adapters.
        outputs: of its forward pass, within `auxiliary_by_example`.

    Raises:
        InputError: the model says no weight for it.
    """
    term, penalty = getattr(outputs, "aux_loss", None), adapter_methods.penalty(network)
    if not isinstance(term, torch.Tensor):
        return penalty
    weighted = _weight(base_of(network)) * term
    return weighted if penalty is None else weighted + penalty


def _weight(base: Any) -> float:
    holders = (base, base.config, getattr(base.config, "text_config", None), getattr(base.config, "ffn_config", None))
    weights = (getattr(holder, name, None) for holder in holders for name in _WEIGHTS)
    weight = next((each for each in weights if isinstance(each, int | float)), None)
    if weight is None:
        raise InputError(
            f"{type(base).__name__} has an auxiliary loss, and its config no weight for it ({', '.join(_WEIGHTS)}); "
            "add one, or set output_router_logits: false in its config.json"
        )
    return float(weight)


@contextlib.contextmanager
def auxiliary_by_example(network: Any) -> Iterator[None]:
    """Within, a forward pass takes its auxiliary loss of each example for itself, and their mean by tokens.

    The balance of experts is a product of means over tokens: over a micro-batch it depends on which examples are in it.
    Over one example it does not, so that 4x1, 2x2 and 1x4 minimise the same.

    Patches the function that transformers (5.23) has in the module of each such model. Models with another one keep
    theirs, which is then weighted by the tokens of the micro-batch.
    """
    module = sys.modules[type(base_of(network)).__module__]
    of_batch = getattr(module, "load_balancing_loss_func", None)
    if of_batch is None:
        yield
        return
    with mock.patch.object(module, "load_balancing_loss_func", _by_example(of_batch)):
        yield


def _by_example(of_batch: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(of_batch)

    def mean(*positional: Any, **named: Any) -> Any:
        arguments = signature.bind(*positional, **named).arguments
        gates: Any = arguments.get("gate_logits")
        mask = arguments.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or not _is_flat(gates, mask):
            return of_batch(**arguments)
        of_examples = zip(*(gate.view(*mask.shape, -1) for gate in gates), strict=True)
        terms = [
            of_batch(**arguments | {"gate_logits": each, "attention_mask": mask[i : i + 1]})
            for i, each in enumerate(of_examples)
        ]
        tokens = mask.sum(dim=1)
        return (torch.stack(terms) * tokens).sum() / tokens.sum()

    return mean


def _is_flat(gates: Any, mask: torch.Tensor) -> bool:
    """Whether the gates of each layer are rows of all positions, example after example."""
    return isinstance(gates, tuple) and all(gate.dim() == 2 and len(gate) == mask.numel() for gate in gates)
