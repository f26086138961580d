"""`adapter_dtype: bf16` trains as fp32 adapters do, to bf16's rounding, holds less, and is predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from trials import run

from harness.predict import peak
from harness.spec.trial import TrialSpec
from harness.training import model

Small = Callable[..., TrialSpec]
WIDE = {"hidden_size": 128, "intermediate_size": 256}


@pytest.mark.parametrize("precision", ["bf16", "nf4", "int8", "bf16-mixed"])
def test_it_trains_as_fp32_adapters_do_and_is_predicted(precision: str, small: Small, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, config=WIDE)
    specs = [small(base_model=folder, precision=precision, adapter_dtype=dtype) for dtype in ("fp32", "bf16")]
    in_fp32, in_bf16 = (run(spec) for spec in specs)
    assert in_bf16.status == "ok", in_bf16.error
    for a, b in zip(in_fp32.steps, in_bf16.steps, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=5e-3)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=0.05)
    assert in_bf16.metrics["adapter_bytes"] == in_fp32.metrics["adapter_bytes"] / 2
    predicted = peak.predict(specs[1], "cpu")
    assert predicted.peak_memory_bytes == pytest.approx(in_bf16.metrics["peak_memory_bytes"], rel=0.005)
    assert predicted.breakdown["memory_adapters_bytes"] == in_fp32.metrics["memory_adapters_bytes"] / 2


def test_no_copies_of_an_adapters_input_are_kept(small: Small, tmp_path: Path) -> None:
    """Under autocast, the input of each adapter is copied to fp32, and back, and that copy is kept for its gradient."""
    folder = tiny_model(tmp_path, config=WIDE)
    keys: dict[str, Any] = {"base_model": folder, "precision": "bf16", "lora_dropout": 0.0, "pad_to_sequence_len": True}
    in_fp32, in_bf16 = (
        peak.predict(small(**keys, adapter_dtype=dtype), "cuda").breakdown["memory_activations_bytes"]
        for dtype in ("fp32", "bf16")
    )
    # At least: q, k and v share one kept input, and gate and up, instead of one each; at most none is kept anew.
    positions, layers, two_bytes = 2 * 256, 2, 2
    saved = (in_fp32 - in_bf16) / (positions * layers * two_bytes)
    assert 3 * 128 <= saved <= 6 * 128 + 256


def test_a_kept_adapter_has_that_format(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small(base_model=tiny_model(tmp_path), precision="bf16", adapter_dtype="bf16")
    network = model.load(spec, torch.device("cpu"))
    assert {each.dtype for each in model.adapters(network)} == {torch.bfloat16}
    network.save_pretrained(tmp_path / "kept")
    kept = load_file(tmp_path / "kept/adapter_model.safetensors")
    assert {each.dtype for each in kept.values()} == {torch.bfloat16}


def test_matrices_that_are_not_trained_have_it_too(small: Small, tmp_path: Path) -> None:
    """One product of two formats is refused by torch."""
    keys = {"precision": "bf16", "adapter_dtype": "bf16", "init_lora_weights": "mica"}
    record = run(small(base_model=tiny_model(tmp_path), **keys))
    assert record.status == "ok", record.error


def test_what_it_does_not_go_with(small: Small) -> None:
    for keys in ({"precision": "fp16"}, {"precision": "fp16-mixed"}, {"precision": "nf4", "compute_dtype": "fp16"}):
        with pytest.raises(ValueError, match="adapter_dtype bf16 with fp16 arithmetic: use adapter_dtype: fp32"):
            small(adapter_dtype="bf16", **keys)
    assert small(adapter="none", adapter_dtype="bf16").id == small(adapter="none").id
    assert not small(precision="bf16", adapter_dtype="bf16").autocasts
