"""`recompute_adapter_inputs` trains as plain adapters do, keeps one input for layers that have it together, and is
predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from trials import run

from harness.predict import peak
from harness.spec.trial import TrialSpec

Small = Callable[..., TrialSpec]
WIDE = {"hidden_size": 128, "intermediate_size": 256}


@pytest.mark.parametrize(
    "keys",
    [
        {"precision": "fp32"},
        {"precision": "fp32", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"precision": "bf16"},
        {"precision": "bf16", "lora_dropout": 0.0},
        {"precision": "bf16", "autocast": False, "reentrant_checkpointing": True, "gradient_checkpointing": True},
        {"precision": "bf16", "adapter_dtype": "bf16"},
        {"precision": "int8"},
        {"precision": "nf4", "lora_target_modules": ["all-linear", "lm_head"]},
    ],
    ids=str,
)
def test_it_trains_as_plain_adapters_do_and_is_predicted(keys: dict[str, Any], small: Small, tmp_path: Path) -> None:
    keys = {"base_model": tiny_model(tmp_path, config=WIDE), "lora_dropout": 0.2} | keys
    specs = [small(**keys, recompute_adapter_inputs=value) for value in (False, True)]
    plain, recomputed = (run(spec) for spec in specs)
    assert recomputed.status == "ok", recomputed.error
    exact = keys["precision"] == "fp32"
    for a, b in zip(plain.steps, recomputed.steps, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-6 if exact else 2e-3)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5 if exact else 0.02)
    assert recomputed.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], rel=1e-6 if exact else 5e-3)
    measured = recomputed.metrics["peak_memory_bytes"]
    assert peak.predict(specs[1], "cpu").peak_memory_bytes == pytest.approx(measured, rel=0.005)


def test_layers_with_one_input_keep_it_once(small: Small, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"base_model": tiny_model(tmp_path, config=WIDE), "precision": "bf16", "lora_dropout": 0.1}
    plain, recomputed = (
        peak.predict(small(**keys, pad_to_sequence_len=True, recompute_adapter_inputs=value), "cuda").breakdown[
            "memory_activations_bytes"
        ]
        for value in (False, True)
    )
    # Of seven adapters, each has a dropped copy in two bytes and a mask in one; what is kept of their four inputs
    # instead is in two bytes, of which those of q, k, v and of gate and up are kept by nothing else.
    positions, layers = 2 * 256, 2
    inputs = 6 * 128 + 256
    least, most = inputs * 3 - (3 * 128 + 256) * 2, inputs * 3
    assert least * 0.95 <= (plain - recomputed) / (positions * layers) <= most


def test_dora_is_refused(small: Small) -> None:
    with pytest.raises(ValueError, match="recompute_adapter_inputs with use_dora"):
        small(recompute_adapter_inputs=True, use_dora=True)
    assert small(adapter="none", recompute_adapter_inputs=True).id == small(adapter="none").id
