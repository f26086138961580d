"""What trials meet when they begin, looked at before any of them does: their data and their model, without weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from harness._util.units import show_share
from harness.environment import resolve_device
from harness.errors import InputError
from harness.metrics import MOSTLY_IN_FORMAT
from harness.spec import capabilities
from harness.spec.trial import TrialSpec
from harness.training import (
    adapter_targets,
    batches,
    checkpoints,
    device_limits,
    formats,
    fused_loss,
    limits,
    model,
    optimizers,
    order,
    tasks,
)

_MODEL_KEYS = (
    "base_model",
    "folder",
    "precision",
    "quantizer",
    "double_quantization",
    "attention",
    "device",
    "adapter",
    "adapter_options",
    "init_lora_weights",
    "loraplus_lr_ratio",
    "lora_bias",
    "lora_target_linear",
    "lora_target_modules",
    "lora_target_parameters",
    "compute_dtype",
    "upcast_unquantized",
    "lora_modules_to_save",
    "use_dora",
    "gradient_checkpointing",
    "checkpoint_every_n_layers",
    "checkpoint_offload",
    "recompute_adapter_inputs",
    "loss",
    "sample_packing",
)
"""Spec keys that decide whether a model can be built, and of what."""
_MOST_OUTCOMES = 4
"""Outcomes of the data that are said in full."""


class Inspection(BaseModel):
    """What trials meet when they begin."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: tuple[str, ...] = ()
    """What is trained on and what is left out, a line for each distinct outcome."""
    warnings: tuple[str, ...] = ()
    """What is unlike what a label says, one line each."""


@dataclass(frozen=True)
class _Data:
    """What was seen of the data of some trials."""

    outcome: str
    texts: limits.Texts
    training_stories: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Model:
    """What was seen of the model of some trials."""

    limits: limits.Limits
    warnings: tuple[str, ...] = ()


def inspect(
    trials: Iterable[tuple[str, TrialSpec]], *, remote: bool = False, trust_remote_code: bool = False
) -> Inspection:
    """Read the data and build the model of each trial as it would, each kind once; nothing is trained.

    Args:
        trials: label and spec of each.
        remote: they run on other machines, whose devices and packages are not known here.
        trust_remote_code: let models from the hub run their own code.

    Raises:
        InputError: a trial cannot run; it is named.
    """
    data: dict[str, _Data] = {}
    networks: dict[str, _Model] = {}
    asked: set[tuple[str, ...]] = set()
    outcomes: dict[str, str] = {}
    warnings: dict[str, None] = {}
    for label, spec in trials:
        data_key, model_key = batches.key(spec), _key(spec)
        try:
            if refused := capabilities.refusal(spec):
                raise InputError(refused)
            if not remote:
                device_limits.refuse_on(spec, resolve_device(spec.device))
                fused_loss.refuse_missing(spec)
            if model_key not in networks:
                networks[model_key] = _look_at_model(spec, trust_remote_code)
            if data_key not in data:
                data[data_key] = _look_at_data(spec, trust_remote_code)
            if spec.evaluate_tasks and spec.evaluate_tasks not in asked:
                tasks.check(spec)
                asked.add(spec.evaluate_tasks)
            seen, network = data[data_key], networks[model_key]
            optimizers.refuse_missing(spec)
            order.check_schedules(spec, seen.training_stories)
            limits.check(spec, seen.texts, network.limits)
        except InputError as error:
            raise InputError(f"{label}: {error}") from None
        outcomes.setdefault(seen.outcome, label)
        warnings |= dict.fromkeys((*seen.warnings, *network.warnings, *_long_texts(spec, seen.texts, network.limits)))
    return Inspection(data=_lines(outcomes), warnings=tuple(warnings))


def _key(spec: TrialSpec) -> str:
    return json.dumps(spec.model_dump(mode="json", include={*_MODEL_KEYS}), sort_keys=True)


def _lines(outcomes: dict[str, str]) -> tuple[str, ...]:
    """Each outcome, with the first label that has it where there are several, and how many there are beyond a few."""
    if len(outcomes) == 1:
        return tuple(f"data: {outcome}" for outcome in outcomes)
    lines = [f"data of {label}: {outcome}" for outcome, label in outcomes.items()]
    further = len(lines) - _MOST_OUTCOMES
    if further > 0:
        lines[_MOST_OUTCOMES:] = [f"data of {further} more differ; harness show tells the counts of each trial"]
    return tuple(lines)


def _look_at_data(spec: TrialSpec, trust_remote_code: bool) -> _Data:
    tokenizer = checkpoints.load_tokenizer(spec, trust_remote_code=trust_remote_code)
    data = batches.load(spec, tokenizer)
    warnings = []
    if data.folded:
        warnings.append(
            f"base_model {spec.base_model}: its chat template has no system turn; the system text of {data.folded} "
            "prompts begins the user's turn"
        )
    if data.without_tools:
        warnings.append(
            f"base_model {spec.base_model}: its chat template does not show the tools of {data.without_tools} chats, "
            "which are trained on without them"
        )
    return _Data(data.describe(spec), limits.of_texts(data, tokenizer), len(data.train), tuple(warnings))


def _long_texts(spec: TrialSpec, texts: limits.Texts, of_model: limits.Limits) -> list[str]:
    longest = max(texts.training, texts.held_out)
    if of_model.made_for is None or longest <= of_model.made_for:
        return []
    return [
        f"base_model {spec.base_model}: an example has {longest} tokens, and the model was made for "
        f"{of_model.made_for} (max_position_embeddings)"
    ]


def _look_at_model(spec: TrialSpec, trust_remote_code: bool) -> _Model:
    try:
        network = model.skeleton(spec, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception:  # a model's own code may need values; the trial itself shows whether it runs
        return _Model(limits.Limits(None, None, None))
    warnings = (
        model.not_trained(network, spec),
        _skipped_layers(network, spec),
        adapter_targets.no_biases(network, spec),
    )
    return _Model(limits.of_model(network), tuple(filter(None, warnings)))


def _skipped_layers(network: Any, spec: TrialSpec) -> str | None:
    """Where a quantiser leaves more than a little as it is."""
    name = model.format_of_linear_weights(spec)
    fraction = formats.fraction_in(network, name)
    if fraction is None or fraction >= MOSTLY_IN_FORMAT:
        return None
    return (
        f"precision {name} holds for {show_share(fraction)} of the linear weights of {spec.base_model}: the others, "
        "such as experts, are of no kind that its quantiser takes, and stay as they are"
    )
