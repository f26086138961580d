"""Spellings of training files to the keys of a spec; keys that replace others."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from harness.grids import presets
from harness.spec.keys import ALL_LINEAR, QUANTISED, Precision
from harness.spec.trial import TrialSpec

PRECISION_FLAGS: dict[str, Precision] = {"bf16": "bf16", "fp16": "fp16", "load_in_8bit": "int8", "load_in_4bit": "nf4"}
"""Flags of training files, and the precision that each stands for."""

_EXCLUSIVE: tuple[frozenset[str], ...] = (
    frozenset({"train_samples", "max_steps", "num_epochs"}),
    frozenset({"lora_target_linear", "lora_target_modules"}),
    frozenset({"warmup_steps", "warmup_ratio"}),
)
"""Keys of which a configuration may give only one; a level that gives one replaces the base's other."""


def one_of_each(keys: Collection[str]) -> set[str]:
    """The keys, and those that a configuration cannot give besides them."""
    return set(keys).union(*(group for group in _EXCLUSIVE if group & set(keys)))


FLOAT_KEYS: frozenset[str] = frozenset(
    name for name, field in TrialSpec.model_fields.items() if "float" in str(field.annotation)
)
"""Keys whose value is a float."""
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", re.ASCII)


def normalise(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the spellings of a training file to the keys of `TrialSpec`.

    ``bf16``/``fp16``/``load_in_8bit``/``load_in_4bit``/``adapter: qlora`` become `precision`,
    ``sequence_len`` becomes `sequence_length`, `like` a preset, and ``auto`` flags become true (bf16) or false (tf32).
    ``bf16: false`` with no other precision is fp32: it must not fall back to the default, bf16.

    Raises:
        ValueError: two spellings contradict each other.
    """
    values = presets.expand(given)
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
    # A 16-bit flag with a quantised load names the arithmetic, which is 16 bit there anyway.
    if any(p in QUANTISED for p in wanted.values()):
        wanted = {k: p for k, p in wanted.items() if p in QUANTISED}
    if "precision" in values:
        named = values["precision"]  # not validated yet
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

    if _is_all_linear(values.get("lora_target_modules")):
        if values.get("lora_target_linear") is False:
            raise ValueError(f"lora_target_linear false contradicts lora_target_modules {ALL_LINEAR}; keep one")
        values |= {"lora_target_modules": None, "lora_target_linear": True}
    for group in _EXCLUSIVE:
        both = sorted(key for key in group if values.get(key) not in (None, False))
        if len(both) > 1:
            raise ValueError(f"{' and '.join(both)} exclude each other; keep one")
    if values.get("lora_target_modules"):
        values["lora_target_linear"] = False
    # YAML writes whole numbers where a float is meant, and some writers put 1e-4 in quotes.
    for key in FLOAT_KEYS & values.keys():
        values[key] = as_number(values[key])
    return values


def _is_all_linear(targets: Any) -> bool:
    only = targets[0] if isinstance(targets, list | tuple) and len(targets) == 1 else targets
    return isinstance(only, str) and only.lower() == ALL_LINEAR


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `override`; a key that excludes another removes it from the base."""
    dropped = {key for group in _EXCLUSIVE if group & override.keys() for key in group - override.keys()}
    if override.get("adapter", base.get("adapter")) != base.get("adapter"):  # options are of one method
        dropped |= {"adapter_options"}
    return {key: value for key, value in base.items() if key not in dropped} | dict(override)


def as_number(value: Any) -> Any:
    """A whole number, or one like 1e-4 that YAML 1.1 reads as text, as a float; other values unchanged."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**63 else math.inf
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        number = float(value)
        return number if math.isfinite(number) else value
    return value
