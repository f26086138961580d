"""Variants of LoRA that options of peft ask for: each layer is of the one that was asked for, or it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch

from harness.errors import InputError
from harness.spec.trial import TrialSpec
from harness.training import quantisers

_NAME = "default"
"""Of the adapter, by peft."""
_OF_VALUES = "kasa_config"
"""The variant that begins with a decomposition of the weights."""
_DRAWS = "monteclora_config"
"""The variant whose layers draw their noise from stores of their own, which no state of a generator brings back."""


def check(adapted: Any, spec: TrialSpec) -> None:
    """Refuse a variant that is not trained as it is asked for; on the device `meta` too.

    Args:
        adapted: a base model with LoRA.
        spec: of the trial.

    Raises:
        InputError: two are asked for, peft has layers of plain LoRA in its place, or it cannot be trained so.
    """
    from peft.tuners.lora import LoraLayer

    asked = _asked(adapted.peft_config[_NAME])
    if not asked:
        return
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)}: LoRA has one of them at a time; leave the others out")
    for name, layer in adapted.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if asked[0] == _OF_VALUES and quantisers.of_torchao(getattr(layer.get_base_layer(), "weight", None)):
            raise InputError(
                f"{_OF_VALUES}: it takes a part out of weights, and those of {name} are quantised; use bf16"
            )
        if _NAME not in layer.lora_variant:
            kind = type(layer.get_base_layer()).__name__
            raise InputError(
                f"{asked[0]}: peft would train plain LoRA in its place on {name}, a {kind}; leave {asked[0]} out, "
                "or use another precision"
            )
    if _term_of(adapted) is not None and spec.sharding != "none":
        raise InputError(f"{asked[0]}: its term of the loss needs whole weights; use sharding: none")
    if asked[0] == _DRAWS and spec.gradient_checkpointing:
        raise InputError(
            f"{_DRAWS}: a layer that is computed again draws other noise; use gradient_checkpointing: false"
        )


def _asked(config: Any) -> list[str]:
    """Names of the options of a configuration that ask for a variant, by what peft (0.21) notes of them."""
    if not hasattr(config, "init_lora_weights"):
        return []
    asked = []
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if option.metadata.get("is_lora_variant") and value:
            asked.append(option.name)
        elif value in option.metadata.get("lora_variants", ()):
            asked.append(f"{option.name} {value}")
    return asked


def own_term(network: Any) -> torch.Tensor | None:
    """The term that a variant adds to the loss, after a forward pass; null: none.

    Those of KaSA (arXiv:2412.06071, equations 9 to 11) and MonteCLoRA, at their weights. It is in fp32.
    """
    term = _term_of(network)
    if term is None:
        return None
    with torch.autocast(next(network.parameters()).device.type, enabled=False):
        value = term()
    return value if isinstance(value, torch.Tensor) else None  # 0.0 where nothing is trained


def _term_of(network: Any) -> Callable[[], torch.Tensor | float] | None:
    """Internal functions of peft's models (0.21), which leaves it to a trainer to add what they return."""
    for config in getattr(network, "peft_config", {}).values():
        for option in _asked(config):
            name = f"_get_{option.removesuffix('_config')}_loss"
            if hasattr(network.base_model, name):
                return cast("Callable[[], torch.Tensor | float]", getattr(network.base_model, name))
    return None
