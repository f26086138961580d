"""What a model takes and what texts ask of it: ids that have an embedding, lengths that have positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harness.errors import InputError
from harness.spec.trial import TrialSpec
from harness.training import adapter_methods
from harness.training.batches import Data, Example

_OFFSET = 2
"""Rows that a table of positions may have before the first one, as OPT's."""


@dataclass(frozen=True)
class Limits:
    """What a model takes."""

    embeddings: int | None
    """Ids that have an embedding: those below; null: the model does not show its embeddings."""
    positions: int | None
    """Longest sequence, next to an adapter's prompt; null: any, since positions are computed and not looked up."""
    made_for: int | None
    """Positions that its config names, beyond which it may not have been trained."""


@dataclass(frozen=True)
class Texts:
    """What the texts of a trial ask of a model."""

    training: int
    """Tokens of the longest training example."""
    held_out: int
    general: int
    largest_id: int
    vocabulary: int
    """Tokens of the tokenizer."""


def of_model(network: Any) -> Limits:
    """The limits of a model, with or without adapters, on any device."""
    try:
        embeddings = network.get_input_embeddings()
        rows = embeddings.weight.shape[0]
    except (AttributeError, NotImplementedError):  # a model's own code need not show them
        return Limits(None, None, None)
    made_for = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if made_for is None or made_for < 1:
        return Limits(rows, None, None)
    positions = _positions(network, embeddings, made_for)
    prompt = adapter_methods.prompt_tokens(network)
    return Limits(rows, None if positions is None else positions - prompt, made_for)


def of_texts(data: Data, tokenizer: Any) -> Texts:
    """What examples ask of a model."""
    largest = max(max(example.input_ids) for group in _groups(data) for example in group)
    return Texts(*lengths_of(data), largest, len(tokenizer))


def lengths_of(data: Data) -> tuple[int, int, int]:
    """Tokens of the longest example to train on, held out, and general."""
    training, held_out, general = (max(map(len, group), default=0) for group in _groups(data))
    return training, held_out, general


def _groups(data: Data) -> tuple[Sequence[Example], ...]:
    return data.train, data.held_out, data.general


def check(spec: TrialSpec, texts: Texts, limits: Limits) -> None:
    """Check that a model can read the texts of a trial.

    Raises:
        InputError: an id has no embedding, or a text is longer than the table of positions.
    """
    if limits.embeddings is not None and texts.largest_id >= limits.embeddings:
        raise InputError(
            f"base_model {spec.base_model}: the texts have the token {texts.largest_id}, and the model has embeddings "
            f"for {limits.embeddings} (its tokenizer has {texts.vocabulary} tokens); give the tokenizer of these "
            "weights, or weights with embeddings for all of its tokens"
        )
    check_lengths(spec, texts.training, texts.held_out, texts.general, limits)


def check_lengths(spec: TrialSpec, training: int, held_out: int, general: int, limits: Limits) -> None:
    """Check that a model has positions for the longest example to train on, held out, and general, in tokens.

    Raises:
        InputError: it has not; it says how many it has.
    """
    if limits.positions is None:
        return
    evaluated = "eval_sequence_length" if spec.eval_sequence_length is not None else "sequence_length"
    for what, tokens, key in (
        ("a training example", training, "sequence_length"),
        ("a held-out example", held_out, evaluated),
    ):
        if tokens > limits.positions:
            raise InputError(
                f"{key} {getattr(spec, key)}: {what} has {tokens} tokens, and {spec.base_model} has positions for "
                f"{limits.positions}; use {key}: {limits.positions} or less"
            )
    if general > limits.positions:
        raise InputError(
            f"measure_forgetting: a general text has {general} tokens, and {spec.base_model} has positions for "
            f"{limits.positions}; use measure_forgetting: false"
        )


def check_generation(network: Any, prompt_tokens: int, new_tokens: int) -> None:
    """Check that a model has positions for a prompt and what is to follow.

    Raises:
        InputError: it has not; it says how many tokens would do.
    """
    positions = of_model(network).positions
    if positions is not None and prompt_tokens + new_tokens > positions:
        way = f"ask for {positions - prompt_tokens} tokens" if prompt_tokens < positions else "give a shorter prompt"
        raise InputError(
            f"{new_tokens} new tokens after a prompt of {prompt_tokens}: the model has positions for {positions}; {way}"
        )


def _positions(network: torch.nn.Module, embeddings: torch.nn.Module, made_for: int) -> int | None:
    """Rows of the model's table of positions; null where it has none.

    It is a second embedding as long as the config says, or a buffer of that length that is named after positions. Only
    the part of the model that embeds tokens is looked at: one that sees images has positions of its own.
    """
    text_model = next(m for m in network.modules() if any(child is embeddings for child in m.children()))
    lengths = [
        # Where padding has a row, as in RoBERTa, positions begin after it.
        made_for if module.padding_idx is None else module.num_embeddings - module.padding_idx - 1
        for module in text_model.modules()
        if isinstance(module, torch.nn.Embedding)
        and module.weight is not embeddings.weight
        and made_for <= module.num_embeddings <= made_for + _OFFSET
    ]
    lengths += [
        made_for
        for name, table in text_model.named_buffers()
        if "pos" in name.rpartition(".")[2] and table.dim() == 2 and table.shape[0] == made_for
    ]
    return min(lengths, default=None)
