"""Training files of LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.dialects import hf_arguments, trl
from harness.dialects.common import NOT_MEASURED, derive, each
from harness.dialects.llama_factory_data import TOOL, read_datasets, read_template
from harness.dialects.rules import Dialect, NoEffect, OtherTask, Reader, Rule, To, Together, Unsupported

_INFERENCE = "inference"
_PREFERENCES = "training on preferences, which `stage` does not ask for"
_IMAGES = "images, videos and sounds, which rows of text do not have"
_NO_TOKENS = "leave it out: the vocabulary stays the model's; special_tokens: {pad_token: ...} names tokens of it"
_GROUPS = "weights of a row share scales; in LLaMA-Factory those of a column do"
_OPTIMIZER = "use an optimizer of transformers: optim: adamw_torch, or adamw_bnb_8bit where its state is too large"

_TABLE: dict[str, Rule] = {
    **hf_arguments.TABLE,
    # The model
    "model_name_or_path": To("base_model"),
    "model_revision": Unsupported("download that revision, and name its folder", ("main",)),
    "adapter_name_or_path": Unsupported("merge it into the model beforehand (`harness merge`), and name the result"),
    "adapter_folder": NoEffect("details of adapter_name_or_path"),
    "rope_scaling": Unsupported("name a model whose config.json has it"),
    "train_from_scratch": Unsupported("use model_name_or_path: random:<its config.json>"),
    "moe_aux_loss_coef": Unsupported("leave it out: the coefficient is that of the model's config.json"),
    "use_unsloth": Unsupported(NOT_MEASURED),
    "use_unsloth_gc": Unsupported("leave it out: checkpoints are not kept in the memory of the CPU here"),
    **each(Unsupported(NOT_MEASURED), "enable_liger_kernel shift_attn mixture_of_depths use_v1_kernels use_kt use_mca"),
    **each(Unsupported(NOT_MEASURED), "upcast_layernorm upcast_lmhead_output fp8 use_hyper_parallel"),
    **each(Unsupported(_NO_TOKENS), "resize_vocab add_tokens add_special_tokens new_special_tokens_config"),
    "split_special_tokens": Unsupported("leave it out: special tokens stay whole"),
    "trust_remote_code": NoEffect("asked for on the command line: `--trust-remote-code`"),
    "flash_attn": Together(),
    **each(Together(), "quantization_bit quantization_method quantization_type double_quantization"),
    **each(Together(), "disable_gradient_checkpointing use_reentrant_gc pure_bf16"),
    **each(NoEffect("details of what is reported as not supported"), "init_special_tokens freeze_original_embeddings"),
    **each(NoEffect("details of fp8"), "fp8_backend"),
    **each(NoEffect("details of fp8"), "fp8_enable_fsdp_float8_all_gather"),
    **each(NoEffect("details of use_kt"), "kt_optimize_rule cpu_infer chunk_size mode kt_maxlen kt_use_cuda_graph"),
    **each(NoEffect("details of use_kt"), "kt_mode kt_force_think"),
    **each(NoEffect("details of use_hyper_parallel"), "hyper_parallel_args"),
    **each(NoEffect("loading"), "cache_dir use_fast_tokenizer low_cpu_mem_usage quantization_device_map"),
    **each(NoEffect("loading"), "offload_folder print_param_status hf_hub_token ms_hub_token om_hub_token"),
    # The method
    **each(Together(), "stage finetuning_type"),
    "lora_rank": To("lora_r"),
    "lora_dropout": To("lora_dropout"),
    "use_rslora": To("use_rslora"),
    "use_dora": To("use_dora"),
    **each(Together(), "lora_alpha lora_target additional_target"),
    "loraplus_lr_ratio": To("loraplus_lr_ratio"),
    **each(Together(), "pissa_init pissa_iter"),
    **each(Unsupported(NOT_MEASURED), "use_llama_pro"),
    **each(Unsupported(NOT_MEASURED), "use_dft_loss use_asft_loss use_eaft_loss use_chunked_ce_loss"),
    **each(Unsupported(_OPTIMIZER), "use_galore use_apollo use_badam use_adam_mini use_muon"),
    "disable_shuffling": Unsupported("leave it out: the order of the rows is random, by `seed`"),
    "early_stopping_steps": Unsupported("leave it out: give the length by num_train_epochs or max_steps"),
    "loraplus_lr_embedding": NoEffect("a rate of adapters on embeddings, which LoRA+ is refused with"),
    "pissa_convert": NoEffect("how the adapter is kept"),
    **each(NoEffect("details of adapter_name_or_path"), "create_new_adapter"),
    **each(
        NoEffect("details of finetuning_type: freeze"),
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules name_module_trainable",
    ),
    **each(
        NoEffect("details of finetuning_type: oft"),
        "oft_rank oft_block_size oft_target module_dropout",
    ),
    **each(
        NoEffect("details of use_galore"),
        "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise",
    ),
    **each(
        NoEffect("details of use_apollo"),
        "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
        "apollo_scale_type apollo_layerwise apollo_scale_front",
    ),
    **each(
        NoEffect("details of use_badam"),
        "badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode "
        "badam_verbose",
    ),
    **each(
        NoEffect("details of another loss"),
        "asft_alpha eaft_alpha chunked_ce_num_chunks chunked_ce_upcast_logits",
    ),
    **each(
        NoEffect(_PREFERENCES),
        "pref_beta pref_ftx pref_bco_weight pref_loss dpo_beta dpo_ftx dpo_loss dpo_label_smoothing orpo_beta "
        "kto_beta kto_ftx kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs "
        "ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit "
        "reward_model reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha",
    ),
    **each(Together(), "freeze_vision_tower freeze_multi_modal_projector"),
    "freeze_language_model": OtherTask("training of the part for images alone"),
    "train_mm_proj_only": OtherTask("training of the part for images alone"),
    "visual_inputs": OtherTask("training on images"),
    # The data
    **each(Together(), "dataset dataset_dir max_samples default_system template ignore_pad_token_for_loss cutoff_len"),
    "val_size": To("val_set_size"),
    "train_on_prompt": To("train_on_inputs"),
    "eval_dataset": Unsupported("use val_size: held-out rows come from `dataset`"),
    "mask_history": Unsupported("leave it out: every answer of a chat carries loss; or give one answer a row"),
    "mix_strategy": Unsupported("use concat, which takes all rows", ("concat",)),
    "interleave_probs": Unsupported("leave it out: all rows of all datasets are taken"),
    **each(Unsupported(NOT_MEASURED), "packing neat_packing"),
    "tool_format": Unsupported("leave it out: tools are written as the chat template does"),
    "tokenized_path": Unsupported("name the rows under `dataset`: they are tokenised here"),
    **each(NoEffect("thinking, which is as the chat template has it"), "enable_thinking preserve_thinking"),
    **each(
        NoEffect("reading of rows"),
        "streaming buffer_size overwrite_cache preprocessing_batch_size preprocessing_num_workers "
        "data_shared_file_system eval_on_each_dataset eval_num_beams reserved_label_len",
    ),
    **each(
        NoEffect(_IMAGES),
        "media_dir image_max_pixels image_min_pixels image_resolution image_do_pan_and_scan crop_to_patches "
        "video_max_pixels video_min_pixels video_resolution video_fps video_maxlen use_audio_in_video "
        "audio_sampling_rate",
    ),
    # Everything else
    **each(NoEffect("logging"), "plot_loss compute_accuracy include_effective_tokens_per_second"),
    **each(
        NoEffect("tracking"),
        "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir "
        "swanlab_lark_webhook_url swanlab_lark_secret trackio_run_name",
    ),
    **each(
        NoEffect("launching: `num_processes` says how many processes train together"),
        "ray_run_name ray_storage_path ray_storage_filesystem ray_num_workers resources_per_worker "
        "placement_strategy ray_init_kwargs master_addr master_port",
    ),
    **each(
        NoEffect(_INFERENCE),
        "do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty length_penalty "
        "skip_special_tokens use_kv_cache infer_backend infer_dtype vllm_maxlen vllm_gpu_util vllm_enforce_eager "
        "vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config "
        "sglang_lora_backend",
    ),
    **each(
        NoEffect("exporting the trained model"),
        "export_dir export_size export_device export_quantization_bit export_quantization_dataset "
        "export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id",
    ),
    "task": OtherTask("evaluation on a benchmark"),
    **each(NoEffect("evaluation on a benchmark"), "task_dir lang n_shot save_dir batch_size download_mode"),
}

_DEFAULTS: Mapping[str, Any] = {
    **hf_arguments.DEFAULTS,
    "adapter": "lora",
    "lora_r": 8,
    "lora_target_linear": True,
    "sequence_length": 2048,
    "val_set_size": 0,
}

_TASKS = {
    "rm": "reward modelling",
    "ppo": "reinforcement learning",
    "dpo": "training on preferences",
    "orpo": "training on preferences",
    "kto": "training on preferences",
}
"""Stages that are not supervised fine-tuning."""


def _combine(reader: Reader) -> None:
    _read_task(reader)
    hf_arguments.read_arguments(reader)
    _read_checkpointing(reader)
    _read_method(reader)
    _read_attention(reader)
    _read_precision(reader)
    read_template(reader)
    read_datasets(reader)
    if "cutoff_len" in reader.given:
        note = "the end is cut off, not prompt and answer in proportion"
        reader.set("sequence_length", reader.get("cutoff_len"), "cutoff_len", note=note)


_TEXTS = "texts without a prompt, of which longer ones are cut; LLaMA-Factory joins all and cuts them into equal parts"


def _read_task(reader: Reader) -> None:
    stage = str(reader.get("stage", "sft"))
    if stage in _TASKS:
        reader.other_task("stage", _TASKS[stage])
    elif stage not in ("sft", "pt"):
        reader.refuse("stage", "use sft or pt")
    else:
        reader.note("supervised fine-tuning" if stage == "sft" else _TEXTS, "stage")
    for name in ("freeze_vision_tower", "freeze_multi_modal_projector"):
        if reader.get(name) is False:
            reader.other_task(name, "training on images")
        else:
            reader.ignore("images, which rows of text do not have", name)
    trains = reader.get("do_train")
    if trains is True:
        reader.ignore("that it is a training", "do_train", "do_predict")
    elif reader.get("do_predict") is True:
        reader.other_task("do_predict", "prediction without training")
    elif trains is False:
        reader.other_task("do_train", "no training")
    elif "export_dir" in reader.given and "dataset" not in reader.given:
        reader.other_task("export_dir", "exporting a model")
    elif "infer_backend" in reader.given and "dataset" not in reader.given:
        reader.other_task("infer_backend", "generation")
    else:
        reader.ignore("prediction, which is off", "do_predict")


def _read_checkpointing(reader: Reader) -> None:
    """It is on, in torch's reentrant variant, unless it is disabled by a key of its own."""
    disabled = reader.get("disable_gradient_checkpointing") is True
    reentrant = reader.get("use_reentrant_gc", True) is not False
    hf_arguments.read_checkpointing(reader, default=not disabled, reentrant=reentrant)
    if not disabled and reader.values["gradient_checkpointing"] is False:
        note = "only disable_gradient_checkpointing turns it off"
        reader.set("gradient_checkpointing", True, "gradient_checkpointing", "activation_checkpointing", note=note)
        if reentrant:
            derive(reader, "reentrant_checkpointing", True)
    reader.note(f"gradient_checkpointing: {str(not disabled).lower()}", "disable_gradient_checkpointing")
    reader.note(f"reentrant_checkpointing: {str(reentrant).lower()}", "use_reentrant_gc")


def _read_method(reader: Reader) -> None:
    method = reader.get("finetuning_type", "lora")
    if method in ("lora", "full"):
        derive(reader, "adapter", "none" if method == "full" else "lora", "finetuning_type")
    else:
        reader.refuse("finetuning_type", "use lora or full")
    rank = reader.values["lora_r"]
    alpha = reader.get("lora_alpha")
    if alpha is not None:
        reader.set("lora_alpha", alpha, "lora_alpha")
    elif isinstance(rank, int):
        reader.set("lora_alpha", 2 * rank)
    targets = _split(reader.get("lora_target", "all"))
    if "lora_target_modules" in reader.given:
        reader.values.pop("lora_target_linear", None)
        reader.note("lora_target_modules, which stand before it", "lora_target")
    elif targets == ["all"]:
        reader.note("lora_target_linear: true", "lora_target")
    else:
        reader.values.pop("lora_target_linear", None)
        derive(reader, "lora_target_modules", targets, "lora_target")
    rounds = reader.get("pissa_iter", 16)
    if reader.get("pissa_init") is True:
        name = "pissa" if rounds == -1 else f"pissa_niter_{rounds}"
        derive(reader, "init_lora_weights", name, "pissa_init")
        reader.note(f"init_lora_weights: {name}", "pissa_iter")
    else:
        reader.ignore("PiSSA, which is off", "pissa_init", "pissa_iter")
    if "additional_target" in reader.given:
        derive(reader, "lora_modules_to_save", _split(reader.get("additional_target")), "additional_target")


def _split(names: Any) -> Any:
    """A list, or a text with commas, as a list."""
    return [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else names


_ATTENTION = {"auto": "auto", "disabled": "eager", "off": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}


def _read_attention(reader: Reader) -> None:
    given = reader.get("flash_attn")
    if given is None:
        return
    # Earlier versions had true and false; YAML reads a bare `off` as false.
    name = {True: "fa2", False: "auto"}[given] if isinstance(given, bool) else str(given)
    if name in _ATTENTION:
        derive(reader, "attention", _ATTENTION[name], "flash_attn")
    else:
        reader.refuse("flash_attn", "use auto, sdpa, fa2 or disabled")


def _read_precision(reader: Reader) -> None:
    """Base weights are loaded in the type of the arithmetic; what is trained is kept in fp32, unless pure_bf16."""
    flags = ("bf16", "fp16", "pure_bf16")
    half = next((name for name in ("pure_bf16", "bf16", "fp16") if reader.get(name) is True), None)
    reader.ignore("off", *(name for name in flags if reader.get(name) is False))
    if reader.get("quantization_bit") is not None:
        _read_quantisation(reader, "fp16" if half == "fp16" else None)
        _read_autocast(reader, half, full=False)
        reader.note("arithmetic over quantised weights", *(name for name in flags if reader.get(name) is True))
        return
    reader.ignore("quantisation, which is off", "quantization_method", "quantization_type", "double_quantization")
    full = reader.values.get("adapter") == "none"
    _read_autocast(reader, half, full=full)
    if half is None:
        # Without a flag, LoRA's base keeps the type of its checkpoint, which is bf16 for nearly all.
        derive(reader, "precision", "fp32" if full else "bf16")
        return
    precision = "fp16" if half == "fp16" else "bf16"
    if full and half != "pure_bf16":
        derive(reader, "precision", f"{precision}-mixed", half)
    else:
        note = "adapters are kept in fp32" if half == "pure_bf16" and not full else ""
        derive(reader, "precision", precision, half, note=note)
    reader.note(f"precision: {reader.values['precision']}", *(name for name in flags if reader.get(name) is True))


def _read_autocast(reader: Reader, half: str | None, *, full: bool) -> None:
    """The trainer runs under autocast where bf16 or fp16 asks for it; without, fp32 adapters compute in fp32."""
    if half is None and not full:
        derive(reader, "autocast", False)
    elif full and half == "pure_bf16" and reader.get("bf16") is True:
        derive(reader, "autocast", True, "bf16")


def _read_quantisation(reader: Reader, compute: str | None) -> None:
    method = str(reader.get("quantization_method", "bnb")).lower()
    if method == "hqq":
        derive(reader, "quantizer", "hqq", "quantization_method", note=_GROUPS)
    elif method in ("bnb", "bitsandbytes"):
        reader.note("bitsandbytes", "quantization_method")
    else:
        reader.refuse("quantization_method", "use bnb or hqq")
    bits = reader.get("quantization_bit")
    if bits == 8:
        derive(reader, "precision", "int8", "quantization_bit")
        reader.ignore("4 bit, and these are 8", "quantization_type", "double_quantization")
    elif bits == 4 and method == "hqq":
        derive(reader, "precision", "int4", "quantization_bit")
        reader.ignore("settings of bitsandbytes", "quantization_type", "double_quantization")
    elif bits == 4:
        derive(reader, "precision", reader.get("quantization_type", "nf4"), "quantization_bit", "quantization_type")
        reader.set("double_quantization", reader.get("double_quantization", True), "double_quantization")
    else:
        reader.refuse("quantization_bit", "use 4 or 8")
    if compute:
        derive(reader, "compute_dtype", compute, "fp16")


def is_one(document: Mapping[str, Any]) -> bool:
    """Whether a training file is one of LLaMA-Factory: more of its keys are of that tool alone than of TRL alone."""
    keys = {str(key) for key in document}
    of_trl = trl.DIALECT.table.keys()
    return len(keys & (_TABLE.keys() - of_trl)) > len(keys & (of_trl - _TABLE.keys()))


DIALECT = Dialect(TOOL, _TABLE, _DEFAULTS, _combine)
