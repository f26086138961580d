"""What trials meet when they begin, looked at before any of them does: their data and their model, without weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from harness.errors import InputError
from harness.spec import TrialSpec
from harness.training import batches, checkpoints, model

_DATA_KEYS = (
    "base_model",
    "folder",
    "datasets",
    "sequence_length",
    "eval_sequence_length",
    "excess_length",
    "train_on_inputs",
    "val_set_size",
    "min_completion_tokens",
)
"""Spec keys that `batches.load` depends on."""
_MODEL_KEYS = (
    "base_model",
    "folder",
    "precision",
    "double_quantization",
    "attention",
    "device",
    "adapter",
    "lora_bias",
    "lora_target_linear",
    "lora_target_modules",
    "use_dora",
)
"""Spec keys that decide whether a model can be built, and of what."""


class Inspection(BaseModel):
    """What trials meet when they begin."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    warnings: tuple[str, ...] = ()
    """What is unlike what a label says, one line each."""


def inspect(trials: Iterable[tuple[str, TrialSpec]], *, trust_remote_code: bool = False) -> Inspection:
    """Read the data and build the model of each trial as it would, each kind once; nothing is trained.

    Args:
        trials: label and spec of each.
        trust_remote_code: let models from the hub run their own code.

    Raises:
        InputError: a trial cannot run; it is named.
    """
    looked_at: set[str] = set()
    warnings: dict[str, None] = {}
    for label, spec in trials:
        try:
            for keys, look in ((_DATA_KEYS, _look_at_data), (_MODEL_KEYS, _look_at_model)):
                key = json.dumps(spec.model_dump(mode="json", include={*keys}), sort_keys=True)
                if key not in looked_at:
                    looked_at.add(key)
                    warnings |= dict.fromkeys(look(spec, trust_remote_code))
        except InputError as error:
            raise InputError(f"{label}: {error}") from None
    return Inspection(warnings=tuple(warnings))


def _look_at_data(spec: TrialSpec, trust_remote_code: bool) -> list[str]:
    batches.load(spec, checkpoints.load_tokenizer(spec, trust_remote_code=trust_remote_code))
    return []


def _look_at_model(spec: TrialSpec, trust_remote_code: bool) -> list[str]:
    network: Any
    try:
        network = model.skeleton(spec, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception:  # a model's own code may need values; the trial itself shows whether it runs
        return []
    del network
    return []
