"""Whether a model keeps the attention of packed examples apart: `batches.pack` says where each begins by positions."""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

import torch

from harness.errors import InputError
from harness.training import reach

_APART: dict[tuple[type, str], bool] = {}
"""By class and configuration of a model."""


def refuse_if_impossible(causal: Any) -> None:
    """Check that packed examples do not see each other in a model, nor change its auxiliary loss.

    Raises:
        InputError: they do, or it cannot be known.
    """
    name = type(causal).__name__
    if getattr(causal.config.get_text_config(), "output_router_logits", False):
        raise InputError(
            f"sample_packing: {name} has an auxiliary loss, which is taken of each example for itself; use "
            "sample_packing: false, or output_router_logits: false in its config.json"
        )
    key = type(causal), causal.config.to_json_string(use_diff=False)
    if key not in _APART:
        _APART[key] = _keeps_apart(causal)
    if not _APART[key]:
        raise InputError(
            f"sample_packing: {name} does not keep examples of a row apart, as their positions say; use "
            "sample_packing: false"
        )


def _keeps_apart(causal: Any) -> bool:
    """Whether it takes positions, makes its masks of them, and has no state that runs along a row.

    A pass on the device `meta` shows the second: transformers (5.23) reads them in a function for all its masks. A
    public property of its models would replace the patches, which also keep it from reading values.
    """
    from transformers import PreTrainedModel, masking_utils

    takes_positions = "position_ids" in inspect.signature(causal.forward).parameters
    if not takes_positions or getattr(causal, "_is_stateful", False):
        return False
    read = mock.Mock(side_effect=masking_utils.find_packed_sequence_indices)
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with (
        mock.patch.multiple(masking_utils, is_tracing=lambda tensor=None: True, find_packed_sequence_indices=read),
        mock.patch.object(PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
        torch.no_grad(),
    ):
        try:
            reach.on_meta(causal)(input_ids=tokens, position_ids=tokens)
        except Exception:  # a model's own code may need values
            return False
    return read.called
