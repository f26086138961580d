"""What DeepSpeed and FSDP do in files of Axolotl, LLaMA-Factory and TRL: what they shard, and what FSDP checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from harness.dialects.common import shard
from harness.dialects.rules import Reader

_NO_OFFLOAD = "use one without offload: nothing is kept in the memory of the CPU here"

_STAGE = re.compile(r"(?:zero|stage|z)[_-]?([0-3])(?![0-9])")
_BY_STAGE = {0: "none", 1: "optimizer", 2: "shard_grad_op", 3: "full_shard"}


def read_deepspeed(reader: Reader, name: str) -> None:
    """Take over the stage of ZeRO that DeepSpeed's settings have, or that a file of them is named after.

    Args:
        reader: of the file.
        name: of the key, which may be absent from the file.
    """
    given = reader.get(name)
    if given is None or given is False:
        return
    if isinstance(given, Mapping):
        zero = given.get("zero_optimization") or {}
        settings = zero if isinstance(zero, Mapping) else {"stage": None}
        stage = settings.get("stage", 0)
        offloads = {key: value for key, value in settings.items() if _is_offload(key, value)}
        instead = "its zero_optimization has no stage from 0 to 3; leave it out, and use sharding: full_shard"
    else:
        match = _STAGE.search(str(given).lower())
        stage = int(match[1]) if match else None
        offloads = {name: given} if "offload" in str(given).lower() else {}
        instead = "no such file, and its name has no stage like zero2 or z3; leave it out, and use sharding: full_shard"
        if any(word in str(given).lower() for word in ("fp8", "autotp")):
            reader.refuse(name, "use one without fp8 and tensor parallelism")
            return
    if offloads:
        reader.refuse(name, _NO_OFFLOAD, offloads if isinstance(given, Mapping) else given)
    elif stage in _BY_STAGE:
        shard(reader, _BY_STAGE[stage], name)
    else:
        reader.refuse(name, instead)


def _is_offload(key: Any, value: Any) -> bool:
    device = value.get("device", "none") if isinstance(value, Mapping) else value
    return "offload" in str(key) and device not in (None, False, "none")


_OF_FSDP = ("fsdp", "fsdp_config", "fsdp_version")
_STRATEGIES = {"1": "full_shard", "2": "shard_grad_op", "3": "no_shard", "4": "hybrid_shard", "5": "hybrid_shard"}
"""Numbers that accelerate takes for names."""


def read_fsdp(reader: Reader, *, implied: bool = False) -> None:
    """Take over what FSDP shards.

    Args:
        reader: of the file.
        implied: whether its settings alone ask for it, as in Axolotl.
    """
    settings = _settings(reader, implied=implied)
    if settings is None:
        reader.ignore("FSDP, which is off", *_OF_FSDP)
        return
    if isinstance(reader.get("fsdp_config"), str):
        reader.refuse("fsdp_config", "no such file; give its settings, like {reshard_after_forward: true}")
    name = "fsdp" if "fsdp" in reader.given else "fsdp_config"
    given = reader.get("fsdp")
    words = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
    asked = [*words, settings.get("sharding_strategy"), settings.get("reshard_after_forward")]
    strategies = [_STRATEGIES.get(word, word) for word in (str(word).lower() for word in asked)]
    offloads = {key: value for key, value in settings.items() if "offload" in key and _is_on(value)}
    offloads.pop("cpu_offload_pin_memory", None)  # how, not whether
    if offloads or "offload" in strategies:
        reader.refuse(name, _NO_OFFLOAD, offloads or given)
    elif any(strategy.startswith("hybrid_shard") for strategy in strategies):
        reader.refuse(name, "use full_shard: hybrid sharding is not there")
    elif "no_shard" in strategies:
        shard(reader, "none", *_OF_FSDP)
    else:
        by_step = "shard_grad_op" in strategies or "false" in strategies
        shard(reader, "shard_grad_op" if by_step else "full_shard", *_OF_FSDP)


def fsdp_checkpoints(reader: Reader, *, implied: bool = False) -> bool:
    """Whether FSDP itself checkpoints layers, which is never reentrant.

    One process does so too: a file with these settings is for several.

    Args:
        reader: of the file.
        implied: as in `read_fsdp`.
    """
    settings = _settings(reader, implied=implied)
    return settings is not None and _is_on(settings.get("activation_checkpointing"))


def _settings(reader: Reader, *, implied: bool) -> dict[str, Any] | None:
    """The settings of FSDP, without what their names may begin with; null: it is off."""
    given = reader.get("fsdp_config")
    config = given if isinstance(given, Mapping) else {}
    if reader.get("fsdp") in (None, False) and not (implied and given):
        return None
    return {str(name).removeprefix("fsdp_"): value for name, value in config.items()}


def _is_on(value: Any) -> bool:
    return bool(value) and str(value).lower() != "false"
