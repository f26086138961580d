"""Gradient checkpointing: which layers recompute their activations, what they keep, and where their inputs wait."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from harness.errors import InputError
from harness.spec.trial import TrialSpec

_ATTENTION = r"aten::_scaled_dot_product_\w+"
_KEPT = {
    "attention": re.compile(_ATTENTION),
    "matmuls": re.compile(rf"{_ATTENTION}|aten::(mm|addmm|bmm|baddbmm)|bitsandbytes::\w*(gemm|matmul)\w*"),
}
"""Operations whose outputs are kept, by values of `checkpoint_keep`."""


def enable(model: Any, spec: TrialSpec) -> None:
    """Recompute layers in the backward pass, all of them or one of so many, the first one too.

    Raises:
        InputError: the model's layers do not say which they are, or this release of transformers offloads nothing.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # Renamed in transformers 5.23; version 6 has the new name alone.
    set_up = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    options: dict[str, Any] = {"use_reentrant": spec.reentrant_checkpointing}
    if spec.checkpoint_keep != "nothing":
        policy = functools.partial(_policy, _KEPT[spec.checkpoint_keep])
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    if not spec.checkpoint_offload:
        set_up(options)
    elif "offload" in inspect.signature(set_up).parameters:
        set_up(options, offload=True)
    else:
        raise InputError("checkpoint_offload: this release of transformers has no such option; use 5.23 or later")
    if spec.checkpoint_every_n_layers == 1:
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"checkpoint_every_n_layers {spec.checkpoint_every_n_layers}: {type(model).__name__} is checkpointed as a "
            "whole; use checkpoint_every_n_layers: 1"
        )
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % spec.checkpoint_every_n_layers == 0


def _policy(kept: re.Pattern[str], _: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    if kept.fullmatch(operation.name()):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
