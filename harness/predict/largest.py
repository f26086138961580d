"""The largest value of a key with which a trial fits, by a search over predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from harness._util.messages import explain, unknown
from harness.errors import InputError
from harness.predict.cards import Capability
from harness.predict.prediction import Prediction, SpecPrediction
from harness.predict.predictor import Predictor
from harness.spec.trial import TrialSpec

UPPER_BOUNDS = {"micro_batch_size": 4096, "sequence_length": 131_072, "lora_r": 4096}
"""Keys that can be searched, and the largest value tried of each."""
_STEPS = (1, 2, 4, 8)
"""What a key's values may have to be multiples of: some initialisations take even ranks alone."""
_ANY_VALUE = 8
"""A value that is valid for every key, and so are its multiples."""
NO_EFFECT = "the key changes nothing here"
"""Error for a key without effect, like the rank of a trial without adapters."""


@dataclass(frozen=True)
class Largest:
    """The answer for one trial and one capacity."""

    value: int | None
    """Null: not even the least one fits."""
    need: int | None
    """Predicted bytes at that value, with the margin."""
    error: str | None = None
    """Why there is no answer."""
    limit: str | None = None
    """Why no larger value can be trained, where memory is not the reason."""
    least: int = 1
    """The smallest value that a spec may have."""


def largest(
    predictor: Predictor,
    specs: Sequence[TrialSpec],
    key: str,
    capabilities: Mapping[str, Capability],
    capacity_of: Callable[[TrialSpec, str], int],
    need: Callable[[Prediction], int],
    on_progress: Callable[[int], None] = lambda answered: None,
) -> dict[tuple[str, str], Largest]:
    """For each spec and each capacity, the largest value of a key that fits.

    Every example fills the sequence and every micro-batch is full, whatever the stories are.

    Args:
        predictor: made with `full_length`.
        specs: of the trials.
        key: one of `UPPER_BOUNDS`.
        capabilities: compute capability of the device, by the name of each capacity.
        capacity_of: bytes that a process of a spec may take of a named capacity.
        need: bytes that a prediction needs, with the margin.
        on_progress: called after each round with the number of answers so far.

    Returns:
        By spec id and name of the capacity.

    Raises:
        InputError: a key that cannot be searched.
    """
    answers = {(spec.id, name): Largest(None, None, NO_EFFECT) for spec in specs for name in capabilities}
    searches: dict[tuple[str, str], _OneSearch] = {}
    for spec in specs:
        if _with(spec, key, _ANY_VALUE).id == _with(spec, key, 2 * _ANY_VALUE).id:
            continue
        step = _step(spec, key)
        for name in capabilities:
            least, most = -(-_least(key) // step), UPPER_BOUNDS[key] // step
            search = _search(getattr(spec, key) // step, capacity_of(spec, name), least, most)
            searches[spec.id, name] = _OneSearch(spec, step, least, search, next(search))
    open_pairs = dict(searches)
    while open_pairs:
        candidates = {pair: _with(each.spec, key, each.step * each.value) for pair, each in open_pairs.items()}
        predicted = _predict(predictor, candidates, capabilities)
        for pair, each in list(open_pairs.items()):
            result = predicted[candidates[pair].id, capabilities[pair[1]]]
            if result.prediction is None:
                each.refused = result.error
            try:
                each.value = each.search.send(math.inf if result.prediction is None else need(result.prediction))
            except StopIteration as end:
                answers[pair] = each.answer(*end.value)
                del open_pairs[pair]
        on_progress(len(answers) - len(open_pairs))
    return answers


@dataclass
class _OneSearch:
    """The search for one spec and one capacity, in multiples of `step`."""

    spec: TrialSpec
    step: int
    least: int
    search: Generator[int, float, tuple[int | None, int | None, bool]]
    value: int
    """What is tried next."""
    refused: str | None = None
    """Why the last of those that cannot be trained or predicted cannot be."""

    def answer(self, value: int | None, need: int | None, limited: bool) -> Largest:
        """What came out: the next value is too large for memory, or is refused."""
        if value is None:
            return Largest(None, None, self.refused if limited else None, least=self.step * self.least)
        return Largest(self.step * value, need, limit=self.refused if limited else None)


def _predict(
    predictor: Predictor, candidates: Mapping[tuple[str, str], TrialSpec], capabilities: Mapping[str, Capability]
) -> dict[tuple[str, Capability], SpecPrediction]:
    """Predictions by spec id and compute capability."""
    predicted: dict[tuple[str, Capability], SpecPrediction] = {}
    for capability in dict.fromkeys(capabilities.values()):
        distinct = {spec.id: spec for (_, name), spec in candidates.items() if capabilities[name] == capability}
        predicted |= {(p.spec.id, capability): p for p in predictor.predict(distinct.values(), capability)}
    return predicted


def distinct_specs(specs: Mapping[str, TrialSpec], key: str) -> dict[str, TrialSpec]:
    """Specs by label without those that differ from an earlier one in this key alone.

    Raises:
        InputError: a key that cannot be searched.
    """
    labels: dict[str, str] = {}
    for label, spec in specs.items():
        labels.setdefault(_with(spec, key, _ANY_VALUE).id, label)
    return {label: specs[label] for label in labels.values()}


def _with(spec: TrialSpec, key: str, value: int) -> TrialSpec:
    """The spec with another value, and steps enough that its micro-batches are full."""
    if key not in UPPER_BOUNDS:
        raise InputError(unknown("key", key, UPPER_BOUNDS))
    length = {"train_samples": None, "num_epochs": None, "max_steps": 2}
    changed = {key: value, **length, "epoch_end": "continue", "max_steps_per_epoch": None}
    if key == "sequence_length":
        changed["eval_sequence_length"] = None
    try:
        return TrialSpec.model_validate(spec.model_dump() | changed)
    except ValidationError as error:
        raise InputError(explain(error, TrialSpec)) from None


def _least(key: str) -> int:
    """The smallest value that a key may have."""
    return int(TrialSpec.model_json_schema()["properties"][key]["minimum"])


def _step(spec: TrialSpec, key: str) -> int:
    """What all values of the key are multiples of, so that the spec is valid."""
    for step in _STEPS:
        try:
            for odd in (9, 11, 13):
                _with(spec, key, odd * step)
        except InputError:
            continue
        return step
    return _ANY_VALUE


def _search(
    start: int, capacity: int, least: int, most: int
) -> Generator[int, float, tuple[int | None, int | None, bool]]:
    """Yields values from `least` to `most`, is sent their needs, returns the largest value that fits, its need, and
    whether it is refusals that limit it.

    Needs grow almost linearly with the value. The next value is therefore interpolated linearly (regula falsi), or the
    midpoint where the last interval was not halved. The need of a value that is refused is infinite.
    """
    low: tuple[int, float] | None = None
    high: tuple[int, float] | None = None
    value, width = min(max(start, least), most), 2 * most
    while True:
        need = yield value
        previous_low = low
        if need <= capacity:
            low = value, need
        else:
            high = value, need
        floor, ceiling = (low[0] if low else least - 1), (high[0] if high else most + 1)
        limited = high is not None and high[1] == math.inf
        if ceiling - floor <= 1:
            return (low[0], int(low[1]), limited) if low else (None, None, limited)
        following = (floor + ceiling) // 2
        if limited and low is None:
            following = least  # where that is refused too, the value is not the reason
        elif low and high is None:
            following = _interpolate(previous_low, low, capacity) if previous_low else 2 * low[0]
        elif low and high and not limited and ceiling - floor <= width // 2:
            following = _interpolate(low, high, capacity)
        value, width = min(max(following, floor + 1), ceiling - 1), ceiling - floor


def _interpolate(a: tuple[int, float], b: tuple[int, float], capacity: int) -> int:
    """Value at which the line through two (value, need) reaches the capacity."""
    slope = (b[1] - a[1]) / (b[0] - a[0])
    return a[0] + int((capacity - a[1]) / slope) if slope > 0 else 2**62
