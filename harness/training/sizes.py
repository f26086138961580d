"""How many parameters a model has and trains, and what its adapter takes."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import torch

from harness.training import formats
from harness.training.without_logits import base_of


def of(network: Any) -> dict[str, float | int | None]:
    """`trainable_parameters` and `total_parameters`, as if unquantised, and of adapters their `_bytes` and `_share`.

    The share is of all that is saved of the adapters, frozen projections too, in what the base has without them.
    """
    counts = _counts(network)
    figures: dict[str, float | int | None] = {
        "trainable_parameters": sum(count for parameter, count in counts if parameter.requires_grad),
        "total_parameters": sum(count for _, count in counts),
    }
    if names := adapters(network):
        saved = _saved(network, names)
        kept = {id(tensor) for tensor in saved}
        of_base = sum(count for parameter, count in _counts(base_of(network)) if id(parameter) not in kept)
        figures |= {
            "adapter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in saved),
            "adapter_share": sum(tensor.numel() for tensor in saved) / of_base,
        }
    return figures


def adapters(network: Any) -> dict[str, Any]:
    """The configurations of the active adapters by name, of peft's models, and of transformers' `add_adapter`."""
    configs: dict[str, Any] = getattr(network, "peft_config", None) or {}
    names = [*configs]
    if names:
        with contextlib.suppress(ValueError):  # transformers', of a model within peft's
            active = network.active_adapters
            names = active() if callable(active) else active
    return {name: configs[name] for name in names}


def _saved(network: Any, names: Collection[str]) -> list[torch.Tensor]:
    """The tensors of adapters, themselves where nothing is computed to save them; none of what is frozen of the base,
    such as the embeddings that peft adds where they have an adapter.
    """
    from peft import get_peft_model_state_dict

    tensors = network.state_dict(keep_vars=True)
    options = {"state_dict": tensors, "save_embedding_layers": False}
    of_each = [get_peft_model_state_dict(network, adapter_name=name, **options) for name in names]
    return [tensor for saved in of_each for tensor in saved.values()]


def _counts(network: Any) -> list[tuple[torch.Tensor, int]]:
    """Each parameter once, with how many numbers it stands for."""
    counts: dict[int, tuple[torch.Tensor, int]] = {}
    for module in network.modules():
        for key, parameter in module.named_parameters(recurse=False):
            # DeepSpeed holds a part of each, and says how many the whole has.
            count = getattr(parameter, "ds_numel", None) or formats.format_of(module, key, parameter)[1]
            counts.setdefault(id(parameter), (parameter, count))
    return [*counts.values()]
