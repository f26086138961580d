"""Optimizer and learning rate schedule of torchtune's training files."""

from __future__ import annotations

from dataclasses import dataclass

from harness.dialects.components import Component, number, whole_number
from harness.dialects.rules import Reader, Unlike


@dataclass(frozen=True)
class _Known:
    """An optimizer, and its own defaults."""

    name: str
    rate: float = 1e-3
    decay: float = 0.0
    beta2: float = 0.999
    note: str = ""


_IN_8_BIT, _IN_4_BIT = (_Known(f"adamw_torch_{bits}bit", decay=1e-2) for bits in (8, 4))
_OPTIMIZERS = {
    "torch": {
        "AdamW": _Known("adamw_torch", decay=1e-2),
        "Adam": _Known("adamw_torch", note="the same without weight decay"),
        "SGD": _Known("sgd"),
        "Adagrad": _Known("adagrad", rate=1e-2),
        "RMSprop": _Known("rmsprop", rate=1e-2),
    },
    "bitsandbytes": {
        "AdamW8bit": _Known("adamw_8bit", decay=1e-2),
        "PagedAdamW8bit": _Known("paged_adamw_8bit", decay=1e-2),
        "PagedAdamW": _Known("paged_adamw_32bit", decay=1e-2),
        "PagedAdamW32bit": _Known("paged_adamw_32bit", decay=1e-2),
        "AdEMAMix": _Known("ademamix", decay=1e-2),
        "AdEMAMix8bit": _Known("ademamix_8bit", decay=1e-2),
        "PagedAdEMAMix": _Known("paged_ademamix_32bit", decay=1e-2),
        "PagedAdEMAMix8bit": _Known("paged_ademamix_8bit", decay=1e-2),
        "Lion": _Known("lion_32bit", rate=1e-4, beta2=0.99),
        "Lion32bit": _Known("lion_32bit", rate=1e-4, beta2=0.99),
        "Lion8bit": _Known("lion_8bit", rate=1e-4, beta2=0.99),
        "PagedLion": _Known("paged_lion_32bit", rate=1e-4, beta2=0.99),
        "PagedLion8bit": _Known("paged_lion_8bit", rate=1e-4, beta2=0.99),
        "RMSprop": _Known("rmsprop_bnb", rate=1e-2),
        "RMSprop8bit": _Known("rmsprop_bnb_8bit", rate=1e-2),
        "RMSprop32bit": _Known("rmsprop_bnb_32bit", rate=1e-2),
    },
    "torchao": {"AdamW8bit": _IN_8_BIT, "_AdamW8bit": _IN_8_BIT, "AdamW4bit": _IN_4_BIT, "_AdamW4bit": _IN_4_BIT},
}
"""By the package, and the last part of the path."""
_INSTEAD = "use torch.optim.AdamW, or one of bitsandbytes.optim like AdamW8bit or PagedAdamW"
_SCHEDULES = {"get_cosine_schedule_with_warmup": "cosine", "get_linear_schedule_with_warmup": "linear"}


def read(reader: Reader) -> None:
    """Read `optimizer` and `lr_scheduler`."""
    optimizer = Component.of(reader, "optimizer")
    if optimizer is None:
        reader.refuse("optimizer", f"torchtune has no default; {_INSTEAD}")
    else:
        _optimizer(reader, optimizer)
    schedule = Component.of(reader, "lr_scheduler")
    if schedule is not None:
        _schedule(reader, schedule)


def _optimizer(reader: Reader, optimizer: Component) -> None:
    known = _OPTIMIZERS.get(optimizer.path.partition(".")[0], {}).get(optimizer.name)
    if known is None:
        optimizer.refuse("_component_", _INSTEAD)
        known = _Known("adamw_torch", decay=1e-2)
    fused = optimizer.take("fused", False) and known.name == "adamw_torch"
    reader.set("optimizer", "adamw_torch_fused" if fused else known.name, "optimizer", note=known.note)
    _set_number(reader, optimizer, "lr", "learning_rate", known.rate)
    _set_number(reader, optimizer, "weight_decay", "weight_decay", known.decay)
    if optimizer.name == "Adam" and reader.values["weight_decay"]:
        optimizer.refuse("weight_decay", "Adam's is coupled; use torch.optim.AdamW", reader.values["weight_decay"])
    _betas(reader, optimizer, known)
    if optimizer.arguments.get("eps") is not None and "adam" in known.name:
        _set_number(reader, optimizer, "eps", "adam_epsilon", 1e-8)
    optimizer.drop("foreach", "capturable", "differentiable")
    optimizer.refuse_rest(off=(0, 0.0))


def _betas(reader: Reader, optimizer: Component, known: _Known) -> None:
    betas = optimizer.take("betas", [0.9, known.beta2])
    try:
        first, second = (number(beta) for beta in betas)
    except (Unlike, TypeError, ValueError):
        optimizer.refuse("betas", "use two numbers, like [0.9, 0.999]", betas)
        return
    if (first, second) != (0.9, 0.999):
        reader.set("adam_beta1", first, "optimizer")
        reader.set("adam_beta2", second, "optimizer")


def _set_number(reader: Reader, optimizer: Component, argument: str, key: str, default: float) -> None:
    value = float(optimizer.take(argument, default))
    decayed = key == "weight_decay" and value and reader.values["adapter"] == "none"
    reader.set(key, value, "optimizer", note="not on biases and norms here" if decayed else "")


def _schedule(reader: Reader, schedule: Component) -> None:
    if schedule.name not in _SCHEDULES:
        schedule.refuse("_component_", f"use one of {', '.join(_SCHEDULES)}, or none")
        return
    reader.set("lr_scheduler", _SCHEDULES[schedule.name], "lr_scheduler")
    steps = schedule.take("num_warmup_steps", 0)
    try:
        reader.set("warmup_steps", whole_number(steps, least=0), "lr_scheduler")
    except Unlike as error:
        schedule.refuse("num_warmup_steps", str(error), steps)
    if schedule.take("num_cycles", 0.5) != 0.5:
        schedule.refuse("num_cycles", "half a wave from the peak to zero; use 0.5")
    schedule.refuse_rest()
