"""How common trainers make their step: bundles of spec keys, by the name that `like` has in a grid.

docs/grids.md says where in these trainers' code each key is from, and what of their steps no key says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness._util.messages import unknown

LIKE = "like"
"""The key of a grid that names a preset."""
MEANING = "Keys of how a trainer makes its step: peft, trl, axolotl or canifinetune; those given next to it win"
"""What `like` is, for the list of keys."""

PRESETS: dict[str, dict[str, Any]] = {
    "peft": {
        "upcast_unquantized": True,
        "autocast": False,
        "keep_outputs": True,
        "reentrant_checkpointing": False,
        "pad_to_sequence_len": None,
        "train_on_inputs": True,
    },
    "trl": {
        "upcast_unquantized": False,
        "autocast": True,
        "keep_outputs": False,
        "reentrant_checkpointing": False,
        "pad_to_sequence_len": None,
        "train_on_inputs": False,
    },
    "axolotl": {
        "upcast_unquantized": False,
        "autocast": True,
        "keep_outputs": False,
        "reentrant_checkpointing": True,
        "pad_to_sequence_len": None,
        "train_on_inputs": False,
    },
    "canifinetune": {
        "upcast_unquantized": True,
        "autocast": False,
        "keep_outputs": True,
        "reentrant_checkpointing": True,
        "pad_to_sequence_len": False,
        "train_on_inputs": True,
    },
}
"""All have the same keys, so that one replaces another."""


def expand(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys with those of the preset that `like` names; keys that are given stay.

    Raises:
        ValueError: there is no such preset.
    """
    values = {key: value for key, value in given.items() if key != LIKE}
    if LIKE not in given:
        return values
    name = given[LIKE]
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"{LIKE}: {unknown('trainer', name, PRESETS)}")
    return PRESETS[name] | values
