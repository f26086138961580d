"""Muon: what an update does to the matrices of layers, and to what is AdamW's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, model, order
from harness.training.step import Trainer

Small = Callable[..., TrialSpec]
CPU = torch.device("cpu")


def update_of(spec: TrialSpec) -> tuple[dict[str, torch.Tensor], Trainer]:
    """What the first step adds to each trained parameter."""
    torch.manual_seed(spec.seed)
    tokenizer = checkpoints.load_tokenizer(spec)
    step, *_ = order.optimizer_steps(spec, batches.load(spec, tokenizer).train)
    network: Any = model.load(spec, CPU)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    trainer = Trainer(network, spec, CPU, 4)
    trainer.step(list(batches.micro_batches(step, spec, tokenizer.pad_token_id, CPU)))
    return {name: p.detach() - before[name] for name, p in trained.items()}, trainer


def test_matrices_of_layers_move_in_all_directions_alike(small: Small, tmp_path: Path) -> None:
    """Five steps of the iteration bring large singular values near 1; AdamW's first update is the rate itself."""
    folder = tiny_model(tmp_path, "llama", config={"tie_word_embeddings": False})
    rate = 1e-3
    keys = {"base_model": folder, "adapter": "none", "weight_decay": 0.0, "learning_rate": rate}
    moved, _ = update_of(small(optimizer="muon", **keys))
    matrices = {name: each for name, each in moved.items() if ".layers." in name and each.ndim == 2}
    assert len(matrices) == 2 * 7
    for name, each in matrices.items():
        directions = torch.linalg.svdvals(each) / (rate * 0.2 * math.sqrt(max(each.shape)))
        assert 0.6 < directions[3] <= directions[0] < 1.4, name
    for name, each in moved.items():
        if name not in matrices:
            assert each.abs().max() == pytest.approx(rate, rel=1e-2), name


@pytest.mark.parametrize("keys", [{}, {"lora_modules_to_save": ["lm_head"]}, {"lora_bias": "all"}], ids=str)
def test_adapters_have_half_of_adamws_state(keys: dict[str, Any], small: Small, tmp_path: Path) -> None:
    spec = small(base_model=tiny_model(tmp_path, "qwen2"), optimizer="muon", **keys)
    moved, trainer = update_of(spec)
    kept = sum(each.numel() for each in trainer.optimizer_state())
    of_muon = sum(each.numel() for name, each in moved.items() if ".lora_" in name)
    of_adamw = sum(each.numel() for each in moved.values()) - of_muon
    assert kept == of_muon + 2 * of_adamw
    assert (of_adamw > 0) == bool(keys)


def test_both_parts_follow_the_schedule(small: Small, tmp_path: Path) -> None:
    spec = small(base_model=tiny_model(tmp_path, "qwen2"), optimizer="muon", lora_bias="all", weight_decay=0.1)
    warm = spec.model_copy(update={"lr_scheduler": "constant_with_warmup", "warmup_ratio": 0.5})
    moved, _ = update_of(warm)  # the first of two steps of warm-up has the rate 0
    assert all(not each.any() for each in moved.values())
    assert any(each.any() for each in update_of(spec)[0].values())
