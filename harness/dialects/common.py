"""What files of several tools have in common: names of optimizers and schedules of transformers, and sharding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from harness.dialects.rules import Reader, Rule
from harness.spec.keys import Optimizer, Scheduler

NOT_MEASURED = "leave it out: not measured here yet"
"""Advice on a technique that harness has no counterpart of."""

MOST_POSITIONS = 131_072
"""Tokens of a text where a tool sets no limit."""

PROJECTED = "use all-linear: GaLore and APOLLO project the gradients of every matrix in layers here"
"""Advice on other choices of matrices."""

OPTIMIZERS: Mapping[str, tuple[str, str]] = {name: (name, "") for name in get_args(Optimizer)} | {
    "adamw_hf": ("adamw_torch", "torch's AdamW in place of the one that transformers had"),
    "adamw_torch_npu_fused": ("adamw_torch_fused", "torch's fused kernel of this device"),
    "adamw_torch_xla": ("adamw_torch", "torch's AdamW of this device"),
    "adamw_apex_fused": ("adamw_torch_fused", "torch's fused kernel in place of Apex's"),
    "adamw_bnb": ("adamw_bnb_8bit", ""),
    "ao_adamw_8bit": ("adamw_torch_8bit", ""),
    "ao_adamw_4bit": ("adamw_torch_4bit", ""),
    "lion": ("lion_32bit", ""),
    "paged_adamw": ("paged_adamw_32bit", ""),
    "paged_lion": ("paged_lion_32bit", ""),
    "paged_ademamix": ("paged_ademamix_32bit", ""),
    "muon": ("muon", "torch's, with updates as large as AdamW's"),
}
"""Names of optimizers in other tools' files: the name here, and what is other than there, in a few words."""

UNLIKE_OPTIMIZERS: frozenset[str] = frozenset(
    {
        *("adamw_anyprecision", "ao_adamw_fp8", "adam_mini"),
        *("galore_adamw_8bit", "galore_adafactor", "q_galore_adamw8bit", "grokadamw", "optimi_adamw"),
        *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo"),
        *("apollo_adamw_layerwise", "dion", "came_pytorch", "lion_pytorch"),
        *("flash_adamw", "flash_adam", "flash_sgd", "flash_lion"),
    }
)
"""Names of optimizers that harness has no counterpart of."""

SCHEDULERS: frozenset[str] = frozenset(get_args(Scheduler))
UNLIKE_SCHEDULERS: Mapping[str, str] = {
    "cosine_with_min_lr": "use cosine, which ends at 0",
    "cosine_warmup_with_min_lr": "use cosine, which ends at 0",
    "warmup_stable_decay": "use constant_with_warmup or linear",
    "reduce_lr_on_plateau": "use constant: the rate here never depends on the loss",
    "greedy": "use constant: the rate here never depends on the loss",
}
"""Names of schedules that harness has no counterpart of, with what would do."""


def each(rule: Rule, names: str) -> dict[str, Rule]:
    """The same rule for several keys.

    Args:
        rule: of each.
        names: of the keys, with spaces between them.
    """
    return dict.fromkeys(names.split(), rule)


def derive(reader: Reader, key: str, value: Any, *names: str, note: str = "") -> None:
    """As `reader.set`, for a spec key that the file may have under its own name, which then holds."""
    if key not in reader.given:
        reader.set(key, value, *names, note=note)


def read_compile(reader: Reader, *, implied: bool) -> None:
    """Take over whether the model is compiled, by torch's default backend in its default mode.

    Args:
        reader: of the file.
        implied: whether naming a backend or a mode asks for it, as in transformers.
    """
    details = {"torch_compile_backend": "inductor", "torch_compile_mode": "default"}
    wanted = reader.get("torch_compile") or (implied and any(map(reader.get, details)))
    if not wanted:
        reader.ignore("off", "torch_compile", *details)
        return
    reader.set("torch_compile", True, "torch_compile", note="each layer for itself")
    for key, usual in details.items():
        if reader.get(key, usual) == usual:
            reader.note("torch_compile: true", key)
        else:
            reader.refuse(key, f"layers are compiled with {usual}; leave it out")


def set_optimizer(reader: Reader, name: str) -> None:
    """Take over the optimizer that a key of the file names; one without a counterpart is refused.

    Args:
        reader: of the file.
        name: of the key, which may be absent from the file.
    """
    given = _name(reader.get(name))
    if given is not None and given in OPTIMIZERS:
        here, note = OPTIMIZERS[given]
        reader.set("optimizer", here, name, note=note)
    elif given is not None:
        known = given in UNLIKE_OPTIMIZERS
        names = "adamw_torch, or adamw_bnb_8bit where its state is too large"
        reader.refuse(name, f"use {names}" if known else f"no optimizer here; use {', '.join(get_args(Optimizer))}")


def set_scheduler(reader: Reader, name: str) -> None:
    """Take over the schedule that a key of the file names; one without a counterpart is refused.

    Args:
        reader: of the file.
        name: of the key, which may be absent from the file.
    """
    given = _name(reader.get(name))
    if given in SCHEDULERS:
        reader.set("lr_scheduler", given, name)
    elif given is not None:
        reader.refuse(name, UNLIKE_SCHEDULERS.get(given, f"no schedule here; use {', '.join(get_args(Scheduler))}"))


def shard(reader: Reader, wanted: str, *names: str) -> None:
    """Take over that weights, gradients or optimizer states are sharded over the processes.

    A file seldom says how many processes there are: that is said at launch. One process has nothing to shard.

    Args:
        reader: of the file; `num_processes` may be among its keys.
        wanted: `full_shard` (FSDP, ZeRO-3), `shard_grad_op` (ZeRO-2), `optimizer` (ZeRO-1) or `none` (DDP).
        names: keys of the file that ask for it.
    """
    processes = reader.values.get("num_processes", 1)
    if wanted == "none":
        reader.note("sharding: none", *names)
    elif processes == 1:
        becomes = "is refused" if wanted == "optimizer" else f"becomes sharding: {wanted}"
        reader.note(f"one process: nothing to shard; with num_processes: 2 or more it {becomes}", *names)
    elif wanted == "optimizer":
        for name in names:
            if name in reader.given:
                reader.refuse(name, "optimizer states are not sharded alone; use ZeRO-2 or none")
    else:
        reader.set("sharding", wanted, *names)


def _name(value: Any) -> str | None:
    return None if value is None else str(value).lower()
