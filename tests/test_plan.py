"""Predictions beside measurements: the same step on tensors without contents holds the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import harness

from harness import plan, trial
from harness.results import Job
from harness.spec import TrialSpec

Small = Callable[..., TrialSpec]

CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "nf4": {"precision": "nf4"},
    "fp4, double": {"precision": "fp4", "double_quantization": True},
    "full": {"adapter": "none"},
    "full, 8-bit": {"adapter": "none", "optimizer": "adamw_bnb_8bit"},
    "paged 8-bit, nf4, checkpointing": {
        "precision": "nf4", "optimizer": "paged_adamw_8bit", "gradient_checkpointing": True},
    "dropout": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "four": {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
    "padded": {"sequence_length": 2048, "excess_length": "drop"},
    "eager": {"attention": "eager"},
    "lion": {"optimizer": "lion_8bit"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_predicted_is_measured(case: str, small: Small) -> None:
    spec = small(**CASES[case])
    record = trial.run(Job(grid="g", spec=spec, label=case))
    assert record.status == "ok", record.error
    predicted = plan.predict(spec)
    measured = record.metrics["peak_memory_bytes"]
    assert measured is not None
    assert predicted.peak_memory_bytes == pytest.approx(measured, rel=0.005)
    assert sum(predicted.shares.values()) == predicted.peak_memory_bytes
    for name, size in predicted.shares.items():
        if name != "memory_activations_bytes":
            assert size == pytest.approx(record.metrics[name], rel=0.005, abs=2048), name


def test_an_operation_that_cannot_be_followed_is_named(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    library = torch.library.Library("harness_test", "DEF")
    library.define("opaque(Tensor x) -> Tensor")
    library.impl("opaque", lambda x: x.clone(), "CPU")
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: torch.ops.harness_test.opaque(forward(self, x)))
    with pytest.raises(plan.Unpredictable, match=r"harness_test.opaque"):
        plan.predict(small())


def test_what_takes_no_memory_is_predicted_once(small: Small) -> None:
    assert small(lora_alpha=64, learning_rate=1.0).memory_key == small().memory_key
    assert small(lora_r=8).memory_key != small().memory_key


def test_plan_says_what_fits_and_a_run_keeps_the_prediction(tmp_path: Path) -> None:
    import pandas

    (tmp_path / "g.yml").write_text(
        "name: g\nbase: {base_model: random:tiny, precision: fp32, sequence_length: 256, train_samples: 8, "
        "val_set_size: 2, device: cuda}\nvary: {lora_r: [64], lora_alpha: [64], adapter: [none]}\n"
    )
    done = harness("plan", "g.yml", "--memory", "1MiB", "--memory", "1GiB", "--json", "plan.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert rows[0]["label"] == "baseline"
    assert all(row["predicted_peak_memory_bytes"] > 0 for row in rows)
    peaks = {row["label"]: row["predicted_peak_memory_bytes"] for row in rows}
    assert peaks["lora_alpha=64"] == peaks["baseline"] < peaks["lora_r=64"]
    assert "no (" in done.stdout
    assert "fits (" in done.stdout

    done = harness("run", "g.yml", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trials = pandas.read_parquet(tmp_path / "results/g/trials")
    error = trials["predicted_peak_memory_bytes"] / trials["peak_memory_bytes"] - 1
    assert error.abs().max() <= 0.005


def test_the_shape_of_8b_without_its_weights() -> None:
    """Bytes per parameter as they are published: 2 in bf16; in nf4 9/16 of a byte for what is in linear layers."""
    base = {
        "base_model": "random:llama-3.1-8b", "sequence_length": 512, "lora_r": 32, "gradient_checkpointing": True,
        "train_samples": 1,
    }  # fmt: skip
    bf16 = plan.predict(TrialSpec.model_validate(base))
    assert bf16.shares["memory_weights_bytes"] == pytest.approx(2 * 8_030_261_248, rel=1e-4)
    assert bf16.shares["memory_adapters_bytes"] == 4 * 83_886_080
    nf4 = plan.predict(TrialSpec.model_validate(base | {"precision": "nf4"}))
    expected = 0.5625 * 6_979_321_856 + 2 * 1_050_673_152
    assert nf4.shares["memory_weights_bytes"] == pytest.approx(expected, rel=1e-3)
