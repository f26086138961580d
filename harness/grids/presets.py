"""How common trainers make their step: bundles of spec keys, by the name that `like` has in a grid.

Sources, in the repositories of these trainers (docs/grids.md says more of each):

- peft: huggingface/peft, method_comparison/MetaMathQA/run.py and utils.py (026d1e0): a plain loop without autocast that
  holds the outputs of a step until the next one, and a loss on all tokens.
- trl: huggingface/trl, trl/trainer/sft_trainer.py: transformers' Trainer under autocast, peft's preparation.
- axolotl: axolotl-ai-cloud/axolotl, src/axolotl/loaders/model.py: the same, and reentrant checkpointing (its #1412).
- canifinetune: DaoyuanLi2816/can-i-finetune-this, src/canifinetune/bench/runner.py (cda809c): a plain loop as peft's,
  over examples that all fill the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness._util.messages import unknown

LIKE = "like"
"""The key of a grid that names a preset."""

PRESETS: dict[str, dict[str, Any]] = {
    "peft": {
        "autocast": False,
        "upcast_unquantized": True,
        "keep_outputs": True,
        "reentrant_checkpointing": True,
        "train_on_inputs": True,
    },
    "trl": {
        "autocast": True,
        "upcast_unquantized": True,
        "keep_outputs": False,
        "reentrant_checkpointing": False,
    },
    "axolotl": {
        "autocast": True,
        "upcast_unquantized": True,
        "keep_outputs": False,
        "reentrant_checkpointing": True,
    },
    "canifinetune": {
        "autocast": False,
        "upcast_unquantized": True,
        "keep_outputs": True,
        "reentrant_checkpointing": True,
        "train_on_inputs": True,
        "pad_to_sequence_len": False,
    },
}


def expand(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys with those of the preset that `like` names; keys that are given stay.

    Raises:
        ValueError: there is no such preset.
    """
    if LIKE not in given:
        return dict(given)
    values = {key: value for key, value in given.items() if key != LIKE}
    name = given[LIKE]
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"like: {unknown('trainer', name, PRESETS)}")
    return PRESETS[name] | values
