"""Attention masks of micro-batches whose tensors have no values: whether one is needed is known from their counts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from harness.record import Phase
from harness.training import packing
from harness.training.batches import Batch
from harness.training.step import Trainer


def is_needed(batch: Batch, network: Any) -> bool:
    """Whether attention of a model needs a mask: for padding, or to keep packed examples apart."""
    if "example_lengths" in batch.inputs:
        return batch.samples > 1 and packing.needs_mask(network)
    return batch.tokens < batch.padded_tokens


@contextlib.contextmanager
def before_forward(trainer: Trainer, call: Callable[[], None]) -> Iterator[None]:
    """Within, calls it as each forward pass begins."""
    report = trainer.on_phase

    def enter(phase: Phase) -> None:
        if phase == "forward":
            call()
        report(phase)

    trainer.on_phase = enter
    try:
        yield
    finally:
        trainer.on_phase = report


@contextlib.contextmanager
def from_counts(needed: Sequence[bool]) -> Iterator[Callable[[], None]]:
    """Within, transformers omits the masks of micro-batches that need none, as it does by values in a real step.

    Args:
        needed: whether each micro-batch needs a mask.

    Yields:
        What is to be called before each forward pass.

    Patches transformers (5.23), which treats fake tensors as tracing and keeps every mask, whose masks of recurrent
    layers look for padding by torch's own function, and whose GPT-2 looks for it to warn of. A public way to say that
    nothing is padded or packed would replace it.
    """
    from torch._subclasses import FakeTensor
    from transformers import PreTrainedModel, masking_utils

    following, is_needed_now = iter(needed), True

    def enter() -> None:
        nonlocal is_needed_now
        is_needed_now = next(following, is_needed_now)  # a failed loss enters the forward pass once more

    def examples_of(position_ids: torch.Tensor) -> torch.Tensor | None:
        """The example of each position; null where there is one example."""
        first = position_ids[:, :1] - 1
        return (torch.diff(position_ids, prepend=first) != 1).cumsum(-1) if is_needed_now else None

    all_of = torch.all

    def all_ones(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not isinstance(tensor, FakeTensor):
            return all_of(tensor, *args, **kwargs)
        return not is_needed_now  # asked of a mask alone: other tensors without values have no answer

    with (
        mock.patch.object(torch, "all", all_ones),
        mock.patch.multiple(
            masking_utils,
            is_tracing=lambda tensor=None: False,
            fast_all=lambda mask: not is_needed_now,
            find_packed_sequence_indices=examples_of,
        ),
        mock.patch.object(PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
    ):
        yield enter
