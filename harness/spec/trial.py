"""Every parameter of a trial, as a record that validates itself, and the ids that follow from it.

The names are the flat keys of the Axolotl family of configurations, so an existing training
file can be pasted into a grid. Each field's docstring is its documentation; ``harness keys``
prints them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from harness._util.redact import redact_home
from harness._util.units import parse_bytes
from harness.spec.datasets import MOST, DatasetSpec, Facts, Frozen, NameOrPath, PositiveInt
from harness.spec.keys import (
    ALL_LINEAR,
    QUANTISED,
    SHARDED_OPTIMIZERS,
    ChatTemplate,
    Noise,
    Optimizer,
    Precision,
    Scheduler,
    SpecialTokens,
    UnitInterval,
    check_pattern,
    is_pattern,
)

_POLYNOMIAL_END = 1e-7
"""Last learning rate of `polynomial` in transformers."""


_UNMEASURED = Facts(measured=False)
_NO_MEMORY = Facts(memory=False)
_TRAINING = Facts(untrained=False)
_TRAINING_NO_MEMORY = Facts(memory=False, untrained=False)


def _later_rate(absent: Any) -> Facts:
    return Facts(memory=False, untrained=False, absent=absent)


class TrialSpec(Frozen):
    """One fine-tuning. Equal specs have equal ids on every machine."""

    base_model: NameOrPath
    """Bundled name (`smollm2-135m-instruct`), local folder, hub id, or `random:<architecture>`."""
    datasets: Annotated[tuple[DatasetSpec, ...], Field(min_length=1)] = (DatasetSpec(path="storyteller"),)
    """Sources of stories, concatenated."""
    test_datasets: Annotated[Annotated[tuple[DatasetSpec, ...], Field(min_length=1)] | None, Facts(absent=None)] = None
    """Sources of the held-out stories; null: they are a part of `datasets`."""
    sequence_length: Annotated[StrictInt, Field(ge=8, le=MOST), _TRAINING] = 512
    """Longest example in tokens, prompt and completion together (`sequence_len` means the same)."""
    eval_sequence_length: Annotated[StrictInt, Field(ge=8, le=MOST)] | None = None
    """The same for held-out stories; null: `sequence_length`. Fix it where sequence lengths are compared."""
    excess_length: Literal["truncate", "drop", "raise"] = "truncate"
    """What happens to a longer example; the count is recorded."""
    skip_empty_rows: Annotated[StrictBool, Facts(absent=False)] = False
    """Pass over rows without an instruction or a completion, and count them; false: such a row is refused."""
    train_on_inputs: Annotated[StrictBool, _TRAINING] = False
    """Take the loss on the prompt too."""
    val_set_size: Annotated[float, Field(strict=True, ge=0)] = 32
    """Held-out stories: a count (1 or more), or a fraction of the rows (below 1). 0: no evaluation."""
    min_completion_tokens: Annotated[PositiveInt, Facts(absent=1)] = 16
    """Fewest completion tokens of a held-out story within `eval_sequence_length`; one with fewer is trained on."""

    chat_template: Annotated[ChatTemplate | None, Facts(absent=None)] = None
    """Name of a chat template (`chatml`, `llama3`, …) or one as Jinja text; null: the model's own."""
    special_tokens: Annotated[SpecialTokens | None, Facts(absent=None)] = None
    """Tokens of the vocabulary in these roles, like `{pad_token: <pad>}`; null: the tokenizer's own."""

    precision: Precision = "bf16"
    """Format of weights and arithmetic; replaces `bf16`, `fp16`, `load_in_8bit` and `load_in_4bit`."""
    double_quantization: StrictBool = False
    """Quantise the scales of nf4 and fp4 too."""
    compute_dtype: Annotated[Literal["bf16", "fp16", "fp32"] | None, Facts(absent=None)] = None
    """Arithmetic over int8, nf4 and fp4 weights, and format of what is not quantised; null: bf16."""
    upcast_unquantized: Annotated[StrictBool, Facts(absent=False)] = False
    """Make what is not quantised of a quantised base (embeddings, head, norms, biases) fp32, as peft's
    `prepare_model_for_kbit_training` does."""
    autocast: Annotated[StrictBool | None, Facts(absent=None)] = None
    """Run forward passes under autocast where arithmetic is 16 bit; null: with fp32 adapters, which need it."""
    tf32: StrictBool = False
    """Use TensorFloat-32 for fp32 matrix products on CUDA."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel; `auto`: sdpa where the model has it, else eager. The row says which."""
    torch_compile: Annotated[StrictBool, Facts(untrained=False, absent=False)] = False
    """Train with layers that torch's compiler has made faster, each kind of layer once; evaluation is uncompiled."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where available."""
    memory_budget: Annotated[int | None, _NO_MEMORY] = None
    """Bytes (or `24GiB`) of each process beyond which the trial ends as out of memory; null: what the device has."""

    adapter: Literal["lora", "none"] = "lora"
    """`none` (or null) is full fine-tuning."""
    lora_r: Annotated[PositiveInt, _TRAINING] = 16
    """Rank."""
    lora_alpha: Annotated[PositiveInt, _TRAINING_NO_MEMORY] = 16
    """Scale: the update is multiplied by alpha / r."""
    lora_dropout: Annotated[UnitInterval, _TRAINING] = 0.0
    """Dropout on the adapter's input."""
    lora_bias: Annotated[Literal["none", "all", "lora_only"], _TRAINING] = "none"
    """Which biases are trained."""
    lora_target_linear: Annotated[StrictBool, _TRAINING] = True
    """Adapters on every linear layer but the head; false: the architecture's default in peft."""
    lora_target_modules: Annotated[tuple[StrictStr, ...] | None, _TRAINING] = None
    """Names of the layers that get an adapter, or one regular expression of their whole names, instead of
    `lora_target_linear`; `all-linear` means the same as that, and may be the first of several."""
    lora_modules_to_save: Annotated[tuple[StrictStr, ...] | None, Facts(absent=None)] = None
    """Layers that are trained as a whole next to the adapters, like `[embed_tokens, lm_head]`."""
    adapter_dtype: Annotated[Literal["fp32", "bf16"], Facts(absent="fp32")] = "fp32"
    """Format of the adapters; bf16 ones compute without autocast and without fp32 copies of their inputs."""
    use_rslora: Annotated[StrictBool, _TRAINING_NO_MEMORY] = False
    """Scale by alpha / sqrt(r)."""
    use_dora: StrictBool = False
    """Weight-decomposed LoRA."""
    save_adapter: Annotated[StrictBool, _TRAINING_NO_MEMORY] = False
    """Keep the trained adapter with the results."""
    measure_forgetting: Annotated[StrictBool, Facts(memory=False, absent=False)] = False
    """Evaluate the bundled general text too, before and after training, to measure forgetting."""

    micro_batch_size: PositiveInt = 1
    """Examples in one forward and backward pass."""
    pad_to_sequence_len: Annotated[StrictBool | None, Facts(untrained=False, absent=None)] = None
    """Pad micro-batches to `sequence_length`; otherwise to their longest example (where `harness plan` assumes full
    length: null, the others are padded to it; false, all fill it)."""
    sample_packing: Annotated[StrictBool, Facts(untrained=False, absent=False)] = False
    """Put the examples of a micro-batch into one row without padding, each with positions and attention of its own."""
    group_by_length: Annotated[StrictBool, Facts(untrained=False, absent=False)] = False
    """Train on examples of similar length together, so that little of a micro-batch is padding."""
    gradient_accumulation_steps: Annotated[PositiveInt, _TRAINING] = 1
    """Micro-batches in one optimizer step."""
    num_processes: PositiveInt = 1
    """Processes that train together."""
    sharding: Annotated[Literal["none", "shard_grad_op", "full_shard"], Facts(absent="none")] = "none"
    """Whether each process holds the whole model (`none`: DDP) or a shard (FSDP), gathered per step or per layer."""
    gradient_checkpointing: Annotated[StrictBool, _TRAINING] = False
    """Recompute activations in the backward pass instead of keeping them."""
    checkpoint_every_n_layers: Annotated[PositiveInt, Facts(untrained=False, absent=1)] = 1
    """With `gradient_checkpointing`, recompute one of so many layers, and keep the activations of the others."""
    reentrant_checkpointing: Annotated[StrictBool, Facts(untrained=False, absent=False)] = False
    """Recompute by torch's reentrant variant, which keeps no graph meanwhile (`use_reentrant: true`)."""
    keep_outputs: Annotated[StrictBool, Facts(untrained=False, absent=False)] = False
    """Hold the logits and other outputs until those of the next micro-batch replace them, as a plain loop does."""
    loss: Annotated[Literal["full", "chunked"], Facts(absent="full")] = "full"
    """Take the loss from all logits of a micro-batch, or in parts, so that they are never held together."""
    loss_chunk_size: Annotated[PositiveInt, Facts(absent=256)] = 256
    """Positions in a part of a chunked loss."""

    train_samples: Annotated[PositiveInt | None, _TRAINING] = None
    """Examples to train on; the stories are repeated where there are fewer."""
    max_steps: Annotated[PositiveInt | None, _TRAINING] = None
    """Optimizer steps, instead of `train_samples`."""
    num_epochs: Annotated[Annotated[float, Field(strict=True, gt=0)] | None, _TRAINING] = None
    """Passes over the training stories, instead of `train_samples`; 1 where none of the three is given."""
    optimizer: Annotated[Optimizer, _TRAINING] = "adamw_torch"
    """Name of the optimizer, as in transformers; `muon` is torch's, with AdamW for all but the matrices of layers."""
    learning_rate: Annotated[float, Field(strict=True, gt=0), _TRAINING_NO_MEMORY] = 2e-4
    """Peak learning rate."""
    lr_scheduler: Annotated[Scheduler, _TRAINING_NO_MEMORY] = "linear"
    """Learning rate schedule."""
    warmup_ratio: Annotated[UnitInterval, _TRAINING_NO_MEMORY] = 0.0
    """Share of the steps over which the learning rate rises."""
    warmup_steps: Annotated[Annotated[StrictInt, Field(ge=0, le=MOST)] | None, _later_rate(None)] = None
    """The same as a number of steps."""
    adam_beta1: Annotated[UnitInterval, _later_rate(0.9)] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[UnitInterval, _later_rate(0.999)] = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: Annotated[Annotated[float, Field(strict=True, ge=0)], _later_rate(1e-8)] = 1e-8
    """What keeps Adam's division finite."""
    weight_decay: Annotated[float, Field(strict=True, ge=0), _TRAINING] = 0.0
    """Decoupled weight decay; not on biases and norms."""
    max_grad_norm: Annotated[float, Field(strict=True, ge=0), _TRAINING] = 1.0
    """Gradient clipping; 0: none."""
    neftune_noise_alpha: Annotated[Noise | None, Facts(untrained=False, absent=None)] = None
    """Uniform noise on the embeddings in training, up to alpha / sqrt(length x width) (NEFTune); null: none."""
    seed: Annotated[StrictInt, Field(ge=0, le=MOST), _TRAINING] = 0
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

    @model_validator(mode="after")
    def _possible(self, info: ValidationInfo) -> TrialSpec:
        # A grid checks single keys first, and combinations once `exclude` has dropped some.
        if info.context != "keys alone":
            self.refuse_impossible()
        return self

    def refuse_impossible(self) -> None:
        """Check the combination of the keys.

        Raises:
            ValueError: each is valid, but together they cannot be trained.
        """
        if self.adapter == "none" and self.precision in QUANTISED:
            raise ValueError(
                f"precision {self.precision} with full fine-tuning: quantised weights cannot be trained; "
                "use adapter: lora, or precision: bf16"
            )
        if self.double_quantization and self.precision not in {"nf4", "fp4"}:
            raise ValueError(f"double_quantization is for precision nf4 or fp4, not {self.precision}")
        if self.precision in QUANTISED and self.adapter == "lora" and self.lora_bias != "none":
            raise ValueError(f"lora_bias {self.lora_bias} with precision {self.precision}: use lora_bias: none")
        if self.precision == "fp16" and self.adapter == "lora" and self.lora_bias != "none":
            raise ValueError(
                f"lora_bias {self.lora_bias} with precision fp16: the loss scaler cannot unscale gradients of fp16 "
                "biases; use lora_bias: none, or precision: fp16-mixed or bf16"
            )
        if self.compute_dtype is not None and self.precision not in QUANTISED:
            raise ValueError(
                f"compute_dtype is for precision int8, nf4 or fp4; {self.precision} names its own arithmetic"
            )
        if self.autocast is False and self.precision.endswith("-mixed"):
            raise ValueError(f"precision {self.precision} is 16 bit under autocast, and autocast is false; use fp32")
        if self.autocast and self.precision == "fp16" and self.adapter == "none":
            raise ValueError(
                "autocast with precision fp16 and full fine-tuning: the loss scaler cannot unscale gradients of fp16 "
                "weights; use precision: fp16-mixed"
            )
        if self.adapter == "lora" and self.adapter_dtype == "bf16" and self._in_fp16:
            raise ValueError("adapter_dtype bf16 with fp16 arithmetic: use adapter_dtype: fp32, or bf16 arithmetic")
        if self.sample_packing and self.pad_to_sequence_len:
            raise ValueError("sample_packing leaves no padding, and pad_to_sequence_len asks for it; keep one")
        if self.warmup_steps is not None and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio exclude each other; keep one")
        if self.lr_scheduler == "polynomial" and self.learning_rate <= _POLYNOMIAL_END:
            raise ValueError(
                f"lr_scheduler polynomial falls to {_POLYNOMIAL_END:g}, and learning_rate is {self.learning_rate:g}; "
                "use a higher one, or lr_scheduler: linear"
            )
        if self.sharding != "none":
            self._refuse_sharding()

    def _refuse_sharding(self) -> None:
        given = f"sharding {self.sharding} with"
        if self.num_processes == 1:
            raise ValueError(f"{given} num_processes 1: there are no processes to shard over; use sharding: none")
        if self.precision in QUANTISED:
            raise ValueError(f"{given} precision {self.precision}: quantised weights are not sharded; use bf16")
        if self.lora_bias != "none" and self.adapter == "lora" and self.precision == "bf16":
            raise ValueError(
                f"{given} lora_bias {self.lora_bias} and precision bf16: trained weights of several formats are not "
                "sharded; use lora_bias: none, or precision: bf16-mixed"
            )
        if self.optimizer not in SHARDED_OPTIMIZERS:
            raise ValueError(f"{given} optimizer {self.optimizer}: use one of {', '.join(sorted(SHARDED_OPTIMIZERS))}")

    @property
    def effective_batch_size(self) -> int:
        """Examples per optimizer step: micro-batch x accumulation x processes."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.num_processes

    @property
    def autocasts(self) -> bool:
        """Whether forward passes run under autocast: never where arithmetic is fp32."""
        if "fp32" in (self.precision, self.compute_dtype):
            return False
        in_fp32 = self.precision.endswith("-mixed") or (self.adapter == "lora" and self.adapter_dtype == "fp32")
        return in_fp32 if self.autocast is None else self.autocast

    @property
    def _in_fp16(self) -> bool:
        return self.precision in ("fp16", "fp16-mixed") or self.compute_dtype == "fp16"

    @property
    def dataset_paths(self) -> str:
        """The paths of its datasets, for a message."""
        return ", ".join(dataset.path for dataset in (*self.datasets, *(self.test_datasets or ())))

    @property
    def datasets_json(self) -> str:
        """Its datasets as JSON: the same text for the same names and prompt keys."""
        return json.dumps(self.model_dump(mode="json", include={"datasets"})["datasets"], sort_keys=True)

    def samples(self, available: int) -> int:
        """Examples that are trained on, of `available` distinct ones."""
        if self.train_samples is not None:
            return self.train_samples
        if self.max_steps is not None:
            return self.max_steps * self.effective_batch_size
        return max(1, round((self.num_epochs or 1.0) * available))

    def canonical(self) -> dict[str, Any]:
        """The keys that change what is measured, as plain JSON values."""
        # A field that was added later is left out at its former value: ids from before stay valid.
        values = {
            name: value
            for name, value in self.model_dump(mode="json").items()
            if FACTS[name].measured and value != FACTS[name].absent
        }
        # An omitted key equals the value that it stands for; sdpa where a model has none is refused.
        values["attention"] = {"auto": "sdpa"}.get(self.attention, self.attention)
        # Keys that change nothing here: a preset, or the base of a grid, gives them to trials of every kind.
        if self.compute_dtype == "bf16":
            del values["compute_dtype"]
        if self.precision not in QUANTISED:
            values.pop("upcast_unquantized", None)
        if self.loss == "full":
            values.pop("loss_chunk_size", None)
        if not self.gradient_checkpointing:
            values.pop("reentrant_checkpointing", None)
            values.pop("checkpoint_every_n_layers", None)
        if self.autocasts == self.model_copy(update={"autocast": None}).autocasts:
            values.pop("autocast", None)
        if not self.pad_to_sequence_len:
            values.pop("pad_to_sequence_len", None)
        if self.micro_batch_size == 1:
            values.pop("sample_packing", None)
        values["eval_sequence_length"] = self.eval_sequence_length or self.sequence_length
        if self.train_samples is None and self.max_steps is None:
            values["num_epochs"] = self.num_epochs or 1.0
        if not self.val_set_size:
            values.pop("min_completion_tokens", None)
        if self.adapter == "none":
            of_adapters = ("lora_", "use_", "adapter_", "save_adapter")
            values = {name: value for name, value in values.items() if not name.startswith(of_adapters)}
        return values

    @property
    def id(self) -> str:
        """Twelve hex digits of the hash of the canonical JSON."""
        return _digest(self.canonical())

    @property
    def memory_key(self) -> str:
        """As `id`, but equal for specs that differ only in keys without effect on memory."""
        held = {k: v for k, v in self.canonical().items() if FACTS[k].memory}
        return _digest(held | {"pad_to_sequence_len": self.pad_to_sequence_len})  # null and false: planned differently

    @property
    def untrained_key(self) -> str:
        """As `id`, but equal for specs whose models have the same losses before training, to the bit.

        An adapter adds an exact zero until it is trained, whatever its size and place. DoRA also scales each layer that
        has one by norms that round, so its `lora_` keys count.
        """
        return _digest(
            {
                k: v
                for k, v in self.canonical().items()
                if FACTS[k].untrained or (self.use_dora and k.startswith("lora_"))
            }
        )


FACTS: dict[str, Facts] = {name: Facts.of(field) for name, field in TrialSpec.model_fields.items()}
"""The facts of each key."""


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
