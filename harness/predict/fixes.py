"""Changes that make a trial fit, cheapest first, by a search over predictions.

Cheapest is what alters least: first changes that leave what is learned as it is (up to rounding), then those of
arithmetic, then those that need another card, then those of the model or of the data; among equals, the least
predicted time per token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from harness.environment import DeviceType
from harness.predict.prediction import Prediction, SpecPrediction, Verdict
from harness.spec import capabilities
from harness.spec.keys import FULL, LORA, QUANTISED, SHARDED_OPTIMIZERS
from harness.spec.trial import TrialSpec

Alters = Literal["nothing", "arithmetic", "hardware", "model"]
_ORDER: tuple[Alters, ...] = ("nothing", "arithmetic", "hardware", "model")
_MOST_CHANGES = 4
"""Changes in one combination."""
_TRIED = 10
"""Combinations that are predicted of each size, at most."""
_SHORT = 0.9
"""Combinations are predicted whose estimate exceeds the capacity by less than a ninth: savings do not add exactly."""


@dataclass(frozen=True, eq=False)
class Change:
    """One change of a spec."""

    kind: str
    """Of several of a kind one is taken."""
    alters: Alters
    keys: Mapping[str, Any]
    """The keys that it sets."""

    @property
    def text(self) -> str:
        """The change in the words of a grid file."""
        keys = {key: value for key, value in self.keys.items() if key != "lora_target_linear"}  # said by the modules
        return ", ".join(f"{key}={_written(value)}" for key, value in keys.items())


@dataclass(frozen=True)
class Proposal:
    """Changes of a trial, and what is predicted with them."""

    changes: tuple[Change, ...]
    spec: TrialSpec
    prediction: Prediction
    verdict: Verdict
    seconds_per_token: float
    """Of an optimizer step, over its padded tokens."""

    @property
    def text(self) -> str:
        """The changes in the words of a grid file."""
        return _text(self.changes)

    @property
    def alters(self) -> Alters:
        """What the changes alter at most."""
        return max((change.alters for change in self.changes), key=_ORDER.index)

    @property
    def cost(self) -> tuple[int, float]:
        """By which proposals are ranked."""
        return _ORDER.index(self.alters), self.seconds_per_token


def _text(changes: Sequence[Change]) -> str:
    return ", ".join(change.text for change in changes)


def _written(value: Any) -> str:
    return "+".join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)


def _micro_batches(spec: TrialSpec, device_type: DeviceType) -> Iterator[Change]:
    size, steps = spec.micro_batch_size, spec.gradient_accumulation_steps
    for parts in range(2, size + 1):
        if size % parts == 0:
            keys = {"micro_batch_size": size // parts, "gradient_accumulation_steps": steps * parts}
            yield Change("micro-batch", "nothing", keys)


def _checkpointing(spec: TrialSpec, device_type: DeviceType) -> Iterator[Change]:
    if not spec.gradient_checkpointing:
        yield Change("checkpointing", "nothing", {"gradient_checkpointing": True})
        yield Change("checkpointing", "nothing", {"gradient_checkpointing": True, "checkpoint_every_n_layers": 2})


_CHUNKS = (64, 16)
"""Positions in a part of the loss."""


def _losses(spec: TrialSpec, device_type: DeviceType) -> Iterator[Change]:
    if spec.loss not in ("full", "chunked"):
        return
    chunked = {} if spec.loss == "chunked" else {"loss": "chunked"}
    if chunked:
        yield Change("loss", "nothing", chunked)
    for size in _CHUNKS:
        if size < spec.loss_chunk_size:
            yield Change("loss", "nothing", {**chunked, "loss_chunk_size": size})


def _outputs(spec: TrialSpec, device_type: DeviceType) -> Iterator[Change]:
    if spec.attention == "eager":
        yield Change("attention", "arithmetic", {"attention": "auto"})
    if spec.keep_outputs:
        yield Change("outputs", "nothing", {"keep_outputs": False})
    if spec.upcasts:
        yield Change("upcast", "arithmetic", {"upcast_unquantized": False})


_PAGED = {
    "adamw_torch": "paged_adamw_32bit", "adamw_torch_fused": "paged_adamw_32bit", "adamw_bnb_8bit": "paged_adamw_8bit",
    "adamw_8bit": "paged_adamw_8bit", "lion_32bit": "paged_lion_32bit", "lion_8bit": "paged_lion_8bit",
    "ademamix": "paged_ademamix_32bit", "ademamix_8bit": "paged_ademamix_8bit",
}  # fmt: skip
_IN_8_BIT = {
    "adamw_torch": "adamw_bnb_8bit", "adamw_torch_fused": "adamw_bnb_8bit", "paged_adamw_32bit": "paged_adamw_8bit",
    "lion_32bit": "lion_8bit", "paged_lion_32bit": "paged_lion_8bit", "ademamix": "ademamix_8bit",
    "paged_ademamix_32bit": "paged_ademamix_8bit", "rmsprop_bnb": "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit": "rmsprop_bnb_8bit",
}  # fmt: skip


def _optimizers(spec: TrialSpec, device_type: DeviceType) -> Iterator[Change]:
    if spec.sharding != "none":
        return
    paged = _PAGED if device_type == "cuda" else {}  # a CPU has no other place
    small = _IN_8_BIT.get(spec.optimizer)
    if spec.optimizer in paged:
        # Torch's have their state in the type of the weights, bitsandbytes' in fp32.
        same = not spec.optimizer.startswith("adamw_torch") or _trains_in_fp32(spec)
        yield Change("optimizer", "nothing" if same else "arithmetic", {"optimizer": paged[spec.optimizer]})
    if small is not None:
        yield Change("optimizer", "arithmetic", {"optimizer": small})
        if small in paged:
            yield Change("optimizer", "arithmetic", {"optimizer": paged[small]})


def _trains_in_fp32(spec: TrialSpec) -> bool:
    adapter_in_fp32 = spec.adapter != "none" and spec.adapter_dtype == "fp32"
    return spec.precision == "fp32" or spec.precision.endswith("-mixed") or adapter_in_fp32


def _precisions(spec: TrialSpec, device_type: DeviceType) -> Iterator[Change]:
    if spec.precision in ("fp32", "bf16-mixed"):
        yield Change("precision", "arithmetic", {"precision": "bf16"})
    if spec.precision == "fp16-mixed":
        yield Change("precision", "arithmetic", {"precision": "fp16"})
    if spec.adapter == "none" or spec.sharding != "none" or spec.lora_bias != "none":
        return
    library = {} if spec.quantizer == "bitsandbytes" else {"quantizer": "bitsandbytes"}
    if spec.precision not in QUANTISED:
        yield Change("precision", "arithmetic", {"precision": "int8", **library})
    if spec.precision not in ("nf4", "fp4", "int4"):
        yield Change("precision", "arithmetic", {"precision": "nf4", **library})
    if not spec.double_quantization:
        changed = {} if spec.precision in ("nf4", "fp4") else {"precision": "nf4", **library}
        yield Change("precision", "arithmetic", {**changed, "double_quantization": True})


def _cards(spec: TrialSpec, device_type: DeviceType) -> Iterator[Change]:
    if device_type == "cpu":  # its processes divide one memory
        return
    if spec.num_processes > 1 or spec.precision in QUANTISED or spec.optimizer not in SHARDED_OPTIMIZERS:
        return
    for key in ("gradient_accumulation_steps", "micro_batch_size"):
        if getattr(spec, key) % 2 == 0:
            keys = {"num_processes": 2, "sharding": "full_shard", key: getattr(spec, key) // 2}
            yield Change("cards", "hardware", keys)
            return


def _adapters(spec: TrialSpec, device_type: DeviceType) -> Iterator[Change]:
    if spec.adapter == FULL:
        yield Change("adapter", "model", {"adapter": LORA})
    if spec.adapter != LORA:
        return
    if spec.adapter_dtype == "fp32" and spec.precision != "fp32":
        yield Change("adapter type", "arithmetic", {"adapter_dtype": "bf16"})
    if not spec.recompute_adapter_inputs and not spec.use_dora and (spec.lora_dropout or spec.autocasts):
        yield Change("adapter inputs", "nothing", {"recompute_adapter_inputs": True})
    for part in (2, 4):  # alpha / r, the scale, is kept
        if spec.lora_r % part == spec.lora_alpha % part == 0:
            yield Change("rank", "model", {"lora_r": spec.lora_r // part, "lora_alpha": spec.lora_alpha // part})


def _targets(spec: TrialSpec, attention: Sequence[str]) -> Iterator[Change]:
    if attention and spec.adapter == LORA and spec.lora_target_modules is None and spec.lora_target_linear:
        yield Change("targets", "model", {"lora_target_modules": list(attention), "lora_target_linear": False})


def _lengths(spec: TrialSpec, device_type: DeviceType) -> Iterator[Change]:
    evaluated = spec.eval_sequence_length
    for length in (spec.sequence_length // 2, spec.sequence_length // 4):
        if length >= 8:
            own = {} if evaluated is None else {"eval_sequence_length": min(evaluated, length)}
            yield Change("length", "model", {"sequence_length": length, **own})


_CHANGES: tuple[Callable[[TrialSpec, DeviceType], Iterator[Change]], ...] = (
    _micro_batches,
    _checkpointing,
    _losses,
    _outputs,
    _optimizers,
    _precisions,
    _cards,
    _adapters,
    _lengths,
)
"""What is tried; each yields the changes of a kind that apply to a spec."""


def changes_of(spec: TrialSpec, device_type: DeviceType, attention: Sequence[str] = ()) -> list[Change]:
    """The single changes that apply to a spec on a device.

    Args:
        spec: of the trial.
        device_type: device to train on.
        attention: names of the linear layers of its model's attention.
    """
    return [*(change for of_kind in _CHANGES for change in of_kind(spec, device_type)), *_targets(spec, attention)]


def proposals(
    spec: TrialSpec,
    now: Prediction,
    predict: Callable[[Sequence[TrialSpec]], Mapping[str, SpecPrediction]],
    verdict: Callable[[TrialSpec, Prediction], Verdict],
    seconds_per_token: Callable[[TrialSpec, Prediction], float],
    capacity: int,
    attention: Sequence[str] = (),
) -> tuple[list[Proposal], dict[str, str]]:
    """Changes with which a trial fits, cheapest first, and after them single changes with which it does not.

    Single changes are all predicted; combinations of a size only while nothing smaller fits without altering more than
    arithmetic, and of these the cheapest whose single savings together are about enough.

    Args:
        spec: of the trial.
        now: its prediction.
        predict: predictions of specs, by id.
        verdict: whether a spec fits.
        seconds_per_token: predicted or measured.
        capacity: bytes that the trial may take.
        attention: names of the linear layers of its model's attention.

    Returns:
        The proposals; and changes that could not be predicted, with why.
    """
    unpredicted: dict[str, str] = {}

    def made(candidates: Sequence[tuple[Change, ...]]) -> list[Proposal]:
        specs = {each: changed for each in candidates if (changed := _changed(spec, each)) is not None}
        predicted = predict(list(specs.values()))
        for each, changed in specs.items():
            if predicted[changed.id].prediction is None:
                unpredicted[_text(each)] = predicted[changed.id].error or ""
        return [
            Proposal(each, changed, p, verdict(changed, p), seconds_per_token(changed, p))
            for each, changed in specs.items()
            if (p := predicted[changed.id].prediction) is not None
        ]

    single = made([(change,) for change in changes_of(spec, now.device_type, attention)])
    saved = {each.changes[0]: now.needed_bytes - each.prediction.needed_bytes for each in single}
    slower = {each.changes[0]: each.seconds_per_token for each in single}
    useful = [change for change in saved if saved[change] > 0]
    every = list(single)
    for size in range(2, _MOST_CHANGES + 1):
        if any(each.verdict == "fits" and each.alters in ("nothing", "arithmetic") for each in every):
            break
        together = [
            each
            for each in itertools.combinations(useful, size)
            if len({change.kind for change in each}) == size
            and now.needed_bytes - sum(saved[change] for change in each) <= capacity / _SHORT
        ]
        together.sort(key=lambda each: (max(_ORDER.index(c.alters) for c in each), sum(slower[c] for c in each)))
        every += made(together[:_TRIED])
    enough = [set(each.changes) for each in every if each.verdict == "fits"]
    every = [each for each in every if not any(less < set(each.changes) for less in enough)]
    fitting = sorted((each for each in every if each.verdict == "fits"), key=lambda each: each.cost)
    others = sorted((each for each in every if each.verdict != "fits"), key=lambda each: each.prediction.needed_bytes)
    return fitting + others, unpredicted


def _changed(spec: TrialSpec, changes: Sequence[Change]) -> TrialSpec | None:
    """The spec with the changes; null where they cannot be trained together."""
    keys: dict[str, Any] = {}
    for change in changes:
        keys |= change.keys
    try:
        changed = TrialSpec.model_validate(spec.model_dump() | keys)
    except ValidationError:
        return None
    return None if capabilities.refusal(changed) else changed
