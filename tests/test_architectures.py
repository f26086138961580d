"""Models of many kinds: one loss however a batch is cut, predictions, attention, formats of weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Mamba2Config

from harness.environment import current
from harness.errors import InputError
from harness.predict import peak
from harness.record import Job, Record
from harness.sources import models
from harness.spec.trial import TrialSpec
from harness.training import inspection, loss, trial

MakeSpec = Callable[..., TrialSpec]


@pytest.fixture
def spec(small: MakeSpec, tmp_path: Path) -> MakeSpec:
    """Makes a spec of a tiny model folder, of which `config` are further keys."""

    def make(architecture: str, config: dict[str, Any] | None = None, **overrides: Any) -> TrialSpec:
        folder = tiny_model(tmp_path / architecture, architecture, config=config)
        return small(base_model=folder, sequence_length=320, **overrides)

    return make


def run(spec: TrialSpec) -> Record:
    """A trial that ended well."""
    record = trial.run(
        Job(grid="test", spec=spec, label="test"), environment=current("cpu"), trust_remote_code=True
    )  # fmt: skip
    assert record.status == "ok", record.error
    return record


# ------------------------------------------------------------------------------------ one loss

AUXILIARY = {"output_router_logits": True, "router_aux_loss_coef": 0.1}


@pytest.mark.parametrize(
    ("architecture", "config"), [("llama", None), ("qwen3_moe", AUXILIARY), ("mixtral", AUXILIARY), ("own_code", None)]
)
def test_what_is_minimised_does_not_depend_on_how_a_batch_is_cut(
    spec: MakeSpec, architecture: str, config: dict[str, Any] | None
) -> None:
    cuts = [(4, 1), (2, 2), (1, 4)]
    records = [
        run(spec(architecture, config, micro_batch_size=size, gradient_accumulation_steps=times, learning_rate=1e-2))
        for size, times in cuts
    ]
    for whole, *others in zip(*(record.steps for record in records), strict=True):
        for other in others:
            assert other.loss == pytest.approx(whole.loss, rel=1e-5)
            assert other.grad_norm == pytest.approx(whole.grad_norm, rel=1e-3)
            assert other.auxiliary_loss == (
                None if config is None else pytest.approx(whole.auxiliary_loss, rel=1e-5)
            )  # fmt: skip
    for record in records:
        assert record.metrics["eval_loss"] == pytest.approx(records[0].metrics["eval_loss"], rel=1e-5)


def test_an_auxiliary_loss_counts_at_the_models_own_weight(spec: MakeSpec) -> None:
    """For one example at a time it is what the model itself adds to its loss."""
    folder = spec("mixtral", AUXILIARY).base_model
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(5, 69)[None]
    own = network(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    without = network(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, output_router_logits=False)

    with loss.auxiliary_by_example(network):
        outputs = network(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert float(loss.auxiliary(network, outputs)) == pytest.approx(float(own.loss - without.loss), rel=1e-4)
    assert float(loss.summed_cross_entropy(outputs.logits, ids)) / 63 == pytest.approx(float(without.loss), rel=1e-6)


# ------------------------------------------------------------------------------------ predictions


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        ("llama", "bf16"),
        ("qwen2", "fp32"),
        ("qwen3_moe", "fp32"),
        ("mixtral", "bf16"),
        ("gpt_oss", "nf4"),
        ("gemma2", "bf16"),
        ("gpt2", "int8"),
        ("gptj", "fp32"),
        ("gpt_neox", "bf16"),
        ("bloom", "fp32"),
        ("phi3", "bf16"),
        ("lfm2", "bf16"),
        ("qwen3_next", "bf16"),
        ("own_code", "fp32"),
    ],
)
def test_predicted_peaks_of_other_architectures_are_the_measured_ones(
    spec: MakeSpec, architecture: str, precision: str
) -> None:
    small = spec(architecture, precision=precision, train_samples=8, val_set_size=1.0)
    predicted = peak.predict(small, "cpu", trust_remote_code=True).peak_memory_bytes
    assert predicted == pytest.approx(run(small).metrics["peak_memory_bytes"], rel=1e-3)


def test_products_of_experts_are_counted(small: MakeSpec, tmp_path: Path) -> None:
    """Two of four experts multiply each row: forward, and for the gradient of their input."""
    predicted, recorded = [], []
    for width in (32, 64):
        folder = tiny_model(tmp_path / str(width), "qwen3_moe", config={"moe_intermediate_size": width})
        keys = {"sequence_length": 128, "eval_sequence_length": 192, "train_samples": 4}
        short = small(base_model=folder, lora_target_modules=["q_proj"], **keys)
        step = peak.predict(short, "cpu")
        predicted.append(step.flops / step.positions)
        recorded.append(run(short).metrics["flops_per_token"])
    layers, experts, matrices, hidden = 2, 2, 3, 32
    assert predicted == pytest.approx(recorded)
    assert recorded[1] - recorded[0] == pytest.approx(4 * layers * experts * matrices * hidden * 32)


# ------------------------------------------------------------------------------------ adapters of experts

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    "keys",
    [{}, {"gradient_checkpointing": True}, {"precision": "bf16", "recompute_adapter_inputs": True}],
    ids=["fp32", "checkpointing", "bf16"],
)
def test_experts_in_one_weight_have_adapters_that_are_trained_and_predicted(
    spec: MakeSpec, keys: dict[str, Any]
) -> None:
    few = keys | {"lora_target_modules": ["q_proj"], "train_samples": 8}
    alone, experts = spec("qwen3_moe", **few), spec("qwen3_moe", **few, lora_target_parameters=EXPERTS)
    without, with_them = run(alone).metrics, run(experts).metrics
    config = json.loads((Path(experts.base_model) / "config.json").read_text())
    wide, narrow = config["hidden_size"], config["moe_intermediate_size"]
    of_layer = experts.lora_r * config["num_local_experts"] * ((wide + 2 * narrow) + (narrow + wide))
    more = with_them["trainable_parameters"] - without["trainable_parameters"]
    assert more == config["num_hidden_layers"] * of_layer
    assert with_them["eval_loss"] != without["eval_loss"]
    assert with_them["eval_loss"] < with_them["eval_loss_before"]
    predicted = peak.predict(experts, "cpu").peak_memory_bytes
    assert predicted == pytest.approx(with_them["peak_memory_bytes"], rel=1e-3)


def test_weights_that_cannot_have_an_adapter_are_refused_in_one_line(spec: MakeSpec, small: MakeSpec) -> None:
    with pytest.raises(
        InputError, match=r"no weight of several experts called experts.up_proj; those are mlp.experts.gate_up_proj, "
    ):
        inspection.inspect([("x", spec("qwen3_moe", lora_target_parameters=["experts.up_proj"]))])
    with pytest.raises(InputError, match=r"there are none; use lora_target_modules"):
        inspection.inspect([("x", spec("llama", lora_target_parameters=["mlp.up_proj.weight"]))])
    with pytest.raises(ValidationError, match="use lora_dropout: 0"):
        small(lora_target_parameters=EXPERTS, lora_dropout=0.1)


# ------------------------------------------------------------------------------------ attention


def test_attention_is_what_the_model_has_and_is_recorded(spec: MakeSpec) -> None:
    assert run(spec("llama")).attention_kernel == "sdpa"
    assert run(spec("gemma2")).attention_kernel == "eager"
    with pytest.raises(InputError, match=r"^x: .*attention sdpa .*use attention: auto$"):
        inspection.inspect([("x", spec("gemma2", attention="sdpa"))])


def test_auto_is_the_same_trial_as_the_kernel_that_it_stands_for(small: MakeSpec) -> None:
    assert small().id == small(attention="sdpa").id != small(attention="eager").id


# ------------------------------------------------------------------------------------ formats


def quantised(spec: TrialSpec, tmp_path: Path, **how: Any) -> TrialSpec:
    """The spec with its model stored in bitsandbytes' format."""
    network = AutoModelForCausalLM.from_pretrained(
        spec.base_model, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**how)
    )
    folder = tmp_path / "quantised"
    network.save_pretrained(folder)
    for file in Path(spec.base_model).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return spec.model_copy(update={"base_model": str(folder)})


def test_a_checkpoint_in_4_bit_is_trained_in_its_own_format_alone(spec: MakeSpec, tmp_path: Path) -> None:
    stored = quantised(
        spec("llama", precision="nf4"),
        tmp_path,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    record = run(stored)
    assert record.metrics["weights_in_format"] == 1
    assert record.base_formats is not None
    assert set(record.base_formats) == {"nf4", "bf16"}
    predicted = peak.predict(stored, "cpu").peak_memory_bytes
    assert predicted == pytest.approx(record.metrics["peak_memory_bytes"], rel=1e-3)
    for precision in ("fp32", "bf16", "int8", "fp4"):
        with pytest.raises(InputError, match=r"quantised already; use their own, precision: nf4"):
            inspection.inspect([("x", stored.model_copy(update={"precision": precision}))])
    with pytest.raises(InputError, match=r"precision nf4 with double_quantization"):
        inspection.inspect([("x", stored.model_copy(update={"double_quantization": True}))])


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "mxfp4"},
    ],
    ids=lambda stored: stored["quant_method"],
)
def test_a_checkpoint_in_a_format_without_a_name_is_refused(spec: MakeSpec, stored: dict[str, Any]) -> None:
    asked = spec("llama", precision="nf4")
    file = Path(asked.base_model) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": stored}))
    with pytest.raises(InputError, match=rf"quantised already \({stored['quant_method']}.*give the checkpoint"):
        inspection.inspect([("x", asked)])


def test_layers_that_a_quantiser_skips_are_counted(spec: MakeSpec) -> None:
    asked = spec("qwen3_moe", precision="nf4", micro_batch_size=1)
    record = run(asked)
    assert record.metrics["weights_in_format"] < 0.5
    assert record.base_formats is not None
    assert record.base_formats["bf16"] > record.base_formats["nf4"] > 0
    assert sum(record.base_formats.values()) == pytest.approx(1)
    (warning,) = inspection.inspect([("x", asked)]).warnings
    assert "precision nf4 holds for" in warning
    assert not inspection.inspect([("x", spec("llama", precision="nf4"))]).warnings


# ------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "t5"}, "not of a causal language model"),
        ({"model_type": "no_such_architecture"}, "model type"),
    ],
    ids=["no language model", "unknown"],
)
def test_what_is_no_language_model_is_refused(spec: MakeSpec, config: dict[str, Any], expected: str) -> None:
    asked = spec("llama")
    (Path(asked.base_model) / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=expected):
        inspection.inspect([("x", asked)])


def test_code_of_a_model_runs_only_where_it_may(spec: MakeSpec) -> None:
    asked = spec("llama")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (Path(asked.base_model) / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="--trust-remote-code"):
        inspection.inspect([("x", asked)])


def test_a_configuration_may_have_numbers_that_json_has_not(tmp_path: Path) -> None:
    Mamba2Config(time_step_limit=(0.0, float("inf"))).save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text(), "as transformers writes it"
    assert models.random_config("config.json", str(tmp_path))["time_step_limit"] == [0.0, float("inf")]


def test_random_weights_are_made_of_models_of_text_alone(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": {"vocab_size": 8}}
    for given, expected in (
        (config, "gemma3 is a model of more than text"),
        ({"model_type": "gemma3"}, "no vocab_size in it"),
        ({"vocab_size": 8}, "no model_type in it"),
        ([], "no model_type and vocab_size in it"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(given))
        with pytest.raises(InputError, match=expected):
            models.random_config("config.json", str(tmp_path))
