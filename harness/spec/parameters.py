"""Every parameter of a trial, each checked for itself.

The names are the flat keys of the Axolotl family of configurations, so an existing training
file can be pasted into a grid. Each field's docstring is its documentation; ``harness keys``
prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
)

from harness._util.redact import redact_home
from harness._util.units import parse_bytes
from harness.spec.datasets import MOST, DatasetSpec, Facts, Frozen, NameOrPath, Part, PositiveInt
from harness.spec.keys import (
    ALL_LINEAR,
    LORA,
    Adapter,
    AdapterOptions,
    ChatTemplate,
    Initialisation,
    Noise,
    Optimizer,
    Precision,
    Quantizer,
    RateRatio,
    Scheduler,
    SpecialTokens,
    UnitInterval,
    check_pattern,
    is_pattern,
    refuse_format_of_cards,
)

_UNMEASURED = Facts(measured=False)
_NO_MEMORY = Facts(memory=False)
_TRAINING = Facts(untrained=False)
_TRAINING_NO_MEMORY = Facts(memory=False, untrained=False)


def _later_rate(absent: Any) -> Facts:
    return Facts(memory=False, untrained=False, absent=absent)


def _several(value: Any) -> Any:
    """A text is a list of one entry; an empty list is none."""
    return (value,) if isinstance(value, str) else value or None


class Parameters(Frozen):
    """The parameters of one fine-tuning."""

    base_model: Annotated[NameOrPath, Part.WEIGHTS]
    """Bundled name (`smollm2-135m-instruct`), local folder, hub id, or `random:<architecture>`."""
    datasets: Annotated[tuple[DatasetSpec, ...], Field(min_length=1), Part.DATA] = (DatasetSpec(path="storyteller"),)
    """Sources of stories, concatenated."""
    test_datasets: Annotated[
        Annotated[tuple[DatasetSpec, ...], Field(min_length=1)] | None, Facts(absent=None), Part.DATA
    ] = None
    """Sources of the held-out stories; null: they are a part of `datasets`."""
    sequence_length: Annotated[StrictInt, Field(ge=8, le=MOST), _TRAINING, Part.DATA] = 512
    """Longest example in tokens, prompt and completion together (`sequence_len` means the same)."""
    eval_sequence_length: Annotated[Annotated[StrictInt, Field(ge=8, le=MOST)] | None, Part.DATA] = None
    """The same for held-out stories; null: `sequence_length`. Fix it where sequence lengths are compared."""
    excess_length: Annotated[Literal["truncate", "drop", "raise"], Part.DATA] = "truncate"
    """What happens to a longer example; the count is recorded."""
    skip_empty_rows: Annotated[StrictBool, Facts(absent=False), Part.DATA] = False
    """Pass over rows without an instruction or a completion, and count them; false: such a row is refused."""
    train_on_inputs: Annotated[StrictBool, _TRAINING, Part.DATA] = False
    """Take the loss on the prompt too."""
    val_set_size: Annotated[float, Field(strict=True, ge=0), Part.DATA] = 32
    """Held-out stories: a count (1 or more), or a fraction of the rows (below 1). 0: no evaluation."""
    held_out_part: Annotated[Literal["comparison", "tuning"], Facts(absent="comparison"), Part.DATA] = "comparison"
    """Which stories are held out: those that configurations are compared on, or as many others to tune them on, where
    the former are left out altogether."""
    min_completion_tokens: Annotated[PositiveInt, Facts(absent=1), Part.DATA] = 16
    """Fewest completion tokens of a held-out story within `eval_sequence_length`; one with fewer is trained on."""

    chat_template: Annotated[ChatTemplate | None, Facts(absent=None), Part.DATA] = None
    """Name of a chat template (`chatml`, `llama3`, …) or one as Jinja text; null: the model's own, or a plain one where
    it has none. `own`: a model without one is refused."""
    special_tokens: Annotated[SpecialTokens | None, Facts(absent=None), Part.DATA] = None
    """Tokens of the vocabulary in these roles, like `{pad_token: <pad>}`; null: the tokenizer's own."""

    precision: Annotated[Precision, BeforeValidator(refuse_format_of_cards), Part.WEIGHTS] = "bf16"
    """Format of weights and arithmetic; replaces `bf16`, `fp16`, `load_in_8bit` and `load_in_4bit`."""
    quantizer: Annotated[Quantizer, Facts(absent="bitsandbytes"), Part.WEIGHTS] = "bitsandbytes"
    """Library of the quantised weights: `bitsandbytes` has int8, nf4 and fp4, `torchao` int8, `hqq` int8 and int4."""
    double_quantization: Annotated[StrictBool, Part.WEIGHTS] = False
    """Quantise the scales of nf4 and fp4 too."""
    compute_dtype: Annotated[Literal["bf16", "fp16", "fp32"] | None, Facts(absent=None), Part.WEIGHTS] = None
    """Arithmetic over quantised weights, and format of what is not quantised; null: bf16."""
    upcast_unquantized: Annotated[StrictBool, Facts(absent=False), Part.WEIGHTS] = False
    """Make what is not quantised of a base in bitsandbytes' formats (embeddings, head, norms, biases) fp32, as peft's
    `prepare_model_for_kbit_training` does."""
    autocast: Annotated[StrictBool | None, Facts(absent=None), Part.WEIGHTS] = None
    """Run forward passes under autocast where arithmetic is 16 bit; null: with fp32 adapters, which need it."""
    tf32: Annotated[StrictBool, Part.WEIGHTS] = False
    """Use TensorFloat-32 for fp32 matrix products on CUDA."""
    attention: Annotated[Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"], Part.ACTIVATIONS] = (
        "auto"
    )
    """Attention kernel; `auto`: sdpa where the model has it, else eager. The row says which. flex_attention: CUDA."""
    torch_compile: Annotated[StrictBool, Facts(untrained=False, absent=False), Part.ACTIVATIONS] = False
    """Train with layers that torch's compiler has made faster, each kind of layer once; evaluation is uncompiled."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where available."""
    memory_budget: Annotated[int | None, _NO_MEMORY] = None
    """Bytes (or `24GiB`) of each process beyond which the trial ends as out of memory; null: what the device has."""

    adapter: Annotated[Adapter, Part.ADAPTERS] = LORA
    """`lora`, or another method of peft in small letters (`harness methods` lists them); `none` (or null) is full
    fine-tuning."""
    adapter_options: Annotated[AdapterOptions, Facts(absent=None), Part.ADAPTERS] = None
    """Options of the method that have no key of their own, as peft calls them: `{r: 8, alpha: 16}` for `loha`."""
    lora_r: Annotated[PositiveInt, _TRAINING, Part.ADAPTERS] = 16
    """Rank."""
    lora_alpha: Annotated[PositiveInt, _TRAINING_NO_MEMORY, Part.ADAPTERS] = 16
    """Scale: the update is multiplied by alpha / r."""
    lora_dropout: Annotated[UnitInterval, _TRAINING, Part.ADAPTERS] = 0.0
    """Dropout on the adapter's input."""
    lora_bias: Annotated[Literal["none", "all", "lora_only"], _TRAINING, Part.ADAPTERS] = "none"
    """Which biases are trained."""
    lora_target_linear: Annotated[StrictBool, _TRAINING, Part.ADAPTERS] = True
    """Adapters on every linear layer but the head; false: the architecture's default in peft."""
    lora_target_modules: Annotated[tuple[StrictStr, ...] | None, _TRAINING, Part.ADAPTERS] = None
    """Names of the layers that get an adapter, or one regular expression of their whole names, instead of
    `lora_target_linear`; `all-linear` means the same as that, and may be the first of several."""
    lora_target_parameters: Annotated[tuple[StrictStr, ...] | None, Facts(absent=None), Part.ADAPTERS] = None
    """Names of weights outside of linear layers that get an adapter too: a layer's experts in one weight, like
    `mlp.experts.down_proj`."""
    lora_modules_to_save: Annotated[tuple[StrictStr, ...] | None, Facts(absent=None), Part.ADAPTERS] = None
    """Layers that are trained as a whole next to the adapters, like `[embed_tokens, lm_head]`."""
    adapter_dtype: Annotated[Literal["fp32", "bf16"], Facts(absent="fp32"), Part.ADAPTERS] = "fp32"
    """Format of the adapters; bf16 ones compute without fp32 copies of their inputs, and without autocast unless it is
    asked for."""
    recompute_adapter_inputs: Annotated[StrictBool, Facts(untrained=False, absent=False), Part.ACTIVATIONS] = False
    """Keep an adapter's input as the layer has it, and make its dropped or converted copy anew in the backward pass."""
    use_rslora: Annotated[StrictBool, _TRAINING_NO_MEMORY, Part.ADAPTERS] = False
    """Scale by alpha / sqrt(r)."""
    use_dora: Annotated[StrictBool, Part.ADAPTERS] = False
    """Weight-decomposed LoRA."""
    init_lora_weights: Annotated[Initialisation, Facts(absent="default"), Part.ADAPTERS] = "default"
    """How LoRA's matrices begin: `default` (random times zero), or `pissa`, `olora`, `mica` and others, which take
    parts of the base weights; `eva` and `corda` by the data, `loftq` by what quantising has taken."""
    loraplus_lr_ratio: Annotated[RateRatio | None, _later_rate(None), Part.OPTIMIZER] = None
    """Learning rate of LoRA's B as a multiple of A's (LoRA+); null: the same."""
    save_adapter: Annotated[StrictBool, _TRAINING_NO_MEMORY] = False
    """Keep the trained adapter with the results."""
    measure_forgetting: Annotated[StrictBool, Facts(memory=False, absent=False)] = False
    """Evaluate the bundled general text too, before and after training, to measure forgetting."""
    general_samples: Annotated[Annotated[StrictInt, Field(ge=1, le=64)], Facts(memory=False, absent=64)] = 64
    """How many of the 64 passages of the general text, of each kind as large a part; fewer take less time."""
    evaluate_tasks: Annotated[
        tuple[StrictStr, ...] | None, BeforeValidator(_several), Facts(memory=False, absent=None)
    ] = None
    """Multiple-choice tasks whose questions are answered before and after training: `story-questions`, or task files of
    lm-evaluation-harness."""

    micro_batch_size: Annotated[PositiveInt, Part.DATA] = 1
    """Examples in one forward and backward pass."""
    pad_to_sequence_len: Annotated[StrictBool | None, Facts(untrained=False, absent=None), Part.DATA] = None
    """Pad micro-batches to `sequence_length`; otherwise to their longest example (where `harness plan` assumes full
    length: null, the others are padded to it; false, all fill it)."""
    sample_packing: Annotated[StrictBool, Facts(untrained=False, absent=False), Part.DATA] = False
    """Put the examples of a micro-batch into one row without padding, each with positions and attention of its own."""
    group_by_length: Annotated[StrictBool, Facts(untrained=False, absent=False), Part.DATA] = False
    """Train on examples of similar length together, so that little of a micro-batch is padding."""
    gradient_accumulation_steps: Annotated[PositiveInt, _TRAINING, Part.GRADIENTS] = 1
    """Micro-batches in one optimizer step."""
    num_processes: Annotated[PositiveInt, Part.GRADIENTS] = 1
    """Processes that train together."""
    sharding: Annotated[Literal["none", "shard_grad_op", "full_shard"], Facts(absent="none"), Part.WEIGHTS] = "none"
    """Whether each process holds the whole model (`none`: DDP) or a shard (FSDP), gathered per step or per layer."""
    gradient_checkpointing: Annotated[StrictBool, _TRAINING, Part.ACTIVATIONS] = False
    """Recompute activations in the backward pass instead of keeping them."""
    checkpoint_every_n_layers: Annotated[PositiveInt, Facts(untrained=False, absent=1), Part.ACTIVATIONS] = 1
    """With `gradient_checkpointing`, recompute one of so many layers, and keep the activations of the others."""
    checkpoint_keep: Annotated[
        Literal["nothing", "attention", "matmuls"], Facts(untrained=False, absent="nothing"), Part.ACTIVATIONS
    ] = "nothing"
    """Outputs that recomputed layers keep all the same: of attention, or of matrix products and attention."""
    checkpoint_offload: Annotated[StrictBool, Facts(untrained=False, absent=False), Part.ACTIVATIONS] = False
    """Keep the inputs of recomputed layers in the host's memory until the backward pass (CUDA)."""
    reentrant_checkpointing: Annotated[StrictBool, Facts(untrained=False, absent=False), Part.ACTIVATIONS] = False
    """Recompute by torch's reentrant variant, which keeps no graph meanwhile (`use_reentrant: true`)."""
    keep_outputs: Annotated[StrictBool, Facts(untrained=False, absent=False), Part.ACTIVATIONS] = False
    """Hold the logits and other outputs until those of the next micro-batch replace them, as a plain loop does."""
    loss: Annotated[Literal["full", "chunked", "liger", "cce"], Facts(absent="full"), Part.ACTIVATIONS] = "full"
    """Take the loss from all logits of a micro-batch, or in parts, so that they are never held together: by torch, or
    by a kernel of Liger or of cut-cross-entropy (CUDA)."""
    loss_chunk_size: Annotated[PositiveInt, Facts(absent=256), Part.ACTIVATIONS] = 256
    """Positions in a part of a chunked loss."""

    train_samples: Annotated[PositiveInt | None, _TRAINING, Part.TRAINING] = None
    """Examples to train on; the stories are repeated where there are fewer."""
    max_steps: Annotated[PositiveInt | None, _TRAINING, Part.TRAINING] = None
    """Optimizer steps, instead of `train_samples`."""
    num_epochs: Annotated[Annotated[float, Field(strict=True, gt=0)] | None, _TRAINING, Part.TRAINING] = None
    """Passes over the training stories, instead of `train_samples`; 1 where none of the three is given."""
    epoch_end: Annotated[
        Literal["continue", "step", "carry"], Facts(untrained=False, absent="continue"), Part.TRAINING
    ] = "continue"
    """Where a pass does not fill its last optimizer step: `continue` fills it from the next pass; `step` takes it with
    what there is, as transformers does; `carry` adds what is left to the next pass's first step, and leaves it out
    after the last one, as torchtune does."""
    max_steps_per_epoch: Annotated[PositiveInt | None, Facts(untrained=False, absent=None), Part.TRAINING] = None
    """Optimizer steps after which a pass ends (with `epoch_end: step` or `carry`); null: with its stories."""
    optimizer: Annotated[Optimizer, _TRAINING, Part.OPTIMIZER] = "adamw_torch"
    """Name of the optimizer, as in transformers; `muon` is torch's, with AdamW for all but the matrices of layers."""
    optimizer_in_backward: Annotated[StrictBool, Facts(untrained=False, absent=False), Part.GRADIENTS] = False
    """Update each parameter in the backward pass, as soon as its gradient is there, and release that."""
    learning_rate: Annotated[float, Field(strict=True, gt=0), _TRAINING_NO_MEMORY, Part.TRAINING] = 2e-4
    """Peak learning rate."""
    lr_scheduler: Annotated[Scheduler, _TRAINING_NO_MEMORY, Part.TRAINING] = "linear"
    """Learning rate schedule; schedule-free optimizers train at a constant rate whatever it is, and rows say so."""
    warmup_ratio: Annotated[UnitInterval, _TRAINING_NO_MEMORY, Part.TRAINING] = 0.0
    """Share of the steps over which the learning rate rises. `lr_scheduler: constant` has no such steps;
    `constant_with_warmup` has."""
    warmup_steps: Annotated[Annotated[StrictInt, Field(ge=0, le=MOST)] | None, _later_rate(None), Part.TRAINING] = None
    """The same as a number of steps."""
    adam_beta1: Annotated[UnitInterval, _later_rate(0.9), Part.TRAINING] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[UnitInterval, _later_rate(0.999), Part.TRAINING] = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: Annotated[Annotated[float, Field(strict=True, ge=0)], _later_rate(1e-8), Part.TRAINING] = 1e-8
    """What keeps Adam's division finite."""
    weight_decay: Annotated[float, Field(strict=True, ge=0), _TRAINING, Part.TRAINING] = 0.0
    """Weight decay, not on biases and norms: apart from the gradients (decoupled), but for Adagrad and RMSprop, which
    have it in their gradients (L2), as torch and bitsandbytes do."""
    max_grad_norm: Annotated[float, Field(strict=True, ge=0), _TRAINING, Part.TRAINING] = 1.0
    """Gradient clipping; 0: none."""
    neftune_noise_alpha: Annotated[Noise | None, Facts(untrained=False, absent=None), Part.DATA] = None
    """Uniform noise on the embeddings in training, up to alpha / sqrt(length x width) (NEFTune); null: none."""
    seed: Annotated[StrictInt, Field(ge=0, le=MOST), _TRAINING, Part.TRAINING] = 0
    """Adapter initialisation, dropout and data order. Never the held-out split."""

    output_dir: Annotated[Annotated[StrictStr, AfterValidator(redact_home)] | None, _UNMEASURED] = None
    """Accepted from training files; results go where `harness run --results` says."""
    logging_steps: Annotated[PositiveInt, _UNMEASURED] = 1
    """Accepted from training files; every step is recorded."""
    folder: Annotated[
        Annotated[StrictStr, AfterValidator(redact_home)] | None, Facts(measured=False, given=False, absent=None)
    ] = None
    """Folder that relative paths begin at: that of the grid file. Set by harness; null: no path is relative."""

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _read_size(cls, value: Any) -> Any:
        return None if value is None else parse_bytes(value)

    @field_validator("special_tokens", mode="before")
    @classmethod
    def _as_pairs(cls, value: Any) -> Any:
        return tuple(value.items()) if isinstance(value, Mapping) else value

    @field_validator("val_set_size")
    @classmethod
    def _whole_count(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError(f"{value} is neither a count (16) nor a fraction (0.1)")
        return value

    @field_validator("lora_target_modules", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        """A text is a list of one entry; a regular expression stands alone."""
        if value is None:
            return None
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not names or "" in names:
            raise ValueError(
                f"{value!r} is not a list of layer names like [q_proj, v_proj], nor a regular expression like "
                r"'.*\.self_attn\..*_proj'"
            )
        for name in (name for name in names if isinstance(name, str)):
            if name.lower() == ALL_LINEAR and (name != names[0] or name != ALL_LINEAR or len(names) == 1):
                raise ValueError(
                    f"{name} stands first: lora_target_modules: [{ALL_LINEAR}, lm_head]; alone it is "
                    "lora_target_linear: true"
                )
            if is_pattern(name):
                check_pattern(name, alone=len(names) == 1)
        return names
