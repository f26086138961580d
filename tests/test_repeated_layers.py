"""Few of a model's equal layers are replayed: what is predicted is what a replay of all of them says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from predictions import predicted
from tiny_models import tiny_model

from harness.predict import loaded_model, repeated_layers
from harness.predict.prediction import Prediction
from harness.spec.trial import TrialSpec

Small = Callable[..., TrialSpec]

CHECKPOINTING = {"gradient_checkpointing": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "nothing saved": ("llama", {}, {}),
    "recomputed": ("llama", {}, CHECKPOINTING),
    "recomputed with gradients to add to": (
        "qwen2",
        {},
        CHECKPOINTING | {"reentrant_checkpointing": True, "gradient_accumulation_steps": 2, "micro_batch_size": 1},
    ),
    "every second one recomputed": ("llama", {}, CHECKPOINTING | {"checkpoint_every_n_layers": 2}),
    "products kept": ("llama", {}, CHECKPOINTING | {"checkpoint_keep": "matmuls"}),
    "offloaded": ("llama", {}, CHECKPOINTING | {"checkpoint_offload": True, "device": "cuda"}),
    "inputs of adapters kept": (
        "llama",
        {},
        {"precision": "bf16", "lora_dropout": 0.1, "recompute_adapter_inputs": True},
    ),
    "packed": ("llama", {}, {"sample_packing": True, "precision": "bf16"}),
    "16-bit copies of weights": ("llama", {}, {"precision": "bf16-mixed", "adapter": "none", "optimizer": "adafactor"}),
    "4 bit, 8-bit state": ("llama", {}, CHECKPOINTING | {"precision": "nf4", "optimizer": "adamw_bnb_8bit"}),
    "8 bit, dropout, outputs kept": ("llama", {}, {"precision": "int8", "lora_dropout": 0.1, "keep_outputs": True}),
    "loss in chunks": ("gpt2", {}, {"precision": "bf16", "loss": "chunked"}),
    "windows in every second layer": ("gemma2", {}, {}),
    "dense layers, then experts": ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, {}),
}
"""Architecture, keys of its config, and of the spec."""


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of units that were skipped in each pass so far."""
    units = list[int]()
    entries = repeated_layers._Expansion.entries

    def seen(self: Any) -> Any:
        units.append(len(self._held) - 1)
        return entries(self)

    monkeypatch.setattr(repeated_layers._Expansion, "entries", seen)
    return units


@pytest.fixture
def all_layers(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrialSpec], Prediction]:
    """Predicts with a replay of all layers."""

    def predict(spec: TrialSpec) -> Prediction:
        with monkeypatch.context() as patch:
            patch.setattr(loaded_model, "_last", {})
            patch.setattr(repeated_layers, "_REPLAYED", 1000)
            return predicted(spec)

    return predict


@pytest.mark.parametrize("case", CASES)
def test_some_layers_stand_for_all(
    case: str, small: Small, tmp_path: Path, expanded: list[int], all_layers: Callable[[TrialSpec], Prediction]
) -> None:
    architecture, config, keys = CASES[case]
    layers = {"n_layer" if architecture == "gpt2" else "num_hidden_layers": 14}
    folder = tiny_model(tmp_path, architecture, config=layers | config)
    spec = small(base_model=folder, **{"sequence_length": 192, "train_samples": 8, "val_set_size": 2.0} | keys)
    few = predicted(spec)
    assert len(expanded) >= 2, "an evaluation and a step"
    assert min(expanded) >= 2
    assert few == all_layers(spec)


def test_layers_whose_routers_a_loss_joins_are_all_replayed(
    small: Small, tmp_path: Path, expanded: list[int], all_layers: Callable[[TrialSpec], Prediction]
) -> None:
    """The auxiliary loss is of the routers of all layers."""
    config = {"num_hidden_layers": 10, "output_router_logits": True, "router_aux_loss_coef": 0.1}
    folder = tiny_model(tmp_path, "mixtral", config=config)
    spec = small(base_model=folder, sequence_length=192, train_samples=8, val_set_size=2.0)
    few = predicted(spec)
    assert len(expanded) == 1, "the first pass says so"
    assert few == all_layers(spec)


def test_unlike_layers_are_no_run(small: Small, tmp_path: Path, expanded: list[int]) -> None:
    """Every layer attends in another way than the one before, and two of them have biases of their own."""
    folder = tiny_model(tmp_path, "qwen3_moe", config={"num_hidden_layers": 8, "mlp_only_layers": [0, 3, 4, 7]})
    predicted(small(base_model=folder, sequence_length=192, train_samples=8, val_set_size=0.0))
    assert not expanded
