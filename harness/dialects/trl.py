"""Training files of TRL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from harness.dialects import hf_arguments
from harness.dialects.common import MOST_POSITIONS, NOT_MEASURED, derive, each, shard
from harness.dialects.rules import Dialect, NoEffect, OtherTask, Reader, Rule, To, Together, Unsupported
from harness.dialects.sharding import read_deepspeed
from harness.spec.datasets import BARE, DatasetSpec, PromptSpec

_ORDER = "the order of the rows, which is random, by `seed`"
_LAUNCHING = "launching processes"

_TABLE: dict[str, Rule] = {
    **hf_arguments.TABLE,
    # The model
    "model_name_or_path": To("base_model"),
    "model_revision": Unsupported("download that revision, and name its folder", ("main",)),
    "base_model_revision": Unsupported("download that revision, and name its folder", ("main",)),
    "model_code_revision": Unsupported("download that revision, and name its folder", ("main",)),
    "trust_remote_code": NoEffect("asked for on the command line: `--trust-remote-code`"),
    "router_aux_loss_coef": Unsupported("leave it out: the coefficient is that of the model's config.json"),
    **each(Together(), "dtype torch_dtype attn_implementation use_flash_attention_2 model_init_kwargs"),
    **each(Together(), "use_peft lora_target_modules load_in_8bit load_in_4bit bnb_4bit_quant_type"),
    **each(Together(), "use_bnb_nested_quant gradient_checkpointing_use_reentrant"),
    "lora_r": To("lora_r"),
    "lora_alpha": To("lora_alpha"),
    "lora_dropout": To("lora_dropout"),
    "lora_modules_to_save": To("lora_modules_to_save", lambda value: [value] if isinstance(value, str) else value),
    "use_rslora": To("use_rslora"),
    "use_dora": To("use_dora"),
    "lora_target_parameters": To("lora_target_parameters", lambda value: [value] if isinstance(value, str) else value),
    "lora_task_type": OtherTask("training of a head in place of the language model's", ("CAUSAL_LM",)),
    "bnb_4bit_quant_storage": NoEffect("how 4-bit weights are kept for sharding"),
    # The data
    **each(Together(), "dataset_name dataset_config dataset_train_split dataset_test_split datasets test_split_size"),
    **each(Together(), "dataset_text_field completion_only_loss assistant_only_loss eval_strategy evaluation_strategy"),
    **each(Together(), "eos_token pad_token chat_template_path"),
    **each(
        Unsupported("use datasets: [{path: ..., name: ..., split: ...}]"),
        "dataset_mixer dataset_mixture dataset_splits dataset_configs",
    ),
    "max_length": To("sequence_length"),
    "max_seq_length": To("sequence_length"),
    "dataset_kwargs": Unsupported("leave it out: rows are tokenised here"),
    "truncation_mode": Unsupported("use keep_start", ("keep_start",)),
    "pad_to_multiple_of": Unsupported("leave it out: batches are padded to their longest row", (0, 1)),
    **each(Unsupported(NOT_MEASURED), "activation_offloading use_liger"),
    "padding_free": To("sample_packing"),
    "packing": Unsupported("use padding_free: true, which packs micro-batches; rows are not filled up here"),
    "eval_packing": NoEffect("evaluation during training"),
    "loss_type": Together(),
    "packing_strategy": NoEffect("details of packing"),
    **each(NoEffect("details of packing"), "num_of_sequences chars_per_token"),
    "shuffle_dataset": NoEffect(_ORDER),
    **each(
        NoEffect("reading of rows"),
        "dataset_num_proc dataset_batch_size dataset_streaming streaming ignore_bias_buffers preprocessing_num_workers",
    ),
    # Launching
    "accelerate_config": Together(),
    **each(
        Unsupported("use accelerate_config: zero2, zero3 or fsdp2"),
        "config_file use_deepspeed use_fsdp deepspeed_config_file zero_stage",
    ),
    "env": NoEffect("variables of the environment"),
    **each(
        NoEffect(_LAUNCHING),
        "num_machines machine_rank main_process_ip main_process_port gpu_ids rdzv_backend same_network "
        "mixed_precision dynamo_backend config verbose",
    ),
    # Training of another kind
    **each(
        OtherTask("training on preferences"),
        "beta label_smoothing max_prompt_length precompute_ref_log_probs precompute_ref_batch_size "
        "generate_during_eval rpo_alpha reference_free f_divergence_type f_alpha_divergence_coef "
        "sync_ref_model ref_model_sync_steps ref_model_mixup_alpha ref_model_init_kwargs use_weighting "
        "use_logits_to_keep ld_alpha discopop_tau desirable_weight undesirable_weight cpo_alpha simpo_gamma alpha",
    ),
    **each(OtherTask("reward modelling"), "center_rewards_coefficient step_separator train_on_last_step_only"),
    **each(
        OtherTask("reinforcement learning"),
        "num_generations max_completion_length reward_funcs reward_weights scale_rewards num_iterations "
        "epsilon epsilon_high use_vllm vllm_mode vllm_gpu_memory_utilization vllm_server_host vllm_server_port "
        "vllm_tensor_parallel_size log_completions mask_truncated_completions importance_sampling_level "
        "steps_per_generation generation_batch_size reward_model_name_or_path reward_model_path sft_model_path "
        "response_length num_ppo_epochs num_mini_batches kl_coef cliprange cliprange_value vf_coef gamma lam "
        "whiten_rewards missing_eos_penalty stop_token rloo_k total_episodes judge",
    ),
    **each(OtherTask("distillation"), "teacher_model_name_or_path teacher_model_init_kwargs lmbda seq_kd"),
}

_DEFAULTS: Mapping[str, Any] = {
    **hf_arguments.DEFAULTS,
    "learning_rate": 2e-5,
    "adapter": "none",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_linear": False,
    "sequence_length": 1024,
    "val_set_size": 0,
}


def _combine(reader: Reader) -> None:
    reader.ignore("that it is a training", "do_train", "do_predict")
    hf_arguments.read_arguments(reader)
    _read_checkpointing(reader)
    _read_adapter(reader)
    _read_model_arguments(reader)
    _read_attention(reader)
    _read_precision(reader)
    _read_launch(reader)
    _read_tokens(reader)
    _read_datasets(reader)
    _read_held_out(reader)
    _read_loss(reader)


def _read_checkpointing(reader: Reader) -> None:
    reentrant = reader.get("gradient_checkpointing_use_reentrant") is True
    hf_arguments.read_checkpointing(reader, default=True, reentrant=reentrant)
    reader.note(f"reentrant_checkpointing: {str(reentrant).lower()}", "gradient_checkpointing_use_reentrant")


def _read_adapter(reader: Reader) -> None:
    derive(reader, "adapter", "lora" if reader.get("use_peft") is True else "none", "use_peft")
    targets = reader.get("lora_target_modules")
    if targets is not None:
        reader.values.pop("lora_target_linear", None)
        reader.set("lora_target_modules", targets, "lora_target_modules")
    if reader.values["adapter"] == "none":
        lora = [name for name in reader.given if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
        for name in lora:
            reader.mapped.pop(name, None)
        reader.ignore("LoRA, which use_peft: true asks for", *lora)


def _read_model_arguments(reader: Reader) -> None:
    """What is passed to the model stands for keys of its own where there are any."""
    given = reader.get("model_init_kwargs")
    if given is None:
        return
    if not isinstance(given, Mapping):
        reader.refuse("model_init_kwargs", "give a mapping like {dtype: bfloat16}")
        return
    others = [key for key in given if key not in ("dtype", "torch_dtype", "attn_implementation", "use_cache")]
    if others:
        reader.refuse("model_init_kwargs", f"leave out {', '.join(map(str, others))}")
    else:
        reader.note("type of weights and attention", "model_init_kwargs")


def _argument(reader: Reader, *names: str) -> tuple[Any, str]:
    """The value of the first of some keys that the file or its model_init_kwargs has, and the key that it is from."""
    inner = reader.get("model_init_kwargs")
    for name in names:
        if name in reader.given:
            return reader.get(name), name
    for name in names:
        if isinstance(inner, Mapping) and inner.get(name) is not None:
            return inner[name], "model_init_kwargs"
    return None, names[0]


_ATTENTION = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flash_attention_2": "flash_attention_2",
    "flex_attention": "flex_attention",
    "kernels-community/flash-attn": "flash_attention_2",
    "kernels-community/flash-attn2": "flash_attention_2",
}


def _read_attention(reader: Reader) -> None:
    given, name = _argument(reader, "attn_implementation")
    if str(given) in _ATTENTION:
        derive(reader, "attention", _ATTENTION[str(given)], name)
    elif given is not None:
        reader.refuse(name, "use sdpa, eager, flash_attention_2 or flex_attention")
    elif reader.get("use_flash_attention_2") is True:
        derive(reader, "attention", "flash_attention_2", "use_flash_attention_2")
    reader.ignore("off", *(["use_flash_attention_2"] if "use_flash_attention_2" not in reader.mapped else []))


_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_HALF_FLAGS = ("bf16", "fp16")


def _read_precision(reader: Reader) -> None:
    """Weights are loaded as `dtype` says, in fp32 by default; the arithmetic is bf16 unless the file says otherwise."""
    given, name = _argument(reader, "dtype", "torch_dtype")
    # Checkpoints are in bf16, nearly all of them.
    weights = "bf16" if given == "auto" else _TYPES.get(str(given).removeprefix("torch.")) if given else "fp32"
    if weights is None:
        reader.refuse(name, "use float32, bfloat16, float16 or auto")
        return
    fp16 = reader.get("fp16") is True
    arithmetic = "fp16" if fp16 else "bf16" if reader.get("bf16", True) is True else None
    reader.ignore("off", *(flag for flag in _HALF_FLAGS if reader.get(flag) is False))
    flags = [flag for flag in _HALF_FLAGS if reader.get(flag) is True]
    if reader.get("load_in_4bit") is True or reader.get("load_in_8bit") is True:
        _read_quantisation(reader, arithmetic or weights)
        if weights == "fp32" and arithmetic:  # of what is not quantised: without a preparation, it is as it was loaded
            derive(reader, "upcast_unquantized", True, name)
        if arithmetic == "bf16" or (arithmetic is None and weights != "fp32"):
            derive(reader, "autocast", arithmetic == "bf16", *_HALF_FLAGS)
        reader.note("adapters are fp32 here, bf16 in TRL", "load_in_8bit", "load_in_4bit")
        reader.note("arithmetic over quantised weights", *flags, name)
        return
    reader.ignore("off", "load_in_4bit", "load_in_8bit")
    reader.ignore("quantisation, which is off", "bnb_4bit_quant_type", "use_bnb_nested_quant")
    if weights == "fp32":
        derive(reader, "precision", f"{arithmetic}-mixed" if arithmetic else "fp32")
    elif arithmetic in (weights, None):
        note = "taken for that of the checkpoint" if given == "auto" else ""
        derive(reader, "precision", weights, name, note=note)
    else:
        reader.refuse(name, f"use one type: {weights} weights with {arithmetic} arithmetic are not there")
        return
    _read_autocast(reader, arithmetic)
    reader.note(f"precision: {reader.values['precision']}", *flags, *([name] if name not in reader.mapped else []))


def _read_autocast(reader: Reader, arithmetic: str | None) -> None:
    """The trainer runs under autocast where it is asked for 16-bit arithmetic, whatever the weights are, and with
    adapters as without: levels of a grid may have either.
    """
    full, half = reader.values["adapter"] == "none", reader.values["precision"] in ("bf16", "fp16")
    if half and arithmetic == "bf16":
        derive(reader, "autocast", True, "bf16")
    elif not full and half and arithmetic is None:
        derive(reader, "autocast", False, *_HALF_FLAGS)


def _read_quantisation(reader: Reader, compute: str) -> None:
    if reader.get("load_in_8bit") is True:
        derive(reader, "precision", "int8", "load_in_8bit")
        reader.ignore("off", "load_in_4bit")
        reader.ignore("4 bit, and these are 8", "bnb_4bit_quant_type", "use_bnb_nested_quant")
    else:
        quant = reader.get("bnb_4bit_quant_type", "nf4")
        derive(reader, "precision", quant, "load_in_4bit", "bnb_4bit_quant_type")
        derive(reader, "double_quantization", reader.get("use_bnb_nested_quant", False), "use_bnb_nested_quant")
        reader.ignore("off", "load_in_8bit")
    if compute != "bf16":
        derive(reader, "compute_dtype", compute)


def _read_launch(reader: Reader) -> None:
    given = reader.get("accelerate_config")
    if given is None:
        return
    name = str(given).lower()
    if "zero" in name:
        read_deepspeed(reader, "accelerate_config")
    elif "offload" in name:
        reader.refuse("accelerate_config", "use one without offload")
    elif "fsdp" in name:
        shard(reader, "full_shard", "accelerate_config")
    elif PurePath(name).stem in ("single_gpu", "multi_gpu"):
        shard(reader, "none", "accelerate_config")
    else:
        reader.refuse("accelerate_config", "use single_gpu, multi_gpu, fsdp2, zero2 or zero3")


def _read_tokens(reader: Reader) -> None:
    tokens = {role: reader.get(role) for role in ("eos_token", "pad_token") if role in reader.given}
    if tokens:
        derive(reader, "special_tokens", tokens, *tokens)
        for role, token in tokens.items():
            reader.note(f"special_tokens: {{{role}: {token}}}", role)
    if "chat_template_path" in reader.given:
        reader.refuse("chat_template_path", "give the template itself: chat_template: chatml, or its Jinja text")


def _read_datasets(reader: Reader) -> None:
    given = reader.get("datasets")
    if given is not None:
        if not isinstance(given, list) or not all(isinstance(entry, Mapping) for entry in given):
            reader.refuse("datasets", "give a list like [{path: mine.jsonl}]")
            return
        reader.set("datasets", [_dataset(reader, index, entry) for index, entry in enumerate(given)], "datasets")
        reader.ignore("datasets stand before it", "dataset_name", "dataset_config")
    elif "dataset_name" in reader.given:
        split = reader.get("dataset_train_split", "train")
        parts = {"name": reader.get("dataset_config"), "split": None if split == "train" else split}
        entry = {"path": reader.get("dataset_name")} | {key: value for key, value in parts.items() if value is not None}
        reader.set("datasets", [entry], "dataset_name")
        reader.note("name and split of the dataset", "dataset_config", "dataset_train_split")
    elif not reader.unsupported.keys() & {"dataset_mixer", "dataset_mixture"}:
        reader.refuse("dataset_name", "name one")
    column = reader.get("dataset_text_field", "text")
    reader.note("column of texts, where rows are texts", "dataset_text_field")
    if column != "text":
        for entry in reader.values.get("datasets", []):
            entry.update({"type": "completion", "field_text": column})


_BUILDERS = frozenset({"json", "csv", "parquet", "arrow", "text"})


def _dataset(reader: Reader, index: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a mixture, as in a grid file."""
    entry = {key: value for key, value in given.items() if value not in (None, "", [], {})}
    for key in [*entry]:
        if key == "columns":
            # The columns that are kept say what the rows are.
            if {"prompt", "completion"} <= {*map(str, entry.pop("columns"))}:
                entry["type"] = "prompt_completion"
        elif key not in DatasetSpec.model_fields and key not in PromptSpec.model_fields:
            reader.refuse(f"datasets[{index}].{key}", "name files by data_files", entry.pop(key))
    if entry.get("split") == "train":
        del entry["split"]
    if str(entry.get("path")) in _BUILDERS and "data_files" in entry:
        # The name of a format stands where the path would; the files are then named from the current folder.
        files = entry.pop("data_files")
        files = [files] if isinstance(files, str) else files
        entry |= {
            "ds_type": entry["path"],
            **({"path": files[0]} if len(files) == 1 else {"path": ".", "data_files": files}),
        }
    return entry


def _read_held_out(reader: Reader) -> None:
    """A part of the rows, or a split of its own, is held out only where the file evaluates."""
    name = "evaluation_strategy" if "evaluation_strategy" in reader.given else "eval_strategy"
    # YAML reads a bare `no` as false.
    evaluates = reader.get(name, "no") not in ("no", False)
    size, split = reader.get("test_split_size"), reader.get("dataset_test_split", "test")
    if size is not None:
        derive(reader, "val_set_size", size, "test_split_size")
        reader.ignore("evaluation, of the rows that test_split_size holds out", name, "dataset_test_split")
    elif not evaluates:
        reader.ignore("evaluation, which is off", name, "dataset_test_split")
    elif "datasets" in reader.given:
        reader.ignore("evaluation, for which nothing is held out", name, "dataset_test_split")
    else:
        reader.set("test_datasets", [{"split": split}], "dataset_test_split")
        if "val_set_size" not in reader.given:
            reader.values.pop("val_set_size", None)
        reader.note(f"evaluated on {split}, before and after training", name)


def _read_loss(reader: Reader) -> None:
    """Texts and chats carry loss on every token, prompts with a completion on the completion alone. SFTTrainer takes
    the logits of some tokens at a time, for any model, with either name.
    """
    if reader.get("loss_type", "nll") in ("nll", "chunked_nll"):
        derive(reader, "loss", "chunked", "loss_type")
    elif reader.get("loss_type") == "dft":
        reader.refuse("loss_type", "use nll")
    else:
        reader.other_task("loss_type", "training on preferences")
    entries = reader.values.get("datasets", [])
    completions, answers = reader.get("completion_only_loss"), reader.get("assistant_only_loss") is True
    if completions is True:
        derive(reader, "train_on_inputs", False, "completion_only_loss")
    elif answers or (completions is None and entries and all(e.get("type") == "prompt_completion" for e in entries)):
        derive(reader, "train_on_inputs", False, "assistant_only_loss")
    elif completions is False:
        derive(reader, "train_on_inputs", True, "completion_only_loss", "assistant_only_loss")
    else:
        for entry in entries:
            if "type" not in entry:
                entry["roles_to_train"] = ["all"]
        note = "loss on all tokens of a chat (assistant_only_loss leaves out the others), on the completion of a prompt"
        reader.note(note, "dataset_name", "datasets")
    reader.ignore("off", *([] if answers or "assistant_only_loss" in reader.mapped else ["assistant_only_loss"]))
    for entry in entries:
        if "type" not in entry and (completions is True or answers):
            entry["type"] = "prompt_completion" if completions is True else "chat_template"
        if entry.get("type", "prompt_completion") == "prompt_completion":
            entry |= {"format": BARE, "tokenize_jointly": True}  # texts stand as they are; turns are chats
            if not answers:
                entry["roles_to_train"] = ["all"]
        if entry.get("type") != "completion":
            entry["add_special_tokens"] = False  # of chats
    tests = reader.values.get("test_datasets", [])
    if entries and tests:  # the same but for its split
        tests[0] |= {key: value for key, value in entries[0].items() if key != "split"}


def _prepare(document: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """The file with the length that stands for none: with a null TRL cuts nothing, and the table sees no nulls."""
    uncut = [key for key in ("max_length", "max_seq_length") if key in document and document[key] is None]
    return {**document, **dict.fromkeys(uncut, MOST_POSITIONS)}, {}


def is_one(document: Mapping[str, Any]) -> bool:
    """Whether a training file is one of TRL, if it is none of LLaMA-Factory."""
    return "model_name_or_path" in document


DIALECT = Dialect("TRL", _TABLE, _DEFAULTS, _combine, _prepare)
