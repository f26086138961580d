"""Predicted peaks against published ones of real cards.

Sources: huggingface/peft, method_comparison, MetaMathQA (July 2026, L40S, torch 2.13, largest reserve): Llama-3.2-3B,
bf16, batch 4, at most 768 tokens, AdamW, no checkpointing, no autocast; pytorch/torchtune, README: the same model, full
fine-tuning on an A100, batch 2 packed to 4096 tokens (peak active).
"""

from __future__ import annotations

from typing import Any

import pytest
from conftest import FEW

from harness._util.units import GIB
from harness.predict import peak
from harness.spec.trial import TrialSpec

PEFT: dict[str, Any] = {
    "base_model": "random:llama-3.2-3b", "precision": "bf16", "sequence_length": 768, "micro_batch_size": 4,
    "optimizer": "adamw_torch", "max_steps": 2, "val_set_size": 0, "datasets": [{"path": FEW}],
    "autocast": False,
}  # fmt: skip
QUERY_VALUE = {"lora_target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
RESERVED: dict[str, tuple[dict[str, Any], float, float]] = {
    "LoRA r 32": (PEFT | QUERY_VALUE | {"lora_r": 32, "lora_alpha": 64}, 20.76, 0.05),
    "LoRA r 64": (PEFT | QUERY_VALUE | {"lora_r": 64, "lora_alpha": 128}, 21.00, 0.05),
    "full": (PEFT | {"adapter": "none"}, 36.20, 0.05),
}


@pytest.mark.parametrize("case", RESERVED)
def test_published_reserves(case: str) -> None:
    given, gib, tolerance = RESERVED[case]
    predicted = peak.predict(TrialSpec.model_validate(given), "cuda", full_length=True).peak_reserved_bytes
    assert predicted == pytest.approx(gib * GIB, rel=tolerance)


def test_published_peak_of_packed_sequences() -> None:
    given = PEFT | {"adapter": "none", "micro_batch_size": 2, "sequence_length": 4096, "pad_to_sequence_len": False}
    predicted = peak.predict(TrialSpec.model_validate(given), "cuda", full_length=True).peak_memory_bytes
    assert predicted == pytest.approx(60.0 * GIB, rel=0.04)
