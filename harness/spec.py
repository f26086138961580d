"""What one fine-tuning is: every parameter of a trial, declared once, frozen and validated.

The names are the flat keys of the Axolotl family of configurations, so an existing training
file can be pasted into a grid. Each field's docstring is its documentation; ``harness keys``
prints them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from harness.private import without_home

Precision = Literal["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed", "int8", "nf4", "fp4"]
QUANTISED: frozenset[str] = frozenset({"int8", "nf4", "fp4"})

Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "sgd",
    "adagrad",
    "adafactor",
]

SHARDED_OPTIMIZERS: frozenset[str] = frozenset({"adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"})
"""Those of torch, which update a shared-out weight as they do a whole one."""

Scheduler = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
]

# The training files' own flags, and the precision that each stands for.
PRECISION_FLAGS: dict[str, Precision] = {"bf16": "bf16", "fp16": "fp16", "load_in_8bit": "int8", "load_in_4bit": "nf4"}

# Keys of which a configuration may give one only; a level that gives one replaces the base's other.
EXCLUSIVE: tuple[frozenset[str], ...] = (
    frozenset({"train_samples", "max_steps", "num_epochs"}),
    frozenset({"lora_target_linear", "lora_target_modules"}),
)

_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*$", re.IGNORECASE)


def parse_bytes(value: int | str) -> int:
    """``"24GiB"``, ``"500 MB"`` or a plain count of bytes → bytes (GiB = 2**30, GB = 10**9).

    Raises:
        ValueError: the text is not a positive size.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is not a size; write it like 24GiB or 500MB")
    if isinstance(value, int):
        size = value
    else:
        match = _BYTES.match(value)
        if match is None:
            raise ValueError(f"{value!r} is not a size; write it like 24GiB or 500MB")
        number, prefix, binary = match.groups()
        bytes_ = float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")
        size = int(min(bytes_, 2**63))
    if not 0 < size < 2**63:
        raise ValueError(f"{value!r} is not a size that memory can have; write it like 24GiB or 500MB")
    return size


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!r} is not one line of printable text")
    return text


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class PromptSpec(_Frozen):
    """How a row becomes a prompt and the completion that is learnt."""

    system_prompt: StrictStr | None = None
    """Instruction that stands before every prompt."""
    field_system: StrictStr | None = None
    """Column whose text, where a row has one, replaces `system_prompt`."""
    field_instruction: StrictStr = "synopsis"
    """Column of the prompt."""
    field_input: StrictStr | None = None
    """Column of further input to the prompt; absent from the bundled stories."""
    field_output: StrictStr = "short_story"
    """Column of the completion; the loss is taken here."""
    format: StrictStr | None = None
    """Prompt text with `{instruction}`, `{input}` and `{system}`; replaces the chat template."""
    no_input_format: StrictStr | None = None
    """As `format`, for rows without input."""

    @field_validator("format", "no_input_format")
    @classmethod
    def _has_only_known_placeholders(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                parts = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(text)]
            except ValueError as error:
                raise ValueError(f"{text!r} has a brace that stands alone ({error}); double it") from None
            names = [name for name, _, _ in parts if name is not None]
            if not {*names} <= {"instruction", "input", "system"} or any(spec or how for _, spec, how in parts):
                raise ValueError(f"{text!r} has a placeholder other than {{instruction}}, {{input}}, {{system}}")
            if "instruction" not in names:
                raise ValueError(f"{text!r} never names {{instruction}}")
        return text


Name = Annotated[StrictStr, Field(min_length=1, max_length=500), AfterValidator(_one_line)]
Place = Annotated[Name, AfterValidator(without_home)]
"""A name that may be a path: one under the home folder begins with `~`, and is the same for everybody."""
_MOST = 2**31 - 1
"""Larger counts are slips of the keyboard, and no Arrow column or seed holds just any integer."""


class DatasetSpec(_Frozen):
    """Where stories come from."""

    path: Place
    """Bundled name (`storyteller`, `storyteller-openings`), a .jsonl/.json/.csv/.parquet file, or a hub id."""
    type: PromptSpec = PromptSpec()
    """Prompt keys."""


PositiveInt = Annotated[StrictInt, Field(ge=1, le=_MOST)]
UnitInterval = Annotated[float, Field(strict=True, ge=0, lt=1)]


class TrialSpec(_Frozen):
    """One fine-tuning. Equal specs have equal ids on every machine."""

    base_model: Place
    """Bundled name (`smollm2-135m-instruct`), local folder, hub id, or `random:<architecture>`."""
    datasets: Annotated[tuple[DatasetSpec, ...], Field(min_length=1)] = (DatasetSpec(path="storyteller"),)
    """Story sources, joined."""
    sequence_length: Annotated[StrictInt, Field(ge=8, le=_MOST)] = 512
    """Longest example in tokens, prompt and completion together (`sequence_len` means the same)."""
    eval_sequence_length: Annotated[StrictInt, Field(ge=8, le=_MOST)] | None = None
    """The same for held-out stories; null: `sequence_length`. Fix it where sequence lengths are compared."""
    excess_length: Literal["truncate", "drop", "raise"] = "truncate"
    """What happens to a longer example; the count is recorded."""
    train_on_inputs: StrictBool = False
    """Take the loss on the prompt too."""
    val_set_size: Annotated[float, Field(strict=True, ge=0)] = 16
    """Held-out stories: a count (1 or more), or a share of the rows (below 1). 0: no evaluation."""

    precision: Precision = "bf16"
    """Format of weights and arithmetic; the one name for `bf16`, `fp16`, `load_in_8bit`, `load_in_4bit`."""
    double_quantization: StrictBool = False
    """Quantise the scales of nf4 and fp4 too."""
    tf32: StrictBool = False
    """Let fp32 matrix products of a CUDA card use TensorFloat-32."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is a card."""
    memory_budget: int | None = None
    """Bytes (or `24GiB`) of each process beyond which the trial ends as out of memory; null: what the device has."""

    adapter: Literal["lora", "none"] = "lora"
    """`none` (or null) is full fine-tuning."""
    lora_r: PositiveInt = 16
    """Rank."""
    lora_alpha: PositiveInt = 16
    """Scale: the update is multiplied by alpha / r."""
    lora_dropout: UnitInterval = 0.0
    """Dropout on the adapter's input."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""
    lora_target_linear: StrictBool = True
    """Adapters on every linear layer but the head; false: the architecture's default in peft."""
    lora_target_modules: tuple[StrictStr, ...] | None = None
    """Names of the layers that get an adapter, instead of `lora_target_linear`."""
    use_rslora: StrictBool = False
    """Scale by alpha / sqrt(r)."""
    use_dora: StrictBool = False
    """Weight-decomposed LoRA."""
    save_adapter: StrictBool = False
    """Keep the trained adapter beside the results."""
    measure_forgetting: StrictBool = False
    """Judge the bundled general text too, before and after training: what of it was forgotten."""

    micro_batch_size: PositiveInt = 1
    """Examples in one forward and backward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches in one optimizer step."""
    num_processes: PositiveInt = 1
    """Processes that train together."""
    sharding: Literal["none", "shard_grad_op", "full_shard"] = "none"
    """What of the model each process holds: all (DDP), or its share (FSDP), gathered for a step or layer by layer."""
    gradient_checkpointing: StrictBool = False
    """Recompute activations in the backward pass instead of keeping them."""

    train_samples: PositiveInt | None = None
    """Examples to train on (past the end of the stories they come round again)."""
    max_steps: PositiveInt | None = None
    """Optimizer steps, instead of `train_samples`."""
    num_epochs: Annotated[float, Field(strict=True, gt=0)] | None = None
    """Passes over the training stories, instead of `train_samples`; 1 where none of the three is given."""
    optimizer: Optimizer = "adamw_torch"
    """Name of the optimizer, as in transformers."""
    learning_rate: Annotated[float, Field(strict=True, gt=0)] = 2e-4
    """Peak learning rate."""
    lr_scheduler: Scheduler = "linear"
    """Shape of the learning rate over the steps."""
    warmup_ratio: UnitInterval = 0.0
    """Share of the steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(strict=True, ge=0)] = 0.0
    """Decoupled weight decay; not on biases and norms."""
    max_grad_norm: Annotated[float, Field(strict=True, ge=0)] = 1.0
    """Gradient clipping; 0: none."""
    seed: Annotated[StrictInt, Field(ge=0, le=_MOST)] = 0
    """Adapter initialisation, dropout and data order. Never the held-out split."""

    output_dir: Annotated[StrictStr, AfterValidator(without_home)] | None = None
    """Accepted from training files; results go where `harness run --results` says."""
    logging_steps: PositiveInt = 1
    """Accepted from training files; every step is recorded."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"output_dir", "logging_steps"})
    """Keys that change nothing that is measured: they stay out of the id."""

    WITHOUT_MEMORY: ClassVar[frozenset[str]] = frozenset(
        {
            "lora_alpha",
            "use_rslora",
            "learning_rate",
            "lr_scheduler",
            "warmup_ratio",
            "memory_budget",
            "save_adapter",
            "measure_forgetting",
        }
    )
    """Keys that change no byte of what a training step holds."""

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _read_size(cls, value: Any) -> Any:
        return None if value is None else parse_bytes(value)

    @field_validator("val_set_size")
    @classmethod
    def _whole_count(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError(f"{value} is neither a count (16) nor a share (0.1)")
        return value

    @field_validator("lora_target_modules", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value is not None and (not isinstance(value, list | tuple) or not value):
            raise ValueError(f"{value!r} is not a list of layer names like [q_proj, v_proj]")
        return value

    @model_validator(mode="after")
    def _possible(self, info: ValidationInfo) -> TrialSpec:
        # A grid looks at each key first, and at their combination once `exclude` has dropped some.
        if info.context != "keys alone":
            self.refuse_impossible()
        return self

    def refuse_impossible(self) -> None:
        """Look at what the keys make together.

        Raises:
            ValueError: each is valid, their combination cannot be trained.
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
        if self.sharding != "none":
            self._refuse_unsharded()

    def _refuse_unsharded(self) -> None:
        said = f"sharding {self.sharding} with"
        if self.num_processes == 1:
            raise ValueError(f"{said} num_processes 1: there is nobody to share with; use sharding: none")
        if self.precision in QUANTISED:
            raise ValueError(f"{said} precision {self.precision}: quantised weights are not shared out; use bf16")
        if self.lora_bias != "none" and self.adapter == "lora" and self.precision in {"bf16", "fp16"}:
            raise ValueError(
                f"{said} lora_bias {self.lora_bias} and precision {self.precision}: weights trained in several formats "
                f"are not shared out; use lora_bias: none, or precision: {self.precision}-mixed"
            )
        if self.optimizer not in SHARDED_OPTIMIZERS:
            raise ValueError(f"{said} optimizer {self.optimizer}: use one of {', '.join(sorted(SHARDED_OPTIMIZERS))}")

    @property
    def effective_batch_size(self) -> int:
        """Examples per optimizer step: micro-batch x accumulation x processes."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.num_processes

    def canonical(self) -> dict[str, Any]:
        """The keys that decide what is measured, as plain JSON values."""
        values = self.model_dump(mode="json", exclude=set(self.WITHOUT_EFFECT))
        for later, absent in (("measure_forgetting", False), ("sharding", "none")):
            if values[later] == absent:  # trials without it keep the ids that they had
                del values[later]
        # What is left out means the same as what it stands for.
        values["eval_sequence_length"] = self.eval_sequence_length or self.sequence_length
        if self.train_samples is None and self.max_steps is None:
            values["num_epochs"] = self.num_epochs or 1.0
        if self.adapter == "none":
            values = {k: v for k, v in values.items() if not k.startswith(("lora_", "use_")) and k != "save_adapter"}
        return values

    @property
    def id(self) -> str:
        """Twelve hex digits of the hash of the canonical JSON."""
        return _digest(self.canonical())

    @property
    def memory_key(self) -> str:
        """As `id`, and equal for specs that differ in nothing that takes memory."""
        return _digest({k: v for k, v in self.canonical().items() if k not in self.WITHOUT_MEMORY})


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def normalise(given: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the several spellings of a training file to the keys of `TrialSpec`.

    ``bf16``/``fp16``/``load_in_8bit``/``load_in_4bit``/``adapter: qlora`` become `precision`,
    ``sequence_len`` becomes `sequence_length`, and ``auto`` flags become true (bf16) or false (tf32).
    ``bf16: false`` with no other precision is fp32: it must not fall back on the default, bf16.

    Raises:
        ValueError: two spellings contradict each other.
    """
    values = dict(given)
    if "sequence_len" in values:
        length = values.pop("sequence_len")
        if values.setdefault("sequence_length", length) != length:
            raise ValueError(f"sequence_len {length} contradicts sequence_length {values['sequence_length']}; keep one")
    if values.get("tf32") == "auto":
        values["tf32"] = False
    for key in ("adapter", "optimizer"):
        if key in values and values[key] is None:
            values[key] = "none" if key == "adapter" else "adamw_torch"

    wanted: dict[str, str] = {}
    for flag, precision in PRECISION_FLAGS.items():
        if flag in values:
            on = values.pop(flag)
            if not (isinstance(on, bool) or on is None or (on == "auto" and flag == "bf16")):
                raise ValueError(f"{flag}: {on!r} is neither true nor false" + ", nor auto" * (flag == "bf16"))
            if on:
                wanted[f"{flag}: {str(on).lower()}"] = precision
    if values.get("adapter") == "qlora":
        values["adapter"] = "lora"
        wanted["adapter: qlora"] = "nf4"
    # A 16-bit flag beside a quantised load names the arithmetic, which is 16 bit there anyway.
    if any(p in QUANTISED for p in wanted.values()):
        wanted = {k: p for k, p in wanted.items() if p in QUANTISED}
    if "precision" in values:
        named = values["precision"]  # of any type so far; the model refuses what is none
        quantised = isinstance(named, str) and named in QUANTISED
        wanted = {f"precision: {named}": named} | {k: p for k, p in wanted.items() if not (p == "bf16" and quantised)}
        if named == "fp4":  # both are load_in_4bit
            wanted = {k: "fp4" if p == "nf4" else p for k, p in wanted.items()}
    if given.get("bf16") is False and (not wanted or "bf16" in wanted.values()):
        wanted["bf16: false"] = "fp32"
    if len({str(p) for p in wanted.values()}) > 1:
        raise ValueError(f"contradictory precision ({', '.join(wanted)}); keep one")
    if wanted:
        values["precision"] = next(iter(wanted.values()))

    for group in EXCLUSIVE:
        both = sorted(key for key in group if values.get(key) not in (None, False))
        if len(both) > 1:
            raise ValueError(f"{' and '.join(both)} exclude each other; keep one")
    if values.get("lora_target_modules"):
        values["lora_target_linear"] = False
    # YAML writes whole numbers where a float is meant, and some writers put 1e-4 in quotes.
    for key in FLOAT_KEYS & values.keys():
        values[key] = _as_float(values[key])
    return values


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `override`; a key that excludes another removes the base's."""
    dropped = {key for group in EXCLUSIVE if group & override.keys() for key in group - override.keys()}
    return {key: value for key, value in base.items() if key not in dropped} | dict(override)


FLOAT_KEYS: frozenset[str] = frozenset(
    name for name, field in TrialSpec.model_fields.items() if "float" in str(field.annotation)
)

_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", re.ASCII)


def _as_float(value: Any) -> Any:
    """A whole number, or a number like 1e-4 that YAML 1.1 reads as text, as a float; else as it came."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**63 else math.inf
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        number = float(value)
        return number if math.isfinite(number) else value
    return value
