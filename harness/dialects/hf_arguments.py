"""Keys of transformers' training arguments, which files of LLaMA-Factory and of TRL share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.dialects.common import (
    NOT_MEASURED,
    PROJECTED,
    derive,
    each,
    read_compile,
    set_optimizer,
    set_scheduler,
)
from harness.dialects.rules import NoEffect, Reader, Rule, To, Together, Unlike, Unsupported
from harness.dialects.sharding import fsdp_checkpoints, read_deepspeed, read_fsdp

_EVALUATION = "evaluation, which is before and after training here"
_LAUNCHING = "launching processes and what passes between them"
_HUB = "the hub"
_LOGGING = "logging: every step is recorded"


def _is_grouped(strategy: Any) -> bool:
    if strategy not in ("random", "group_by_length"):
        raise Unlike("use random or group_by_length")
    return bool(strategy == "group_by_length")


TABLE: Mapping[str, Rule] = {
    # What the training is
    "output_dir": To("output_dir"),
    "per_device_train_batch_size": To("micro_batch_size"),
    "per_gpu_train_batch_size": To("micro_batch_size"),
    "gradient_accumulation_steps": To("gradient_accumulation_steps"),
    "learning_rate": To("learning_rate"),
    "weight_decay": To("weight_decay"),
    "adam_beta1": To("adam_beta1"),
    "adam_beta2": To("adam_beta2"),
    "adam_epsilon": To("adam_epsilon"),
    "max_grad_norm": To("max_grad_norm"),
    "neftune_noise_alpha": To("neftune_noise_alpha", lambda value: value or None),
    "seed": To("seed"),
    "tf32": To("tf32"),
    "use_cpu": To("device", lambda value: "cpu" if value else "auto"),
    "no_cuda": To("device", lambda value: "cpu" if value else "auto"),
    **each(
        Together(),
        "num_train_epochs max_steps warmup_ratio warmup_steps optim adafactor lr_scheduler_type bf16 fp16 data_seed "
        "gradient_checkpointing activation_checkpointing gradient_checkpointing_kwargs activation_checkpointing_kwargs "
        "deepspeed fsdp fsdp_config torch_compile torch_compile_backend torch_compile_mode",
    ),
    # What would change the training and has no counterpart
    "lr_scheduler_kwargs": Unsupported("leave it out: schedules have transformers' own parameters"),
    "optim_args": Unsupported("leave it out: optimizers have their usual parameters"),
    "optim_target_modules": Unsupported(PROJECTED, ("all-linear", "all_linear")),
    "label_smoothing_factor": Unsupported(NOT_MEASURED, (0, 0.0)),
    **each(Unsupported(NOT_MEASURED), "use_liger_kernel"),
    **each(Unsupported(NOT_MEASURED), "torchdynamo torch_empty_cache_steps use_ipex jit_mode_eval full_determinism"),
    "group_by_length": To("group_by_length"),
    "train_sampling_strategy": To("group_by_length", _is_grouped),
    "sortish_sampler": Unsupported("leave it out: the order of the rows is random, by `seed`"),
    "dataloader_drop_last": Unsupported("leave it out: the last rows of a pass are trained on too"),
    "auto_find_batch_size": Unsupported("give per_device_train_batch_size; `harness plan` predicts what fits"),
    "load_best_model_at_end": Unsupported("leave it out: what is measured is the model after the last step"),
    "resume_from_checkpoint": Unsupported("leave it out: each trial starts from the base model"),
    **each(Unsupported("leave it out: evaluation has the precision of the training"), "bf16_full_eval fp16_full_eval"),
    **each(Unsupported("use bf16: true", ("auto", "O1")), "half_precision_backend fp16_backend fp16_opt_level"),
    "use_mps_device": Unsupported("leave it out: devices are cpu and cuda"),
    "past_index": Unsupported("leave it out", (-1,)),
    "tp_size": Unsupported("use sharding: full_shard", (0, 1)),
    **each(Unsupported("use sharding: full_shard"), "sharded_ddp mp_parameters parallelism_config"),
    **each(Unsupported("leave it out"), "accelerator_config dispatch_batches split_batches"),
    # What does not change what is measured
    "use_cache": NoEffect("generation"),
    "liger_kernel_config": NoEffect("details of use_liger_kernel"),
    "length_column_name": NoEffect("details of sorting by length"),
    "average_tokens_across_devices": NoEffect("the loss is a mean over the tokens of all processes here"),
    **each(NoEffect("columns, which are known by the rows here"), "remove_unused_columns label_names"),
    **each(
        NoEffect(_LOGGING),
        "logging_dir logging_steps logging_strategy logging_first_step logging_nan_inf_filter log_level "
        "log_level_replica log_on_each_node disable_tqdm report_to run_name project trackio_space_id "
        "trackio_bucket_id trackio_static_space_id include_num_input_tokens_seen include_tokens_per_second "
        "skip_memory_metrics debug",
    ),
    **each(
        NoEffect("saving"),
        "save_strategy save_steps save_total_limit save_only_model save_on_each_node save_safetensors "
        "enable_jit_checkpoint overwrite_output_dir ignore_data_skip restore_callback_states_from_checkpoint",
    ),
    **each(
        NoEffect(_HUB),
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision "
        "push_to_hub_model_id push_to_hub_organization push_to_hub_token",
    ),
    **each(
        NoEffect(_EVALUATION),
        "do_eval eval_strategy evaluation_strategy evaluate_during_training eval_steps eval_delay eval_on_start "
        "eval_accumulation_steps per_device_eval_batch_size per_gpu_eval_batch_size prediction_loss_only "
        "eval_do_concat_batches eval_use_gather_object include_for_metrics include_inputs_for_metrics "
        "batch_eval_metrics metric_for_best_model greater_is_better",
    ),
    **each(
        NoEffect("generation"),
        "predict_with_generate generation_max_length generation_num_beams generation_config",
    ),
    **each(
        NoEffect(_LAUNCHING),
        "local_rank ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph ray_scope xpu_backend tpu_num_cores tpu_metrics_debug fsdp_min_num_params "
        "fsdp_transformer_layer_cls_to_wrap",
    ),
    **each(
        NoEffect("reading of rows"),
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order",
    ),
    **each(Together(), "do_train do_predict"),
}
"""Keys of transformers 4 and 5, those of its arguments for sequence to sequence too."""

DEFAULTS: Mapping[str, Any] = {
    "micro_batch_size": 8,
    "num_epochs": 3.0,
    "epoch_end": "step",
    "learning_rate": 5e-5,
    "optimizer": "adamw_torch_fused",
    "seed": 42,
}
"""Defaults of transformers where they differ from a spec's: its optimizer is the fused one since torch 2.8."""


def read_arguments(reader: Reader) -> None:
    """Take over the keys that need one another, but for those of precision and checkpointing."""
    _read_length(reader)
    _read_warmup(reader)
    set_optimizer(reader, "optim")
    if reader.get("adafactor") is True:
        reader.set("optimizer", "adafactor", "adafactor")
    else:
        reader.ignore("off", "adafactor")
    set_scheduler(reader, "lr_scheduler_type")
    _read_data_seed(reader)
    read_compile(reader, implied=True)
    read_deepspeed(reader, "deepspeed")
    read_fsdp(reader)


def is_positive(value: Any) -> bool:
    """Whether a value is a number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _read_length(reader: Reader) -> None:
    steps = reader.get("max_steps")
    if is_positive(steps):
        reader.values.pop("num_epochs", None)
        reader.set("max_steps", steps, "max_steps")
        reader.note(f"max_steps: {steps}, which stands before it", "num_train_epochs")
        return
    reader.ignore("off: num_train_epochs decides", "max_steps")
    if "train_samples" in reader.given:
        reader.values.pop("num_epochs", None)
        reader.note("train_samples, which stands before it", "num_train_epochs")
    elif "num_train_epochs" in reader.given:
        reader.set("num_epochs", reader.get("num_train_epochs"), "num_train_epochs")


def _read_warmup(reader: Reader) -> None:
    """Steps stand before a ratio; steps below 1 are a ratio themselves."""
    steps, ratio = reader.get("warmup_steps"), reader.get("warmup_ratio")
    if isinstance(steps, float) and 0 < steps < 1:
        reader.set("warmup_ratio", steps, "warmup_steps")
        reader.note("warmup_steps, which stands before it", "warmup_ratio")
    elif is_positive(steps) or not isinstance(steps, int | float | None):
        whole = int(steps) if isinstance(steps, float) and steps.is_integer() else steps
        reader.set("warmup_steps", whole, "warmup_steps")
        reader.note("warmup_steps, which stands before it", "warmup_ratio")
    else:
        reader.ignore("off", "warmup_steps")
        if ratio is not None:
            reader.set("warmup_ratio", ratio, "warmup_ratio")


def _read_data_seed(reader: Reader) -> None:
    if "data_seed" not in reader.given:
        return
    if reader.get("data_seed") == reader.values["seed"]:
        reader.note("seed, which is that of the order too", "data_seed")
    else:
        reader.refuse("data_seed", f"leave it out: `seed` ({reader.values['seed']}) decides the order too")


def read_checkpointing(reader: Reader, *, default: bool, reentrant: bool) -> None:
    """Take over gradient checkpointing, which transformers 5 calls activation checkpointing, or that of FSDP.

    Args:
        reader: of the file.
        default: whether it is on where the file does not say.
        reentrant: whether torch's reentrant variant is used where the file does not say.
    """
    on = default
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if name in reader.given:
            on = reader.get(name)
            if not isinstance(on, bool):
                # Unsloth's variant is named by a text.
                reader.refuse(name, "use true or false")
                on = default
    reader.set("gradient_checkpointing", on, "gradient_checkpointing", "activation_checkpointing")
    if not on and fsdp_checkpoints(reader):
        reader.set("gradient_checkpointing", True, "fsdp_config", note="FSDP's own")
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        given = reader.get(name, {})
        if not isinstance(given, Mapping):
            reader.refuse(name, "give a mapping like {use_reentrant: false}")
            continue
        others = [key for key in given if key not in ("use_reentrant", "preserve_rng_state")]
        if others:
            reader.refuse(name, f"leave out {', '.join(map(str, others))}: the only choice is use_reentrant")
        reentrant = given.get("use_reentrant", reentrant)
        reader.note(f"reentrant_checkpointing: {str(reentrant).lower()}", name)
    if on is True and reentrant is True:
        derive(reader, "reentrant_checkpointing", True)
