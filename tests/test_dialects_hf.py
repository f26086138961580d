"""Training files of LLaMA-Factory and of TRL: what they become, and what is refused."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from harness.dialects import hf_arguments, llama_factory, training_file, trl
from harness.dialects.llama_factory_data import datasets_from, datasets_of, info_path
from harness.dialects.rules import Dialect, Reader, read
from harness.grids.levels import SPEC_KEYS, make_spec, normalised
from harness.grids.yaml_file import read_yaml
from harness.spec.trial import TrialSpec

FILES = Path(__file__).parent / "training_files"
DIALECTS = {"llama_factory": llama_factory.DIALECT, "trl": trl.DIALECT}
CORPUS = sorted(path for tool in DIALECTS for path in (FILES / tool).glob("*.yml"))

OTHER_TASKS = {
    *("llama_factory/dpo", "llama_factory/kto", "llama_factory/reward", "llama_factory/predict"),
    *("llama_factory/vision", "llama_factory/export", "trl/dpo", "trl/grpo", "trl/reward"),
}
REFUSED = {
    "llama_factory/badam": {"use_badam"},
    "llama_factory/freeze_pro": {"finetuning_type", "use_llama_pro"},
    "llama_factory/full_zero3_offload": {"deepspeed"},
    "llama_factory/galore": {"use_galore"},
    "llama_factory/packing": {"packing", "neat_packing", "enable_liger_kernel"},
    "llama_factory/unsloth": {"use_unsloth", "eval_dataset", "rope_scaling"},
    "trl/experts": {"lr_scheduler_type", "lr_scheduler_kwargs"},
    "trl/packing": {"packing", "use_liger_kernel"},
    "trl/template_file": {"chat_template_path"},
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def read_file(path: Path) -> Reader:
    return read_as(DIALECTS[path.parent.name], read_yaml(path))


def read_as(dialect: Dialect, document: dict[str, Any]) -> Reader:
    reader, strangers = read(dialect, document, SPEC_KEYS)
    assert not strangers
    return reader


def spec_of(reader: Reader) -> TrialSpec:
    return make_spec(normalised(reader.values, "file"), "file")


def spec(name: str) -> TrialSpec:
    reader = read_file(FILES / f"{name}.yml")
    assert not reader.unsupported
    assert not reader.other_tasks
    return spec_of(reader)


def lf(**keys: Any) -> Reader:
    required = {"model_name_or_path": "m", "dataset": "d", "do_train": True}
    return read_as(llama_factory.DIALECT, required | keys)


def of_trl(**keys: Any) -> Reader:
    return read_as(trl.DIALECT, {"model_name_or_path": "m", "dataset_name": "d"} | keys)


# ------------------------------------------------------------------------------------------------- the corpus


@pytest.mark.parametrize("path", CORPUS, ids=name_of)
def test_every_key_of_a_file_is_accounted_for(path: Path) -> None:
    reader = read_file(path)
    counted = reader.mapped.keys() | reader.no_effect.keys() | reader.unsupported.keys() | reader.other_tasks.keys()
    assert reader.given.keys() <= counted
    assert {*reader.unsupported} == REFUSED.get(name_of(path), set()) or name_of(path) in OTHER_TASKS
    assert bool(reader.other_tasks) == (name_of(path) in OTHER_TASKS)


@pytest.mark.parametrize("path", [p for p in CORPUS if name_of(p) not in OTHER_TASKS], ids=name_of)
def test_what_is_left_of_a_file_is_a_spec(path: Path) -> None:
    spec_of(read_file(path))


def test_most_files_are_taken_as_they_stand() -> None:
    for tool in DIALECTS:
        names = [name_of(path) for path in CORPUS if path.parent.name == tool]
        taken = [name for name in names if name not in OTHER_TASKS and name not in REFUSED]
        assert len(names) >= 18
        assert len(taken) >= 2 / 3 * len(names)


def test_all_reasons_stand_in_one_message() -> None:
    document = read_yaml(FILES / "llama_factory" / "unsloth.yml") | {"finetunning_type": "lora"}
    with pytest.raises(ValueError, match="did you mean finetuning_type") as caught:
        training_file.interpret(document, SPEC_KEYS)
    assert all(name in str(caught.value) for name in REFUSED["llama_factory/unsloth"])
    del document["finetunning_type"]
    left = training_file.interpret(document, SPEC_KEYS, without_unsupported=True)
    assert left.without.keys() == REFUSED["llama_factory/unsloth"]


@pytest.mark.parametrize("value", [0, -1, 0.5, True, "text", ["a"], [1], {"a": 1}, [{"path": "a"}]], ids=repr)
@pytest.mark.parametrize("tool", DIALECTS)
def test_no_value_of_a_key_is_more_than_refused(tool: str, value: Any) -> None:
    dialect = DIALECTS[tool]
    for key in dialect.table:
        reader, _ = read(
            dialect, {"model_name_or_path": "m", "dataset": "d", "dataset_name": "d", key: value}, SPEC_KEYS
        )
        with contextlib.suppress(ValueError):
            spec_of(reader)


def test_files_are_recognised() -> None:
    for path in CORPUS:
        assert llama_factory.is_one(read_yaml(path)) == (path.parent.name == "llama_factory"), path


# ------------------------------------------------------------------------------------------------- whole files

EXPECTED: dict[str, dict[str, Any]] = {
    "llama_factory/minimal": {
        "base_model": "Qwen/Qwen2.5-0.5B-Instruct", "adapter": "lora", "lora_r": 8, "lora_alpha": 16,
        "lora_dropout": 0.0, "lora_target_linear": True, "sequence_length": 2048, "micro_batch_size": 8,
        "gradient_accumulation_steps": 1, "num_epochs": 3.0, "learning_rate": 5e-5, "lr_scheduler": "linear",
        "warmup_ratio": 0.0, "warmup_steps": None, "optimizer": "adamw_torch_fused", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "seed": 42, "val_set_size": 0, "precision": "bf16", "gradient_checkpointing": True,
        "reentrant_checkpointing": True, "train_on_inputs": False, "chat_template": "own", "attention": "auto",
    },
    "llama_factory/lora": {
        "lora_r": 16, "lora_alpha": 32, "sequence_length": 1024, "micro_batch_size": 2, "warmup_ratio": 0.1,
        "gradient_accumulation_steps": 4, "num_epochs": 2.0, "lr_scheduler": "cosine", "val_set_size": 0.05,
        "learning_rate": 1e-4, "output_dir": "saves/llama3.2-1b/lora",
    },
    "llama_factory/lora_targets": {
        "lora_target_modules": ("q_proj", "v_proj"), "lora_modules_to_save": ("embed_tokens", "lm_head"),
        "lora_alpha": 16, "use_rslora": True, "precision": "fp16", "attention": "sdpa", "warmup_steps": 20,
        "max_steps": 300, "num_epochs": None, "chat_template": "chatml", "learning_rate": 2e-4,
    },
    "llama_factory/full_zero3": {
        "adapter": "none", "precision": "bf16-mixed", "sharding": "full_shard", "num_processes": 4,
    },
    "llama_factory/full_zero2_one_process": {"adapter": "none", "sharding": "none", "num_processes": 1},
    "llama_factory/full_pure_bf16": {
        "precision": "bf16", "gradient_checkpointing": False, "reentrant_checkpointing": False,
        "optimizer": "paged_adamw_8bit", "warmup_ratio": 0.03, "warmup_steps": None,
    },
    "llama_factory/qlora": {"precision": "nf4", "double_quantization": True, "compute_dtype": None},
    "llama_factory/qlora_fp4_single": {
        "precision": "fp4", "double_quantization": False, "compute_dtype": "fp16", "reentrant_checkpointing": False,
    },
    "llama_factory/int8": {"precision": "int8", "double_quantization": False, "attention": "flash_attention_2"},
    "llama_factory/hqq": {"precision": "int4", "quantizer": "hqq", "double_quantization": False},
    "llama_factory/adafactor": {"precision": "fp16-mixed", "optimizer": "adafactor", "attention": "eager"},
    "llama_factory/no_flags": {"precision": "fp32", "learning_rate": 1e-5, "lr_scheduler": "constant"},
    "llama_factory/deepspeed_mapping": {"sharding": "shard_grad_op"},
    "llama_factory/tracked": {"optimizer": "adamw_torch_8bit", "gradient_checkpointing": True, "val_set_size": 100},
    "trl/minimal": {
        "adapter": "none", "sequence_length": 1024, "micro_batch_size": 8, "num_epochs": 3.0, "learning_rate": 2e-5,
        "lr_scheduler": "linear", "optimizer": "adamw_torch_fused", "seed": 42, "precision": "bf16-mixed",
        "gradient_checkpointing": True, "reentrant_checkpointing": False, "train_on_inputs": False,
        "val_set_size": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
    },
    "trl/full": {
        "precision": "bf16", "attention": "flash_attention_2", "reentrant_checkpointing": True,
        "special_tokens": (("eos_token", "<|im_end|>"),), "sequence_length": 4096,
    },
    "trl/lora": {
        "adapter": "lora", "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_linear": True,
        "lora_modules_to_save": ("lm_head",), "precision": "bf16", "train_on_inputs": False,
    },
    "trl/lora_default_targets": {
        "lora_r": 16, "lora_alpha": 32, "lora_target_linear": False, "lora_target_modules": None,
        "precision": "bf16-mixed", "max_steps": 200, "num_epochs": None, "warmup_steps": 10,
    },
    "trl/lora_layers": {"precision": "fp16", "lora_target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "trl/qlora": {"precision": "nf4", "double_quantization": True, "sequence_length": 2048, "tf32": True},
    "trl/int8": {"precision": "int8", "gradient_checkpointing": False},
    "trl/fp32": {"precision": "fp32", "device": "cpu"},
    "trl/model_arguments": {"precision": "bf16", "attention": "sdpa"},
    "trl/mixture": {"val_set_size": 0.1},
    "trl/test_split": {"val_set_size": 32},
    "trl/other_test_split": {"val_set_size": 32},
    "trl/zero3": {"sharding": "full_shard", "num_processes": 4},
    "trl/fsdp_one_process": {"sharding": "none"},
    "trl/prompt_completion": {"train_on_inputs": False},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_is_this_spec(name: str) -> None:
    made = spec(name)
    assert {key: getattr(made, key) for key in EXPECTED[name]} == EXPECTED[name]


def test_datasets_of_files() -> None:
    assert [d.path for d in spec("llama_factory/lora").datasets] == ["stories", "questions"]
    assert {d.split for d in spec("llama_factory/lora").datasets} == {"train[:500]"}
    assert spec("llama_factory/lora_targets").datasets[0].path == "my_data/notes.jsonl"
    assert spec("llama_factory/pretrain").datasets[0].type.kind == "text"
    hub = spec("llama_factory/hub_names").datasets[0]
    assert (hub.path, hub.type.system_prompt) == ("someone/stories", "You write short stories.")
    mixture = spec("trl/mixture").datasets
    assert (mixture[0].name, mixture[0].split) == ("short", "train[:1000]")
    assert (mixture[1].ds_type, mixture[1].data_files) == ("json", ("a.jsonl", "b.jsonl"))
    assert mixture[1].type.field_instruction == "prompt"
    text = spec("trl/text_column").datasets[0].type
    assert (text.kind, text.field_text) == ("text", "content")
    assert spec("trl/lora").datasets[0].type.kind == "chat"


# ------------------------------------------------------------------------------------------------- single keys


@pytest.mark.parametrize(
    ("keys", "precision"),
    [
        ({"bf16": True}, "bf16"),
        ({"bf16": True, "finetuning_type": "full"}, "bf16-mixed"),
        ({"pure_bf16": True, "finetuning_type": "full"}, "bf16"),
        ({"fp16": True, "finetuning_type": "full"}, "fp16-mixed"),
        ({"fp16": True}, "fp16"),
        ({}, "bf16"),
        ({"finetuning_type": "full"}, "fp32"),
        ({"bf16": True, "precision": "fp32"}, "fp32"),
    ],
)
def test_precision_of_llama_factory(keys: dict[str, Any], precision: str) -> None:
    assert spec_of(lf(**keys)).precision == precision


@pytest.mark.parametrize(
    ("keys", "precision"),
    [
        ({}, "bf16-mixed"),
        ({"dtype": "bfloat16"}, "bf16"),
        ({"torch_dtype": "auto"}, "bf16"),
        ({"fp16": True}, "fp16-mixed"),
        ({"bf16": False}, "fp32"),
        ({"bf16": False, "dtype": "bfloat16"}, "bf16"),
    ],
)
def test_precision_of_trl(keys: dict[str, Any], precision: str) -> None:
    assert spec_of(of_trl(**keys)).precision == precision


def test_weights_and_arithmetic_of_two_16_bit_types_are_refused() -> None:
    assert "bf16 weights with fp16 arithmetic" in of_trl(dtype="bfloat16", fp16=True).unsupported["dtype"]


def test_steps_stand_before_epochs() -> None:
    assert spec_of(lf(max_steps=5, num_train_epochs=2)).max_steps == 5
    assert spec_of(lf(max_steps=-1, num_train_epochs=2)).num_epochs == 2.0
    assert spec_of(lf(train_samples=7, num_train_epochs=2)).train_samples == 7


def test_warmup() -> None:
    both = spec_of(of_trl(warmup_steps=10, warmup_ratio=0.1))
    assert (both.warmup_steps, both.warmup_ratio) == (10, 0.0)
    assert spec_of(of_trl(warmup_steps=0, warmup_ratio=0.1)).warmup_ratio == 0.1
    assert spec_of(of_trl(warmup_steps=0.2)).warmup_ratio == 0.2


def test_a_value_of_the_wrong_type_is_reported_by_the_spec() -> None:
    with pytest.raises(ValueError, match="warmup_steps is 'many'; it must be a whole number"):
        spec_of(lf(warmup_steps="many"))
    with pytest.raises(ValueError, match="num_epochs is 'many'; it must be a number"):
        spec_of(lf(num_train_epochs="many"))


@pytest.mark.parametrize(("name", "word"), [("lomo", "adamw_torch"), ("nonsense", "no optimizer here")])
def test_optimizers_without_counterpart_are_refused(name: str, word: str) -> None:
    assert word in lf(optim=name).unsupported["optim"]


def test_a_schedule_without_counterpart_is_refused() -> None:
    assert "use cosine" in lf(lr_scheduler_type="cosine_with_min_lr").unsupported["lr_scheduler_type"]


@pytest.mark.parametrize(
    ("given", "sharding"),
    [
        ("ds_z0_config.json", "none"),
        ("zero2.json", "shard_grad_op"),
        ("ds_zero_3.json", "full_shard"),
        ({"zero_optimization": {"stage": 3}}, "full_shard"),
    ],
)
def test_stages_of_deepspeed(given: Any, sharding: str) -> None:
    assert spec_of(lf(deepspeed=given, num_processes=2)).sharding == sharding


_ON_CPU = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize("given", ["zero1.json", "ds_z3_offload.json", "mine.json", _ON_CPU])
def test_what_deepspeed_does_without_counterpart_is_refused(given: Any) -> None:
    assert "deepspeed" in lf(deepspeed=given, num_processes=2).unsupported


def test_one_process_has_nothing_to_shard() -> None:
    reader = lf(deepspeed="zero1.json")
    assert not reader.unsupported
    assert "one process: nothing to shard" in reader.mapped["deepspeed"]
    assert "num_processes: 2" in lf(fsdp="full_shard auto_wrap").mapped["fsdp"]


@pytest.mark.parametrize(
    ("keys", "sharding"),
    [
        ({"fsdp": "full_shard auto_wrap"}, "full_shard"),
        ({"fsdp": ["shard_grad_op", "auto_wrap"]}, "shard_grad_op"),
        ({"fsdp": True, "fsdp_config": {"reshard_after_forward": False}}, "shard_grad_op"),
        ({"fsdp": True}, "full_shard"),
        ({"fsdp": False}, "none"),
    ],
)
def test_fsdp(keys: dict[str, Any], sharding: str) -> None:
    assert spec_of(of_trl(num_processes=2, **keys)).sharding == sharding


@pytest.mark.parametrize("key", ["activation_checkpointing", "fsdp_activation_checkpointing"])
@pytest.mark.parametrize("processes", [1, 2])
def test_fsdp_checkpoints_by_its_own_key(key: str, processes: int) -> None:
    keys = {"fsdp": True, "fsdp_config": {key: True}, "num_processes": processes}
    files = [of_trl(**keys, gradient_checkpointing=False), lf(**keys, disable_gradient_checkpointing=True)]
    for reader in files:
        made = spec_of(reader)
        assert (made.gradient_checkpointing, made.reentrant_checkpointing) == (True, False)
        assert "FSDP's own" in reader.notes["fsdp_config"]
    off = keys | {"fsdp": False}
    assert not spec_of(of_trl(**off, gradient_checkpointing=False)).gradient_checkpointing


def test_fsdp_with_offload_is_refused() -> None:
    assert "fsdp" in of_trl(fsdp=True, fsdp_config={"offload_params": True}).unsupported
    assert "fsdp" not in of_trl(fsdp=True, fsdp_config={"cpu_offload": "false"}).unsupported
    assert "fsdp" in of_trl(fsdp="full_shard offload").unsupported
    assert "fsdp" in of_trl(fsdp=True, fsdp_config={"cpu_offload": True}).unsupported


def test_templates_of_llama_factory() -> None:
    assert lf(template="llama3").mapped["template"] == "chat_template: own (the model's, which it must have)"
    assert spec_of(lf(template="llama3")).chat_template == "own"
    assert spec_of(lf(template="alpaca")).chat_template == "alpaca"
    for name in ("alpaca", "vicuna"):
        assert "its own system prompt only where default_system gives it" in lf(template=name).mapped["template"]
    assert "template" in lf(template="default").unsupported
    assert "template" in lf(template="llava").other_tasks
    assert "template" not in lf(template="glm4").other_tasks
    assert "LLaMA-Factory joins all" in lf(stage="pt").mapped["stage"]


def test_prediction_and_images_are_other_tasks() -> None:
    assert "do_predict" in lf(do_train=False, do_predict=True).other_tasks
    assert "do_train" in lf(do_train=False).other_tasks
    assert "freeze_vision_tower" in lf(freeze_vision_tower=False).other_tasks
    assert not lf(freeze_vision_tower=True, image_max_pixels=1024).other_tasks


def test_values_at_the_tools_defaults_ask_for_nothing() -> None:
    reader = lf(packing=False, mix_strategy="concat", model_revision="main", label_smoothing_factor=0.0)
    assert not reader.unsupported
    reader = of_trl(packing=False, truncation_mode="keep_start", train_sampling_strategy="random", loss_type="nll")
    assert not reader.unsupported


def test_loss_of_trl_is_on_all_tokens_and_noted() -> None:
    assert "loss on all tokens" in of_trl().mapped["dataset_name"]
    assert spec_of(of_trl(completion_only_loss=True)).train_on_inputs is False
    assert spec_of(of_trl(completion_only_loss=False)).train_on_inputs is True
    plain = spec_of(of_trl())
    assert (plain.train_on_inputs, plain.datasets[0].type.roles_to_train) == (False, ("all",))
    assert spec_of(of_trl(assistant_only_loss=True)).datasets[0].type.roles_to_train == ("assistant",)
    assert spec_of(of_trl(assistant_only_loss=True)).datasets[0].type.kind == "chat"
    formats = [spec_of(of_trl(**keys)).datasets[0].type.format for keys in ({}, {"completion_only_loss": True})]
    assert formats == ["{instruction}"] * 2, "prompts that are texts stand as they are"
    for keys in ({}, {"completion_only_loss": True}):
        kind = spec_of(of_trl(**keys)).datasets[0].type
        assert (kind.roles_to_train, kind.tokenize_jointly, kind.add_special_tokens) == (("all",), True, False)


def test_without_a_length_trl_cuts_nothing() -> None:
    assert spec_of(of_trl(max_length=None)).sequence_length == 131_072
    assert spec_of(of_trl(max_length=None)).sequence_length > spec_of(of_trl()).sequence_length


def test_keys_of_a_spec_stand_before_what_is_derived() -> None:
    made = spec_of(lf(lora_target="q_proj", lora_target_modules=["v_proj"], adapter="lora", attention="eager"))
    assert (made.lora_target_modules, made.attention) == (("v_proj",), "eager")
    assert spec_of(of_trl(val_set_size=8, eval_strategy="steps")).val_set_size == 8


def test_a_file_without_data_is_refused() -> None:
    assert "dataset_name" in read_as(trl.DIALECT, {"model_name_or_path": "m"}).unsupported
    assert "dataset" in read_as(llama_factory.DIALECT, {"model_name_or_path": "m", "do_train": True}).unsupported


def test_parts_of_a_mixture_without_counterpart_are_refused() -> None:
    reader = of_trl(datasets=[{"path": "a", "data_dir": "b"}])
    assert "datasets[0].data_dir" in reader.unsupported


# ------------------------------------------------------------------------------------------------- dataset_info.json

INFO: dict[str, Any] = {
    "plain": {"file_name": "plain.json"},
    "named": {"file_name": "named.json", "columns": {"prompt": "question", "response": "answer", "system": "sys"}},
    "texts": {"file_name": "texts.txt", "columns": {"prompt": "text"}},
    "chats": {"hf_hub_url": "someone/chats", "formatting": "sharegpt", "subset": "en", "split": "train_sft"},
    "messages": {
        "file_name": "messages.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "bot"},
    },
    "pairs": {"file_name": "pairs.json", "ranking": True},
    "pictures": {"file_name": "p.json", "columns": {"prompt": "a", "images": "b"}},
    "talks": {"file_name": "t.json", "columns": {"history": "history"}},
    "foreign": {"ms_hub_url": "a/b"},
    "few": {"file_name": "few.json", "num_samples": 50},
}


def dataset(name: str) -> Any:
    return make_spec({"base_model": "m", "datasets": datasets_of([name], INFO)}, "file").datasets[0]


def test_alpaca_datasets() -> None:
    plain = dataset("plain")
    assert plain.path == "data/plain.json"
    kind = plain.type
    assert (kind.field_instruction, kind.field_input, kind.field_output) == ("instruction", "input", "output")
    assert kind.input_separator == "\n", "as LLaMA-Factory puts both into a turn"
    named = dataset("named").type
    assert (named.field_instruction, named.field_input, named.field_output) == ("question", None, "answer")
    assert named.field_system == "sys"
    assert (dataset("texts").type.kind, dataset("texts").type.field_text) == ("text", "text")
    assert (dataset("few").split, dataset("few").num_samples) == (None, 50)


def test_chats() -> None:
    chats = dataset("chats")
    assert (chats.path, chats.name, chats.split) == ("someone/chats", "en", "train_sft")
    assert (chats.type.field_messages, chats.type.message_field_role) == ("conversations", "from")
    assert chats.type.alternating_turns
    messages = dataset("messages").type
    assert (messages.message_field_role, messages.message_field_content) == ("role", "content")
    assert dict(messages.roles)["assistant"] == ("bot", "function_call")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pairs", "preferences"),
        ("pictures", "images"),
        ("talks", "history"),
        ("foreign", "neither file_name nor hf_hub_url"),
        ("plane", "did you mean plain"),
    ],
)
def test_rows_of_other_tasks_are_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        datasets_of([name], INFO)


def test_a_column_that_is_null_is_none() -> None:
    columns = {"prompt": "instruction", "response": "output", "history": None, "images": None}
    (entry,) = datasets_of(["mine"], {"mine": {"file_name": "mine.json", "columns": columns}})
    assert entry["type"] == {"kind": "instruction", "field_instruction": "instruction", "field_output": "output"}


def test_datasets_of_a_training_file() -> None:
    document = {"dataset": "plain, few", "dataset_dir": "mine", "max_samples": 100, "default_system": "Be short."}
    assert info_path(document) == "mine/dataset_info.json"
    first, second = datasets_from(document, INFO)
    assert (first["path"], first["split"]) == ("mine/plain.json", "train[:100]")
    assert (second.get("split"), second["num_samples"]) == (None, 50)
    assert datasets_from(document | {"max_samples": 20}, INFO)[1]["num_samples"] == 20
    odd = INFO | {"few": {"file_name": "few.json", "num_samples": "many"}}
    assert datasets_from(document, odd)[1]["num_samples"] == "many", "which is then refused"
    assert first["type"]["system_prompt"] == "Be short."
    assert info_path({"dataset": "a/b", "dataset_dir": "ONLINE"}) is None


# ------------------------------------------------------------------------------------------------- tables


def fields_of(module: str, name: str, of: str = "transformers") -> set[str]:
    """Fields of a dataclass, from its source: importing it would import torch."""
    package = importlib.util.find_spec(of)
    assert package is not None
    assert package.origin is not None
    tree = ast.parse((Path(package.origin).parent / f"{module.replace('.', '/')}.py").read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name).body
    return {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def test_the_table_has_every_training_argument_of_transformers() -> None:
    fields = fields_of("training_args", "TrainingArguments")
    fields |= fields_of("training_args_seq2seq", "Seq2SeqTrainingArguments")
    assert len(fields) > 100
    assert fields <= hf_arguments.TABLE.keys()


def test_the_table_has_every_argument_of_trl() -> None:
    fields = fields_of("trainer.sft_config", "SFTConfig", "trl") | fields_of(
        "trainer.model_config", "ModelConfig", "trl"
    )
    for name in ("ScriptArguments", "DatasetMixtureConfig"):
        fields |= fields_of("scripts.utils", name, "trl")
    assert len(fields) > 30
    assert {name for name in fields if not name.startswith("_")} <= trl.DIALECT.table.keys()


def test_a_mixture_of_the_alignment_handbook_is_refused_with_what_would_do() -> None:
    document = {
        "model_name_or_path": "a/b",
        "use_peft": True,
        "dataset_mixer": {"a/c": 1.0},
        "dataset_splits": ["train"],
    }
    reader = read_as(trl.DIALECT, document | {"preprocessing_num_workers": 12})
    assert reader.reasons == [
        "dataset_mixer: {'a/c': 1.0}, dataset_splits: train (use datasets: [{path: ..., name: ..., split: ...}])"
    ]


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
def test_keys_of_a_spec_in_tables_are_those_of_a_spec(dialect: Dialect) -> None:
    targets = {rule.key for rule in dialect.table.values() if hasattr(rule, "key")}
    assert targets | dialect.defaults.keys() <= TrialSpec.model_fields.keys()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"precision": "bf16-mixed", "autocast": None, "upcast_unquantized": False}),
        ({"dtype": "bfloat16"}, {"precision": "bf16", "autocast": True, "upcast_unquantized": False}),
        ({"dtype": "bfloat16", "bf16": False}, {"autocast": None}),
        ({"dtype": "bfloat16", "use_peft": True}, {"autocast": True}),
        ({"dtype": "bfloat16", "use_peft": True, "bf16": False}, {"autocast": False}),
        ({"use_peft": True, "load_in_4bit": True}, {"upcast_unquantized": True, "compute_dtype": None}),
        ({"use_peft": True, "load_in_8bit": True, "dtype": "float32"}, {"upcast_unquantized": True}),
        (
            {"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16"},
            {"upcast_unquantized": False, "autocast": True},
        ),
        (
            {"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16", "bf16": False},
            {"upcast_unquantized": False, "autocast": False},
        ),
        (
            {"use_peft": True, "load_in_4bit": True, "bf16": False},
            {"upcast_unquantized": False, "autocast": None, "compute_dtype": "fp32"},
        ),
        ({"padding_free": True}, {"sample_packing": True}),
        ({"packing": False}, {"sample_packing": False}),
        ({"train_sampling_strategy": "group_by_length"}, {"group_by_length": True}),
        ({"torch_compile": True}, {"torch_compile": True}),
        ({"torch_compile_mode": "default"}, {"torch_compile": True}),
        ({"torch_compile": False}, {"torch_compile": False}),
    ],
)
def test_how_trl_makes_its_step(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    document = {"model_name_or_path": "a/b", "dataset_name": "a/c", "lora_target_modules": ["q_proj"], **keys}
    values = spec_of(read_as(trl.DIALECT, document)).model_dump()
    assert {key: values[key] for key in expected} == expected


def test_trls_adapters_over_quantised_bases_are_16_bit() -> None:
    document = {"model_name_or_path": "a/b", "dataset_name": "a/c", "use_peft": True, "load_in_4bit": True}
    assert "adapters are fp32 here, bf16 in TRL" in read_as(trl.DIALECT, document).notes["load_in_4bit"]


@pytest.mark.parametrize("keys", [{}, {"loss_type": "nll"}, {"loss_type": "chunked_nll"}], ids=str)
def test_trl_never_makes_all_logits(keys: dict[str, Any]) -> None:
    assert spec_of(of_trl(**keys)).loss == "chunked"
    assert spec_of(of_trl(loss="full", **keys)).loss == "full", "unless the file asks for it with harness's own key"


@pytest.mark.parametrize(
    ("keys", "autocast"),
    [
        ({}, False),
        ({"bf16": True}, None),
        ({"quantization_bit": 4}, False),
        ({"quantization_bit": 4, "fp16": True}, None),
        ({"finetuning_type": "full"}, None),
        ({"finetuning_type": "full", "pure_bf16": True}, None),
        ({"finetuning_type": "full", "pure_bf16": True, "bf16": True}, True),
    ],
)
def test_llama_factorys_trainer_is_under_autocast_where_bf16_or_fp16_asks_for_it(
    keys: dict[str, Any], autocast: bool | None
) -> None:
    document = {"model_name_or_path": "a/b", "stage": "sft", "template": "qwen", "dataset": "a", **keys}
    assert spec_of(read_as(llama_factory.DIALECT, document)).autocast is autocast
