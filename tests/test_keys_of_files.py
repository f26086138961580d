"""Keys of a spec that other tools' training files have: arithmetic, whole layers, reentrant checkpointing, rates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from trials import run

from harness.errors import InputError
from harness.predict import peak
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, evaluation, inspection, model, order
from harness.training.memory import MemoryMeter
from harness.training.step import Trainer

Small = Callable[..., TrialSpec]
CPU = torch.device("cpu")


def losses(spec: TrialSpec) -> list[float]:
    record = run(spec)
    assert record.status == "ok", record.error
    return [step.loss for step in record.steps]


def test_the_reentrant_variant_learns_the_same(small: Small) -> None:
    for adapter in ("lora", "none"):
        plain, usual, reentrant = (
            losses(small(adapter=adapter, max_steps=3, train_samples=None, **keys))
            for keys in (
                {},
                {"gradient_checkpointing": True},
                {"gradient_checkpointing": True, "reentrant_checkpointing": True},
            )
        )
        assert usual == pytest.approx(plain, abs=1e-5)
        assert reentrant == pytest.approx(usual, abs=1e-6)


def test_the_reentrant_variant_is_of_checkpointing_alone(small: Small) -> None:
    plain, reentrant = (run(small(reentrant_checkpointing=on)) for on in (False, True))
    assert plain.spec.id == reentrant.spec.id
    assert plain.metrics["peak_memory_bytes"] == reentrant.metrics["peak_memory_bytes"]


@pytest.mark.parametrize(
    ("precision", "compute"), [("nf4", "fp16"), ("nf4", "fp32"), ("int8", "fp16"), ("int8", "fp32")]
)
def test_arithmetic_over_quantised_weights(precision: str, compute: str, small: Small) -> None:
    wanted = {"fp16": torch.float16, "fp32": torch.float32}[compute]
    spec = small(precision=precision, compute_dtype=compute)
    network = model.load(spec, CPU)
    assert network.get_input_embeddings().weight.dtype == wanted
    computed = {m.compute_dtype for m in network.modules() if getattr(m, "compute_dtype", None) is not None}
    assert computed == ({wanted} if precision == "nf4" else set())
    assert model.compute_dtype(spec) == (None if compute == "fp32" else wanted)
    assert (Trainer(network, spec, CPU, 2).scaler is not None) == (compute == "fp16")
    assert model.compute_dtype(small(precision=precision)) == torch.bfloat16
    assert small(precision=precision, compute_dtype="bf16").id == small(precision=precision).id != spec.id


def test_whole_layers_are_trained_next_to_adapters(small: Small) -> None:
    spec = small(lora_modules_to_save=["lm_head"], lora_target_modules=["q_proj"])
    network = model.load(spec, CPU)
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        name for name in trained if name.endswith("lm_head.modules_to_save.default.weight")
    }
    assert any("lm_head" in name for name in trained)
    assert all("q_proj" in name or "lm_head" in name for name in trained)
    assert len(losses(spec)) >= 1
    with pytest.raises(InputError, match=r"lora_modules_to_save: .* has no module lm_haed; did you mean lm_head\?"):
        model.skeleton(small(lora_modules_to_save=["lm_haed"]))


def test_all_linear_layers_and_named_ones_add_up(small: Small) -> None:
    def adapted(**keys: Any) -> set[str]:
        network = model.skeleton(small(**keys))
        return {name.partition(".lora_")[0] for name, _ in network.named_parameters() if ".lora_" in name}

    linear = adapted()
    more = adapted(lora_target_modules=["all-linear", "lm_head", "embed_tokens"])
    assert {name.rpartition(".")[2] for name in more - linear} == {"lm_head", "embed_tokens"}
    assert linear < more


def test_warm_up_in_steps(small: Small) -> None:
    spec = small(warmup_steps=2, max_steps=4, train_samples=None, lr_scheduler="linear", learning_rate=1.0)
    trainer = Trainer(model.load(spec, CPU), spec, CPU, 4)
    rates = []
    for _ in range(4):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.scheduler.step()
    assert rates == [0.0, 0.5, 1.0, 0.5]
    with pytest.raises(InputError, match=r"warmup_steps 1 of 1 optimizer step .* use warmup_steps: 0"):
        order.check_schedules(small(warmup_steps=1, max_steps=1, train_samples=None), 8)


def test_moments_of_adam(small: Small) -> None:
    spec = small(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = Trainer(model.load(spec, CPU), spec, CPU, 2).optimizer
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    assert optimizer.defaults["eps"] == 1e-6


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"compute_dtype": "fp16"}, "compute_dtype is for precision int8, int4, nf4 or fp4"),
        ({"autocast": False, "precision": "bf16-mixed"}, "autocast is false; use fp32"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_steps and warmup_ratio exclude each other"),
        ({"lora_target_modules": ["lm_head", "all-linear"]}, "all-linear stands first"),
    ],
)
def test_impossible_combinations(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrialSpec.model_validate({"base_model": "random:tiny", **keys})


def test_noise_on_the_embeddings_in_training_alone(small: Small) -> None:
    spec = small(neftune_noise_alpha=5.0, micro_batch_size=4)
    network = model.load(spec, CPU)
    embeddings, ids = network.get_input_embeddings(), torch.zeros((2, 50), dtype=torch.long)
    noise = embeddings(ids) - embeddings.eval()(ids)
    most = 5 / (50 * noise.shape[2]) ** 0.5
    assert 0.95 * most < noise.abs().max() <= most
    assert float(noise.std()) == pytest.approx(most / 3**0.5, rel=0.05)
    plain, noisy, again = run(small(micro_batch_size=4)), run(spec), run(spec)
    assert [s.loss for s in noisy.steps] == [s.loss for s in again.steps]
    assert all(a.loss != b.loss for a, b in zip(plain.steps, noisy.steps, strict=True))
    before = [[s.loss for s in record.stories if s.when == "before"] for record in (plain, noisy)]
    assert before[0] == before[1]
    assert peak.predict(spec, "cpu").peak_memory_bytes == pytest.approx(noisy.metrics["peak_memory_bytes"], rel=0.005)
    barely = losses(small(neftune_noise_alpha=1e-4, micro_batch_size=4))
    assert barely == pytest.approx([s.loss for s in plain.steps], rel=1e-3)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_one_of_so_many_layers_is_recomputed(adapter: str, small: Small, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, config={"num_hidden_layers": 6})
    shape = {"base_model": folder, "adapter": adapter, "micro_batch_size": 4, "gradient_checkpointing": True}
    plain = run(small(**shape | {"gradient_checkpointing": False}))
    peaks = []
    for layers in (1, 2, 3, 100):
        spec = small(**shape, checkpoint_every_n_layers=layers)
        record = run(spec)
        assert [s.loss for s in record.steps] == pytest.approx([s.loss for s in plain.steps], rel=1e-5)
        assert [s.grad_norm for s in record.steps] == pytest.approx([s.grad_norm for s in plain.steps], rel=1e-3)
        peaks.append(record.metrics["peak_memory_bytes"])
        assert peak.predict(spec, "cpu").peak_memory_bytes == pytest.approx(peaks[-1], rel=0.005)
    assert peaks == sorted(peaks)
    # Of six layers six, three, two and one are recomputed; each holds as much as another.
    all_kept = plain.metrics["peak_memory_bytes"]
    of_layer = (all_kept - peaks[-1]) / 1
    assert all_kept - peaks[2] == pytest.approx(2 * of_layer, rel=0.1)
    assert all_kept - peaks[1] == pytest.approx(3 * of_layer, rel=0.1)


@pytest.mark.parametrize(
    ("keys", "attention"),
    [({}, "auto"), ({"precision": "bf16", "lora_dropout": 0.1}, "auto"), ({"precision": "nf4"}, "auto"), ({}, "eager")],
    ids=str,
)
def test_recomputed_layers_keep_products(keys: dict[str, Any], attention: str, small: Small, tmp_path: Path) -> None:
    """Kept products are not computed twice, and take memory for it."""
    folder = tiny_model(tmp_path, config={"num_hidden_layers": 4})
    shape = {"base_model": folder, "micro_batch_size": 4, "sequence_length": 192, "attention": attention} | keys
    kinds = ("nothing", "matmuls") if attention == "eager" else ("nothing", "attention", "matmuls")
    plain = run(small(**shape))
    peaks, flops = [], []
    for kind in kinds:
        spec = small(**shape, gradient_checkpointing=True, checkpoint_keep=kind)
        record = run(spec)
        assert record.status == "ok", record.error
        assert [s.loss for s in record.steps] == pytest.approx([s.loss for s in plain.steps], rel=1e-5)
        assert [s.grad_norm for s in record.steps] == pytest.approx([s.grad_norm for s in plain.steps], rel=1e-3)
        peaks.append(record.metrics["peak_memory_bytes"])
        flops.append(record.metrics["flops_per_token"])
        assert peak.predict(spec, "cpu").peak_memory_bytes == pytest.approx(peaks[-1], rel=0.005)
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == len(peaks)
    assert flops == sorted(flops, reverse=True)
    assert len(set(flops)) == len(flops)
    assert flops[-1] == pytest.approx(plain.metrics["flops_per_token"], rel=0.01)


def test_offloaded_inputs_of_layers_are_not_on_the_card(small: Small, tmp_path: Path) -> None:
    layers, positions, hidden, four_bytes = 8, 2 * 256, 32, 4
    shape = {"base_model": tiny_model(tmp_path, config={"num_hidden_layers": layers}), "precision": "fp32"}
    shape |= {"gradient_checkpointing": True, "pad_to_sequence_len": True, "sequence_length": 256, "device": "cuda"}
    held, offloaded = (peak.predict(small(**shape, checkpoint_offload=on), "cuda") for on in (False, True))
    saved = held.breakdown["memory_activations_bytes"] - offloaded.breakdown["memory_activations_bytes"]
    of_layer = positions * hidden * four_bytes
    assert (layers - 2) * of_layer <= saved <= layers * of_layer  # that of the layer at work is on the card
    with pytest.raises(InputError, match=r"checkpoint_offload on a CPU: .* use checkpoint_offload: false"):
        inspection.inspect([("a", small(**shape | {"device": "cpu"}, checkpoint_offload=True))])


def test_flex_attention_is_for_cards(small: Small, tmp_path: Path) -> None:
    flex = small(base_model=tiny_model(tmp_path), attention="flex_attention")
    with pytest.raises(InputError, match="flex_attention on a CPU: torch has no gradient of it there; use"):
        inspection.inspect([("a", flex)])
    with pytest.raises(peak.Unpredictable, match="flex_attention: it is compiled, and by a compiler for cards"):
        peak.predict(flex, "cuda")
    with pytest.raises(ValueError, match="sample_packing with attention flex_attention"):
        small(attention="flex_attention", sample_packing=True, micro_batch_size=2)
    assert model.skeleton(flex).config._attn_implementation == "flex_attention"


def test_the_tracker_of_memory_sees_flex_attention(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU computes it, without gradients; the tracker is the one that a trial takes."""
    monkeypatch.setattr("harness.training.device_limits.refuse_on", lambda *_: None)
    keys = {"base_model": tiny_model(tmp_path), "precision": "fp32", "sequence_length": 256, "val_set_size": 2}
    losses = []
    for attention in ("sdpa", "flex_attention"):
        spec = small(**keys, attention=attention)
        data = batches.load(spec, checkpoints.load_tokenizer(spec))
        tracking = functools.partial(MemoryMeter(CPU, None, compiled=spec.compiles).tracking, breakdown=True)
        losses.append(evaluation.story_losses(model.load(spec, CPU), data.held_out, spec, 0, CPU, tracking))
    for (story, one, tokens), (*_, other, _) in zip(*losses, strict=True):
        assert other == pytest.approx(one, rel=1e-4), (story, tokens)


def test_what_checkpointing_cannot_keep(small: Small) -> None:
    on = {"gradient_checkpointing": True}
    with pytest.raises(ValueError, match="checkpoint_keep matmuls with reentrant_checkpointing"):
        small(**on, checkpoint_keep="matmuls", reentrant_checkpointing=True)
    for attention in ("eager", "flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match=f"checkpoint_keep attention with attention {attention}"):
            small(**on, checkpoint_keep="attention", attention=attention)
    assert small(checkpoint_keep="matmuls", checkpoint_offload=True).id == small().id
