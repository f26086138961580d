"""Loss of each held-out story."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from harness import distributed
from harness.data import IGNORED, Example, collate
from harness.model import autocast
from harness.spec import TrialSpec


@torch.no_grad()
def story_losses(
    model: Any, examples: Sequence[Example], spec: TrialSpec, pad_id: int, device: torch.device
) -> list[tuple[str, float, int]]:
    """Story id, loss in nats per completion token, and completion tokens of each example.

    The mean over tokens is taken in fp32, whatever the model computes in. Dropout is off within.
    """
    was_training = model.training
    model.eval()
    try:
        found = []
        for start in range(0, len(examples), spec.micro_batch_size):
            group = examples[start : start + spec.micro_batch_size]
            found += _batch_losses(model, group, spec, pad_id, device)
        return found
    finally:
        distributed.let_go(model)
        model.train(was_training)


def _batch_losses(
    model: Any, group: Sequence[Example], spec: TrialSpec, pad_id: int, device: torch.device
) -> list[tuple[str, float, int]]:
    batch = collate(group, pad_id, device)
    labels = batch.inputs.pop("labels")
    with autocast(spec, device):
        logits = model(**batch.inputs).logits
    # Position t predicts token t + 1. One story at a time keeps the fp32 copy of the logits small.
    found = []
    for example, row, target in zip(group, logits[:, :-1], labels[:, 1:], strict=True):
        carried = target != IGNORED
        loss = F.cross_entropy(row[carried].float(), target[carried], reduction="sum")
        tokens = int(carried.sum())
        found.append((example.story_id, float(loss) / tokens, tokens))
    return found


def token_mean(losses: Sequence[tuple[str, float, int]]) -> float | None:
    """Mean loss over all completion tokens, in nats; null for no stories."""
    tokens = sum(n for _, _, n in losses)
    return sum(loss * n for _, loss, n in losses) / tokens if tokens else None
