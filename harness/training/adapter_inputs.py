"""Adapters that keep their layer's input for the backward pass, and make the dropped or converted copy of it anew."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F


def recompute(network: Any) -> None:
    """Let each LoRA layer of a model with adapters keep nothing of its input but the input itself.

    Layers with one input, such as the projections to queries, keys and values, then hold it once together. Else each
    holds a copy after dropout and a mask, or one that autocast made. Arithmetic and random numbers are the same.

    It replaces parts of peft's layers (0.21): `lora_dropout`, the forward pass of `lora_A`, and the switch
    `cast_input_dtype_enabled`. An option of peft for it would let this go.
    """
    for layer in network.modules():
        for name, product in getattr(layer, "lora_A", {}).items():
            if isinstance(product, torch.nn.Linear):
                dropout = layer.lora_dropout[name]
                layer.lora_dropout[name] = torch.nn.Identity()
                layer.cast_input_dtype_enabled = False
                vars(product)["forward"] = functools.partial(_product, product, getattr(dropout, "p", 0.0))


def _product(layer: torch.nn.Linear, probability: float, inputs: torch.Tensor) -> torch.Tensor:
    """dropout(inputs) times the layer's weight, in autocast's format or that of the weight."""
    kind = inputs.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.weight.dtype
    product: torch.Tensor = _DroppedProduct.apply(  # type: ignore[no-untyped-call]  # torch declares no types
        inputs, layer.weight, probability if layer.training else 0.0, dtype
    )
    return product


class _DroppedProduct(torch.autograd.Function):
    """`F.linear(F.dropout(inputs, probability), weight)`, which keeps `inputs`, `weight` and the generator's state."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, probability: float, dtype: torch.dtype) -> Any:
        ctx.save_for_backward(inputs, weight)
        ctx.probability, ctx.dtype = probability, dtype
        ctx.state = _generator_state(inputs.device) if probability else None
        dropped = _kept(inputs, probability, dtype).mul_(inputs) if probability else inputs.to(dtype)
        return F.linear(dropped, weight.to(dtype)) / (1 - probability)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        device = inputs.device
        gradient = gradient / (1 - ctx.probability)
        kept = None
        if ctx.state is not None:
            with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
                _set_generator_state(device, ctx.state)
                kept = _kept(inputs, ctx.probability, ctx.dtype)
        dropped = inputs.to(ctx.dtype) if kept is None else inputs * kept
        of_weight = gradient.flatten(0, -2).T @ dropped.flatten(0, -2)
        del dropped  # before another one as large
        of_inputs = gradient @ weight.to(ctx.dtype)
        if kept is not None:
            of_inputs *= kept
        return of_inputs.to(inputs.dtype), of_weight.to(weight.dtype), None, None


def _kept(inputs: torch.Tensor, probability: float, dtype: torch.dtype) -> torch.Tensor:
    """1 where an element is kept, 0 where it is dropped, from the device's generator."""
    return torch.empty_like(inputs, dtype=dtype).bernoulli_(1 - probability)


def _generator_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_generator_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
