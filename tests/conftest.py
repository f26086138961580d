"""Shared by the tests: small specs, and one cache for made and converted weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from harness.spec import TrialSpec

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads of tiny matrices wait for one another longer than they compute; so in the workers too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SMALL: dict[str, Any] = {
    "base_model": "random:tiny",
    "precision": "fp32",
    "sequence_length": 256,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_samples": 16,
    "val_set_size": 2.0,
    "lora_r": 4,
}


@pytest.fixture
def small() -> Callable[..., TrialSpec]:
    """Makes a spec that trains in a second; keywords override."""

    def make(**overrides: Any) -> TrialSpec:
        return TrialSpec.model_validate(SMALL | overrides)

    return make
