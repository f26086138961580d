"""Methods of peft: each trains, is kept, loaded and merged; options are peft's; bad cells are refused beforehand."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.ia3 import IA3Layer
from pydantic import ValidationError
from test_cli import Ask
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from trials import run

from harness.analysis import comparison, loading
from harness.errors import InputError
from harness.grids.claims import Contrast, recorded_level
from harness.grids.grid import load
from harness.predict import matching, peak
from harness.report import adapter_tables, document, tables
from harness.results.store import Store
from harness.runner import learning_rates
from harness.sources import models
from harness.spec import capabilities
from harness.spec.keys import ADAPTERS
from harness.spec.trial import TrialSpec
from harness.training import (
    adapter_methods,
    batches,
    checkpoints,
    formats,
    inspection,
    limits,
    loss,
    model,
    optimizers,
    order,
    saved_adapters,
)
from harness.training.step import Trainer

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import methods

Small = Callable[..., TrialSpec]
CPU = torch.device("cpu")


def refusal(spec: TrialSpec) -> str:
    """The one line that a trial of the spec is refused with, before it begins."""
    with pytest.raises(InputError) as error:
        inspection.inspect([("trial", spec)])
    text = str(error.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------ each method


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_method_trains_and_is_kept_loaded_and_merged(method: str, tmp_path: Path) -> None:
    spec = methods.spec_of(method, "fp32")
    network, held_out = methods.trained(spec)
    reference = methods.logits(network, spec, held_out)
    untrained = methods.logits(model.load(spec, CPU), spec, held_out)
    assert methods.distance(reference, untrained) > 1e-4, "it changed nothing"
    saved_adapters.write(network, spec, tmp_path)
    loaded = saved_adapters.load(model.base(spec, CPU), tmp_path)
    assert methods.distance(methods.logits(loaded, spec, held_out), reference) < 1e-5
    cell = capabilities.table().find(method, "fp32")
    assert cell is not None
    if cell.not_merged is None:
        merged = saved_adapters.merged(network)
        assert methods.distance(methods.logits(merged, spec, held_out), reference) < 1e-5
    else:
        with pytest.raises(InputError, match=r"nothing to merge|does not merge"):
            saved_adapters.merged(network)


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("loha", "fp32"),
        ("vera", "int8"),
        ("oft", "nf4"),
        ("prompt_tuning", "bf16"),
        ("adalora", "bf16"),
        ("hra", "int8"),  # trains on codes instead of weights, without an error
        ("peanut", "nf4"),
        ("prefix_tuning", "fp32"),  # without gradient checkpointing alone
    ],
)
def test_the_table_says_what_is_seen(method: str, precision: str) -> None:
    """A part of it; `benchmarks/methods.py` makes all of it."""
    there = capabilities.table().find(method, precision)
    seen = methods.try_method(method, precision)
    assert there is not None
    for name in ("fails", "not_reloaded", "not_merged", "not_checkpointed", "not_predicted"):
        assert (getattr(seen, name) is None) == (getattr(there, name) is None), name
    assert seen.prediction_error == pytest.approx(there.prediction_error, abs=1e-4)


def test_the_table_is_of_every_method_and_of_the_installed_release() -> None:
    table = capabilities.table()
    cells = {(cell.method, cell.precision) for cell in table.cells}
    assert cells == {(method, precision) for method in ADAPTERS for precision in methods.PRECISIONS}
    assert dict(table.versions)["peft"] == importlib.metadata.version("peft")
    assert {kind.value.lower() for kind in PeftType} - {*ADAPTERS} == {
        "multitask_prompt_tuning", "poly", "shadow", "xlora",
    }  # fmt: skip
    errors = {cell.method: abs(cell.prediction_error) for cell in table.cells if cell.prediction_error is not None}
    assert sum(error < 0.005 for error in errors.values()) >= 30


# ------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"adapter": "loha", "adapter_options": {"rr": 4}}, "loha has no such option; did you mean r?"),
        ({"adapter": "loha", "adapter_options": {"r": "four"}}, "adapter_options.r: 'four'"),
        ({"adapter": "loha", "adapter_options": {"r": True}}, "adapter_options.r: True"),
        ({"adapter": "loha", "adapter_options": {"target_modules": ["q_proj"]}}, "use lora_target_modules"),
        ({"adapter_options": {"r": 4}}, "adapter_options.r: it has a key of its own; use lora_r"),
        ({"adapter": "adalora", "adapter_options": {"total_step": 9}}, "it follows from the trial"),
        ({"adapter": "adalora", "adapter_options": {"r": 9}}, "use init_r and target_r"),
        ({"adapter": "prompt_tuning"}, "needs num_virtual_tokens, as in adapter_options: {num_virtual_tokens: 20}"),
        ({"adapter": "c3a"}, "block size"),
        (
            {"adapter": "cpt", "adapter_options": {"opt_weighted_loss_type": "decay"}},
            "losses of all methods are of the same tokens",
        ),
        (
            {"adapter": "ia3", "adapter_options": {"feedforward_modules": ["dwn_proj"]}},
            "dwn_proj is none of the layers",
        ),
        (
            {
                "adapter": "ia3",
                "lora_target_modules": ["q_proj"],
                "adapter_options": {"feedforward_modules": ["up_proj"]},
            },
            "up_proj is none of the layers that get an adapter, which are q_proj",
        ),
        ({"adapter_options": {"layers_to_transform": [0, 9]}}, "no linear layer is in layer 9; layers count from 0"),
        (
            {"init_lora_weights": "eva", "adapter_options": {"rank_pattern": {"q_proj": 2}}},
            "eva with rank_pattern: it gives each layer lora_r",
        ),
        (
            {"init_lora_weights": "corda", "adapter_options": {"rank_pattern": {"q_proj": 2}}},
            "corda with rank_pattern: it gives each layer lora_r",
        ),
        ({"adapter": "loha", "lora_target_modules": ["q_prj"]}, "did you mean q_proj?"),
        ({"adapter": "prompt_tuning", "adapter_options": {"num_virtual_tokens": 2}, "sample_packing": True}, "packing"),
    ],
)
def test_an_impossible_option_is_one_line_beforehand(small: Small, keys: dict[str, Any], text: str) -> None:
    assert text in refusal(small(**keys))


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"adapter": "lohaa"}, "did you mean loha?"),
        ({"adapter": "LORA"}, "did you mean lora?"),
        ({"adapter": "xlora"}, "it mixes adapters that were trained before"),
        ({"adapter": "none", "adapter_options": {"r": 4}}, "which has no adapter"),
        ({"init_lora_weights": "pisa"}, "did you mean pissa?"),
        ({"init_lora_weights": "pissa", "precision": "nf4"}, "use olora"),
        ({"init_lora_weights": "pissa_niter_8", "save_adapter": True}, "cannot be found again"),
        ({"init_lora_weights": ["pissa", "olora"]}, "is not the name of one"),
        ({"adapter": "loha", "adapter_options": "r=8"}, "is no mapping of names to values"),
        ({"adapter": "loha", "adapter_options": [{"r": 8}]}, "is no mapping of names to values"),
        ({"adapter": "loha", "adapter_options": {"r": 8, True: 1}}, "is no mapping of names to values"),
        ({"init_lora_weights": "mica", "optimizer": "lora_fa"}, "mica trains LoRA's A alone"),
        ({"init_lora_weights": "mica", "loraplus_lr_ratio": 2.0}, "mica trains LoRA's A alone"),
        ({"optimizer": "lora_fa", "adapter_options": {"lora_bias": True}}, "trains LoRA's B alone"),
        ({"init_lora_weights": "orthogonal", "lora_r": 3}, "the rank must be even"),
        ({"adapter": "loha", "optimizer": "lora_fa"}, "it is for LoRA's matrices alone"),
        ({"optimizer": "lora_fa", "use_dora": True}, "trains LoRA's B alone"),
        ({"loraplus_lr_ratio": 0.5}, "greater than or equal to 1"),
        (
            {"adapter": "adalora", "optimizer_in_backward": True, "max_grad_norm": 0, "gradient_accumulation_steps": 1},
            "adalora looks at all of them afterwards",
        ),
        ({"adapter": "vera", "optimizer": "galore_adamw"}, "whose weights are small already"),
    ],
)
def test_an_impossible_key_is_refused(small: Small, keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text.replace("?", r"\?")):
        small(**keys)


def test_equal_options_make_equal_trials(small: Small) -> None:
    one = small(adapter="loha", adapter_options={"r": 4, "alpha": 8}, lora_r=4)
    assert small(adapter="loha", adapter_options={"alpha": 8, "r": 4}, lora_r=99, use_dora=True).id == one.id
    assert small(adapter="loha", adapter_options={"r": 5, "alpha": 8}).id != one.id
    assert small(adapter="loha", adapter_options=[["r", 4], ["alpha", 8]], lora_r=4).id == one.id
    assert small(adapter="loha", adapter_options={}).id == small(adapter="loha").id
    assert small(loraplus_lr_ratio=2.0).id != small().id == small(init_lora_weights=True).id
    assert small(adapter="loha", loraplus_lr_ratio=2.0).id == small(adapter="loha").id
    assert TrialSpec.model_validate_json(one.model_dump_json()) == one


def test_losses_before_training_are_of_one_seed_where_an_adapter_begins_at_random(small: Small) -> None:
    prompt = {"adapter": "prompt_tuning", "adapter_options": {"num_virtual_tokens": 4}}
    for keys in (prompt, {"adapter": "loha"}, {"init_lora_weights": "pissa_niter_4"}):
        assert small(**keys).untrained_key != small(**keys, seed=1).untrained_key
    assert small().untrained_key == small(seed=1, lora_r=8, init_lora_weights="default").untrained_key
    assert small(init_lora_weights="pissa").untrained_key != small(init_lora_weights="pissa", lora_r=8).untrained_key


def test_options_reach_the_method(small: Small) -> None:
    spec = small(adapter="loha", adapter_options={"r": 2, "rank_pattern": {"q_proj": 5}})
    shapes = {name: tuple(each.shape) for name, each in model.load(spec, CPU).named_parameters() if "hada_w1_a" in name}
    assert {shape[1] for name, shape in shapes.items() if "q_proj" in name} == {5}
    assert {shape[1] for name, shape in shapes.items() if "q_proj" not in name} == {2}


# ------------------------------------------------------------------------------------ what is refused, what is counted


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"adapter": "hra", "precision": "int8"}, "it computes something else than in fp32"),
        ({"adapter": "hra", "precision": "fp4"}, "adapter hra with precision fp4"),
        (
            {"adapter": "prefix_tuning", "gradient_checkpointing": True, "adapter_options": {"num_virtual_tokens": 4}},
            "adapter prefix_tuning with gradient_checkpointing",
        ),
        (
            {"adapter": "adalora", "num_processes": 2, "sharding": "full_shard", "precision": "fp32"},
            "adapter adalora with sharding full_shard",
        ),
    ],
)
def test_what_was_seen_to_fail_is_refused_beforehand(small: Small, keys: dict[str, Any], text: str) -> None:
    line = refusal(small(**keys))
    assert text in line
    assert f"`harness methods {keys['adapter']}`" in line


def test_another_peft_may_know_how(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small(adapter="hra", precision="int8")
    assert capabilities.refusal(spec) is not None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99")
    assert capabilities.refusal(spec) is None


def test_frozen_parts_of_an_adapter_count_as_its_memory(small: Small) -> None:
    record = run(small(adapter="vera"))
    assert record.status == "ok", record.error
    frozen = 256 * (128 + 128) * 4  # two projections for all layers, as wide as the widest
    assert record.metrics["memory_adapters_bytes"] == frozen + 4 * (record.metrics["trainable_parameters"] or 0)
    assert (record.metrics["adapter_seconds"] or 0) > 0


# ------------------------------------------------------------------------------------ prompts


def test_a_prompt_changes_no_label(small: Small) -> None:
    """The loss is of the same tokens as ever, in full and in parts; the prompt's own positions carry none."""
    keys = {"adapter": "prompt_tuning", "adapter_options": {"num_virtual_tokens": 3}}
    spec = small(**keys)
    torch.manual_seed(0)
    network = model.load(spec, CPU)
    data = batches.load(spec, checkpoints.load_tokenizer(spec))
    batch = next(iter(batches.micro_batches(order.optimizer_steps(spec, data.train)[0], spec, 0, CPU)))
    _, summed = loss.forward(network, network, batch.inputs, spec)
    given = {name: value for name, value in batch.inputs.items() if name != "labels"}
    logits, labels = network(**given).logits[:, 3:-1], batch.inputs["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert float(summed) == pytest.approx(float(expected), rel=1e-6)
    chunked = small(**keys, loss="chunked", loss_chunk_size=50)
    _, in_parts = loss.forward(network, network, batch.inputs, chunked)
    assert float(in_parts) == pytest.approx(float(summed), rel=1e-6)


def test_a_prompt_takes_positions(small: Small) -> None:
    shape = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}
    for tokens, fits in ((64, True), (65, False)):
        options = {"num_virtual_tokens": tokens}
        spec = small(adapter="prompt_tuning", adapter_options=options, sequence_length=256)
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, vocab_size=512, n_positions=320))
        adapted = adapter_methods.attach(network, spec, ())
        assert ((limits.of_model(adapted).positions or 0) >= 256) == fits


def test_noise_is_on_trained_tokens_too(small: Small) -> None:
    spec = small(adapter="trainable_tokens", adapter_options={"token_indices": [1, 2]}, neftune_noise_alpha=5.0)
    network = model.load(spec, CPU)
    tokens = torch.ones(1, 4, dtype=torch.long)
    one, other = (network(input_ids=tokens).logits for _ in range(2))
    assert not torch.equal(one, other)
    network.eval()
    one, other = (network(input_ids=tokens).logits for _ in range(2))
    assert torch.equal(one, other)


def test_weights_of_an_adapter_are_none_of_the_base(small: Small) -> None:
    spec = small(adapter="loha", precision="bf16", adapter_options={"r": 64})
    assert formats.fraction_in(model.load(spec, CPU), "bf16") == 1.0
    assert not inspection.inspect([("trial", spec)]).warnings


# ------------------------------------------------------------------------------------ IA3


def scaled(network: Any) -> dict[str, list[str]]:
    """Ends of the names of layers whose inputs IA3 scales, and of those whose outputs it scales."""
    layers = [(name, each) for name, each in network.named_modules() if isinstance(each, IA3Layer)]
    return {
        side: sorted({".".join(name.split(".")[-2:]) for name, each in layers if each.is_feedforward is inputs})
        for side, inputs in (("inputs", True), ("outputs", False))
    }


@pytest.mark.parametrize(
    ("architecture", "inputs", "outputs"),
    [
        ("llama", ["mlp.down_proj"], ["mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj"]),
        ("gpt2", ["mlp.c_proj"], ["attn.c_attn", "attn.c_proj", "mlp.c_fc"]),
        ("bloom", ["mlp.dense_4h_to_h"], ["mlp.dense_h_to_4h", "self_attention.dense"]),
        ("phi3", [], ["mlp.down_proj", "mlp.gate_up_proj"]),  # peft has no entry for it
    ],
)
def test_ia3_scales_the_side_that_peft_says(
    architecture: str, inputs: list[str], outputs: list[str], small: Small, tmp_path: Path
) -> None:
    spec = small(base_model=tiny_model(tmp_path, architecture), adapter="ia3", precision="fp32")
    layers = scaled(model.load(spec, CPU))
    assert layers["inputs"] == inputs
    assert {*outputs} <= {*layers["outputs"]}


@pytest.mark.parametrize("named", ["mlp.down_proj", "down_proj", "model.layers.0.mlp.down_proj"])
def test_ia3_scales_the_inputs_of_the_layers_that_are_named(named: str, small: Small) -> None:
    spec = small(adapter="ia3", adapter_options={"feedforward_modules": [named, "up_proj"]})
    assert scaled(model.load(spec, CPU))["inputs"] == ["mlp.down_proj", "mlp.up_proj"]


# ------------------------------------------------------------------------------------ AdaLoRA


def test_adalora_adds_its_penalty_once_however_the_loss_is_taken(small: Small) -> None:
    full, chunked = (run(small(adapter="adalora", loss=how)) for how in ("full", "chunked"))
    for a, b in zip(full.steps, chunked.steps, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)
        assert b.auxiliary_loss == pytest.approx(a.auxiliary_loss, rel=1e-4)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3)
    spec = small(adapter="adalora")
    network = model.load(spec, CPU)
    data = batches.load(spec, checkpoints.load_tokenizer(spec))
    batch = next(iter(batches.micro_batches(data.held_out, spec, 0, CPU)))
    with torch.no_grad():
        in_parts = loss.by_example(network, batch.inputs, small(adapter="adalora", loss="chunked"))
        assert [float(x) for x in loss.by_example(network, batch.inputs, spec)] == pytest.approx(
            [float(x) for x in in_parts], rel=1e-5
        )


def test_adalora_has_the_penalty_and_the_schedule_of_peft(small: Small) -> None:
    spec = small(adapter="adalora", precision="bf16")
    torch.manual_seed(0)
    network = model.load(spec, CPU)
    assert not any(each.requires_grad for name, each in network.named_parameters() if ".ranknum." in name)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    plain = network.get_base_model()(input_ids=tokens, labels=tokens).loss
    of_peft = network(input_ids=tokens, labels=tokens).loss - plain
    term = loss.auxiliary(network, network(input_ids=tokens))
    assert term is not None
    assert float(term) == pytest.approx(float(of_peft), rel=1e-3)
    data = batches.load(spec, checkpoints.load_tokenizer(spec))
    trainer = Trainer(network, spec, CPU, 4)
    kept = []
    for step in order.optimizer_steps(spec, data.train):
        trainer.step(list(batches.micro_batches(step, spec, 0, CPU)))
        kept.append(sum(int((each != 0).sum()) for name, each in network.named_parameters() if ".lora_E." in name))
    layers = 14
    assert kept[-1] == 8 * layers < 12 * layers, "the target rank at the end"
    assert kept == sorted(kept, reverse=True)


def test_a_schedule_that_is_longer_than_the_training_is_refused(small: Small) -> None:
    spec = small(adapter="adalora", adapter_options={"tinit": 2, "tfinal": 2})
    assert "tinit 2 and tfinal 2 leave no step of 4" in refusal(spec)
    record = run(spec)
    assert record.status == "failed"
    assert "leave no step of 4" in (record.error or "")
    assert run(small(adapter="adalora", adapter_options={"tinit": 1, "tfinal": 2})).status == "ok"


# ------------------------------------------------------------------------------------ beginnings and rates of LoRA


@pytest.mark.parametrize("how", ["pissa", "olora", "mica", "orthogonal", "gaussian"])
def test_an_initialisation_begins_with_the_base_and_is_kept(small: Small, how: str, tmp_path: Path) -> None:
    spec = small(init_lora_weights=how, learning_rate=0.02)
    torch.manual_seed(0)
    network = model.load(spec, CPU)
    data = batches.load(spec, checkpoints.load_tokenizer(spec))
    held_out = batches.collate(data.held_out, 0, CPU)
    base = methods.logits(model.base(spec, CPU), spec, held_out)
    assert methods.distance(methods.logits(network, spec, held_out), base) < 1e-5
    weights = {name: each for name, each in network.named_parameters() if ".lora_B." in name}
    begins_at_zero = all(not each.any() for each in weights.values())
    assert begins_at_zero == (how == "gaussian")
    network, held_out = methods.trained(spec)
    reference = methods.logits(network, spec, held_out)
    assert methods.distance(reference, base) > 1e-3
    saved_adapters.write(network, spec, tmp_path)
    loaded = saved_adapters.load(model.base(spec, CPU), tmp_path)
    assert methods.distance(methods.logits(loaded, spec, held_out), reference) < 1e-4
    assert methods.distance(methods.logits(saved_adapters.merged(network), spec, held_out), reference) < 1e-4


def test_olora_takes_parts_of_quantised_weights_too(small: Small) -> None:
    spec = small(init_lora_weights="olora", precision="nf4")
    record = run(spec)
    assert record.status == "ok", record.error
    assert peak.predict(spec, "cpu").peak_memory_bytes == pytest.approx(record.metrics["peak_memory_bytes"], rel=0.001)


def test_loraplus_trains_b_at_a_multiple_of_the_rate(small: Small) -> None:
    spec = small(loraplus_lr_ratio=16.0, weight_decay=0.1, learning_rate=1e-3)
    network = model.load(spec, CPU)
    made = optimizers.make(network, spec, 0)
    names = {id(each): name for name, each in network.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in made.param_groups for p in group["params"]}
    assert len(rates) == len(model.trainable(network))
    for name, rate in rates.items():
        assert rate == pytest.approx(16e-3 if ".lora_B." in name else 1e-3)
    recorded = run(spec)
    assert recorded.status == "ok", recorded.error
    assert recorded.steps[0].learning_rate == pytest.approx(1e-3)
    plain = run(small(weight_decay=0.1, learning_rate=1e-3))
    assert recorded.steps[-1].loss < plain.steps[-1].loss - 0.01, "B moves faster"


def test_loraplus_has_the_rates_of_pefts(small: Small) -> None:
    """Vectors, such as DoRA's magnitudes, move as fast as B."""
    spec = small(loraplus_lr_ratio=16.0, use_dora=True, learning_rate=1e-3, lora_modules_to_save=["lm_head", "norm"])
    network = model.load(spec, CPU)

    def rates(made: torch.optim.Optimizer) -> dict[int, float]:
        return {id(p): group["lr"] for group in made.param_groups for p in group["params"]}

    theirs = create_loraplus_optimizer(network, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    assert rates(optimizers.make(network, spec, 0)) == pytest.approx(rates(theirs))
    assert len(rates(theirs)) == len(model.trainable(network))


def test_loraplus_is_refused_on_embeddings(small: Small) -> None:
    spec = small(loraplus_lr_ratio=16.0, lora_target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(InputError, match=r"run: loraplus_lr_ratio with an adapter on embed_tokens.*; leave it out of"):
        inspection.inspect([("run", spec)])
    inspection.inspect([("run", spec.model_copy(update={"loraplus_lr_ratio": None}))])


def test_lora_fa_trains_b_alone_and_holds_less(small: Small) -> None:
    spec = small(optimizer="lora_fa")
    torch.manual_seed(0)
    before = {n: p.clone() for n, p in model.load(spec, CPU).named_parameters() if ".lora_A." in n}
    network, _ = methods.trained(spec)
    assert all(torch.equal(p, before[n]) for n, p in network.named_parameters() if n in before)
    assert any(bool(p.any()) for n, p in network.named_parameters() if ".lora_B." in n)
    records = {name: run(small(optimizer=name)) for name in ("adamw_torch", "lora_fa")}
    plain, frozen = (records[name].metrics for name in ("adamw_torch", "lora_fa"))
    # A of each layer is not trained, and its input is not kept for it.
    assert (frozen["trainable_parameters"] or 0) < (plain["trainable_parameters"] or 0)
    assert (frozen["memory_adapters_bytes"] or 0) == plain["memory_adapters_bytes"]
    assert (frozen["peak_memory_bytes"] or 0) < 0.9 * (plain["peak_memory_bytes"] or 0)
    predicted = peak.predict(spec, "cpu").peak_memory_bytes
    assert predicted == pytest.approx(frozen["peak_memory_bytes"], rel=0.001)


def test_lora_fa_trains_b_of_embeddings_too(small: Small) -> None:
    record = run(small(optimizer="lora_fa", lora_target_modules=["q_proj", "embed_tokens"], lora_target_linear=False))
    assert record.status == "ok", record.error


# ------------------------------------------------------------------------------------ as large as the baseline


def test_sizes_come_as_near_as_there_are_sizes(small: Small) -> None:
    """By counting: LoRA has r (in + out) weights on a layer, LoHa 2 r (in + out), HRA r in, C3A in x out / block."""
    widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)] * 2
    baseline = small(lora_r=8)
    wanted = 8 * sum(i + o for i, o in widths)
    counts: dict[str, Callable[[int], float]] = {
        "loha": lambda r: 2 * r * sum(i + o for i, o in widths),
        "hra": lambda r: r * sum(i for i, _ in widths),
        "c3a": lambda block: sum(i * o for i, o in widths) / block,
        "prompt_tuning": lambda tokens: 64 * tokens,
    }
    specs = [small(adapter=name, adapter_options=methods.OPTIONS.get(name)) for name in counts]
    matched = matching.match([("", spec) for spec in specs], baseline, "trainable_parameters")
    for (name, count), each in zip(counts.items(), matched, strict=True):
        option, _, size = each.size.partition(" ")
        assert dict(each.spec.adapter_options or ())[option] == int(size)
        assert each.ratio == pytest.approx(count(int(size)) / wanted)
        others = [2**power for power in range(6)] if name == "c3a" else [int(size) - 1, int(size) + 1]
        for other in others:
            assert abs(count(other) / wanted - 1) >= abs(each.ratio - 1) - 1e-9, f"{name}: {other} is nearer"
    assert [round(each.ratio, 2) for each in matched] == [1.0, 1.0, 1.12, 1.0]


def test_a_method_of_one_size_says_how_large_it_is(small: Small) -> None:
    trials = [("IA3", small(adapter="ia3")), ("DoRA", small(use_dora=True))]
    each, kept = matching.match(trials, small(), "trainable_parameters")
    assert each.size == ""
    assert each.ratio == pytest.approx(1152 / 8192)
    assert kept.spec.lora_r == 4, "a variant of LoRA at LoRA's rank"


def test_sizes_that_do_not_go_with_the_layers_are_passed_over(small: Small) -> None:
    """GraLoRA's rank is a multiple of its blocks; what cannot be built without values keeps its size."""
    gralora, shira = (small(adapter=name, adapter_options=None) for name in ("gralora", "shira"))
    each, kept = matching.match([("", gralora), ("", shira)], small(lora_r=7), "trainable_parameters")
    rank = int(each.size.partition(" ")[2])
    assert rank % 2 == 0
    assert each.ratio == pytest.approx(1, abs=0.2)
    assert (kept.size, kept.ratio, kept.spec) == ("", None, shira)


def test_a_model_that_cannot_be_built_is_named(small: Small) -> None:
    with pytest.raises(InputError, match=r"^narrow: adapter_options\.rr"):
        matching.match([("narrow", small(adapter="ia3", adapter_options={"rr": 1}))], small(), "trainable_parameters")


def test_peaks_are_matched_too(small: Small) -> None:
    baseline = small(lora_r=64)
    (each,) = matching.match([("", small(adapter="loha"))], baseline, "peak_memory_bytes")
    assert each.ratio == pytest.approx(1, abs=0.01)
    peaks = [peak.predict(spec, "cpu").peak_memory_bytes for spec in (each.spec, baseline)]
    assert peaks[0] / peaks[1] == pytest.approx(each.ratio)


@pytest.mark.long
def test_a_grid_solves_sizes_before_it_runs_and_says_which_do_not_fit(ask: Ask, tmp_path: Path) -> None:
    grid = {
        "name": "sizes",
        "base": methods.SMALL | {"device": "cpu", "lora_r": 8, "train_samples": 4},
        "match": "trainable_parameters",
        "repeats": 2,
        "visits": 0,
        "vary": {"method": {"LoHa": {"adapter": "loha"}, "IA3": {"adapter": "ia3"}}},
    }
    file = tmp_path / "sizes.yml"
    file.write_text(json.dumps(grid))
    code, printed, errors = ask("run", str(file), "--no-predict")
    assert code == 0, errors
    assert printed.count("LoHa: r 4, 1.00 of the baseline's") == 1
    assert "IA3: has one size alone, 0.07 of the baseline's" in printed
    rows = Store(tmp_path / "results/sizes").read("trials").to_pylist()
    sizes = {(row["label"], row["repeat"]): row["trainable_parameters"] for row in rows}
    assert sizes["LoHa", 0] == sizes["LoHa", 1] == sizes["baseline", 0] == 16384
    assert {row["seed"] for row in rows if row["label"] == "LoHa"} == {0, 1}
    table = tables.techniques(comparison.compare(loading.load(tmp_path / "results/sizes")))
    measurements = loading.load(tmp_path / "results/sizes")
    # A claim compares methods whose sizes differ, each its own; and finds one by its options.
    assert len(measurements.pairs(Contrast(compare={"adapter": ("lora", "loha")}))) == 1
    assert recorded_level("adapter_options", {"r": 4}) in set(measurements.configs["adapter_options"])
    cards = document.document(measurements, tmp_path / "results/sizes").tables
    (card,) = (each for each in cards if each.id == "adapters")
    shown = {row[0].text: [cell.text for cell in row] for row in card.rows}
    assert shown["LoHa"][1:4] == ["r 4", "0.0002", "16,384"]
    assert shown["baseline"][1] == "rank 8"
    assert shown["IA3"][1] == "–"
    labels = [row[0].text for row in table.rows]
    assert "IA3 (0.07× the trainable parameters, unmatched)" in labels
    assert "LoHa" in labels


# ------------------------------------------------------------------------------------ a learning rate for each


def test_the_stories_to_tune_on_are_others(small: Small) -> None:
    spec, tuning = small(val_set_size=4.0), small(val_set_size=4.0, held_out_part="tuning")
    tokenizer = checkpoints.load_tokenizer(spec)
    compared, tuned = (batches.load(each, tokenizer) for each in (spec, tuning))
    judged = [{example.story_id for example in data.held_out} for data in (compared, tuned)]
    assert len(judged[0]) == len(judged[1]) == 4
    assert not judged[0] & judged[1]
    trained = {example.story_id for example in tuned.train}
    assert not trained & (judged[0] | judged[1]), "neither is trained on"
    assert len(trained) == len(compared.train) - 4
    assert "4 neither trained nor evaluated on" in tuned.describe(tuning)


def test_configurations_that_become_one_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "grid.yml"
    file.write_text(json.dumps({"base": {"base_model": "random:tiny"}, "vary": {"lora_r": [4, 8]}}))
    grid = load(file)
    specs = {t.spec.id: t.spec.model_copy(update={"lora_r": 16}) for t in grid.trials}
    with pytest.raises(InputError, match="are one configuration"):
        grid.with_specs(specs)


def test_options_of_the_base_are_not_those_of_another_method(tmp_path: Path) -> None:
    base = {"base_model": "random:tiny", "adapter": "loha", "adapter_options": {"r": 4}}
    file = tmp_path / "grid.yml"
    vary = {"method": {"full": {"adapter": "none"}, "IA3": {"adapter": "ia3"}, "larger": {"learning_rate": 1e-3}}}
    file.write_text(json.dumps({"base": base, "vary": vary}))
    options = {trial.label: trial.spec.adapter_options for trial in load(file).trials}
    assert options["full"] is options["IA3"] is None
    assert options["larger"] == options["baseline"] == (("r", 4),)


@pytest.mark.long
def test_each_configuration_gets_its_learning_rate_first(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    checkpoints._random_checkpoint(models.ARCHITECTURES["tiny"], tmp_path / "model")
    checkpoints.byte_tokenizer().save_pretrained(tmp_path / "model")
    grid = {
        "name": "tuned",
        "base": methods.SMALL | {"base_model": str(tmp_path / "model"), "device": "cpu"},
        "tune_first": {"learning_rate": [1e-6, 0.01, 1e4]},
        "repeats": 2,
        "visits": 0,
        "vary": {"method": {"IA3": {"adapter": "ia3", "learning_rate": 5e-5}}},
    }  # fmt: skip
    file = tmp_path / "tuned.yml"
    inline = ("--no-predict", "--engine", "inline")
    file.write_text(json.dumps(grid))
    _, printed, errors = ask("run", str(file), *inline, "--limit", "1")
    assert "the comparison begins once all of them are done" in printed, errors
    assert not (tmp_path / "results/tuned").exists()
    _, _, errors = ask("run", str(file), *inline, "--limit", "7")
    assert len(Store(tmp_path / "results/tuned").completed()) == 2, errors
    code, _, errors = ask("run", str(file), *inline)
    assert code == 0, errors
    _, printed, _ = ask("run", str(file), "--dry-run")
    assert "6 trainings find the learning rates, 0 of them to run" in printed
    assert "5 trials, 0 to run" in printed, "at the rates that were found"
    assert ask("run", str(file), *inline, "--only", "IA3")[0] == 0
    trainings = Store(tmp_path / "results/tuned-rates").read("trials").to_pylist()
    assert len(trainings) == 6
    assert {row["held_out_part"] for row in trainings} == {"tuning"}
    losses = {
        label: {row["learning_rate"]: row["eval_loss"] for row in trainings if row["label"].startswith(label)}
        for label in ("baseline", "IA3")
    }
    best = {label: min(tried, key=lambda rate: tried[rate] or 99.0) for label, tried in losses.items()}
    assert best["baseline"] == 0.01, "neither too slow nor diverging"
    rows = Store(tmp_path / "results/tuned").read("trials").to_pylist()
    assert len(rows) == 5
    for row in rows:
        assert row["learning_rate"] == best["IA3" if row["label"] == "IA3" else "baseline"]
        assert row["held_out_part"] == "comparison"
    measurements = loading.load(tmp_path / "results/tuned")
    assert measurements.baseline is not None
    shown = adapter_tables.learning_rates(measurements.tuned) if measurements.tuned else None
    assert shown is not None
    assert "6 trainings" in shown.note
    assert [row[0].text for row in shown.rows] == ["baseline", "IA3"]
    assert shown.rows[0][2].value == pytest.approx(losses["baseline"][0.01])


def test_multiples_are_of_the_rate_of_each_configuration(tmp_path: Path) -> None:
    grid = {
        "base": {"base_model": "smollm2-135m-instruct", "learning_rate": 2e-3},
        "tune_first": {"learning_rate": {"multiples": [4, 0.25]}},
        "repeats": 2,
        "vary": {"method": {"IA3": {"adapter": "ia3", "learning_rate": 3.2e-2}}},
    }
    file = tmp_path / "grid.yml"
    for given, multiples in ((grid, (0.25, 4)), (grid | {"tune_first": "learning_rate"}, (0.316, 1, 3.16, 10))):
        file.write_text(json.dumps(given))
        trials = learning_rates.grid_of_rates(load(file)).trials
        rates = {(trial.label.split(",")[0], trial.spec.learning_rate) for trial in trials}
        assert len(rates) == len(trials) == 2 * len(multiples)
        for label, rate in rates:
            own = 3.2e-2 if label == "IA3" else 2e-3
            assert min(abs(rate / own / multiple - 1) for multiple in multiples) < 0.01


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"tune_first": {"learning_rate": {"multiples": [1]}}}, "with two or more"),
        ({"tune_first": {"learning_rate": {"times": [1, 2]}}}, "with two or more"),
        ({"tune_first": "rank"}, "use learning_rate, or learning_rate: [1e-4"),
        ({"tune_first": {"learning_rate": [1e-4]}}, "with two or more"),
        ({"tune_first": {"learning_rate": [1e-4, -1]}}, "with two or more"),
        ({"tune_first": "learning_rate"}, "give a pretrained base_model"),
        (
            {
                "tune_first": "learning_rate",
                "base": {"base_model": "smollm2-135m-instruct"},
                "vary": {"learning_rate": [1]},
            },
            "tune_first chooses the learning rate of each configuration",
        ),
        ({"match": "parameters"}, "unknown match 'parameters'"),
        ({"match": "trainable_parameters", "design": "grid"}, "match goes with a baseline"),
    ],
)
def test_a_grid_key_that_cannot_be_is_one_line(tmp_path: Path, keys: dict[str, Any], text: str) -> None:
    file = tmp_path / "grid.yml"
    file.write_text(json.dumps({"base": {"base_model": "random:tiny"}, "vary": {"lora_r": [4]}} | keys))
    with pytest.raises(InputError) as error:
        load(file)
    assert text in str(error.value)
    assert "\n" not in str(error.value)
