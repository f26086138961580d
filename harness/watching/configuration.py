"""What can be seen of a watched training's configuration. What cannot be seen is null in its row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args

import torch
from pydantic import ValidationError

from harness._util.messages import explain
from harness.errors import InputError
from harness.spec.keys import Optimizer
from harness.spec.trial import FACTS, TrialSpec
from harness.training import distributed, formats, sizes
from harness.watching.loop import Loop

_OF_LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_bias": "bias",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Keys by the attributes of peft's configuration."""
_OPTIMIZERS = {
    ("torch", "AdamW"): ("adamw_torch", "adamw_torch_fused"),
    ("torch", "SGD"): ("sgd",),
    ("torch", "Adagrad"): ("adagrad",),
    ("torch", "RMSprop"): ("rmsprop",),
    ("transformers", "Adafactor"): ("adafactor",),
    ("bitsandbytes", "AdamW8bit"): ("adamw_bnb_8bit", "adamw_8bit"),
    ("bitsandbytes", "PagedAdamW8bit"): ("paged_adamw_8bit",),
    ("bitsandbytes", "PagedAdamW32bit"): ("paged_adamw_32bit",),
    ("bitsandbytes", "Lion8bit"): ("lion_8bit",),
    ("bitsandbytes", "Lion32bit"): ("lion_32bit",),
}
"""Names of optimizers by their packages and classes."""
_OF_ARGUMENTS = {
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_ratio": "warmup_ratio",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "neftune_noise_alpha": "neftune_noise_alpha",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "max_length": "sequence_length",
    "seed": "seed",
}
"""Keys by the names of transformers' and TRL's arguments, where both mean the same."""
_OF_ADAPTERS = ("lora", "adapter_", "use_dora", "use_rslora", "init_lora", "recompute_adapter")
_WITHOUT_EFFECT = {
    *(
        "device",
        "memory_budget",
        "save_adapter",
        "measure_forgetting",
        "general_samples",
        "evaluate_tasks",
        "test_datasets",
    ),
    *("eval_sequence_length", "min_completion_tokens", "held_out_part", "loss_chunk_size", "checkpoint_every_n_layers"),
    *("train_samples", "num_epochs", "epoch_end", "max_steps_per_epoch", "warmup_ratio", "warmup_steps"),
}
"""Keys that mean nothing where a loop evaluates and saves by itself, or stand for others that are seen."""
NO_DATA = "unknown"
"""In place of the name of a dataset that nobody gave."""


def given(spec: Mapping[str, Any] | TrialSpec) -> TrialSpec:
    """The spec that a user says a loop has.

    Raises:
        InputError: it is none.
    """
    if isinstance(spec, TrialSpec):
        return spec
    try:
        return TrialSpec.model_validate(dict(spec))
    except ValidationError as error:
        raise InputError(f"harness.watch: spec: {explain(error, TrialSpec)}") from None


def seen(loop: Loop, arguments: Mapping[str, Any]) -> tuple[TrialSpec, tuple[str, ...]]:
    """The spec of a watched loop as far as it can be seen, and the keys that could not be.

    Args:
        loop: that has ended.
        arguments: of transformers' Trainer; empty where there are none.
    """
    values: dict[str, Any] = {}
    for part in (_of_model(loop), _of_adapter(loop.model), _of_steps(loop), _of_arguments(arguments, loop.optimizer)):
        for key, value in part.items():
            values = _with(values, key, value)
    spec = TrialSpec.model_validate(values)
    if spec.schedule != spec.lr_scheduler:  # a schedule over an optimizer without one, which no grid has
        values.pop("lr_scheduler", None)
    unseen = {key for key, facts in FACTS.items() if facts.measured and facts.given} - values.keys() - _WITHOUT_EFFECT
    if spec.adapter == "none":
        unseen = {key for key in unseen if not key.startswith(_OF_ADAPTERS)}
    return spec, tuple(sorted(unseen))


def _with(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """With one more key, unless a grid could not have it at this value: then it is not known."""
    first = {"base_model": "unknown", "datasets": ({"path": NO_DATA},)}
    try:
        TrialSpec.model_validate(first | values | {key: value})
    except ValidationError:
        return values if key not in first else {**values, key: first[key]}
    return {**values, key: value}


def _of_model(loop: Loop) -> dict[str, Any]:
    model = loop.model
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or type(model).__name__
    values = {
        "base_model": name,
        "datasets": ({"path": NO_DATA},),
        "attention": getattr(config, "_attn_implementation", None),
        "gradient_checkpointing": any(getattr(each, "gradient_checkpointing", False) for each in model.modules()),
    }
    if (precision := _precision(loop)) is not None:
        values["precision"] = precision
    return values


def _precision(loop: Loop) -> str | None:
    """Format of most of the weights, with 16-bit arithmetic over fp32 ones as `-mixed`."""
    fractions = formats.byte_fractions(loop.model)
    name = max(fractions, key=lambda each: fractions[each], default=None)
    by_type = {torch.bfloat16: "bf16-mixed", torch.float16: "fp16-mixed"}
    return by_type.get(loop.autocast, name) if name == "fp32" and loop.autocast is not None else name


def _of_adapter(model: Any) -> dict[str, Any]:
    configs = [*sizes.adapters(model).values()]
    if not configs:
        return {"adapter": "none"}
    name = str(getattr(configs[0].peft_type, "value", configs[0].peft_type)).lower()
    values: dict[str, Any] = {"adapter": name}
    if name != "lora":
        return values
    values |= {key: getattr(configs[0], attribute) for key, attribute in _OF_LORA.items()}
    targets = configs[0].target_modules
    values["lora_target_modules"] = targets if isinstance(targets, str) else sorted(targets or ())
    if configs[0].modules_to_save:
        values["lora_modules_to_save"] = sorted(configs[0].modules_to_save)
    types = {p.dtype for name, p in model.named_parameters() if ".lora_" in name}
    if len(types) == 1:
        values["adapter_dtype"] = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(types.pop())
    return values


def _of_steps(loop: Loop) -> dict[str, Any]:
    if not loop.steps:
        return {}
    values: dict[str, Any] = {
        "micro_batch_size": _most_common(Counter({rows: n for (rows, _), n in loop.shapes.items()})),
        "gradient_accumulation_steps": _most_common(loop.counts),
        "sequence_length": max(8, *(columns for _, columns in loop.shapes)),
        "max_steps": len(loop.steps),
        "num_processes": distributed.world_size(),
        "val_set_size": 0,  # what the loop evaluates is not seen
        "learning_rate": loop.learning_rate or max(step.learning_rate for step in loop.steps),
    }
    if loop.optimizer is not None:
        if names := _names_of(loop.optimizer):
            values["optimizer"] = names[0]
        values["weight_decay"] = max(float(group.get("weight_decay", 0)) for group in loop.optimizer.param_groups)
    return values


def _most_common(counts: Counter[int]) -> int:
    return counts.most_common(1)[0][0]


def _of_arguments(arguments: Mapping[str, Any], optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Of transformers' arguments, what they say, what a grid has a key for, and what was not seen to be otherwise: a
    Trainer may be given an optimizer, and look for a batch size that fits.
    """
    values = {key: arguments[name] for name, key in _OF_ARGUMENTS.items() if arguments.get(name) is not None}
    if (warm_up := arguments.get("warmup_steps")) is not None:  # a fraction is a share of the steps
        values |= {"warmup_steps": int(warm_up)} if warm_up >= 1 else {"warmup_ratio": float(warm_up)}
    if "lr_scheduler" in values:
        values["lr_scheduler"] = str(getattr(values["lr_scheduler"], "value", values["lr_scheduler"]))
    if arguments.get("auto_find_batch_size"):
        values.pop("micro_batch_size", None)
    name = str(getattr(arguments.get("optim"), "value", arguments.get("optim")))
    if optimizer is None or _may_be(optimizer, name):
        return values | ({"optimizer": name} if name in get_args(Optimizer) else {})
    own = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    return {key: value for key, value in values.items() if key not in own}


def _names_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    package = type(optimizer).__module__.partition(".")[0]
    return _OPTIMIZERS.get((package, type(optimizer).__name__), ())


def _may_be(optimizer: torch.optim.Optimizer, name: str) -> bool:
    """Whether an optimizer may be the one of this name: of its class, or of one that has no name here."""
    if names := _names_of(optimizer):
        return name in names
    return not type(optimizer).__module__.startswith("torch.") and all(
        name not in names for (package, _), names in _OPTIMIZERS.items() if package != "bitsandbytes"
    )
