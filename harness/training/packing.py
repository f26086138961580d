"""Packed examples in a model: `batches.pack` says how long each is, and their attention is kept apart.

Where a model uses torch's scaled dot product attention, it is computed for each example in turn, without work for pairs
of different examples, nor a mask over all pairs of the row. Else transformers makes that mask of the positions, which
begin anew in each example.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from harness.errors import InputError
from harness.training import reach

_BY_EXAMPLE = "sdpa_by_example"
"""Name of the attention in transformers' registry."""


@dataclass(frozen=True)
class _Ways:
    """How the examples of a row can be kept apart in a model."""

    by_mask: bool
    by_example: bool


_WAYS: dict[tuple[type, str], _Ways] = {}
"""By class and configuration of a model."""


def set_up(causal: Any) -> None:
    """Let a model keep packed examples apart.

    Raises:
        InputError: they would see each other in it, or change its auxiliary loss, or it cannot be known.
    """
    name = type(causal).__name__
    if getattr(causal.config.get_text_config(), "output_router_logits", False):
        raise InputError(
            f"sample_packing: {name} has an auxiliary loss, which is taken of each example for itself; use "
            "sample_packing: false, or output_router_logits: false in its config.json"
        )
    key = type(causal), causal.config.to_json_string(use_diff=False) + causal.config._attn_implementation
    if key not in _WAYS:
        _WAYS[key] = _ways(causal)
    if not _WAYS[key].by_mask:
        raise InputError(
            f"sample_packing: {name} does not keep examples of a row apart, as their positions say; use "
            "sample_packing: false"
        )
    if _WAYS[key].by_example:
        causal.set_attn_implementation(_BY_EXAMPLE)


def inputs(causal: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with for a micro-batch, packed or not, of these inputs without labels."""
    if "example_lengths" not in given:
        return dict(given)
    if needs_mask(causal):
        return {name: value for name, value in given.items() if name != "example_lengths"}
    # With a mask of padding that masks nothing, transformers does not look for examples in the positions.
    return {**given, "attention_mask": torch.ones_like(given["input_ids"])}


def needs_mask(network: Any) -> bool:
    """Whether a mask keeps the examples of a row apart in a model with or without adapters."""
    return bool(network.config._attn_implementation != _BY_EXAMPLE)


def attention(network: Any) -> str | None:
    """The kernel of a model's attention; null: the model's own code does not say."""
    kernel: str | None = network.config._attn_implementation
    return "sdpa" if kernel == _BY_EXAMPLE else kernel


def _attention_by_example(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    example_lengths: Sequence[int] | None = None,
    **options: Any,
) -> Any:
    """Transformers' scaled dot product attention, of each example of a row for itself.

    Args:
        module: of the attention.
        query: of shape (rows, heads, length, width), as `key` and `value`, which may have fewer heads.
        key: see above.
        value: see above.
        attention_mask: over all positions of the row, such as a sliding window; null: causal.
        example_lengths: of the examples in the one row; null: each row is one example.
        options: of transformers' function.

    Returns:
        The outputs, of shape (rows, length, heads, width), and no weights.
    """
    from transformers.integrations import sdpa_attention

    attend: Any = sdpa_attention.sdpa_attention_forward
    if example_lengths is None:
        return attend(module, query, key, value, attention_mask, **options)
    lengths = list(example_lengths)
    outputs, start = [], 0
    for parts in zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True):
        end = start + parts[0].shape[2]
        mask = None if attention_mask is None else attention_mask[..., start:end, start:end]
        outputs.append(attend(module, *parts, mask, **options)[0])
        start = end
    return torch.cat(outputs, dim=1), None


def _ways(causal: Any) -> _Ways:
    """A pass on the device `meta` shows whether a model takes positions and makes its masks of them, and has no state
    that runs along a row; and whether the lengths of the examples reach the attention of each of its layers.

    transformers (5.23) reads positions in a function for all its masks. A public property of its models would replace
    the patches, which also keep it from reading values.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

    AttentionInterface.register(_BY_EXAMPLE, _attention_by_example)
    AttentionMaskInterface.register(_BY_EXAMPLE, masking_utils.sdpa_mask)
    takes_positions = "position_ids" in inspect.signature(causal.forward).parameters
    if not takes_positions or getattr(causal, "_is_stateful", False):
        return _Ways(by_mask=False, by_example=False)
    on_meta = reach.on_meta(causal)
    read = mock.Mock(side_effect=masking_utils.find_packed_sequence_indices)
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    packed = {"input_ids": tokens, "position_ids": tokens}
    with mock.patch.object(masking_utils, "find_packed_sequence_indices", read):
        if not _runs(on_meta, packed) or not read.called:
            return _Ways(by_mask=False, by_example=False)
    if causal.config._attn_implementation != "sdpa":
        return _Ways(by_mask=True, by_example=False)
    on_meta.set_attn_implementation(_BY_EXAMPLE)
    called = mock.Mock(side_effect=_attention_by_example)
    AttentionInterface.register(_BY_EXAMPLE, called)
    runs = _runs(on_meta, inputs(on_meta, {**packed, "example_lengths": (1, 1)}))
    AttentionInterface.register(_BY_EXAMPLE, _attention_by_example)
    reached = [
        call.kwargs.get("example_lengths") and call.kwargs.get("position_bias") is None for call in called.mock_calls
    ]
    layers = causal.config.get_text_config().num_hidden_layers
    return _Ways(by_mask=True, by_example=runs and all(reached) and len(reached) == layers)


def _runs(on_meta: Any, given: Mapping[str, Any]) -> bool:
    from transformers import PreTrainedModel, masking_utils

    with (
        mock.patch.object(masking_utils, "is_tracing", return_value=True),
        mock.patch.object(PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
        torch.no_grad(),
    ):
        try:
            on_meta(**given)
        except Exception:  # a model's own code may need values, or take no lengths
            return False
    return True
