"""Where adapters are: targets match or are refused, text reaches what is trained, merging changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from test_launch import Watch

from harness.adapters import merge, trained
from harness.analysis import loading
from harness.environment import current
from harness.errors import InputError
from harness.grids import grid, search_file
from harness.grids.claims import recorded_level
from harness.grids.grid import Grid, Trial
from harness.grids.yaml_file import read_yaml, spec_to_yaml
from harness.launch.inline import InlineLauncher
from harness.record import Job
from harness.results.schema import spec_of
from harness.results.store import Store
from harness.runner.grid_run import run_grid
from harness.spec.trial import TrialSpec

LLAMA = {
    "model_type": "llama", "vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 48, "max_position_embeddings": 512, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
          "image_size": 28, "patch_size": 14}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": LLAMA,
    "tied": LLAMA | {"tie_word_embeddings": True},
    "experts": LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1},
    "unknown": LLAMA | {"model_type": "phi3", "pad_token_id": 1},
    "images": {
        "model_type": "gemma3", "vision_config": VISION, "mm_tokens_per_image": 4, "boi_token_index": 4,
        "eoi_token_index": 5, "image_token_index": 6,
        "text_config": {k: v for k, v in LLAMA.items() if k != "model_type"} | {"head_dim": 16, "sliding_window": 32},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from harness.training import checkpoints

    folder = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(folder / name)
        checkpoints.byte_tokenizer().save_pretrained(folder / name)
    return folder


def spec(models: Path, name: str, **given: Any) -> TrialSpec:
    """A short training of one of the models in fp32."""
    return TrialSpec.model_validate(
        SMALL | {"base_model": str(models / name), "precision": "fp32", "val_set_size": 4, "lora_r": 4} | given
    )


# ------------------------------------------------------------------------------------ spelling


def load(folder: Path, text: str) -> Grid:
    """The grid of a text."""
    (folder / "g.yml").write_text("name: g\n" + text)
    return grid.load(folder / "g.yml")


def test_targets_are_names_or_one_pattern_or_all_linear(tmp_path: Path) -> None:
    made = load(
        tmp_path,
        "base: {base_model: random:tiny, lora_target_modules: [q_proj]}\n"
        "vary: {lora_target_modules: [[q_proj, v_proj], all-linear, '.*attn.*proj', v_proj, [o_proj], o_proj]}\n",
    )
    levels = {t.label: (t.spec.lora_target_modules, t.spec.lora_target_linear) for t in made.trials if not t.twin}
    assert levels == {
        "baseline": (("q_proj",), False),
        "lora_target_modules=q_proj+v_proj": (("q_proj", "v_proj"), False),
        "lora_target_modules=all-linear": (None, True),
        "lora_target_modules=.*attn.*proj": ((".*attn.*proj",), False),
        "lora_target_modules=v_proj": (("v_proj",), False),
        "lora_target_modules=o_proj": (("o_proj",), False),
    }


@pytest.mark.parametrize("text", ["all-linear", "[all-linear]", "null"])
def test_all_linear_is_the_default(text: str, tmp_path: Path) -> None:
    (trial,) = load(tmp_path, f"base: {{base_model: random:tiny, lora_target_modules: {text}}}\n").trials
    assert trial.spec.id == TrialSpec(base_model="random:tiny").id


def test_a_pattern_is_read_back_as_it_was(tmp_path: Path) -> None:
    given = TrialSpec.model_validate(SMALL | {"lora_target_modules": r".*\.(q|v)_proj"})
    (tmp_path / "t.yml").write_text(spec_to_yaml(given))
    assert TrialSpec.model_validate(read_yaml(tmp_path / "t.yml")).id == given.id
    assert TrialSpec.model_validate_json(given.model_dump_json()) == given


def test_a_search_has_each_as_a_choice(tmp_path: Path) -> None:
    (tmp_path / "g.yml").write_text(
        "name: g\nbase: {base_model: random:tiny, train_samples: 8}\n"
        "tune: {objectives: [peak_memory_bytes], "
        "space: {lora_target_modules: [[q_proj, v_proj], all-linear, '.*attn.*proj'], adapter: [lora, qlora]}}\n"
    )
    search = search_file.load(tmp_path / "g.yml")
    assert [list(p.choices) for p in search.parameters] == [
        ["q_proj+v_proj", "all-linear", ".*attn.*proj"], ["lora", "qlora"],
    ]  # fmt: skip
    chosen = {"lora_target_modules": "all-linear", "adapter": "qlora"}
    _, made = search.walk(lambda parameter: chosen[parameter.name])
    assert (made.lora_target_modules, made.lora_target_linear, made.precision) == (None, True, "nf4")
    assert search.place(made) == chosen


def test_claims_name_levels_as_grids_do() -> None:
    def level(value: Any) -> Any:
        return recorded_level("lora_target_modules", value)

    assert (level(None), level("any"), level("all-linear")) == (None, "any", None)
    assert level("q_proj") == level(["q_proj"]) == '["q_proj"]'
    assert level([["q_proj", "v_proj"], [".*"]]) == ['["q_proj", "v_proj"]', '[".*"]']
    assert recorded_level("precision", ["nf4", "fp4"]) == ["nf4", "fp4"]


# ------------------------------------------------------------------------------------ matching


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("plain", ["q_proj", "W_pack", "query_key_value"], "no module W_pack or query_key_value; its layers .* q_proj"),
        ("plain", ["q_porj"], r"no module q_porj; did you mean q_proj\?"),
        ("plain", ".*attend.*", r"matches the whole name of no module; names are like model\.layers\.0\.self_attn"),
        ("plain", "q_proj|v_proj", "matches the whole name of no module"),
        ("plain", ["q_proj", "norm"], "'norm' matches model.norm, a LlamaRMSNorm, which cannot have an adapter"),
        ("plain", ".*mlp.*", r"matches model\.layers\.0\.mlp, a LlamaMLP"),
        ("experts", ["q_proj", "w1"], "without also targeting w3"),
        ("experts", ["q_proj", "gate_proj"], "no module gate_proj"),
        ("images", ["q_proj", "out_proj"], r"out_proj is model\.vision_tower\..* alone, which text does not reach"),
    ],
)  # fmt: skip
def test_a_target_without_a_layer_is_refused(name: str, targets: Any, message: str, models: Path) -> None:
    from harness.training import model

    with pytest.raises(InputError, match=message) as error:
        model.skeleton(spec(models, name, lora_target_modules=targets))
    assert "\n" not in str(error.value)


def test_an_architecture_without_defaults_is_refused(models: Path) -> None:
    from harness.training import model

    with pytest.raises(InputError, match=r"no default layers for phi3; name them in lora_target_modules .*qkv_proj"):
        model.skeleton(spec(models, "unknown", lora_target_linear=False))


@pytest.mark.parametrize(
    ("name", "targets", "adapted"),
    [
        ("plain", ["layers.1.self_attn.q_proj"], {"model.layers.1.self_attn.q_proj"}),
        ("plain", r".*\.1\.self_attn\.[qv]_proj", {f"model.layers.1.self_attn.{x}_proj" for x in "qv"}),
        ("plain", "lm_head", {"lm_head"}),
        ("experts", ["w1", "w3"], {f"model.layers.{i}.mlp.experts" for i in (0, 1)}),
        ("images", ["q_proj"], {f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)}),
    ],
)
def test_adapters_are_where_the_targets_say(name: str, targets: Any, adapted: set[str], models: Path) -> None:
    from harness.training import model

    network = model.skeleton(spec(models, name, lora_target_modules=targets))
    names = [each for each, p in network.named_parameters() if p.requires_grad]
    assert {each.partition(".lora_")[0].removeprefix("base_model.model.") for each in names} == adapted


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"lora_target_modules": ["all-linear", "lm_head"]},
        {"precision": "int4", "quantizer": "hqq"},
        {"adapter": "loha"},
    ],
    ids=str,
)
def test_layers_are_chosen_by_their_indices_among_all_linear_ones(keys: dict[str, Any], models: Path) -> None:
    from harness.training import model

    if keys.get("quantizer") == "hqq":
        pytest.importorskip("hqq")
    network = model.skeleton(spec(models, "plain", **keys, adapter_options={"layers_to_transform": [1]}))
    names = {each for each, p in network.named_parameters() if p.requires_grad}
    layers = {each.partition(".layers.")[2].partition(".")[0] for each in names}
    assert layers == ({"1", ""} if "lora_target_modules" in keys else {"1"})  # the head is in none, and named
    assert sum(".q_proj." in each for each in names) == sum(".down_proj." in each for each in names) > 0


# ------------------------------------------------------------------------------------ what text reaches


@pytest.mark.parametrize("given", [{"adapter": "none"}, {}], ids=str)
def test_what_text_does_not_reach_is_not_trained(given: dict[str, Any], models: Path) -> None:
    """By the gradients of a real step; as predicted."""
    from harness.predict import peak
    from harness.training import inspection, trial

    one = spec(models, "images", **given)
    record = trial.run(Job(spec=one, grid="g", label="one", repeat=0), environment=current("cpu"))
    assert record.status == "ok", record.error
    prediction = peak.predict(one, "cpu")
    assert record.metrics["peak_memory_bytes"] == pytest.approx(prediction.peak_memory_bytes, rel=1e-4)
    for part in ("adapters", "gradients", "optimizer"):
        name = f"memory_{part}_bytes"
        assert record.metrics[name] == prediction.breakdown[name]
    assert not without_gradient(one), "each trained parameter has a gradient"
    what = "parameters of model.vision_tower and model.multi_modal_projector are not trained"
    what = what if given == {"adapter": "none"} else "layers of model.vision_tower get no adapter"
    (line,) = inspection.inspect([("one", one)]).warnings
    assert line.endswith(f"{what}: text does not reach them")


@pytest.mark.parametrize("given", [{"lora_bias": "all"}, {"precision": "nf4"}, {"precision": "int8"}], ids=str)
def test_nothing_of_the_vision_tower_is_trained(given: dict[str, Any], models: Path) -> None:
    from harness.training import model

    network = model.skeleton(spec(models, "images", **given))
    trained_ = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained_
    assert not [name for name in trained_ if "language_model" not in name]


def without_gradient(one: TrialSpec) -> list[str]:
    """Trained parameters that one step leaves without a gradient."""
    import torch

    from harness.training import batches, checkpoints, model

    network = model.load(one, torch.device("cpu"))
    tokenizer = checkpoints.load_tokenizer(one)
    train = batches.load(one, tokenizer).train
    (batch, *_) = batches.micro_batches(
        train[:2],
        one.model_copy(update={"micro_batch_size": 2}),
        checkpoints.pad_id(tokenizer, None),
        torch.device("cpu"),
    )
    network(**batch.inputs).loss.backward()
    trained_ = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    assert trained_
    return [name for name, p in trained_ if p.grad is None]


def test_every_expert_is_reached(models: Path) -> None:
    """Whatever its tokens: one expert of four takes each."""
    from harness.training import inspection, model

    one = spec(models, "experts", adapter="none")
    assert all(p.requires_grad for p in model.skeleton(one).parameters())
    assert not inspection.inspect([("one", one)]).warnings


# ------------------------------------------------------------------------------------ merging

MERGED: dict[str, dict[str, Any]] = {
    "head": {"lora_target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"lora_target_modules": ["embed_tokens", "q_proj"]},
    "dora": {"lora_target_modules": ["lm_head"], "use_dora": True, "use_rslora": True},
    "bf16": {"lora_target_modules": ["lm_head"], "precision": "bf16"},
}


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained adapters over tied weights."""
    folder = tmp_path_factory.mktemp("results")
    trials = [
        Trial(spec(models, "tied", save_adapter=True, learning_rate=3e-2, **given), name, None, None)
        for name, given in MERGED.items()
    ]
    with InlineLauncher() as launcher:
        run_grid(Grid("g", "G", "list", tuple(trials)), Store(folder / "g"), launcher, Watch())
    return folder


@pytest.mark.parametrize("label", MERGED)
def test_merging_unties_weights(label: str, results: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    result = merge.merge(trained.find_adapter(results, label), tmp_path / "m")
    assert result["merge_error"] <= 8 * result["rounding"] < (1e-4 if label != "bf16" else 0.5)
    losses = result["losses"]
    assert losses["merged"] == pytest.approx(losses["unmerged"], abs=1e-4 if label != "bf16" else 0.05)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text())["tie_word_embeddings"] is False
    assert not torch.equal(network.lm_head.weight, network.model.embed_tokens.weight)


def test_a_merge_that_is_off_is_not_written(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged without untying, the embeddings change too."""
    monkeypatch.setattr(merge, "_merge", _merge_tied)
    source = trained.find_adapter(results, "head")
    with pytest.raises(InputError, match=r"merged, logits are off by up to .*--allow-difference writes"):
        merge.merge(source, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    assert merge.merge(source, tmp_path / "m", allow_difference=True)["merge_error"] > 0.01
    assert (tmp_path / "m/model.safetensors").is_file()


def _merge_tied(*arguments: Any) -> Any:
    from harness.adapters import merged_model
    from harness.training import saved_adapters

    saved_adapters._untie = lambda base: None
    spec_, adapter, folder, figures, allow, *_ = arguments
    merged = merged_model.merge(
        TrialSpec.model_validate_json(spec_), Path(adapter), Path(folder), figures, allow_difference=allow
    )
    return merged.model_dump(mode="json")


def test_rows_hold_targets(results: Path) -> None:
    rows = {row["label"]: row for row in Store(results / "g").read("trials").to_pylist()}
    assert spec_of(rows["head"]).lora_target_modules == ("lm_head", "q_proj")
    measured = loading.load(results / "g")
    assert sorted(measured.configs["lora_target_modules"]) == [
        '["embed_tokens", "q_proj"]', '["lm_head", "q_proj"]', '["lm_head"]', '["lm_head"]',
    ]  # fmt: skip
