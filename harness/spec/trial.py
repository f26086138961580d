"""One fine-tuning: parameters that can be trained together, and the ids that follow from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import (
    ValidationInfo,
    model_validator,
)

from harness.spec.datasets import Facts, Part
from harness.spec.keys import (
    FULL,
    FUSED_LOSSES,
    INITIALISED_LATER,
    LORA,
    LOW_RANK_OPTIMIZERS,
    OF_UNQUANTISED,
    QUANTISED,
    SCHEDULE_FREE_OPTIMIZERS,
    SHARDED_OPTIMIZERS,
    WARMING_UP_OPTIMIZERS,
    WITHOUT_BETAS,
    WITHOUT_EPSILON,
    check_format,
)
from harness.spec.parameters import Parameters

_POLYNOMIAL_END = 1e-7
"""Last learning rate of `polynomial` in transformers."""


_OF_LORA = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_target_parameters", "use_", "adapter_dtype",
    "recompute_adapter_", "init_lora_", "loraplus_",
)  # fmt: skip
"""Beginnings of keys that other methods do not have."""
_OF_ADAPTERS = ("lora_", "adapter_", "save_adapter")
"""Beginnings of keys that full fine-tuning does not have, besides those."""

_BEGINS_AT_ZERO = ("default", "gaussian", "eva")
"""Initialisations of LoRA by which it adds an exact zero until it is trained."""


def has_key(adapter: str, key: str) -> bool:
    """Whether a key has an effect under an adapter: those of LoRA have none under others, nor any without adapters."""
    if key.startswith(_OF_LORA) and adapter != LORA:
        return False
    return adapter != FULL or not key.startswith(_OF_ADAPTERS)


class TrialSpec(Parameters):
    """One fine-tuning. Equal specs have equal ids on every machine."""

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
        if self.adapter == FULL and self.precision in QUANTISED:
            raise ValueError(
                f"precision {self.precision} with full fine-tuning: quantised weights cannot be trained; "
                "use adapter: lora, or precision: bf16"
            )
        check_format(self.precision, self.quantizer)
        if self.num_processes > 1 and self.precision in QUANTISED and self.quantizer == "torchao":
            raise ValueError(
                f"num_processes {self.num_processes} with quantizer torchao: its weights cannot be handed to other "
                "processes; use quantizer: bitsandbytes or hqq"
            )
        if self.double_quantization and self.precision not in {"nf4", "fp4"}:
            raise ValueError(f"double_quantization is for precision nf4 or fp4, not {self.precision}")
        if self.precision in QUANTISED and self.adapter == LORA and self.lora_bias != "none":
            raise ValueError(f"lora_bias {self.lora_bias} with precision {self.precision}: use lora_bias: none")
        if self.precision == "fp16" and self.adapter == LORA and self.lora_bias != "none":
            raise ValueError(
                f"lora_bias {self.lora_bias} with precision fp16: the loss scaler cannot unscale gradients of fp16 "
                "biases; use lora_bias: none, or precision: fp16-mixed or bf16"
            )
        if self.compute_dtype is not None and self.precision not in QUANTISED:
            raise ValueError(
                f"compute_dtype is for precision int8, int4, nf4 or fp4; {self.precision} names its own arithmetic"
            )
        if self.autocast is False and self.precision.endswith("-mixed"):
            raise ValueError(f"precision {self.precision} is 16 bit under autocast, and autocast is false; use fp32")
        if self.autocast and self.precision == "fp16" and self.adapter == FULL:
            raise ValueError(
                "autocast with precision fp16 and full fine-tuning: the loss scaler cannot unscale gradients of fp16 "
                "weights; use precision: fp16-mixed"
            )
        if self.adapter == LORA:
            self._refuse_of_lora()
        if self.adapter == FULL and self.adapter_options:
            raise ValueError("adapter_options with full fine-tuning, which has no adapter; leave them out, or name one")
        if self.gradient_checkpointing and self.checkpoint_keep != "nothing" and self.reentrant_checkpointing:
            raise ValueError(
                f"checkpoint_keep {self.checkpoint_keep} with reentrant_checkpointing, which recomputes all; keep one"
            )
        if (
            self.gradient_checkpointing
            and self.checkpoint_keep == "attention"
            and self.attention not in ("auto", "sdpa")
        ):
            raise ValueError(
                f"checkpoint_keep attention with attention {self.attention}, which is no operation of torch's own; use "
                "attention: sdpa, or checkpoint_keep: matmuls"
            )
        if self.attention == "flex_attention" and (self.sample_packing or self.torch_compile):
            name = "sample_packing" if self.sample_packing else "torch_compile"
            raise ValueError(f"{name} with attention flex_attention, which is compiled by itself; use attention: sdpa")
        if self.sample_packing and self.pad_to_sequence_len:
            raise ValueError("sample_packing leaves no padding, and pad_to_sequence_len asks for it; keep one")
        if self.warmup_steps is not None and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio exclude each other; keep one")
        if self.max_steps_per_epoch is not None and self.epoch_end == "continue":
            raise ValueError(
                "max_steps_per_epoch with epoch_end continue, whose steps run from one epoch into the next; use "
                "epoch_end: step or carry, or max_steps"
            )
        if self.schedule == "polynomial" and self.learning_rate <= _POLYNOMIAL_END:
            raise ValueError(
                f"lr_scheduler polynomial falls to {_POLYNOMIAL_END:g}, and learning_rate is {self.learning_rate:g}; "
                "use a higher one, or lr_scheduler: linear"
            )
        if self.optimizer in LOW_RANK_OPTIMIZERS and self.adapter != FULL:
            raise ValueError(
                f"optimizer {self.optimizer} with adapter {self.adapter}, whose weights are small already: use "
                "adapter: none, or another optimizer"
            )
        if self.optimizer == "lora_fa" and self.adapter != LORA:
            raise ValueError(f"optimizer lora_fa with adapter {self.adapter}: it is for LoRA's matrices alone")
        if self.optimizer in ("schedule_free_adamw", "schedule_free_radam") and not self.adam_beta1:
            raise ValueError(f"optimizer {self.optimizer} with adam_beta1 0, by which it divides; use one above 0")
        if self.optimizer_in_backward:
            self._refuse_in_backward()
        if self.sharding != "none":
            self._refuse_sharding()

    def _refuse_of_lora(self) -> None:
        if self.adapter_dtype == "bf16" and self._in_fp16:
            raise ValueError("adapter_dtype bf16 with fp16 arithmetic: use adapter_dtype: fp32, or bf16 arithmetic")
        if self.recompute_adapter_inputs and self.use_dora:
            raise ValueError("recompute_adapter_inputs with use_dora: DoRA's layers use their inputs twice; keep one")
        if self.lora_target_parameters and (self.lora_dropout or self.use_dora):
            raise ValueError(
                "lora_target_parameters with lora_dropout or use_dora, which adapters of such weights do not have: use "
                "lora_dropout: 0 and use_dora: false"
            )
        given = f"init_lora_weights {self.init_lora_weights}"
        if self.init_lora_weights.startswith(OF_UNQUANTISED) and self.precision in QUANTISED:
            raise ValueError(
                f"{given} with precision {self.precision}: it takes parts of weights that are not quantised; use "
                "olora, or precision: bf16"
            )
        if self.init_lora_weights == "olora" and self.precision in QUANTISED and self.quantizer != "bitsandbytes":
            raise ValueError(f"{given} with quantizer {self.quantizer}: use quantizer: bitsandbytes")
        if self.save_adapter and self.init_lora_weights == "loftq":
            raise ValueError(
                f"{given} with save_adapter: it makes up for quantising, which the weights that an adapter is merged "
                "into do not have behind them; use olora"
            )
        if self.save_adapter and self.init_lora_weights.startswith(("pissa_niter_", "corda")):
            by = "of data" if self.init_lora_weights == "corda" else "by random projections"
            raise ValueError(
                f"{given} with save_adapter: what it took of the weights is found {by}, and cannot be found again when "
                "the adapter is loaded; use pissa"
            )
        if self.init_lora_weights in INITIALISED_LATER:
            self._refuse_initialised_later(given)
        if self.init_lora_weights == "orthogonal" and self.lora_r % 2:
            raise ValueError(f"{given} with lora_r {self.lora_r}: the rank must be even")
        biased = bool(dict(self.adapter_options or ()).get("lora_bias")) or self.lora_bias != "none"
        others = self.use_dora or self.loraplus_lr_ratio or self.lora_modules_to_save or biased
        if self.optimizer == "lora_fa" and others:
            raise ValueError(
                "optimizer lora_fa trains LoRA's B alone, without use_dora, loraplus_lr_ratio, lora_modules_to_save or "
                "biases; leave them out, or use another optimizer"
            )
        if self.init_lora_weights == "mica" and (self.optimizer == "lora_fa" or self.loraplus_lr_ratio):
            name = "optimizer lora_fa" if self.optimizer == "lora_fa" else "loraplus_lr_ratio"
            raise ValueError(f"{given} with {name}: mica trains LoRA's A alone, and that is about B; keep one")
        if self.optimizer == "muon" and self.loraplus_lr_ratio:
            raise ValueError("loraplus_lr_ratio with optimizer muon, which scales updates itself; keep one")

    def _refuse_initialised_later(self, given: str) -> None:
        if self.init_lora_weights == "loftq" and self.precision not in QUANTISED:
            raise ValueError(f"{given} with precision {self.precision}: it makes up for quantising; use precision: nf4")
        if self.use_dora and self.init_lora_weights != "eva":
            raise ValueError(f"{given} with use_dora, whose norms are of the weights before it: keep one")
        if self.lora_target_parameters:
            raise ValueError(f"{given} with lora_target_parameters: it is of linear layers; leave one out")
        if self.sharding != "none":
            raise ValueError(f"{given} with sharding {self.sharding}: it takes whole weights; use sharding: none")

    def _refuse_in_backward(self) -> None:
        given = "optimizer_in_backward updates with the gradients of one micro-batch, one parameter at a time"
        if self.gradient_accumulation_steps > 1:
            raise ValueError(f"{given}; use gradient_accumulation_steps: 1, and a larger micro_batch_size")
        if self.max_grad_norm:
            raise ValueError(f"{given}, before the norm of all is known; use max_grad_norm: 0")
        if self.adapter == "adalora":
            raise ValueError(f"{given}, and adalora looks at all of them afterwards; use optimizer_in_backward: false")
        if self.optimizer == "lora_fa":
            raise ValueError(f"{given}, and lora_fa updates pairs of them; use adamw_torch")
        if self.optimizer == "apollo_adamw":
            raise ValueError(f"{given}, and apollo_adamw then projects all by one seed; use galore_adamw")
        if self.num_processes > 1:
            raise ValueError(f"{given}, and none is averaged over processes; use num_processes: 1")
        if self._in_fp16:
            raise ValueError(f"{given}, without a loss scaler; use bf16 or fp32 arithmetic in place of fp16")

    def _refuse_sharding(self) -> None:
        given = f"sharding {self.sharding} with"
        if self.num_processes == 1:
            raise ValueError(f"{given} num_processes 1: there are no processes to shard over; use sharding: none")
        if self.precision in QUANTISED:
            raise ValueError(f"{given} precision {self.precision}: quantised weights are not sharded; use bf16")
        if self.loss in FUSED_LOSSES:
            raise ValueError(f"{given} loss {self.loss}, whose kernel takes the whole head; use loss: chunked")
        if self.lora_bias != "none" and self.adapter == LORA and self.precision == "bf16":
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
    def schedule(self) -> str:
        """The schedule of the learning rate that it is trained by: constant where the optimizer takes its place."""
        return "constant" if self.optimizer in SCHEDULE_FREE_OPTIMIZERS else self.lr_scheduler

    @property
    def warms_up(self) -> bool:
        """Whether its schedule or its optimizer has a warm-up, of one step or more."""
        has_one = self.schedule != "constant" or self.optimizer in WARMING_UP_OPTIMIZERS
        return has_one and bool(self.warmup_steps or self.warmup_ratio)

    @property
    def compiles(self) -> bool:
        """Whether torch's compiler makes some of the code of its steps: layers, or attention."""
        return self.torch_compile or self.attention == "flex_attention"

    @property
    def counts_operations(self) -> bool:
        """Whether all of a step's products are operations of torch's, which can be counted."""
        return self.loss != "cce" and self.attention not in ("flash_attention_2", "flex_attention")

    @property
    def autocasts(self) -> bool:
        """Whether forward passes run under autocast: never where arithmetic is fp32."""
        if "fp32" in (self.precision, self.compute_dtype):
            return False
        adapter_in_fp32 = self.adapter != FULL and (self.adapter != LORA or self.adapter_dtype == "fp32")
        in_fp32 = self.precision.endswith("-mixed") or adapter_in_fp32
        return in_fp32 if self.autocast is None else self.autocast

    @property
    def upcasts(self) -> bool:
        """Whether what is not quantised is made fp32, which peft does over bitsandbytes' formats alone."""
        return self.upcast_unquantized and self.precision in QUANTISED and self.quantizer == "bitsandbytes"

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

    @property
    def tasks_json(self) -> str:
        """Its tasks as JSON, as rows have them; empty where there are none."""
        return json.dumps([*self.evaluate_tasks]) if self.evaluate_tasks else ""

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
            values.pop("quantizer", None)
        if not self.upcasts:
            values.pop("upcast_unquantized", None)
        if self.loss != "chunked":
            values.pop("loss_chunk_size", None)
        if not self.gradient_checkpointing:
            values.pop("reentrant_checkpointing", None)
            values = {name: value for name, value in values.items() if not name.startswith("checkpoint_")}
        if self.autocasts == self.model_copy(update={"autocast": None}).autocasts:
            values.pop("autocast", None)
        if not self.pad_to_sequence_len:
            values.pop("pad_to_sequence_len", None)
        if self.micro_batch_size == 1:
            values.pop("sample_packing", None)
        values["eval_sequence_length"] = self.eval_sequence_length or self.sequence_length
        if self.train_samples is None and self.max_steps is None:
            values["num_epochs"] = self.num_epochs or 1.0
            if values["num_epochs"] == 1 and self.epoch_end == "step" and self.max_steps_per_epoch is None:
                del values["epoch_end"]  # the end of a single pass is the end of the training
        values["lr_scheduler"] = self.schedule
        if not self.warms_up:
            values["warmup_ratio"] = 0.0
            values.pop("warmup_steps", None)
        if self.optimizer in WITHOUT_BETAS:
            values = {name: value for name, value in values.items() if not name.startswith("adam_beta")}
        if self.optimizer in WITHOUT_EPSILON:
            values.pop("adam_epsilon", None)
        if not self.val_set_size:
            values.pop("min_completion_tokens", None)
            values.pop("held_out_part", None)
        if not self.measure_forgetting:
            values.pop("general_samples", None)
        return {name: value for name, value in values.items() if has_key(self.adapter, name)}

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

        LoRA adds an exact zero until it is trained, whatever its size and place. DoRA also scales each layer that has
        one by norms that round, so its `lora_` keys count. What takes parts of the weights rounds them, and other
        methods begin as they do, prompts with random tokens: there the seed counts too.
        """
        adds_zero = self.adapter == FULL or (self.adapter == LORA and self.init_lora_weights in _BEGINS_AT_ZERO)
        return _digest(
            {
                k: v
                for k, v in self.canonical().items()
                if FACTS[k].untrained
                or (k.startswith("lora_") and (self.use_dora or not adds_zero))
                or (k == "seed" and not adds_zero)
            }
        )


FACTS: dict[str, Facts] = {name: Facts.of(field) for name, field in TrialSpec.model_fields.items()}
"""The facts of each key."""
PARTS = {name: part for name, field in TrialSpec.model_fields.items() if (part := Part.of(field)) is not None}
"""The part of a training that each key acts on."""


def part_of(keys: Collection[str]) -> Part | None:
    """The part of a training that a technique acts on; null where no key of it acts on one.

    A learning rate or a length that goes with a technique does not count: full fine-tuning has a rate of its own.

    Args:
        keys: those in which it differs from what it is compared with.
    """
    parts = {PARTS[key] for key in keys if key in PARTS}
    parts = parts - {Part.TRAINING} or parts
    return next(iter(parts), None) if len(parts) <= 1 else Part.SEVERAL


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
