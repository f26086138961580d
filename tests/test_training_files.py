"""Training files of other tools, through the commands: what they mean, what is refused, what is recorded."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Answer
from tiny_models import tiny_model

from harness.dialects import axolotl
from harness.errors import InputError
from harness.grids import grid, imported
from harness.grids.grid import Grid
from harness.spec.trial import TrialSpec
from harness.training import checkpoints

Ask = Callable[..., Answer]
FILES = Path(__file__).parent / "training_files"
CORPUS = sorted(file for tool in FILES.iterdir() for file in tool.glob("*.y*ml"))
LESSON = Path(__file__).parent / "lesson"
AXOLOTLS = "base_model: random:tiny\nsequence_len: 256\nlearning_rate: 0.0002\nmicro_batch_size: 2\n"
ANOTHER_TASK = "harness measures supervised fine-tuning"


def load(folder: Path, text: str, **options: Any) -> Grid:
    file = folder / "file.yml"
    file.write_text(text, encoding="utf-8")
    return grid.load(file, **options)


def spec(folder: Path, text: str, **options: Any) -> TrialSpec:
    return load(folder, text, **options).trials[0].spec


def refusal(file: Path, **options: Any) -> str:
    with pytest.raises(InputError) as refused:
        grid.load(file, **options)
    return str(refused.value)


# ------------------------------------------------------------------------------------ the corpus


def outcome(file: Path) -> str:
    """Whether a file is taken as it stands (`taken`), without some keys (`without`), or is of `another task`."""
    try:
        grid.load(file)
    except InputError as refused:
        if ANOTHER_TASK in str(refused):
            assert ANOTHER_TASK in refusal(file, without_unsupported=True)
            return "another task"
    else:
        return "taken"
    grid.load(file, without_unsupported=True)
    return "without"


def test_two_thirds_of_the_files_are_taken_as_they_stand_and_the_others_without_some_keys() -> None:
    outcomes = [outcome(file) for file in CORPUS]
    assert len(outcomes) >= 60
    assert {file.parent.name for file in CORPUS} == {"axolotl", "llama_factory", "torchtune", "trl"}
    assert 3 * outcomes.count("taken") >= 2 * len(outcomes)
    assert outcomes.count("without") >= 10
    assert outcomes.count("another task") >= 10


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_grid_that_a_file_means_is_the_same_trial(file: Path, tmp_path: Path) -> None:
    if outcome(file) == "another task":
        return
    expected = grid.load(file, without_unsupported=True)
    meant = imported.read(file)
    again = tmp_path / "again.yml"
    again.write_text(imported.grid_file(meant, file, file.parent), encoding="utf-8")
    text = again.read_text(encoding="utf-8")
    for key in (*meant.no_effect, *meant.without):
        assert key in text
    assert [t.spec.id for t in grid.load(again).trials] == [t.spec.id for t in expected.trials]


# ------------------------------------------------------------------------------------ Axolotl's


def test_what_axolotls_files_mean() -> None:
    def of(name: str) -> TrialSpec:
        return grid.load(FILES / "axolotl" / f"{name}.yml").trials[0].spec

    lora = of("llama3-lora")
    assert (lora.precision, lora.adapter, lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (
        "int8",
        "lora",
        32,
        16,
        0.05,
    )
    assert lora.lora_modules_to_save == ("embed_tokens", "lm_head")
    assert (lora.optimizer, lora.lr_scheduler, lora.warmup_steps, lora.num_epochs) == (
        "adamw_bnb_8bit",
        "cosine",
        10,
        4,
    )
    assert (lora.val_set_size, lora.excess_length, lora.seed, lora.attention) == (0.05, "drop", 42, "flash_attention_2")
    assert lora.special_tokens == (("pad_token", "<|end_of_text|>"),)
    assert lora.datasets[0].type.field_input == "input"
    assert str(lora.datasets[0].type.format).startswith("Below is an instruction")

    qlora = of("mistral-qlora")
    assert (qlora.precision, qlora.double_quantization, qlora.compute_dtype) == ("nf4", True, "bf16")
    assert qlora.lora_target_modules is not None
    assert qlora.lora_target_modules[0] == "all-linear"
    assert (qlora.warmup_ratio, qlora.max_grad_norm, qlora.weight_decay, qlora.seed) == (0.1, 0.3, 0.01, 7)
    assert (qlora.gradient_checkpointing, qlora.reentrant_checkpointing) == (True, False)
    chat = qlora.datasets[0].type
    assert (qlora.chat_template, chat.kind, chat.field_messages) == ("chatml", "chat", "conversations")
    assert (chat.message_field_role, chat.message_field_content) == ("from", "value")

    full = of("full-phi")
    assert (full.adapter, full.precision, full.adam_beta2, full.adam_epsilon) == ("none", "bf16", 0.95, 1e-5)
    assert full.reentrant_checkpointing
    assert (of("t4-fp16-qlora").precision, of("t4-fp16-qlora").compute_dtype) == ("nf4", "fp16")
    assert not of("trusting").double_quantization
    assert of("fp32-full").precision == "fp32"
    assert of("fp32-full").gradient_accumulation_steps == 4
    assert (of("empty-lora-keys").lora_r, of("empty-lora-keys").lora_target_linear) == (8, False)
    assert of("embed-and-linear").lora_target_modules == ("all-linear", "embed_tokens", "lm_head")
    assert (of("zero3-two-cards").sharding, of("zero3-two-cards").max_steps) == ("full_shard", 200)
    assert of("zero3-two-cards").num_epochs is None
    assert of("full-fsdp2").sharding == "none"
    assert of("pretraining").datasets[0].type.kind == "text"
    assert of("pretraining").datasets[0].type.field_text == "body"
    several = of("several-datasets")
    assert several.test_datasets is not None
    assert (several.test_datasets[0].split, several.datasets[1].path, several.datasets[1].shards) == (
        "test",
        "data/more.jsonl",
        10,
    )
    assert of("regex-targets").lora_target_modules == (
        r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj",
    )


def test_axolotls_defaults(tmp_path: Path) -> None:
    plain = spec(tmp_path, AXOLOTLS)
    assert (plain.adapter, plain.precision, plain.sequence_length) == ("none", "bf16", 256)
    assert (plain.val_set_size, plain.lr_scheduler, plain.optimizer) == (0, "cosine", "adamw_torch_fused")
    assert (plain.num_epochs, plain.warmup_ratio, plain.excess_length, plain.seed) == (1.0, 0.03, "drop", 42)
    limited = spec(tmp_path, AXOLOTLS + "max_steps: 1000\nnum_epochs: 3\n")
    assert (limited.max_steps, limited.num_epochs, limited.warmup_steps) == (1000, None, 30)
    file = load(tmp_path, AXOLOTLS + "max_steps: 1000\nnum_epochs: 3\n").training_file
    assert file is not None
    assert file.notes["max_steps"] == "max_steps: 1000 (Axolotl ends with num_epochs: 3 where that is sooner)"


def test_axolotl_decays_nothing_with_loraplus(tmp_path: Path) -> None:
    decayed = AXOLOTLS + "adapter: lora\nlora_target_linear: true\nweight_decay: 0.1\n"
    assert spec(tmp_path, decayed).weight_decay == 0.1
    loaded = load(tmp_path, decayed + "loraplus_lr_ratio: 16\nloraplus_lr_embedding: 0.00001\n")
    assert (loaded.trials[0].spec.weight_decay, loaded.trials[0].spec.loraplus_lr_ratio) == (0.0, 16.0)
    file = loaded.training_file
    assert file is not None
    assert file.notes["weight_decay"] == "weight_decay: 0 (Axolotl has none with LoRA+)"
    assert "refused" in file.no_effect["loraplus_lr_embedding"]


@pytest.mark.parametrize(
    ("keys", "autocast"),
    [
        ("", True),
        ("bf16: full\n", None),
        ("bf16: false\nfp16: false\n", None),
        ("adapter: lora\n", True),
        ("adapter: lora\nbf16: full\n", False),
        ("adapter: qlora\nload_in_4bit: true\nbf16: full\n", False),
        ("adapter: lora\nfp16: true\nbf16: false\n", None),
        ("adapter: lora\nfloat16: true\nbf16: false\n", False),
        ("autocast: false\n", False),
    ],
)
def test_axolotls_trainer_is_under_autocast_unless_the_weights_alone_are_16_bit(
    keys: str, autocast: bool | None, tmp_path: Path
) -> None:
    assert spec(tmp_path, AXOLOTLS + keys).autocast is autocast


def test_full_fine_tuning_over_a_file_with_adapters_is_under_autocast_too(tmp_path: Path) -> None:
    (tmp_path / "lora.yml").write_text(AXOLOTLS + "adapter: lora\nlora_target_linear: true\n")
    levels = load(tmp_path, "base: lora.yml\nvary: {adapter: [none]}\n")
    full = next(trial.spec for trial in levels.trials if trial.spec.adapter == "none")
    assert full.autocast is spec(tmp_path, AXOLOTLS).autocast is True
    alike = spec(tmp_path, AXOLOTLS + "adapter: lora\nlora_target_linear: true\n")
    assert alike.id == alike.model_copy(update={"autocast": None}).id, "what is the default anyway makes no other trial"


@pytest.mark.parametrize(
    ("keys", "warm_up"),
    [
        ("warmup_steps: 1\n", (2, 0.0)),
        ("warmup_steps: 3\n", (3, 0.0)),
        ("max_steps: 40\n", (2, 0.0)),
        ("max_steps: 20\n", (0, 0.0)),
        ("max_steps: 19\nwarmup_ratio: 0.1\n", (2, 0.0)),
        ("max_steps: 39\nwarmup_ratio: 0.1\n", (3, 0.0)),
        ("num_epochs: 2\nwarmup_ratio: 0.1\n", (None, 0.1)),
    ],
)
def test_axolotl_warms_up_in_whole_steps_and_makes_two_of_one(
    keys: str, warm_up: tuple[int | None, float], tmp_path: Path
) -> None:
    made = spec(tmp_path, AXOLOTLS + keys)
    assert (made.warmup_steps, made.warmup_ratio) == warm_up


@pytest.mark.parametrize(
    ("keys", "sharding"),
    [
        ("fsdp: [no_shard]\n", "none"),
        ("fsdp_config: {sharding_strategy: NO_SHARD}\n", "none"),
        ("fsdp_config: {sharding_strategy: 2}\n", "shard_grad_op"),
        ("fsdp_config: {reshard_after_forward: 'false'}\n", "shard_grad_op"),
        ("fsdp_config: {fsdp_offload_params: false, cpu_offload_pin_memory: true}\n", "full_shard"),
        ("deepspeed: my/stage3.json\n", "full_shard"),
        ("deepspeed: {zero_optimization: {stage: 3, offload_param: {device: none}}}\n", "full_shard"),
    ],
)
def test_axolotls_sharding(keys: str, sharding: str, tmp_path: Path) -> None:
    assert spec(tmp_path, AXOLOTLS + "num_processes: 2\n" + keys).sharding == sharding


def test_fsdp_of_axolotl_checkpoints_by_its_own_key(tmp_path: Path) -> None:
    made = spec(tmp_path, AXOLOTLS + "fsdp_version: 2\nfsdp_config: {activation_checkpointing: true}\n")
    assert (made.gradient_checkpointing, made.reentrant_checkpointing) == (True, False)
    both = "gradient_checkpointing: true\nfsdp_config: {activation_checkpointing: false}\n"
    assert spec(tmp_path, AXOLOTLS + both).reentrant_checkpointing


_OF_TOOLS = {
    "Axolotl": AXOLOTLS,
    "TRL": "model_name_or_path: random:tiny\ndataset_name: storyteller\n",
    "LLaMA-Factory": "model_name_or_path: random:tiny\nstage: sft\ndo_train: true\ndataset: a\ntemplate: qwen\n",
}


@pytest.mark.parametrize("text", _OF_TOOLS.values(), ids=list(_OF_TOOLS))
def test_settings_of_deepspeed_and_fsdp_are_read_from_the_files_that_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "training").mkdir()
    for name, zero in {
        "ds_config": {"stage": 2, "offload_optimizer": {"device": "none"}},
        "zero2": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }.items():
        (tmp_path / f"configs/{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    (tmp_path / "training/fsdp.json").write_text('{"reshard_after_forward": false}')
    text += "num_processes: 2\n"
    assert spec(tmp_path / "training", text + "deepspeed: configs/ds_config.json\n").sharding == "shard_grad_op"
    assert spec(tmp_path / "training", text + "fsdp: true\nfsdp_config: fsdp.json\n").sharding == "shard_grad_op"
    with pytest.raises(InputError, match=r"'offload_optimizer': \{'device': 'cpu'\}\} \(use one without offload"):
        load(tmp_path / "training", text + "deepspeed: configs/zero2.json\n")
    (tmp_path / "configs/ds_config.json").write_text("[")
    with pytest.raises(InputError, match=r"ds_config\.json cannot be read as JSON"):
        load(tmp_path / "training", text + "deepspeed: configs/ds_config.json\n")
    assert spec(tmp_path / "training", text + "deepspeed: elsewhere/zero3.json\n").sharding == "full_shard", (
        "by its name"
    )


def test_keys_that_ask_for_nothing_are_off(tmp_path: Path) -> None:
    degrees = (
        "tensor_parallel_size context_parallel_size sequence_parallel_degree dp_replicate_size pipeline_parallel_size"
    )
    zeros = "label_smoothing_factor early_stopping_patience lisa_n_layers cosine_constant_lr_ratio"
    values = dict.fromkeys(degrees.split(), 1) | dict.fromkeys(zeros.split(), 0)
    details = {"use_eaft": False, "eaft_alpha": 1.0, "ring_attn_func": "batch_ring", "heads_k_stride": 1}
    file = load(tmp_path, AXOLOTLS + yaml.safe_dump(values | details)).training_file
    assert file is not None
    assert file.no_effect.keys() >= (values | details).keys()
    for key in values:
        (tmp_path / "a.yml").write_text(AXOLOTLS + f"{key}: 2\n")
        assert f"{key}: 2 (leave it out" in refusal(tmp_path / "a.yml")


def test_ranks_of_single_layers(tmp_path: Path) -> None:
    keys = "adapter: lora\nlora_target_linear: true\nlora_rank_pattern: {q_proj: 4}\nlora_alpha_pattern: {q_proj: 8}\n"
    assert dict(spec(tmp_path, AXOLOTLS + keys).adapter_options or ()) == {
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"q_proj": 8},
    }
    assert spec(tmp_path, AXOLOTLS + "lora_rank_pattern: {q_proj: 4}\n").adapter == "none"


@pytest.mark.parametrize(
    "text",
    [
        "model: Qwen/Qwen2.5-7B-Instruct\ntrain_type: lora\ndataset: [a]\nlearning_rate: 1e-4\n",
        "base_model_name_or_path: a/b\npeft_type: LORA\nr: 16\nlora_alpha: 32\n",
    ],
    ids=["ms-swift", "an adapter's settings"],
)
def test_files_of_tools_that_are_not_read_are_called_that(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(text)
    assert "training file of Axolotl (base_model), LLaMA-Factory or TRL" in refusal(tmp_path / "a.yml")
    assert "did you mean" not in refusal(tmp_path / "a.yml")


def test_axolotls_padding_and_embeddings(tmp_path: Path) -> None:
    assert spec(tmp_path, AXOLOTLS + "pad_to_sequence_len: true\n").pad_to_sequence_len is True
    longest = load(tmp_path, AXOLOTLS + "pad_to_sequence_len: false\n")
    assert longest.trials[0].spec.pad_to_sequence_len is None, "false would say that all examples fill the sequence"
    assert longest.training_file is not None
    assert "pad_to_sequence_len" in longest.training_file.no_effect
    qlora = AXOLOTLS + "adapter: qlora\nload_in_4bit: true\n"
    for skip in ("true", "false"):  # norms, embeddings and head are made 16 bit again after peft's preparation
        assert not spec(tmp_path, qlora + f"embeddings_skip_upcast: {skip}\n").upcast_unquantized
    (tmp_path / "a.yml").write_text(qlora + "peft_autocast_adapter_dtype: false\n")
    assert grid.load(tmp_path / "a.yml").trials[0].spec.adapter_dtype == "bf16"


def test_flex_attention_is_read(tmp_path: Path) -> None:
    for text in ("flex_attention: true\n", "attn_implementation: flex_attention\n"):
        assert spec(tmp_path, AXOLOTLS + text).attention == "flex_attention"


@pytest.mark.parametrize(
    ("key", "loss", "plugin"),
    [
        ("cut_cross_entropy", "cce", "cut_cross_entropy.CutCrossEntropyPlugin"),
        ("liger_fused_linear_cross_entropy", "liger", "liger.LigerPlugin"),
        ("chunked_cross_entropy", "chunked", ""),
    ],
)
def test_kernels_of_the_loss_are_read(key: str, loss: str, plugin: str, tmp_path: Path) -> None:
    plugins = f"plugins: [axolotl.integrations.{plugin}]\n" if plugin else ""
    assert spec(tmp_path, AXOLOTLS + plugins + f"{key}: true\n").loss == loss
    assert spec(tmp_path, AXOLOTLS + plugins + f"{key}: false\n").loss == "full"


def test_micro_batches_in_one_row(tmp_path: Path) -> None:
    for value, packs in (("true", True), ("auto", True), ("false", False)):
        flat = spec(tmp_path, AXOLOTLS + f"batch_flattening: {value}\n")
        assert flat.sample_packing is packs
    assert spec(tmp_path, AXOLOTLS + "group_by_length: true\n").group_by_length
    (tmp_path / "a.yml").write_text(AXOLOTLS + "sample_packing: true\n")
    assert "use batch_flattening: true" in refusal(tmp_path / "a.yml")


def test_all_reasons_stand_in_one_message(tmp_path: Path) -> None:
    message = refusal(FILES / "axolotl/packed-liger.yml")
    for key in (
        "liger_rope: true",
        "sample_packing: true",
        "lora_mlp_kernel: true",
    ):
        assert key in message
    assert "--without-unsupported" in message
    assert "\n" not in message
    many = "".join(f"liger_{n}: true\n" for n in ("rope", "rms_norm", "layer_norm", "glu_activation"))
    others = "torch_compile: true\ntorch_compile_mode: max-autotune\n"
    others += "lora_mlp_kernel: true\nrelora: true\nearly_stopping_patience: 3\n"
    (tmp_path / "many.yml").write_text(AXOLOTLS + many + others)
    reasons = refusal(tmp_path / "many.yml")
    for key in re.findall(r"^(\w+):", many + others, re.MULTILINE):
        assert f"{key}: " in reasons or key == "torch_compile", "however many they are"


def test_compiling_is_read_with_its_backend_and_mode(tmp_path: Path) -> None:
    named = "torch_compile_backend: inductor\ntorch_compile_mode: default\n"
    for asked in ("true", "auto"):
        assert spec(tmp_path, AXOLOTLS + f"torch_compile: {asked}\n" + named).torch_compile
    assert not spec(tmp_path, AXOLOTLS + named).torch_compile
    (tmp_path / "a.yml").write_text(AXOLOTLS + "torch_compile: true\ntorch_compile_backend: eager\n")
    assert "torch_compile_backend: eager (layers are compiled with inductor" in refusal(tmp_path / "a.yml")


def test_a_key_that_no_table_has_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(AXOLOTLS + "lora_rr: 8\nwandb_projekt: x\n")
    for without in (False, True):
        reason = refusal(tmp_path / "a.yml", without_unsupported=without)
        assert "unknown key 'lora_rr'; did you mean lora_r?" in reason
        assert "did you mean wandb_project?" in reason
    assert spec(tmp_path, AXOLOTLS + "no_such_key:\nnor_this: false\nnor_that: []\n").adapter == "none"


def test_keys_of_plug_ins_are_known_by_what_they_begin_with(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(AXOLOTLS + "moe_bnb_fast: true\nswanlab_new_key: x\nliger_of_tomorrow: true\n")
    assert "moe_bnb_fast: true, liger_of_tomorrow: true (" in refusal(tmp_path / "a.yml")
    without = grid.load(tmp_path / "a.yml", without_unsupported=True).training_file
    assert without is not None
    assert without.no_effect["swanlab_new_key"] == "tracking"
    assert spec(tmp_path, AXOLOTLS + "moe_bnb_fast: false\neot_tokens: [x]\n").adapter == "none"


def test_roles_to_train_by_their_names_in_the_data(tmp_path: Path) -> None:
    given = "datasets: [{path: a.jsonl, type: chat_template, roles_to_train: [gpt, assistant, human]}]\n"
    assert spec(tmp_path, AXOLOTLS + given).datasets[0].type.roles_to_train == ("assistant", "user")


def test_what_carries_loss_in_chats_besides_axolotls_is_noted(tmp_path: Path) -> None:
    chats = "datasets: [{path: a.jsonl, type: chat_template}]\n"
    imported = load(tmp_path, AXOLOTLS + chats + "train_on_inputs: true\n").training_file
    assert imported is not None
    assert imported.notes["train_on_inputs"].startswith("all of a chat carries loss")
    for other in (chats, "datasets: [{path: a.jsonl, type: alpaca}]\ntrain_on_inputs: true\n"):
        imported = load(tmp_path, AXOLOTLS + other).training_file
        assert imported is not None
        assert "train_on_inputs" not in imported.notes


def test_harness_keys_stand_in_axolotls_files_too(tmp_path: Path) -> None:
    own = spec(tmp_path, AXOLOTLS + "wandb_project: x\ntrain_samples: 4\ndevice: cpu\nnum_processes: 2\n")
    assert (own.train_samples, own.device, own.num_processes) == (4, "cpu", 2)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("adapter: llama-adapter\n", "adapter: llama-adapter (use lora or qlora"),
        ("lr_scheduler: rex\n", "lr_scheduler: rex (no schedule here; use constant"),
        ("sage_attention: true\n", "sage_attention: true (use sdpa"),
        ("bf16: true\nfp16: true\n", "fp16: true (contradicts bf16: true"),
        ("gradient_checkpointing: offload\n", "gradient_checkpointing: offload (use true"),
        ("deepspeed: zero3_cpuoffload.json\n", "deepspeed: zero3_cpuoffload.json (use one without offload"),
        ("deepspeed: mine.json\n", "deepspeed: mine.json (no such file, and its name has no stage"),
        (
            "deepspeed: {zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}\n",
            "deepspeed: {'offload_optimizer': {'device': 'cpu'}} (use one without offload",
        ),
        ("fsdp: [hybrid_shard, auto_wrap]\n", "fsdp: hybrid_shard+auto_wrap (use full_shard"),
        ("fsdp_config: {sharding_strategy: HYBRID_SHARD}\n", "(use full_shard: hybrid sharding"),
        ("fsdp_config: settings.json\n", "fsdp_config: settings.json (no such file; give its settings"),
        ("fsdp_config: {offload_params: true}\n", "fsdp_config: {'offload_params': True} (use one without offload"),
        ("datasets: [{path: a.jsonl, type: oasst}]\n", "datasets[0].type: oasst (use alpaca"),
        ("datasets: [{path: a.jsonl, type: alpaca, train_on_eos: all}]\n", "datasets[0].train_on_eos: all (use turn"),
        (
            "datasets: [{path: a.jsonl, type: chat_template, message_field_training: training}]\n",
            "datasets[0].message_field_training: training (give the turns that are not trained on weight: 0",
        ),
        ("special_tokens: {additional_special_tokens: [a]}\n", "special_tokens.additional_special_tokens"),
        ("chat_template: my_own\n", "chat_template: my_own (use tokenizer_default"),
        ("excess_length_strategy: cut\n", "excess_length_strategy: cut (use drop"),
    ],
)
def test_values_without_a_counterpart(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(AXOLOTLS + text)
    assert part in refusal(tmp_path / "a.yml")
    grid.load(tmp_path / "a.yml", without_unsupported=True)


_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 0.5, "", "x", "false", "2", [], ["x"], {}, {"x": 1}, {"x": None}, [{"x": 1}], [[1]],
]  # fmt: skip


@pytest.mark.parametrize("key", sorted(axolotl.DIALECT.table))
def test_any_value_of_any_key_is_read_or_refused_in_one_line(key: str, tmp_path: Path) -> None:
    document = yaml.safe_load(AXOLOTLS)
    for value in _ODD:
        (tmp_path / "a.yml").write_text(yaml.safe_dump(document | {key: value}))
        reason = ""
        try:
            grid.load(tmp_path / "a.yml", without_unsupported=True)
        except InputError as refused:
            reason = str(refused)
        assert "\n" not in reason


_DATASET_KEYS = (
    "path", "type", "name", "split", "data_files", "ds_type", "shards", "chat_template", "chat_template_jinja",
    "conversation", "field", "field_messages", "message_field_role", "message_property_mappings", "roles",
    "roles_to_train", "train_on_eos", "field_tools", "text_column", "field_human", "drop_system_message",
    "field_images", "trust_remote_code", "revision", "no_such_key",
)  # fmt: skip


@pytest.mark.parametrize("key", _DATASET_KEYS)
def test_any_value_of_any_key_of_a_dataset_is_read_or_refused_in_one_line(key: str, tmp_path: Path) -> None:
    for value in [*_ODD, "json", "chat_template", {"field_instruction": 3}, {"role": 1}, {"user": "x"}]:
        for kind in ("chat_template", "sharegpt", {"field_output": "x"}):
            entry = {"path": "a.jsonl", "type": kind} | {key: value}
            document = yaml.safe_load(AXOLOTLS) | {"datasets": [entry], "test_datasets": [entry]}
            (tmp_path / "a.yml").write_text(yaml.safe_dump(document))
            reason = ""
            try:
                grid.load(tmp_path / "a.yml", without_unsupported=True)
            except InputError as refused:
                reason = str(refused)
            assert "\n" not in reason


def test_a_value_that_is_quoted_means_what_it_says(tmp_path: Path) -> None:
    """As text, "false" would count as true, and "5" as no number of steps."""
    lora = AXOLOTLS + "adapter: lora\n"
    assert spec(tmp_path, lora + 'load_in_4bit: "false"\n').id == spec(tmp_path, lora).id
    trls = "model_name_or_path: random:tiny\ndataset_name: storyteller\nlora_r: 8\n"
    quoted = spec(tmp_path, trls + 'use_peft: "true"\nload_in_4bit: "true"\nmax_steps: "5"\n')
    assert quoted.id == spec(tmp_path, trls + "use_peft: true\nload_in_4bit: true\nmax_steps: 5\n").id
    assert (quoted.adapter, quoted.precision, quoted.max_steps) == ("lora", "nf4", 5)


def test_what_is_of_another_kind_than_the_tool_takes_is_one_line(tmp_path: Path) -> None:
    processes = "num_processes: 0\nbatch_size: 8\n"
    for text in ("deepspeed: {zero_optimization: }\n", "lora_target_modules: 3\n", processes):
        (tmp_path / "a.yml").write_text(AXOLOTLS + text)
        with contextlib.suppress(InputError):
            grid.load(tmp_path / "a.yml")
    files = "datasets: [{path: json, data_files: {train: a.jsonl}, type: alpaca}]\n"
    assert spec(tmp_path, AXOLOTLS + files).datasets[0].path == "a.jsonl"
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.json").write_text("[]")
    given = "model_name_or_path: random:tiny\nstage: sft\nfinetuning_type: lora\ntemplate: qwen\ndataset: mine\n"
    for entry, says in (
        ({"columns": ["q", "r"]}, "mine has columns ['q', 'r']; give a mapping"),
        ({"columns": {"promt": "q"}}, "columns: unknown key 'promt'; did you mean prompt"),
        ({"columns": {"prompt": 3}}, "prompt is 3; give a name"),
        ({"formatting": "sharegpt", "tags": "x"}, "mine has tags 'x'; give a mapping"),
    ):
        (tmp_path / "data/dataset_info.json").write_text(json.dumps({"mine": {"file_name": "a.json"} | entry}))
        (tmp_path / "lf.yml").write_text(given)
        assert says in refusal(tmp_path / "lf.yml")


# ------------------------------------------------------------------------------------ harness's own


def test_the_files_of_the_lesson_mean_what_they_meant() -> None:
    first, second = (grid.load(LESSON / f"advanced_train{n}.yml") for n in ("", "2"))
    assert first.training_file is None
    for one in (first, second):
        (trial,) = one.trials
        given = trial.spec
        assert (given.adapter, given.lora_r, given.lora_alpha, given.lora_dropout) == ("lora", 32, 16, 0.05)
        assert (given.sequence_length, given.micro_batch_size, given.optimizer) == (1024, 4, "adamw_bnb_8bit")
        assert (given.precision, given.lr_scheduler, given.val_set_size, given.seed) == ("bf16", "linear", 32, 0)
        assert given.gradient_checkpointing
        assert not given.reentrant_checkpointing
    assert first.trials[0].spec.id == "35a5d50a0801"
    assert second.trials[0].spec.id == "4b7e184e3def"


def test_a_file_without_an_adapter_is_full_fine_tuning(tmp_path: Path) -> None:
    for text in (AXOLOTLS, "base_model: random:tiny\nsequence_length: 256\nprecision: bf16\n"):
        assert spec(tmp_path, text).adapter == "none"
    lesson = (LESSON / "advanced_train.yml").read_text()
    without = "".join(line for line in lesson.splitlines(keepends=True) if not line.startswith(("adapter", "lora_")))
    assert spec(tmp_path, without).adapter == "none"
    with pytest.raises(InputError, match="lora_r without adapter: give adapter: lora"):
        load(tmp_path, "base_model: random:tiny\nsequence_length: 256\nlora_r: 4\n")
    assert spec(tmp_path, "base: {base_model: 'random:tiny'}\n").adapter == "lora", "a grid's base has its own default"


def test_keys_of_axolotl_can_be_pasted_into_a_grid(tmp_path: Path) -> None:
    text = (FILES / "axolotl/dora.yml").read_text()
    pasted = "base:\n" + "".join(f"  {line}\n" for line in text.splitlines())
    assert spec(tmp_path, pasted).id == grid.load(FILES / "axolotl/dora.yml").trials[0].spec.id
    named = load(tmp_path, f"base: {FILES / 'axolotl/dora.yml'}\nvary: {{lora_r: [4]}}\n")
    assert named.training_file is not None
    assert [t.spec.lora_r for t in sorted(named.trials, key=lambda t: t.label)] == [8, 8, 4]


def test_a_key_of_axolotl_does_not_make_full_fine_tuning_of_a_grid_of_adapters(tmp_path: Path) -> None:
    own = "base: {base_model: 'random:tiny', lora_r: 8, train_samples: 8, wandb_project: tales%s}\n"
    with pytest.raises(InputError, match=r"lora_r without adapter: with keys of Axolotl \(wandb_project\)"):
        load(tmp_path, own % "")
    assert spec(tmp_path, own % ", adapter: lora").lora_r == 8


def test_prompts_of_axolotl_have_its_own_columns_and_formats(tmp_path: Path) -> None:
    given = "type: {field_instruction: ask, format: '[INST] {instruction} {input} [/INST]'}"
    own, plain, chat = (
        spec(tmp_path, f"{AXOLOTLS}datasets: [{{path: a.jsonl, {kind}}}]\n").datasets[0].type
        for kind in (given, "type: {field_output: reply}", "type: chat_template")
    )
    assert (own.field_instruction, own.field_input, own.field_output, own.field_system) == (
        "ask", "input", "output", "system",
    )  # fmt: skip
    assert (own.format, own.no_input_format) == ("[INST] {instruction} {input} [/INST]", "{instruction} ")
    assert (plain.format, plain.field_output) == ("{instruction} {input} ", "reply")
    assert (own.system_format, own.add_special_tokens) == ("{system}", True)
    placed = given.replace("ask", "ask, system_format: 'S: {system} '")
    entry = f"{AXOLOTLS}datasets: [{{path: a.jsonl, {placed}}}]\n"
    assert spec(tmp_path, entry).datasets[0].type.system_format == "S: {system} "
    assert (chat.field_system, chat.add_special_tokens) == ("system", False)
    lead = f"{AXOLOTLS}datasets: [{{path: a.jsonl, type: chat_template, field_system: lead}}]\n"
    assert spec(tmp_path, lead).datasets[0].type.field_system == "lead"


def test_a_file_of_axolotl_that_data_files_names_again_is_one_file(tmp_path: Path) -> None:
    for files in ("a.jsonl", "[a.jsonl]"):
        entry = f"[{{path: a.jsonl, type: alpaca, data_files: {files}, ds_type: json}}]"
        (dataset,) = spec(tmp_path, f"{AXOLOTLS}datasets: {entry}\ntest_datasets: {entry}\n").datasets
        assert (dataset.path, dataset.data_files) == ("a.jsonl", ())


def test_a_familys_template_is_the_models_own_which_it_must_have(tmp_path: Path) -> None:
    wanted = {
        kind: spec(tmp_path, f"{AXOLOTLS}chat_template: gemma3\ndatasets: [{{path: a.jsonl, type: {kind}}}]\n")
        for kind in ("chat_template", "alpaca")
    }
    assert {kind: each.chat_template for kind, each in wanted.items()} == {"chat_template": "own", "alpaca": None}
    template = "{{ messages[0]['content'] }}"
    has, lacks = (
        TrialSpec(base_model=tiny_model(tmp_path / name, chat_template=own), chat_template="own")
        for name, own in (("has", template), ("lacks", None))
    )
    assert checkpoints.load_tokenizer(has).chat_template == template
    with pytest.raises(InputError, match="lacks has no chat template of its own; give one with chat_template: "):
        checkpoints.load_tokenizer(lacks)


def test_texts_that_a_tool_would_divide_are_noted(tmp_path: Path) -> None:
    for kind, noted in (("completion", True), ("alpaca", False)):
        file = load(tmp_path, f"{AXOLOTLS}datasets: [{{path: a.jsonl, type: {kind}}}]\n").training_file
        assert file is not None
        assert ("Axolotl makes several examples of it" in file.notes.get("datasets", "")) == noted


@pytest.mark.parametrize("key", ["dataset_exact_deduplication", "dataloader_drop_last"])
def test_which_rows_axolotl_trains_on_is_no_detail(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match=key):
        load(tmp_path, f"{AXOLOTLS}datasets: [{{path: a.jsonl, type: alpaca}}]\n{key}: true\n")
    load(tmp_path, f"{AXOLOTLS}datasets: [{{path: a.jsonl, type: alpaca}}]\n{key}: false\n")


def test_lists_of_datasets_of_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/tales.json").write_text("[]")
    info: dict[str, Any] = {"tales": {"file_name": "tales.json", "columns": {"prompt": "synopsis", "response": "tale"}}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    text = "model_name_or_path: random:tiny\nstage: sft\ndo_train: true\ndataset: tales\ntemplate: llama3\n"
    (dataset,) = spec(tmp_path, text).datasets
    assert (dataset.path, dataset.type.field_instruction, dataset.type.field_output) == (
        "data/tales.json",
        "synopsis",
        "tale",
    )
    info["tales"]["ranking"] = True  # type: ignore[assignment]  # of a preference dataset
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match="preference"):
        load(tmp_path, text)
    (tmp_path / "data/dataset_info.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load(tmp_path, text)


# ------------------------------------------------------------------------------------ the commands

ALPACA = [
    {"instruction": f"Tell of the hen and the {what}.", "input": given, "output": f"The hen saw the {what} and slept."}
    for what, given in (("storm", ""), ("door", "It is old."), ("key", ""), ("river", "It is wide."))
]


def tiny(folder: Path, more: str = "") -> Path:
    (folder / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    file = folder / "mine.yml"
    file.write_text(
        "base_model: random:tiny\ndatasets: [{path: alpaca.jsonl, type: alpaca}]\nwandb_project: hens\n"
        "save_steps: 10\nbf16: false\nsequence_len: 512\nmax_steps: 1\nmicro_batch_size: 4\nlearning_rate: 0.001\n"
        + more
    )
    return file


def test_the_tool_is_named_first_and_what_has_no_effect_is_listed_once(ask: Ask, tmp_path: Path) -> None:
    code, output, _ = ask("run", str(tiny(tmp_path)), "--dry-run")
    assert code == 0
    lines = output.splitlines()
    assert lines[0].startswith("mine.yml: a training file of Axolotl")
    assert lines[1].startswith("no effect on what is measured: ")
    assert "wandb_project" in " ".join(lines[1:3])
    assert "save_steps" in " ".join(lines[1:3])
    assert output.count("wandb_project") == 1


def test_what_is_left_out_stands_on_every_page(ask: Ask, tmp_path: Path) -> None:
    file = tiny(tmp_path, "sample_packing: true\n")
    code, _, errors = ask("run", str(file))
    assert (code, "sample_packing: true" in errors) == (2, True)
    code, output, errors = ask("run", str(file), "--without-unsupported", "--no-predict")
    assert code == 0, errors
    assert "left out, so another training than the file's: sample_packing: true" in " ".join(output.split())
    about = json.loads((tmp_path / "results/mine/grid.json").read_text())["training_file"]
    assert about["tool"] == "Axolotl"
    assert about["no_effect"]["wandb_project"] == "tracking"
    assert list(about["without"]) == ["sample_packing"]
    code, output, errors = ask("report", "results/mine")
    assert code == 0, errors
    assert "without sample_packing" in output
    pages = [file for file in (tmp_path / "reports/mine").rglob("*") if file.suffix in {".md", ".html", ".csv", ".tex"}]
    assert len(pages) > 5
    for page in pages:
        if len(page.read_text().splitlines()) > 1:  # a table of headings alone says nothing
            assert re.search(r"sample(_|\\_)packing", page.read_text()), page
    for image in (tmp_path / "reports/mine/plots").glob("*.svg"):
        assert "sample_packing" in image.read_text(), image


def test_import_writes_a_grid_that_runs(ask: Ask, tmp_path: Path) -> None:
    file = tiny(tmp_path, "sample_packing: true\nlora_r: 4\nadapter: lora\n")
    (tmp_path / "grids").mkdir()
    code, output, errors = ask("import", str(file), "-o", "grids/mine.yml")
    assert code == 0, errors
    assert "harness run grids/mine.yml" in output
    text = (tmp_path / "grids/mine.yml").read_text()
    assert "sequence_length: 512  # sequence_len" in text
    assert "seed: 42  # Axolotl's default" in text
    assert "#   wandb_project (tracking)" in text
    assert "#   sample_packing: true (use batch_flattening: true" in text
    assert "path: ../alpaca.jsonl" in text
    assert ask("run", "grids/mine.yml", "--no-predict")[0] == 0
    assert ask("import", str(file), "-o", "grids/mine.yml")[0] == 2, "it is not replaced unasked"
    assert "base:" in ask("import", str(file))[1]
    assert ask("import", "grids/mine.yml")[0] == 2


def test_the_first_loss_is_that_of_a_rendering_by_hand(ask: Ask, tmp_path: Path) -> None:
    """Axolotl's prompt of Alpaca data, on the bundled model: all four rows are in the one step."""
    import pandas
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.training.checkpoints import checkpoint_folder

    file = tiny(tmp_path, "warmup_steps: 0\n")
    file.write_text(file.read_text().replace("random:tiny", "smollm2-135m-instruct"))
    code, _, errors = ask("run", str(file), "--no-predict")
    assert code == 0, errors
    steps = pandas.read_parquet(tmp_path / "results/mine/steps")
    measured = float(steps.loc[steps["block"].isna(), "loss"].iloc[0])

    folder = checkpoint_folder("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = tokens = 0.0
    for row in ALPACA:
        task = "a task, paired with an input that provides further context" if row["input"] else "a task"
        given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        prompt = (
            f"Below is an instruction that describes {task}. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"
        )
        head = tokenizer(prompt)["input_ids"]
        tail = tokenizer(row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(tail), reduction="sum"))
        tokens += len(tail)
    assert measured == pytest.approx(total / tokens, rel=1e-4)
