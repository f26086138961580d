"""The keys of Axolotl's training files: those of its configuration schema (axolotl.utils.schemas) and its plug-ins."""

from __future__ import annotations

from typing import Any

from harness.dialects.common import NOT_MEASURED, PROJECTED
from harness.dialects.rules import NoEffect, OtherTask, Rule, To, Together, Unlike, Unsupported

_PREFERENCES = "preference training or reinforcement learning"
_IMAGES = "training on images or sound"
CLASSES = "a reward model or a classifier"
_ZERO = (0, 0.0)
"""Values by which a number asks for nothing."""


def _all(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


def _number(value: Any) -> Any:
    """Axolotl takes numbers in quotes, too."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _excess_length(value: Any) -> Any:
    if value not in ("drop", "truncate", "raise"):
        raise Unlike("use drop, truncate or raise")
    return value


TABLE: dict[str, Rule] = {
    **_all(Together(), "base_model datasets test_datasets pretraining_dataset val_set_size chat_template"),
    **_all(Together(), "chat_template_jinja default_system_message special_tokens plugins"),
    **_all(Together(), "bf16 fp16 bfloat16 float16 float32 load_in_8bit load_in_4bit bnb_config_kwargs adapter"),
    **_all(Together(), "lora_r lora_alpha lora_dropout lora_target_modules lora_target_linear"),
    **_all(Together(), "lora_target_parameters lora_modules_to_save lora_rank_pattern lora_alpha_pattern"),
    **_all(Together(), "peft_use_dora peft_use_rslora peft peft_init_lora_weights loraplus_lr_ratio"),
    **_all(Together(), "max_steps num_epochs warmup_steps warmup_ratio optimizer lr_scheduler"),
    **_all(Together(), "micro_batch_size gradient_accumulation_steps batch_size gradient_checkpointing"),
    **_all(Together(), "gradient_checkpointing_kwargs attn_implementation flash_attention sdp_attention"),
    **_all(Together(), "eager_attention xformers_attention s2_attention flex_attention sage_attention"),
    **_all(Together(), "chunked_cross_entropy cut_cross_entropy liger_fused_linear_cross_entropy"),
    **_all(Together(), "fsdp fsdp_config fsdp_version deepspeed base_model_config tokenizer_config model_type"),
    "sequence_len": To("sequence_length"),
    "eval_sequence_len": To("eval_sequence_length"),
    "excess_length_strategy": To("excess_length", _excess_length),
    "train_on_inputs": To("train_on_inputs"),
    "learning_rate": To("learning_rate", _number),
    "weight_decay": To("weight_decay", _number),
    "max_grad_norm": To("max_grad_norm", _number),
    "adam_beta1": To("adam_beta1"),
    "adam_beta2": To("adam_beta2"),
    "adam_epsilon": To("adam_epsilon", _number),
    **_all(To("neftune_noise_alpha", lambda value: value or None), "neftune_noise_alpha noisy_embedding_alpha"),
    "seed": To("seed"),
    "tf32": To("tf32", lambda value: value is True),
    "output_dir": To("output_dir"),
    "device": To("device", lambda value: "cpu" if value == "cpu" else "auto"),
    "logging_steps": NoEffect("logging"),
    "trust_remote_code": NoEffect("asked for by --trust-remote-code"),
    **_all(NoEffect("logging"), "eval_table_size eval_max_new_tokens include_tokens_per_second include_tkps debug"),
    **_all(NoEffect("logging"), "profiler_steps profiler_steps_start use_tensorboard generate_samples verbosity"),
    **_all(NoEffect("logging"), "num_generation_samples generation_max_new_tokens generation_temperature"),
    **_all(NoEffect("logging"), "generation_top_p generation_top_k generation_prompt_ratio generation_do_sample"),
    **_all(NoEffect("saving"), "save_steps saves_per_epoch save_strategy save_total_limit save_only_model"),
    **_all(NoEffect("saving"), "save_safetensors save_first_step resume_from_checkpoint auto_resume_from_checkpoints"),
    **_all(NoEffect("saving"), "fsdp_final_state_dict_type dynamic_checkpoint merge_lora merge_method lora_on_cpu"),
    **_all(NoEffect("saving"), "save_compressed lora_out_dir hub_private_repo export"),
    **_all(NoEffect("the hub"), "hub_model_id hub_strategy hub_revision push_dataset_to_hub hf_use_auth_token"),
    **_all(NoEffect("tracking"), "use_wandb wandb_name wandb_run_id wandb_mode wandb_project wandb_entity"),
    **_all(NoEffect("tracking"), "wandb_watch wandb_log_model use_mlflow mlflow_tracking_uri"),
    **_all(NoEffect("tracking"), "mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts use_comet"),
    **_all(NoEffect("tracking"), "comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode"),
    **_all(NoEffect("tracking"), "comet_online comet_experiment_config use_trackio trackio_project_name"),
    **_all(NoEffect("tracking"), "trackio_run_name trackio_space_id use_otel_metrics otel_metrics_host"),
    **_all(NoEffect("tracking"), "otel_metrics_port wandb_run"),
    **_all(NoEffect("evaluation during training"), "eval_steps evals_per_epoch eval_strategy evaluation_strategy"),
    **_all(NoEffect("evaluation during training"), "eval_batch_size do_causal_lm_eval eval_causal_lm_metrics"),
    **_all(NoEffect("evaluation during training"), "do_bench_eval bench_dataset bench_split metric_for_best_model"),
    **_all(NoEffect("evaluation during training"), "greater_is_better eval_sample_packing eval_on_start"),
    **_all(NoEffect("evaluation during training"), "lm_eval_tasks lm_eval_batch_size lm_eval_post_train lm_eval_model"),
    **_all(NoEffect("preparing the data"), "dataset_prepared_path dataset_processes dataset_num_proc"),
    **_all(NoEffect("preparing the data"), "dataset_keep_in_memory skip_prepare_dataset num_dataset_shards_to_save"),
    **_all(NoEffect("preparing the data"), "is_preprocess preprocess_iterable remove_unused_columns streaming"),
    **_all(NoEffect("preparing the data"), "streaming_multipack_buffer_size pretrain_multipack_buffer_size"),
    **_all(NoEffect("preparing the data"), "pretrain_multipack_attn sample_packing_group_size shuffle_merged_datasets"),
    **_all(NoEffect("preparing the data"), "sample_packing_bin_size sample_packing_sequentially"),
    **_all(
        NoEffect("preparing the data"),
        "sample_packing_mp_start_method sample_packing_eff_est sample_packing_seq_len_multiplier",
    ),
    **_all(
        NoEffect("preparing the data"),
        "total_num_tokens total_supervised_tokens multipack_real_batches",
    ),
    **_all(NoEffect("loading the data"), "dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor"),
    **_all(NoEffect("loading the data"), "shuffle_before_merging_datasets"),
    **_all(NoEffect("launching"), "strict world_size local_rank ddp ddp_timeout ddp_bucket_cap_mb device_map"),
    **_all(NoEffect("launching"), "ddp_broadcast_buffers ddp_find_unused_parameters accelerator_config use_ray"),
    **_all(NoEffect("launching"), "ray_run_name ray_num_workers resources_per_worker axolotl_config_path"),
    **_all(NoEffect("when Python frees memory of its own"), "gc_steps gc_collect_steps"),
    **_all(
        NoEffect("launching"),
        "low_cpu_mem_usage cloud inference base_model_ignore_patterns gradio_title gradio_share gradio_server_name",
    ),
    **_all(NoEffect("launching"), "gradio_server_port gradio_max_new_tokens gradio_temperature"),
    **_all(NoEffect("watching for a loss that explodes"), "loss_watchdog_threshold loss_watchdog_patience"),
    **_all(NoEffect("the tokenizer's class"), "tokenizer_type tokenizer_use_fast tokenizer_legacy"),
    **_all(NoEffect("the tokenizer's class"), "tokenizer_use_mistral_common"),
    **_all(NoEffect("the model's family"), "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model"),
    **_all(NoEffect("the model's family"), "is_qwen_derived_model cls_model_config mean_resizing_embeddings"),
    **_all(NoEffect("the loss: tokens of the whole step are weighed alike here"), "average_tokens_across_devices"),
    "embeddings_skip_upcast": NoEffect("loading: embeddings are in the type of the arithmetic in training"),
    "peft_autocast_adapter_dtype": Together(),
    **_all(Together(), "torch_compile torch_compile_backend torch_compile_mode"),
    "chunked_cross_entropy_num_chunks": NoEffect("parts of a chunked loss have loss_chunk_size positions here"),
    "group_by_length": To("group_by_length"),
    "batch_flattening": To("sample_packing", lambda value: value in (True, "auto")),
    "sample_packing": Unsupported("use batch_flattening: true, which packs micro-batches; rows are not filled up here"),
    **_all(
        Unsupported(NOT_MEASURED),
        "max_packed_sequence_len deepcompile flex_attn_compile_kwargs activation_offloading "
        "layer_offloading selective_checkpointing tiled_mlp "
        "tiled_mlp_num_shards liger_rope liger_rms_norm liger_glu_activation liger_swiglu "
        "liger_layer_norm liger_cross_entropy liger_use_token_scaling "
        "liger_rms_norm_gated unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o "
        "unsloth_rms_norm unsloth_rope flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv "
        "flash_attn_fuse_mlp flash_optimum use_kernels use_scattermoe use_sonicmoe "
        "mlp_kernel experts_implementation quantize_moe_experts llama4_linearized_experts kernelize "
        "torch_empty_cache_steps sdpa_varlen flash_attn_d512 fp32_norms",
    ),
    "large_head_attention": Unsupported(NOT_MEASURED, ("sdpa",)),
    "fp32_norm_classes": NoEffect("details of fp32_norms"),
    "torch_compile_options": Unsupported("leave it out: layers are compiled with inductor's own options"),
    "nf4_backend": Unsupported("use bitsandbytes", ("bitsandbytes",)),
    **_all(
        Unsupported("leave it out: these kernels are Axolotl's own"),
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel lora_norm_kernel "
        "fused_attn_kernel gemma4_hybrid_attn_impl",
    ),
    "llmcompressor": Unsupported("leave it out: weights are as dense as those of base_model"),
    "conversation": Unsupported("name the format by chat_template"),
    "collator_pad_to_longest": NoEffect("micro-batches are padded to their longest example here"),
    "pad_to_sequence_len": Together(),
    "pad_to_multiple_of": Unsupported("leave it out: micro-batches are padded to their longest example here", (1,)),
    **_all(
        Unsupported("leave it out: examples are shuffled by the seed here"),
        "curriculum_sampling dataset_shard_num dataset_shard_idx",
    ),
    **_all(
        Unsupported("leave it out: each pass over the data is trained to its end here", _ZERO),
        "early_stopping_patience load_best_model_at_end auto_find_batch_size",
    ),
    **_all(
        Unsupported("leave it out: one learning rate for all weights here"),
        "embedding_lr embedding_lr_scale lr_groups",
    ),
    "loraplus_lr_embedding": NoEffect("a rate of adapters on embeddings, which LoRA+ is refused with"),
    **_all(
        Unsupported("leave it out: a schedule is named by lr_scheduler alone here", _ZERO),
        "lr_scheduler_kwargs lr_quadratic_warmup cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor "
        "log_sweep_min_lr log_sweep_max_lr jagged_restart_steps jagged_restart_warmup_steps "
        "jagged_restart_anneal_steps",
    ),
    "optim_target_modules": Unsupported(PROJECTED, ("all-linear", "all_linear")),
    **_all(
        Unsupported("leave it out: optimizers have their own defaults here"),
        "optim_args torchdistx_path adam_beta3 adam_epsilon2 dion_lr dion_momentum "
        "dion_rank_fraction dion_rank_multiple_of galore_rank",
    ),
    **_all(
        Unsupported("leave it out: all weights are trained, or adapters", _ZERO),
        "unfrozen_parameters lisa_n_layers relora relora_steps "
        "relora_warmup_steps relora_anneal_steps relora_prune_ratio relora_prune_method relora_cpu_offload "
        "spectrum_top_fraction spectrum_model_name freeze_mm_modules fix_untrained_tokens reinit_weights",
    ),
    **_all(
        Unsupported("leave it out: adapters are on every layer that is named"),
        "lora_model_dir lora_fan_in_fan_out peft_layers_to_transform peft_layers_pattern peft_layer_replication "
        "peft_trainable_token_indices peft_ensure_weight_tying loftq_config",
    ),
    **_all(
        Unsupported("give a checkpoint whose config and vocabulary are as they shall be"),
        "model_config overrides_of_model_config model_kwargs overrides_of_model_kwargs rope_scaling tokens "
        "added_tokens_overrides resize_token_embeddings_to_32x shrink_embeddings model_revision revision_of_model "
        "scaling_softmax scaling_softmax_factor scaling_softmax_bias model_quantization_config "
        "model_quantization_config_kwargs is_moe_model",
    ),
    **_all(
        Unsupported("use precision: nf4 or int8, over the checkpoint before it was quantised"),
        "gptq gptq_disable_exllama qat quantization fp8 fp8_enable_fsdp_float8_all_gather nvfp4 mxfp4 use_onebitllms",
    ),
    **_all(
        Unsupported("leave it out: there are data parallelism and sharding here", (0, 1)),
        "sequence_parallel_degree context_parallel_size tensor_parallel_size expert_parallel_size dp_replicate_size "
        "pipeline_parallel_size",
    ),
    **_all(NoEffect("details of context_parallel_size"), "heads_k_stride ring_attn_func"),
    **_all(NoEffect("details of lisa_n_layers"), "lisa_step_interval lisa_layers_attribute"),
    **_all(NoEffect("details of use_eaft"), "eaft_alpha eaft_k"),
    **_all(NoEffect("details of use_pose"), "pose_split_on_token_ids pose_max_context_len pose_num_chunks"),
    "dataset_exact_deduplication": Unsupported("leave it out, and give the data without rows that occur twice"),
    "dataloader_drop_last": Unsupported("leave it out: the last rows of a pass are trained on too"),
    "dp_shard_size": NoEffect("launching"),
    "qlora_sharded_model_loading": NoEffect("loading the model"),
    **_all(
        Unsupported("use --memory: the budget is enforced for each process"),
        "max_memory gpu_memory_limit",
    ),
    **_all(
        Unsupported("leave it out: the loss is the cross entropy of all supervised tokens here", _ZERO),
        "use_eaft use_dynamic_finetuning use_pose pretraining_sample_concatenation min_sample_len "
        "label_smoothing_factor trainer_cls",
    ),
    "eot_tokens": NoEffect("the end of a turn is as the chat template has it"),
    "chat_template_kwargs": Unsupported("leave it out: a chat template gets the messages and tools alone"),
    "max_prompt_len": NoEffect("reinforcement learning alone"),
    **_all(NoEffect("preference training alone"), "dpo_use_weighting precompute_ref_log_probs dpo_beta rl_beta"),
    **_all(NoEffect("preference training alone"), "dpo_label_smoothing dpo_use_liger_kernel dpo_padding_free"),
    **_all(NoEffect("preference training alone"), "dpo_loss_type dpo_loss_weights dpo_use_logits_to_keep rpo_alpha"),
    **_all(NoEffect("preference training alone"), "dpo_generate_during_eval dpo_norm_loss orpo_alpha simpo_gamma"),
    **_all(
        NoEffect("preference training alone"),
        "cpo_alpha kto_desirable_weight kto_undesirable_weight trl vllm rl_adapter_ref_model",
    ),
    "rl": OtherTask(_PREFERENCES),
    "ebft": OtherTask(_PREFERENCES),
    **_all(OtherTask(CLASSES), "reward_model process_reward_model num_labels center_rewards_coefficient"),
    **_all(OtherTask(_IMAGES), "processor_type image_size image_resize_algorithm"),
    "diffusion": OtherTask("diffusion of text"),
    **_all(OtherTask("distillation"), "kd_trainer kd_ce_alpha kd_alpha kd_temperature kd_zscore_base_temp kd_top_k"),
}

FAMILIES: dict[str, Rule] = {
    **_all(NoEffect("tracking"), "swanlab_ use_swanlab dreadnode_ otel_"),
    **_all(NoEffect("evaluation during training"), "benchmark_ lm_eval_"),
    **_all(
        Unsupported(NOT_MEASURED),
        "liger_ use_liger_ moe_ expert_ nonexpert_ use_dsv4_ use_glm_ dsv4_ glm_ gemma4_ nvfp4_ scattermoe_ sonicmoe_ "
        "grokfast_ dense_mixer cce_ cut_cross_entropy_ torchao_ tiled_mlp_ spectrum_ mixlora_",
    ),
    **_all(OtherTask("distillation"), "kd_ gkd_"),
    **_all(OtherTask(_PREFERENCES), "nemo_gym_ ebft_ grpo_"),
    "diffusion_": OtherTask("diffusion of text"),
}
"""Keys of plug-ins, by what their names begin with."""
