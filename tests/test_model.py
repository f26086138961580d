"""Models against published counts, every precision for real, and the bundled model itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from trials import quantizer_of, run

from harness.sources import models
from harness.spec.keys import QUANTISED, Precision
from harness.spec.trial import TrialSpec
from harness.training import adapter_methods, model

Small = Callable[..., TrialSpec]


def on_meta(architecture: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = models.random_config(architecture)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def test_shapes_have_the_published_sizes() -> None:
    sizes = {n: on_meta(n).num_parameters() for n in models.ARCHITECTURES if n != "tiny"}
    assert sizes == {
        "smollm2-135m": 134_515_008,
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.2-3b": 3_212_749_824,
        "llama-3.1-8b": 8_030_261_248,
        "qwen2.5-0.5b": 494_032_768,
    }


@pytest.mark.parametrize(
    ("architecture", "spec", "trained"),
    [
        ("llama-3.1-8b", {"lora_r": 32}, 83_886_080),
        ("llama-3.1-8b", {"lora_r": 1}, 2_621_440),
        ("llama-3.2-3b", {"lora_r": 32, "lora_target_modules": ["q_proj", "v_proj"]}, 9_175_040),
        ("llama-3.2-3b", {"lora_r": 32, "lora_target_linear": False}, 9_175_040),
    ],
)
def test_adapters_have_the_published_sizes(architecture: str, spec: dict[str, Any], trained: int) -> None:
    values = {"base_model": f"random:{architecture}", **spec}
    if "lora_target_modules" in values:
        values["lora_target_linear"] = False
    chosen = TrialSpec.model_validate(values)
    with torch.device("meta"):
        network = adapter_methods.attach(on_meta(architecture), chosen, unreached=())
    sizes = model.sizes(network, chosen)
    assert sizes["trainable_parameters"] == trained
    assert sizes["adapter_bytes"] == 4 * trained  # 35.0 MiB for q and v of the 3B at rank 32


@pytest.mark.parametrize(
    ("precision", "adapter"),
    [(p, a) for p in get_args(Precision) for a in ("lora", "none") if a == "lora" or p not in QUANTISED],
)
def test_every_precision_trains_in_its_own_formats(small: Small, precision: str, adapter: str) -> None:
    rate = 1e-2 if adapter == "lora" else 1e-3
    spec = small(
        precision=precision, adapter=adapter, lora_r=16, learning_rate=rate, train_samples=24, **quantizer_of(precision)
    )
    network = model.load(spec, torch.device("cpu"))
    trained = {p.dtype for p in model.trainable(network)}
    frozen = {p.dtype for p in network.parameters() if not p.requires_grad and p.dim() == 2}
    sixteen = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if adapter == "none":
        assert trained == {sixteen or torch.float32}
        assert not frozen
    else:
        assert trained == {torch.float32}
        quantised = {"int8": torch.int8, "int4": torch.uint8, "nf4": torch.uint8, "fp4": torch.uint8}.get(precision)
        if quantised:
            assert frozen == {quantised, torch.bfloat16}  # embeddings and head are not quantised
        else:
            assert frozen == {sixteen or torch.float32}
    record = run(spec)
    if (precision, adapter) == ("fp16", "none"):
        # Adam's epsilon is zero in fp16: without master weights it may diverge, and its status says so.
        assert record.status in ("ok", "diverged")
        return
    assert record.status == "ok", record.error
    losses = [s.loss for s in record.steps]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("option", ["use_rslora", "use_dora"])
def test_lora_variants_train(small: Small, option: str) -> None:
    plain, variant = run(small(learning_rate=1e-2)), run(small(learning_rate=1e-2, **{option: True}))
    assert variant.status == "ok", variant.error
    assert [s.loss for s in variant.steps] != [s.loss for s in plain.steps]


@pytest.mark.parametrize("precision", sorted(QUANTISED))
def test_evaluating_changes_nothing_of_what_training_learns(small: Small, precision: str) -> None:
    """bitsandbytes has a layout of weights for inference, through which no gradient passes."""
    spec = small(precision=precision, **quantizer_of(precision))
    tokens = torch.arange(40).reshape(2, 20)
    gradients = []
    for evaluate in (False, True):
        torch.manual_seed(0)
        network = model.load(spec, torch.device("cpu"))
        if evaluate:
            network.eval()
            with torch.no_grad(), model.autocast(spec, torch.device("cpu")):
                network(input_ids=tokens)
            network.train()
        with model.autocast(spec, torch.device("cpu")):
            network(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    fresh, evaluated = gradients
    assert all(grad is not None for grad in evaluated.values())
    for name, grad in fresh.items():
        torch.testing.assert_close(evaluated[name], grad)
    assert all(grad.abs().sum() > 0 for name, grad in fresh.items() if "lora_B" in name)


def test_a_model_that_learns_nothing_did_not_train(small: Small) -> None:
    record = run(small(precision="bf16", adapter="none", learning_rate=1e-12))
    assert (record.status, record.error_type) == ("did_not_train", "DidNotTrain")
    assert record.metrics.get("peak_memory_bytes"), "its memory is a fact"
    assert record.metrics.get("tokens_per_second") is None


def test_missing_kernel_is_a_failure_to_load(small: Small) -> None:
    record = run(small(attention="flash_attention_2"))
    assert (record.status, record.phase) == ("failed", "load")
    assert record.error


@pytest.mark.long
def test_the_bundled_model_is_the_real_one_and_learns_stories() -> None:
    record = run(
        TrialSpec(
            base_model="smollm2-135m-instruct",
            sequence_length=160,
            micro_batch_size=2,
            gradient_accumulation_steps=1,
            train_samples=6,
            val_set_size=2,
            learning_rate=1e-3,
            lr_scheduler="constant",
        )
    )
    assert record.status == "ok", record.error
    metrics = record.metrics
    assert metrics["total_parameters"] == 134_515_008 + metrics["trainable_parameters"]  # type: ignore[operator]  # set
    before, after = metrics["eval_loss_before"], metrics["eval_loss"]
    assert before is not None
    assert after is not None
    # Random weights have ln(49152) = 10.8 nats; a chat model knows English.
    assert 2.0 < before < 5.0
    assert after < before
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(after))
    assert metrics["memory_weights_bytes"] == pytest.approx(2 * 134_515_008, rel=1e-4)
    after_rows = [s for s in record.stories if s.when == "after"]
    weighted = sum(s.loss * s.tokens for s in after_rows) / sum(s.tokens for s in after_rows)
    assert weighted == pytest.approx(after)
    # Frozen weights need no gradient of their own: 4 operations per parameter and token, adapters 6. Attention:
    # two products forward and five backward of 2 x 160 positions x 576 channels, in 30 layers.
    flops = 4 * 134_515_008 + 6 * metrics["trainable_parameters"] + 7 * 2 * 160 * 576 * 30  # type: ignore[operator]  # set
    assert metrics["flops_per_token"] == pytest.approx(flops, rel=0.01)
