"""Loss of each held-out story."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from harness.spec.trial import TrialSpec
from harness.training import distributed, loss, order
from harness.training.batches import IGNORED, Batch, Example, collate
from harness.training.model import autocast


@torch.no_grad()
def story_losses(
    model: Any,
    examples: Sequence[Example],
    spec: TrialSpec,
    pad_id: int,
    device: torch.device,
    tracking: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[tuple[str, float, int]]:
    """Story id, loss in nats per completion token, and number of completion tokens of each example.

    The mean over tokens is in fp32 at every precision. Dropout is off.

    Args:
        model: evaluated, and left as it was.
        examples: the texts.
        spec: of the model.
        pad_id: token that stands where there is none.
        device: of the model.
        tracking: entered around the batches of which one holds most memory. Tracking all of them takes as long again.
    """
    was_training = model.training
    model.eval()
    size = spec.micro_batch_size
    groups = [examples[start : start + size] for start in range(0, len(examples), size)]
    tracked = _heaviest(groups)
    try:
        losses = []
        for number, group in enumerate(groups):
            with tracking() if number in tracked else contextlib.nullcontext():
                losses += _batch_losses(model, group, spec, pad_id, device)
        return losses
    finally:
        distributed.reshard(model)
        model.train(was_training)


def _heaviest(groups: Sequence[Sequence[Example]]) -> set[int]:
    """Numbers of the batches of which one holds most, and of the first: what is made once is made there, and stays."""
    lengths = [[len(example) for example in group] for group in groups]
    kinds = [order.MicroBatchKind(len(of), max(of), padded=min(of) < max(of), later=False) for of in lengths]
    return {0, *map(kinds.index, order.heaviest(kinds))}


def _batch_losses(
    model: Any, group: Sequence[Example], spec: TrialSpec, pad_id: int, device: torch.device
) -> list[tuple[str, float, int]]:
    batch = collate(group, pad_id, device)
    tokens = [int((target != IGNORED).sum()) for target in batch.inputs["labels"]]
    sums = summed_losses(model, batch, spec, device)
    return [(e.story_id, float(total) / n, n) for e, total, n in zip(group, sums, tokens, strict=True)]


@torch.no_grad()
def summed_losses(model: Any, batch: Batch, spec: TrialSpec, device: torch.device) -> list[torch.Tensor]:
    """Sum of the cross entropies of each example of a batch, in nats."""
    with autocast(spec, device):
        return loss.by_example(model, batch.inputs, spec)


def token_mean(losses: Sequence[tuple[str, float, int]]) -> float | None:
    """Mean loss over all completion tokens, in nats; null for no stories."""
    tokens = sum(n for _, _, n in losses)
    return sum(loss * n for _, loss, n in losses) / tokens if tokens else None
