"""Training files of torchtune: its recipes' keys, the model's builder, the optimizer and the loss.

Facts of torchtune are those of version 0.6: https://pytorch.org/torchtune/stable/api_ref_config.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.dialects import torchtune_data, torchtune_optimizer
from harness.dialects.components import Component, number, whole_number
from harness.dialects.references import is_reference, resolve
from harness.dialects.rules import Dialect, NoEffect, OtherTask, Reader, Rule, To, Together, Unsupported

_LOGGING = NoEffect("logging")
_PROFILING = NoEffect("profiling")
_SAVING = NoEffect("saving of checkpoints")
_SHARDING = NoEffect("sharding over processes; their number is given at launch, here as num_processes")
_GENERATING = NoEffect("a setting of generation")
_REINFORCING = NoEffect("a setting of reinforcement learning")
_PREFERENCES = OtherTask("training on preferences")
_REINFORCEMENT = OtherTask("reinforcement learning")
_DISTILLATION = OtherTask("knowledge distillation")
_GENERATION = OtherTask("generation")
_EVALUATION = OtherTask("evaluation")
_QUANTISATION = OtherTask("quantisation of a model, or training that is aware of it")
_IMAGES = OtherTask("a model of images")
_ONE_PROCESS = "it splits a model over processes; use 1, or remove it"


def _steps(value: Any) -> int:
    return whole_number(value, least=1)


def _seed(value: Any) -> int:
    return whole_number(value, least=0)


def _clipping(value: Any) -> float:
    if value in ("inf", ".inf", float("inf")):  # torchtune then measures the norm, and clips nothing
        return 0.0
    return number(value)


_TABLE: dict[str, Rule] = {
    # what is trained, on what
    "model": Together(),
    "tokenizer": Together(),
    "checkpointer": Together(),
    "dataset": Together(),
    "dtype": Together(),
    "device": Together(),
    "dataset_val": Together(),
    "dataset_validation": Together(),
    "run_val_every_n_steps": NoEffect("validation during training; harness evaluates before and after"),
    "max_validation_batches": NoEffect("validation during training; harness evaluates before and after"),
    "batch_size_val": NoEffect("validation during training; harness evaluates before and after"),
    "collate_fn": Together(),
    "shuffle": Together(),
    "dataloader": NoEffect("loading of data"),
    "datasets": Unsupported("weighted sources are not mixed here; list the datasets under dataset"),
    "resize_token_embeddings": Unsupported("use a base model whose embeddings fit its tokenizer"),
    # the training
    "batch_size": To("micro_batch_size", _steps),
    "gradient_accumulation_steps": To("gradient_accumulation_steps", _steps),
    "epochs": To("num_epochs", _steps),
    "max_steps_per_epoch": To("max_steps_per_epoch", _steps),
    "optimizer": Together(),
    "lr_scheduler": Together(),
    "loss": Together(),
    "clip_grad_norm": To("max_grad_norm", _clipping),
    "seed": To("seed", _seed),
    "optimizer_in_bwd": To("optimizer_in_backward"),
    "compile": Together(),
    "enable_activation_checkpointing": Together(),
    "ac_mode": Together(),
    "ac_option": Together(),
    "enable_activation_offloading": Unsupported("activations stay on the device; use enable_activation_checkpointing"),
    "activation_offloading_use_streams": NoEffect("a setting of enable_activation_offloading"),
    "enable_fp8_training": Unsupported("use dtype: bf16 alone"),
    "fp8_recipe_name": NoEffect("a setting of enable_fp8_training"),
    "cudnn_deterministic_mode": Unsupported("kernels are those that torch chooses"),
    "layer_dropout": Unsupported("all layers are trained in every step"),
    "early_exit_loss": Unsupported("the loss is that of the last layer"),
    # processes
    "fsdp": Together(),
    "fsdp_cpu_offload": Unsupported("weights stay on the device"),
    "fsdp_sharding_strategy": _SHARDING,
    "fsdp_reshard_after_forward": _SHARDING,
    "custom_sharded_layers": _SHARDING,
    "memory_efficient_fsdp_wrap": _SHARDING,
    "data_parallel_shard_dim": _SHARDING,
    "data_parallel_replicate_dim": _SHARDING,
    "tensor_parallel_dim": Unsupported(_ONE_PROCESS, off=(1,)),
    "tensor_parallel_plan": NoEffect("a setting of tensor_parallel_dim"),
    "context_parallel_dim": Unsupported(_ONE_PROCESS, off=(1,)),
    "context_parallel_rotate_method": NoEffect("a setting of context_parallel_dim"),
    "low_cpu_ram": NoEffect("loading of the model"),
    # around it
    "output_dir": NoEffect("where results go; here what `--results` says"),
    "resume_from_checkpoint": Unsupported("give the trained weights as checkpoint_dir of the checkpointer"),
    "should_load_recipe_state": Unsupported("give the trained weights as checkpoint_dir of the checkpointer"),
    "save_adapter_weights_only": _SAVING,
    "enable_async_checkpointing": _SAVING,
    "save_every_n_steps": _SAVING,
    "save_every_n_epochs": _SAVING,
    "checkpoint_every_n_steps": _SAVING,
    "keep_last_n_checkpoints": _SAVING,
    "metric_logger": _LOGGING,
    "log_every_n_steps": _LOGGING,
    "log_peak_memory_every_n_steps": _LOGGING,
    "log_peak_memory_stats": _LOGGING,
    "log_level": _LOGGING,
    "debug_logging_enabled": _LOGGING,
    "debug_num_samples_per_step": _LOGGING,
    "profiler": _PROFILING,
    "perf_profiler": _PROFILING,
    # preferences
    "ref_checkpointer": _PREFERENCES,
    "reference_checkpointer": _PREFERENCES,
    # reinforcement learning
    "policy_model": _REINFORCEMENT,
    "reward_and_value_model": _REINFORCEMENT,
    "reward_model": _REINFORCEMENT,
    "value_model": _REINFORCEMENT,
    "ref_policy_checkpointer": _REINFORCEMENT,
    "value_checkpointer": _REINFORCEMENT,
    "reward_checkpointer": _REINFORCEMENT,
    "ppo_epochs": _REINFORCEMENT,
    "grpo_samples": _REINFORCEMENT,
    "reward_fn": _REINFORCEMENT,
    "reward_functions": _REINFORCEMENT,
    "vllm": _REINFORCEMENT,
    "orchestration": _REINFORCEMENT,
    "postprocessing": _REINFORCEMENT,
    "training": _REINFORCEMENT,
    "inference": _REINFORCEMENT,
    "num_steps": _REINFORCING,
    "ppo_batch_size": _REINFORCING,
    "forward_batch_size": _REINFORCING,
    "max_generated_tokens": _REINFORCING,
    "min_response_length": _REINFORCING,
    "penalise_no_eos": _REINFORCING,
    "reward_penalty": _REINFORCING,
    "stop_token_ids": _REINFORCING,
    "whiten_rewards": _REINFORCING,
    "gamma": _REINFORCING,
    "lmbda": _REINFORCING,
    "kl_coeff": _REINFORCING,
    "replay_buffer_size": _REINFORCING,
    "num_trainer_workers": _REINFORCING,
    "num_ref_workers": _REINFORCING,
    "num_fsdp_workers": _REINFORCING,
    "steps_before_sync": _REINFORCING,
    # distillation
    "teacher_model": _DISTILLATION,
    "teacher_checkpointer": _DISTILLATION,
    "kd_loss": _DISTILLATION,
    "kd_ratio": _DISTILLATION,
    # other recipes
    "quantizer": _QUANTISATION,
    "fake_quant_after_n_steps": _QUANTISATION,
    "tasks": _EVALUATION,
    "limit": _EVALUATION,
    "include_path": _EVALUATION,
    "max_seq_length": _EVALUATION,
    "prompt": _GENERATION,
    "max_new_tokens": _GENERATION,
    "instruct_template": _GENERATING,
    "chat_format": _GENERATING,
    "temperature": _GENERATING,
    "top_k": _GENERATING,
    "top_p": _GENERATING,
    "enable_kv_cache": _GENERATING,
    "guidance": _IMAGES,
    "transform": _IMAGES,
    "preprocess": _IMAGES,
    "sampler": _IMAGES,
    "total_steps": _IMAGES,
    "sample_every_n_steps": _IMAGES,
}

_DEFAULTS: dict[str, Any] = {
    "adapter": "none",
    "precision": "fp32",
    "max_grad_norm": 0.0,
    "lr_scheduler": "constant",
    "num_epochs": 1,
    "epoch_end": "carry",
    "val_set_size": 0,
}

_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")
_FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}  # fmt: skip
"""Layers of Phi-3 and Phi-4, which torchtune splits."""
_WITH_IMAGES = ("vision", "llama4", "clip", "flamingo", "flux", "multimodal")
_SIZES = (
    "vocab_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "embed_dim", "intermediate_dim", "max_seq_len",
    "norm_eps", "rope_base", "scale_factor", "tie_word_embeddings", "q_proj_bias", "k_proj_bias", "v_proj_bias",
    "q_norm", "k_norm",
)  # fmt: skip
_IN_PARTS = "LinearCrossEntropyLoss"
_LOSSES = {
    "CrossEntropyLoss": "",
    "CEWithChunkedOutputLoss": "of all logits at once; torchtune takes it in chunks, which needs less memory",
    _IN_PARTS: "",
}
_OTHER_LOSSES = {
    "DPO": "training on preferences",
    "RSO": "training on preferences",
    "SimPO": "training on preferences",
    "PPO": "reinforcement learning",
    "GRPO": "reinforcement learning",
    "KL": "knowledge distillation",
    "Flux": "a model of images",
}


def is_one(document: Mapping[str, Any]) -> bool:
    """Whether a training file is one of torchtune: one of its values is a component, or both of its mappings are there.

    Args:
        document: keys and values.
    """
    values = [part for value in document.values() for part in (value if isinstance(value, list) else [value])]
    if any(isinstance(value, Mapping) and "_component_" in value for value in values):
        return True
    return all(isinstance(document.get(key), Mapping) for key in ("checkpointer", "tokenizer"))


def _prepare(document: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """References replaced; keys of the user's own that these name are variables."""
    resolved, named = resolve(document)
    variables = {key: "a value that others refer to" for key in named if key not in _TABLE}
    return {key: value for key, value in resolved.items() if key not in variables}, variables


def _combine(reader: Reader) -> None:
    own = {key: value for key, value in reader.values.items() if key in reader.given and key not in _TABLE}
    _model(reader)
    _precision(reader)
    _checkpointer(reader)
    torchtune_data.read(reader)
    torchtune_optimizer.read(reader)
    _loss(reader)
    _memory(reader)
    _device(reader)
    _leftovers(reader)
    reader.values |= own  # keys of harness, written into the file on purpose


def _model(reader: Reader) -> None:
    model = Component.of(reader, "model")
    if model is None:
        reader.refuse("model", "give the builder of a model, like torchtune.models.llama3_2.llama3_2_1b")
        return
    if any(word in model.path for word in _WITH_IMAGES):
        reader.other_task("model", "a model of images")
        return
    if "classifier" in model.name or "reward" in model.name:
        reader.other_task("model", "a model of rewards or classes")
        return
    if not model.path.startswith("torchtune.models."):
        model.refuse("_component_", "harness knows the builders of torchtune.models")
    model.drop(*_SIZES)
    if model.take("attn_dropout", 0.0):
        model.refuse("attn_dropout", "attention has no dropout here; use 0.0")
    if model.name.startswith(("lora_", "qlora_")):
        _adapter(reader, model)
    else:
        reader.set("adapter", "none", "model", note="full fine-tuning; the base model's own sizes")
    model.refuse_rest()


def _adapter(reader: Reader, model: Component) -> None:
    """The arguments of a builder with adapters, at its own defaults where they are absent."""
    reader.set("adapter", "lora", "model")
    reader.set("lora_r", model.take("lora_rank", 8), "model")
    alpha = model.take("lora_alpha", 16)
    if alpha != int(alpha) or alpha < 1:
        model.refuse("lora_alpha", "use a whole number", alpha)
    else:
        reader.set("lora_alpha", int(alpha), "model")
    reader.set("lora_dropout", model.take("lora_dropout", 0.0), "model")
    if model.take("use_dora", False):
        reader.set("use_dora", True, "model")
    _targets(reader, model)
    quantised = model.take("quantize_base", False) or model.name.startswith("qlora_")
    if quantised:
        note = "torchtune's NF4 is torchao's, with scales in 8 bit; here it is that of bitsandbytes"
        reader.set("precision", "nf4", "model", note=note)
        reader.set("double_quantization", True, "model")


def _targets(reader: Reader, model: Component) -> None:
    """Layers with adapters by their names in transformers."""
    names, note = [], ""
    for name in model.take("lora_attn_modules", []):
        if isinstance(name, str) and name in _ATTENTION:
            names.append(_ATTENTION[name])
        else:
            model.refuse("lora_attn_modules", f"use some of {', '.join(_ATTENTION)}", name)
    names += _MLP if model.take("apply_lora_to_mlp", False) else ()
    if model.family in ("phi3", "phi4"):
        names = list(dict.fromkeys(_FUSED.get(name, name) for name in names))
        note = "q, k, v and gate, up are one layer each in this model"
    names += ["lm_head"] if model.take("apply_lora_to_output", False) else []
    if names:
        reader.set("lora_target_modules", names, "model", note=note)
    else:
        model.refuse("lora_attn_modules", "no layer has an adapter; give some, like [q_proj, v_proj]", [])


def _precision(reader: Reader) -> None:
    """After the model: an adapter's base keeps its quantisation."""
    dtype = reader.get("dtype", "fp32")
    quantised, adapter = reader.values["precision"] == "nf4", reader.values["adapter"] == "lora"
    if dtype not in ("bf16", "fp32"):
        reader.refuse("dtype", "torchtune's recipes train in bf16 or fp32; use one of them")
        dtype = "bf16"
    reader.set("compute_dtype" if quantised else "precision", dtype, "dtype")
    if adapter and dtype == "bf16":
        reader.set("adapter_dtype", dtype, "dtype")


def _checkpointer(reader: Reader) -> None:
    checkpointer = Component.of(reader, "checkpointer")
    if checkpointer is None:
        return
    folder = checkpointer.text("checkpoint_dir")
    if folder is None or is_reference(folder):
        checkpointer.refuse("checkpoint_dir", "give the folder of the model", folder)
    else:
        reader.set("base_model", folder.rstrip("/") or folder, "checkpointer")
    if checkpointer.name != "FullModelHFCheckpointer":
        form = "Meta's" if "Meta" in checkpointer.name else "another"
        checkpointer.refuse(
            "_component_", f"files in {form} format are not read here; give the folder of the model from Hugging Face"
        )


def _loss(reader: Reader) -> None:
    loss = Component.of(reader, "loss")
    if loss is None:
        return
    task = next((task for part, task in _OTHER_LOSSES.items() if part in loss.name), None)
    if task is not None:
        reader.other_task("loss", task)
        return
    if loss.name not in _LOSSES:
        loss.refuse("_component_", f"use one of {', '.join(_LOSSES)}")
    else:
        note = _LOSSES[loss.name]
        reader.note("cross entropy" + (f" ({note})" if note else ""), "loss")
        if loss.name == _IN_PARTS:
            reader.set("loss", "chunked", "loss")
    loss.drop("num_output_chunks", "ignore_index")
    if loss.take("reduction", "mean") != "mean":
        loss.refuse("reduction", "use mean")
    loss.refuse_rest(off=(0, 0.0))


def _memory(reader: Reader) -> None:
    """Checkpointing of activations, by the older key or by `ac_mode`, and compilation."""
    wanted, mode = bool(reader.get("enable_activation_checkpointing", False)), reader.get("ac_mode")
    keys, layers = ("enable_activation_checkpointing", "ac_mode"), reader.get("ac_option")
    some = mode == "selective" and type(layers) is int and layers > 0  # else operations, by name
    if wanted and mode is not None:
        reader.set("gradient_checkpointing", False, *keys, note="with both keys torchtune checkpoints nothing")
    else:
        reader.set("gradient_checkpointing", wanted or mode == "full" or some, *keys)
    if some:
        reader.set("checkpoint_every_n_layers", layers, "ac_option")
    else:
        reader.ignore("a setting of ac_mode: selective", "ac_option")
    if mode not in (None, "full") and not some:
        reader.refuse("ac_mode", "whole layers are checkpointed; give ac_option as a number, like 2")
    compiled = reader.get("compile", False)
    parts = compiled if isinstance(compiled, Mapping) else {"model": compiled}
    if parts.get("model"):  # its layers, as there; whether the loss and the optimizer are compiled makes no difference
        reader.set("torch_compile", True, "compile", note="each layer for itself")
    elif any(parts.values()):
        reader.refuse("compile", "layers alone are compiled here; use compile: false")
    else:
        reader.ignore("off", "compile")


def _device(reader: Reader) -> None:
    device = reader.get("device", "cuda")
    if device == "cpu":
        reader.set("device", "cpu", "device")
    elif isinstance(device, str) and device.split(":")[0] in ("cuda", "rocm"):
        reader.set("device", "auto", "device", note="CUDA where available")
    else:
        reader.refuse("device", "use cuda or cpu")


def _leftovers(reader: Reader) -> None:
    """Keys whose value alone decides whether they ask for something."""
    reader.note("not read: val_set_size holds out rows of dataset, if it is given", "dataset_val", "dataset_validation")
    if reader.get("shuffle", True) is not True:
        reader.refuse("shuffle", "examples are shuffled by the seed; use shuffle: true")
    else:
        reader.ignore("examples are shuffled by the seed", "shuffle")
    offload = reader.get("fsdp")
    if isinstance(offload, Mapping) and any(offload.values()):
        reader.refuse("fsdp", "weights stay on the device; use fsdp_cpu_offload: false", str(dict(offload)))
    else:
        reader.ignore(_SHARDING.why, "fsdp")
    collate = str(reader.get("collate_fn", "")).rpartition(".")[2]
    if "image" in collate:
        reader.other_task("collate_fn", "a model of images")
    elif collate in ("", "padded_collate", "padded_collate_sft", "padded_collate_packed"):
        reader.ignore("padding of batches", "collate_fn")
    else:
        reader.refuse("collate_fn", "batches are padded on the right; remove it")


DIALECT = Dialect("torchtune", _TABLE, _DEFAULTS, _combine, _prepare)
