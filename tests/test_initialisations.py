"""Initialisations of LoRA by data, and by weights as they were before they were quantised."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM
from trials import run

from harness.errors import InputError
from harness.predict import peak
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, initialisations, inspection, model, quantisers, saved_adapters

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import methods

Small = Callable[..., TrialSpec]
CPU = torch.device("cpu")


def initialised(spec: TrialSpec) -> tuple[Any, batches.Data]:
    torch.manual_seed(spec.seed)
    network = model.load(spec, CPU)
    data = batches.load(spec, checkpoints.load_tokenizer(spec))
    with torch.no_grad():
        if spec.init_lora_weights == "eva":
            initialisations.eva(network, data.train, 0, CPU, size=spec.micro_batch_size)
        elif spec.init_lora_weights == "corda":
            initialisations.corda(network, data.train, 0, CPU)
        else:
            initialisations.loftq(network, lambda: model.base(model.unquantised(spec), CPU))
    return network, data


def factors(network: Any, of: str) -> dict[str, torch.Tensor]:
    return {name: each.detach() for name, each in network.named_parameters() if f".{of}." in name}


def test_eva_takes_the_directions_in_which_inputs_vary_most(small: Small) -> None:
    spec = small(init_lora_weights="eva", lora_r=4)
    network, data = initialised(spec)
    inputs: list[torch.Tensor] = []
    layer = network.get_base_model().model.layers[1].mlp.up_proj
    handle = layer.register_forward_hook(lambda _, given, __: inputs.append(given[0].detach()))
    for example in data.train:
        batch = batches.collate([example], 0, CPU).inputs
        with torch.no_grad():
            network(**batch)
        inputs[-1] = inputs[-1][batch["labels"] != -100]
    handle.remove()
    tokens = torch.cat(inputs)
    tokens = tokens - tokens.mean(0)
    best = torch.linalg.svdvals(tokens)[:4].square().sum()
    directions = layer.lora_A.default.weight.detach()
    torch.testing.assert_close(directions @ directions.T, torch.eye(4), atol=1e-3, rtol=0)
    assert (tokens @ directions.T).square().sum() > 0.9 * best
    of_another_seed, _ = initialised(spec.model_copy(update={"seed": 1}))
    for name, each in factors(of_another_seed, "lora_A").items():
        torch.testing.assert_close(each, factors(network, "lora_A")[name])


def test_eva_changes_nothing_yet_and_is_kept(small: Small, tmp_path: Path) -> None:
    spec = small(init_lora_weights="eva")
    network, data = initialised(spec)
    held_out = batches.collate(data.held_out, 0, CPU)
    base = methods.logits(model.base(spec, CPU), spec, held_out)
    assert methods.distance(methods.logits(network, spec, held_out), base) < 1e-6
    assert spec.untrained_key == small(init_lora_weights="eva", seed=1).untrained_key
    for each in factors(network, "lora_B").values():
        torch.nn.init.normal_(each)
    saved_adapters.write(network, spec, tmp_path)
    loaded = saved_adapters.load(model.base(spec, CPU), tmp_path)
    reference = methods.logits(network, spec, held_out)
    assert methods.distance(reference, base) > 1e-3
    assert methods.distance(methods.logits(loaded, spec, held_out), reference) < 1e-5


def test_corda_takes_out_of_the_weights_what_matters_for_the_data(small: Small) -> None:
    spec = small(init_lora_weights="corda", lora_alpha=16)
    network, data = initialised(spec)
    held_out = batches.collate(data.held_out, 0, CPU)
    base = model.base(spec, CPU)
    reference = methods.logits(base, spec, held_out)
    assert methods.distance(methods.logits(network, spec, held_out), reference) < 1e-4
    with network.disable_adapter():
        residual = methods.distance(methods.logits(network, spec, held_out), reference)
    pissa = model.load(small(init_lora_weights="pissa", lora_alpha=16), CPU)
    with pissa.disable_adapter():
        assert residual > methods.distance(methods.logits(pissa, spec, held_out), reference)
    assert not network.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.equal(
        base.model.layers[0].mlp.up_proj.weight
    )


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_loftq_makes_up_for_quantising(small: Small, precision: str) -> None:
    distances = []
    for rank in (0, 8, 32):
        spec = small(init_lora_weights="loftq", precision=precision, lora_r=max(rank, 1), lora_alpha=16)
        network, data = initialised(spec)
        held_out = batches.collate(data.held_out, 0, CPU)
        reference = methods.logits(model.base(small(precision="bf16"), CPU), spec, held_out)
        if rank == 0:
            with network.disable_adapter():
                distances.append(methods.distance(methods.logits(network, spec, held_out), reference))
        else:
            distances.append(methods.distance(methods.logits(network, spec, held_out), reference))
    plain, some, more = distances
    assert more < some < plain


@pytest.mark.parametrize(
    ("how", "keys"),
    [
        ("eva", {}),
        ("eva", {"precision": "nf4", "gradient_checkpointing": True}),
        ("eva", {"use_dora": True, "adapter_dtype": "bf16"}),
        ("corda", {}),
        ("corda", {"precision": "bf16"}),
        ("loftq", {"precision": "nf4"}),
        ("loftq", {"precision": "int8"}),
    ],
)
def test_a_trial_begins_so_and_says_what_it_took(small: Small, how: str, keys: dict[str, Any]) -> None:
    spec = small(init_lora_weights=how, **keys)
    record = run(spec)
    assert record.status == "ok", record.error
    metrics = record.metrics
    plain = run(small(**keys))
    assert metrics["adapter_seconds"] > plain.metrics["adapter_seconds"]
    assert metrics["trainable_parameters"] == plain.metrics["trainable_parameters"]
    predicted = peak.predict(spec, "cpu").peak_memory_bytes
    assert predicted == pytest.approx(metrics["peak_memory_bytes"], rel=0.005)
    assert metrics["memory_adapters_bytes"] == plain.metrics["memory_adapters_bytes"]
    assert metrics["memory_weights_bytes"] == plain.metrics["memory_weights_bytes"]
    assert record.steps[-1].loss != plain.steps[-1].loss


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"init_lora_weights": "eva", "lora_r": 65}, "has 64 directions, and lora_r is 65"),
        ({"init_lora_weights": "corda", "lora_r": 33}, "has 32 directions, and lora_r is 33"),
        ({"init_lora_weights": "loftq", "precision": "nf4", "lora_r": 33}, "has 32 directions"),
        ({"init_lora_weights": "eva", "lora_target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens is not linear"),
        ({"init_lora_weights": "corda", "lora_target_modules": ["lm_head", "q_proj"]}, "leave lm_head out of"),
        ({"init_lora_weights": "pissa", "lora_target_modules": ["lm_head", "q_proj"]}, "which another layer has too"),
    ],
)
def test_layers_that_it_cannot_be_of_are_refused_beforehand(small: Small, keys: dict[str, Any], text: str) -> None:
    spec = small(**keys)
    with pytest.raises(InputError, match=text):
        inspection.inspect([("trial", spec)])
    with pytest.raises(InputError, match=text):
        model.load(spec, CPU)


def test_loftq_leaves_alone_what_was_not_quantised(small: Small) -> None:
    spec = small(init_lora_weights="loftq", precision="nf4", lora_target_modules=["q_proj", "lm_head"])
    network, _ = initialised(spec)
    begins = {name: bool(each.any()) for name, each in network.named_parameters() if ".lora_" in name}
    assert all(there for name, there in begins.items() if "lora_A" in name)
    assert not any(there for name, there in begins.items() if "lm_head" in name and "lora_B" in name)
    with pytest.raises(InputError, match="no layer with an adapter is quantised"):
        initialised(small(init_lora_weights="loftq", precision="nf4", lora_target_modules=["lm_head"]))


def gpt2(folder: Path) -> str:
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=2, vocab_size=512, n_positions=256)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    checkpoints.byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_loftq_of_layers_that_quantising_turns(small: Small, tmp_path: Path) -> None:
    keys = {"base_model": gpt2(tmp_path / "gpt2"), "lora_target_modules": ["c_attn", "c_proj"], "lora_alpha": 16}
    spec = small(init_lora_weights="loftq", precision="nf4", lora_r=32, **keys)
    network, _ = initialised(spec)
    before = model.base(small(**keys), CPU)
    for name, layer in initialisations.layers(network).items():
        weight = before.get_submodule(name).weight.T
        quantised = quantisers.dequantised(layer.get_base_layer()).float()
        update = layer.get_delta_weight("default")
        assert torch.dist(weight, quantised + update) < 0.75 * torch.dist(weight, quantised), name


@pytest.mark.parametrize("how", ["eva", "corda"])
def test_models_of_other_kinds(small: Small, how: str, tmp_path: Path) -> None:
    """GPT-2 has turned weights; OPT gives some layers all positions in one row."""
    config = AutoConfig.for_model(
        "opt", hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=512,
        max_position_embeddings=512, word_embed_proj_dim=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "opt")
    checkpoints.byte_tokenizer().save_pretrained(tmp_path / "opt")
    for base in (gpt2(tmp_path / "gpt2"), str(tmp_path / "opt")):
        record = run(small(base_model=base, init_lora_weights=how, lora_target_linear=True))
        assert record.status == "ok", record.error


def test_directions_that_never_settle_end_in_a_line() -> None:
    passes = initialisations._Passes([{}, {}])
    drawn = itertools.islice(itertools.cycle(passes), 1000)
    with pytest.raises(InputError, match="still change after 20 passes over 2 batches"):
        list(drawn)


def test_batches_have_more_tokens_than_directions_are_wanted(small: Small) -> None:
    spec = small(init_lora_weights="eva")
    examples = batches.load(spec, checkpoints.load_tokenizer(spec)).train[:7]
    tokens = [sum(label != batches.IGNORED for label in example.labels) for example in examples]
    rank = sum(tokens) // (3 * initialisations._TOKENS_PER_RANK)
    groups = initialisations._groups(examples, 2, rank)
    assert [example for group in groups for example in group] == list(examples)
    assert 1 < len(groups) < 4
    for group in groups:
        carry = sum(label != batches.IGNORED for example in group for label in example.labels)
        assert carry >= initialisations._TOKENS_PER_RANK * rank
    with pytest.raises(InputError, match="use a lower lora_r, or more stories"):
        initialisations._groups(examples, 2, sum(tokens))


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"init_lora_weights": "corda", "precision": "nf4"}, "weights that are not quantised"),
        ({"init_lora_weights": "corda", "save_adapter": True}, "is found of data, and cannot be found again"),
        ({"init_lora_weights": "corda", "use_dora": True}, "whose norms are of the weights before it"),
        ({"init_lora_weights": "loftq"}, "it makes up for quantising; use precision: nf4"),
        ({"init_lora_weights": "loftq", "precision": "nf4", "save_adapter": True}, "use olora"),
        ({"init_lora_weights": "eva", "lora_target_parameters": ["experts.up"]}, "it is of linear layers"),
        ({"init_lora_weights": "lora_ga"}, "use eva"),
    ],
)
def test_what_cannot_be_is_refused(small: Small, keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        small(**keys)
