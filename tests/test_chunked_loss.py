"""`loss: chunked` learns what the full loss learns, holds less, and is predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from trials import run

from harness.errors import InputError
from harness.predict import peak
from harness.record import Record
from harness.spec.trial import TrialSpec
from harness.training import loss, model

Small = Callable[..., TrialSpec]
Both = Callable[..., tuple[Record, Record]]

# What follows the decoder: nothing, a softcap, a scale, an auxiliary loss of experts; a head that is tied or not, has
# an adapter, or is trained as a whole.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "full fine-tuning": ("llama", {}, {"adapter": "none"}),
    "full fine-tuning, tied": ("qwen2", {"tie_word_embeddings": True}, {"adapter": "none"}),
    "softcap": ("gemma2", {"final_logit_softcapping": 5.0}, {}),
    "scale": ("granite", {"logits_scaling": 4.0}, {}),
    "experts": ("qwen3_moe", {"output_router_logits": True, "router_aux_loss_coef": 0.1}, {}),
    "gpt2": ("gpt2", {}, {}),
    "a decoder within another module": ("opt", {}, {}),
    "an adapter on the head": ("llama", {}, {"lora_target_modules": ["all-linear", "lm_head"], "lora_dropout": 0.0}),
    "a trained head": ("llama", {}, {"lora_modules_to_save": ["lm_head"]}),
    "checkpointing": ("llama", {}, {"gradient_checkpointing": True}),
}


@pytest.fixture
def both(small: Small, tmp_path: Path) -> Both:
    """Trains a tiny model of an architecture with the full and with a chunked loss."""

    def train(architecture: str, config: dict[str, Any], **keys: Any) -> tuple[Record, Record]:
        folder = tiny_model(tmp_path / "model", architecture, config=config)
        wide = {"sequence_length": 384, "train_samples": 8, "learning_rate": 1e-2, "micro_batch_size": 4}
        specs = [
            small(base_model=folder, loss=loss, loss_chunk_size=100, **(wide | keys)) for loss in ("full", "chunked")
        ]
        full, chunked = (run(spec) for spec in specs)
        assert (full.status, chunked.status) == ("ok", "ok"), (full.error, chunked.error)
        return full, chunked

    return train


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_the_full_loss_learns(kind: str, both: Both) -> None:
    architecture, config, keys = KINDS[kind]
    full, chunked = both(architecture, config, precision="fp32", **keys)
    for a, b in zip(full.steps, chunked.steps, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.auxiliary_loss == (None if a.auxiliary_loss is None else pytest.approx(a.auxiliary_loss, rel=1e-5))
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3)
    assert (full.steps[0].auxiliary_loss is not None) == (kind == "experts")
    for a, b in zip(full.stories, chunked.stories, strict=True):
        assert (b.story_id, b.tokens) == (a.story_id, a.tokens)
        assert b.loss == pytest.approx(a.loss, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16-mixed", "nf4"])
def test_it_does_so_in_16_bit(precision: str, both: Both) -> None:
    full, chunked = both("llama", {"hidden_size": 64}, precision=precision, learning_rate=1e-3)
    for a, b in zip(full.steps, chunked.steps, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=2e-3)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=0.03)


@pytest.mark.parametrize(
    "keys", [{}, {"adapter": "none"}, {"precision": "bf16"}, {"gradient_checkpointing": True}, {"loss_chunk_size": 64}]
)
def test_what_it_holds_is_predicted(keys: dict[str, Any], small: Small, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, config={"vocab_size": 8192})
    wide = {"sequence_length": 384, "train_samples": 8, "micro_batch_size": 4, "val_set_size": 8, "precision": "fp32"}
    full, chunked = (small(base_model=folder, loss=loss, **wide | keys) for loss in ("full", "chunked"))
    record, predicted = run(chunked), peak.predict(chunked, "cpu")
    for name in ("peak_memory_bytes", "peak_evaluate_bytes"):
        assert getattr(predicted, name) == pytest.approx(record.metrics[name], rel=0.005)
    whole = peak.predict(full, "cpu")
    # The logits of all positions in the model's format, in fp32, their logarithms and their gradient are not held;
    # those of a part are.
    positions, part = 4 * 384, keys.get("loss_chunk_size", 256)
    saved = whole.peak_memory_bytes - predicted.peak_memory_bytes
    assert saved == pytest.approx((positions - part) * 8192 * 4 * 3, rel=0.25)
    assert predicted.peak_evaluate_bytes is not None
    assert whole.peak_evaluate_bytes is not None
    assert predicted.peak_evaluate_bytes < 0.5 * whole.peak_evaluate_bytes


def test_it_is_that_of_an_adapter_within_attention(small: Small) -> None:
    options = {"adapter": "adaption_prompt", "adapter_options": {"adapter_len": 4, "adapter_layers": 2}}
    full, chunked = (run(small(**options, loss=how)) for how in ("full", "chunked"))
    assert chunked.status == "ok", chunked.error
    for a, b in zip(full.steps, chunked.steps, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3)


def test_a_forward_pass_that_is_not_the_models_is_one_line(small: Small) -> None:
    network = model.load(small(adapter="none"), torch.device("cpu"))
    tokens = torch.arange(8)[None]
    inputs = {"input_ids": tokens, "labels": tokens}
    with pytest.raises(InputError, match="keeps a forward pass of its own; use loss: full"):
        loss.forward(lambda **given: type(network).forward(network, **given), network, inputs, small(loss="chunked"))


def test_a_model_that_takes_no_part_is_refused(small: Small, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="OwnForCausalLM computes its logits all at once; use loss: full"):
        model.skeleton(small(base_model=tiny_model(tmp_path, "own_code"), loss="chunked"), trust_remote_code=True)


def test_the_size_of_parts_counts_in_a_chunked_loss_alone(small: Small) -> None:
    assert small(loss_chunk_size=64).id == small().id
    assert small(loss="chunked", loss_chunk_size=64).id != small(loss="chunked").id != small().id
