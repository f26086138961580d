"""What predictions do once instead of again: they say what they would say if all were done anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from predictions import predicted
from tiny_models import tiny_model

from harness.environment import DeviceType
from harness.predict import loaded_model, peak
from harness.predict.prediction import Prediction
from harness.spec.keys import LOW_RANK_OPTIMIZERS, TORCHAO_OPTIMIZERS, Optimizer
from harness.spec.trial import TrialSpec

Small = Callable[..., TrialSpec]


def anew(spec: TrialSpec, device_type: DeviceType = "cuda") -> Prediction:
    loaded_model._last.clear()
    return predicted(spec, device_type)


@pytest.mark.parametrize(
    ("optimizer", "device_type"),
    [*((name, "cuda") for name in get_args(Optimizer)), ("adamw_torch", "cpu"), ("adafactor", "cpu")],
)
def test_a_first_update_stands_for_later_ones(
    optimizer: str, device_type: DeviceType, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes the optimizer's state, and does what every update does. Adafactor's also makes a number for each weight
    that the next one makes again. Of torchao's, what is moved differs by 8 bytes.
    """
    spec = small(optimizer=optimizer, lora_r=64, adapter="none" if optimizer in LOW_RANK_OPTIMIZERS else "lora")
    once = predicted(spec, device_type)
    monkeypatch.setattr(peak._StepReplay, "_is_covered", lambda *_: False)
    twice = predicted(spec, device_type)
    assert once.model_copy(update={"work": twice.work}) == twice
    moved, of_two = (sum(each.calls * each.moved_bytes for each in one.work) for one in (once, twice))
    roughly = optimizer == "adafactor" or optimizer in TORCHAO_OPTIMIZERS
    assert moved == (pytest.approx(of_two, rel=1e-4) if roughly else of_two)


STEPS: tuple[dict[str, Any], ...] = (
    {"sequence_length": 160},
    {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "optimizer": "sgd"},
)
"""What is predicted with a model that has been used."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapters, recomputed": ("llama", {"gradient_checkpointing": True, "lora_dropout": 0.1}),
    "fully trained, autocast": ("llama", {"adapter": "none", "precision": "bf16-mixed"}),
    "4 bit, biases that the first pass replaces": (
        "qwen2",
        {"precision": "nf4", "upcast_unquantized": True, "keep_outputs": True},
    ),
    "8 bit": ("llama", {"precision": "int8"}),
    "packed, loss in chunks": ("llama", {"sample_packing": True, "loss": "chunked"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_used_is_as_a_new_one(name: str, small: Small, tmp_path: Path) -> None:
    architecture, keys = MODELS[name]
    folder = tiny_model(tmp_path, architecture, config={"num_hidden_layers": 7})
    base = {"base_model": folder, "train_samples": 8, "val_set_size": 2.0} | keys
    specs = [small(**base | change) for change in STEPS]
    anew(small(**base))
    used = [predicted(spec) for spec in specs]
    assert used == [anew(spec) for spec in specs]


def test_one_model_is_loaded_once(small: Small) -> None:
    anew(small(micro_batch_size=4))
    (loaded,) = loaded_model._last.values()
    for change in STEPS:
        predicted(small(**change))
    assert [*loaded_model._last.values()] == [loaded]
    predicted(small(lora_r=8))
    assert [*loaded_model._last.values()] != [loaded]


def test_a_model_whose_tables_have_grown_is_loaded_again(small: Small, tmp_path: Path) -> None:
    """Phi-3's frequencies are others for long texts, and stay so."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
    config = {"num_hidden_layers": 8, "rope_scaling": scaling, "original_max_position_embeddings": 128}
    folder = tiny_model(tmp_path, "llama", config=config)
    keys = {"base_model": folder, "val_set_size": 0.0}
    short, long = (small(**keys, sequence_length=length) for length in (120, 256))
    used = [anew(long), predicted(short), predicted(long)]
    assert used == [anew(long), anew(short), anew(long)]


def test_nothing_is_kept_of_a_prediction_that_failed(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small()
    before = anew(spec)
    with monkeypatch.context() as patch:
        patch.setattr(peak._StepReplay, "_replay_kinds", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predicted(spec)
    assert not loaded_model._last
    assert predicted(spec) == before
