"""Levels of a factor, the spec keys that each sets, and holding the effective batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from harness._util.messages import as_written, explain, kind_of, one_line, unknown
from harness.grids.presets import LIKE
from harness.grids.spellings import PRECISION_FLAGS, normalise
from harness.spec.trial import FACTS, TrialSpec

SPEC_KEYS = (*(key for key, facts in FACTS.items() if facts.given), "sequence_len", LIKE, *PRECISION_FLAGS)
HOLDING = ("micro_batch_size", "num_processes")
"""Factors that may hold the effective batch."""
ACCUMULATION = "gradient_accumulation_steps"
"""The key that is derived where it is held."""


@dataclass(frozen=True)
class Level:
    """One value of a factor, and the spec keys that it sets."""

    factor: str
    text: str
    changes: dict[str, Any]
    hold: bool = False
    """Derive the accumulation so that the effective batch stays the base's."""

    @property
    def label(self) -> str:
        """`lora_r=4`; of a labelled bundle only its label."""
        named = self.factor in self.changes or self.factor == LIKE
        return f"{self.factor}={self.text}" if named else self.text


def normalised(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Given keys under their names in a spec.

    Raises:
        ValueError: one is unknown, or two contradict each other.
    """
    for key in values:
        if key not in SPEC_KEYS:
            raise ValueError(f"{where}: {unknown('key', key, SPEC_KEYS)}")
    try:
        return normalise(values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def changes_of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """As `normalised`, for keys that replace the base's. Here a flag that is off names no precision to replace it by.

    Raises:
        ValueError: as `normalised`, or a precision flag is off.
    """
    changes = normalised(values, where)
    off = [key for key in values if key in PRECISION_FLAGS]
    if off and "precision" not in changes:
        raise ValueError(
            f"{where}: {off[0]}: {as_written(values[off[0]])} names no precision; say precision: bf16 or fp32"
        )
    return changes


def make_spec(values: Mapping[str, Any], where: str, *, keys_alone: bool = False) -> TrialSpec:
    """A validated spec.

    Args:
        values: its keys.
        where: the part of the file that they are from, which comes first in the message of an error.
        keys_alone: validate each key, and not their combination.

    Raises:
        ValueError: in one line, what is wrong and what would do.
    """
    try:
        return TrialSpec.model_validate(values, context="keys alone" if keys_alone else None)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error, TrialSpec)}") from None


def levels_of(factor: Any, given: Any, where: str = "vary") -> list[Level]:
    """The levels of a factor: a list of values (perhaps with `hold`), or labelled bundles.

    Raises:
        ValueError: they are none of these; the message begins with `where`.
    """
    hold = False
    if isinstance(given, dict) and ("levels" in given or "hold" in given):
        extra = [key for key in given if key not in ("levels", "hold")]
        if extra:
            raise ValueError(f"{where}: {factor}: {unknown('key', extra[0], ('levels', 'hold'))}")
        if given.get("hold", "effective_batch_size") != "effective_batch_size":
            raise ValueError(f"{where}: {factor}: hold is {kind_of(given['hold'])}; use effective_batch_size")
        hold = "hold" in given
        given = given.get("levels")
        if hold and isinstance(given, dict):
            raise ValueError(f"{where}: {factor}: hold goes with a list of levels, not with labelled ones")
    if hold and factor not in HOLDING:
        raise ValueError(f"{where}: {factor}: hold: effective_batch_size goes with {' and '.join(HOLDING)}")
    if isinstance(given, dict):
        if not given:
            raise ValueError(f"{where}: {factor} has no levels; give at least one")
        return [_bundle(as_written(factor), label, changes) for label, changes in given.items()]
    if factor not in SPEC_KEYS:
        raise ValueError(f"{where}: {unknown('factor', factor, SPEC_KEYS)}")
    if given is None or given == []:
        raise ValueError(f"{where}: {factor} has no levels; give at least one")
    if not isinstance(given, list):
        raise ValueError(f"{where}: {factor} is {kind_of(given)}; its levels must be a list like [{as_written(given)}]")
    levels = []
    for value in given:
        changes = changes_of({factor: value}, f"{where}: {factor}")
        name = factor if factor in changes or factor == LIKE else next(iter(changes))
        # `adapter: qlora` sets two keys: the text as written names both.
        text = value if name == factor and isinstance(value, str) and len(changes) > 1 else changes[name]
        levels.append(Level(name, one_line(as_written(text)), changes, hold))
    return levels


def _bundle(factor: str, label: Any, changes: Any) -> Level:
    label = one_line(as_written(label))
    where = f"{factor}: {label}"
    if not isinstance(changes, dict) or not changes:
        raise ValueError(f"{where} is {kind_of(changes)}; a labelled level is a mapping of spec keys")
    return Level(factor, label, changes_of(changes, where))


def list_levels(given: Any) -> list[Level]:
    """The levels of `trials:`, a list of mappings or a mapping of labels to mappings.

    Raises:
        ValueError: they are neither.
    """
    if isinstance(given, dict):
        return [_bundle("trials", label, changes) for label, changes in given.items()]
    if not isinstance(given, list):
        raise ValueError(
            f"trials is {kind_of(given)}; it must be a list of mappings, or a mapping of labels to mappings"
        )
    levels = []
    for changes in given:
        if not isinstance(changes, dict) or not changes:
            raise ValueError(f"trials: {kind_of(changes)} is not a mapping of spec keys")
        label = ", ".join(f"{key}={as_written(value)}" for key, value in changes.items())
        levels.append(_bundle("trials", label, changes))
    return levels


def condition_of(given: Any, where: str) -> dict[str, tuple[Any, ...]] | None:
    """The values of spec keys under which a parameter is active (`when`), of keys as levels may spell them.

    Raises:
        ValueError: a key or a value is none; the message begins with `where`.
    """
    if given is None:
        return None
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{where}: when is {kind_of(given)}; it must be a mapping like {{adapter: lora}}")
    allowed: dict[str, tuple[Any, ...]] = {}
    for key, value in given.items():
        for name, values in _alternatives(key, value if isinstance(value, list) else [value], f"{where}: when").items():
            allowed[name] = tuple(each for each in values if each in allowed.get(name, values))
    return allowed


def _alternatives(key: Any, levels: Sequence[Any], where: str) -> dict[str, tuple[Any, ...]]:
    """By key of a spec, the values that it has where a key, as it is spelt, has one of these levels."""
    each = []
    for level in levels:
        changes = changes_of({key: level}, where)
        spec = make_spec({"base_model": "any"} | changes, where, keys_alone=True)
        each.append({name: getattr(spec, name) for name in changes})
    if not each:
        return {key: ()}
    # Values of one key are alternatives; of several, each would go with each of the others'.
    names = dict.fromkeys(name for changes in each for name in changes)
    differing = [name for name in names if any(changes.get(name) != each[0].get(name) for changes in each)]
    if len(differing) > 1 or any(changes.keys() != names.keys() for changes in each):
        shown = " and ".join(map(as_written, levels))
        raise ValueError(f"{where}: {key}: {shown} differ in {' and '.join(names)}; give one of those keys")
    return {name: tuple(changes[name] for changes in each) for name in names}


def hold_effective_batch(values: Mapping[str, Any], base: TrialSpec, where: str) -> dict[str, Any]:
    """The values with the accumulation that keeps the base's effective batch.

    Raises:
        ValueError: micro-batch x processes do not divide it, or a value is invalid; `where` comes first in the message.
    """
    spec = make_spec(values, where, keys_alone=True)
    sizes = {key: getattr(spec, key) for key in HOLDING}
    at_once = math.prod(sizes.values())
    if base.effective_batch_size % at_once:
        product = " x ".join(f"{key} {size}" for key, size in sizes.items() if size > 1)
        raise ValueError(
            f"{where}: {product} does not divide the effective batch of {base.effective_batch_size} that is held"
        )
    return {**values, ACCUMULATION: base.effective_batch_size // at_once}
