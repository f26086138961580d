"""The largest value of a key with which a trial fits, by a search over predictions."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

from harness._util.messages import unknown
from harness.environment import DeviceType
from harness.predict.prediction import LOCAL_MACHINE, Prediction, capacity_per_process
from harness.predict.predictor import Predictor
from harness.spec.trial import TrialSpec

UPPER_BOUNDS = {"micro_batch_size": 4096, "sequence_length": 131_072, "lora_r": 4096}
"""Keys that can be searched, and the largest value tried of each."""
_ANY_VALUE = 8
"""A value that is valid for every key."""
NO_EFFECT = "the key changes nothing here"
"""Error for a key without effect, like the rank of a trial without adapters."""


@dataclass(frozen=True)
class Largest:
    """The answer for one trial and one capacity."""

    value: int | None
    """Null: not even 1 fits."""
    need: int | None
    """Predicted bytes at that value, with the margin."""
    error: str | None = None
    """Why there is no answer."""


def largest(
    predictor: Predictor,
    specs: Sequence[TrialSpec],
    key: str,
    capacities: Mapping[str, int],
    need: Callable[[Prediction], int],
    device_type: DeviceType,
    on_progress: Callable[[int], None] = lambda answered: None,
) -> dict[tuple[str, str], Largest]:
    """For each spec and each capacity, the largest value of a key that fits.

    Every example fills the sequence and every micro-batch is full, whatever the stories are.

    Args:
        predictor: made with `full_length`.
        specs: of the trials.
        key: one of `UPPER_BOUNDS`.
        capacities: bytes by name.
        need: bytes that a prediction needs, with the margin.
        device_type: device to train on.
        on_progress: called after each round with the number of answers so far.

    Returns:
        By spec id and name of the capacity.

    Raises:
        ValueError: a key that cannot be searched.
    """

    def process_capacity(spec: TrialSpec, name: str) -> int:
        capacity = capacities[name]
        return capacity_per_process(capacity, spec, device_type) if name == LOCAL_MACHINE else capacity

    effective = [spec for spec in specs if _with(spec, key, _ANY_VALUE).id != _with(spec, key, 2 * _ANY_VALUE).id]
    answers = {(spec.id, name): Largest(None, None, NO_EFFECT) for spec in specs for name in capacities}
    searches = {
        (spec.id, name): (spec, _search(getattr(spec, key), process_capacity(spec, name), UPPER_BOUNDS[key]))
        for spec in effective
        for name in capacities
    }
    open_values = {pair: next(search) for pair, (_, search) in searches.items()}
    while open_values:
        candidates = {pair: _with(searches[pair][0], key, value) for pair, value in open_values.items()}
        distinct = {spec.id: spec for spec in candidates.values()}
        predicted = {p.spec.id: p for p in predictor.predict(distinct.values())}
        for pair, candidate in candidates.items():
            result = predicted[candidate.id]
            if result.prediction is None:
                answers[pair] = Largest(None, None, result.error)
                del open_values[pair]
                continue
            try:
                open_values[pair] = searches[pair][1].send(need(result.prediction))
            except StopIteration as end:
                answers[pair] = Largest(*end.value)
                del open_values[pair]
        on_progress(len(answers) - len(open_values))
    return answers


def distinct_specs(specs: Mapping[str, TrialSpec], key: str) -> dict[str, TrialSpec]:
    """Specs by label without those that differ from an earlier one in this key alone.

    Raises:
        ValueError: a key that cannot be searched.
    """
    labels: dict[str, str] = {}
    for label, spec in specs.items():
        labels.setdefault(_with(spec, key, _ANY_VALUE).id, label)
    return {label: specs[label] for label in labels.values()}


def _with(spec: TrialSpec, key: str, value: int) -> TrialSpec:
    """The spec with another value, and steps enough that its micro-batches are full."""
    if key not in UPPER_BOUNDS:
        raise ValueError(unknown("key", key, UPPER_BOUNDS))
    changed = {key: value, "train_samples": None, "num_epochs": None, "max_steps": 2}
    if key == "sequence_length":
        changed["eval_sequence_length"] = None
    return TrialSpec.model_validate(spec.model_dump() | changed)


def _search(start: int, capacity: int, most: int) -> Generator[int, int, tuple[int | None, int | None]]:
    """Yields values, is sent their needs, returns the largest value that fits and its need.

    Needs grow almost linearly with the value. The next value is therefore interpolated linearly (regula falsi), or the
    midpoint where the last interval was not halved.
    """
    low: tuple[int, int] | None = None
    high: tuple[int, int] | None = None
    value, width = min(start, most), 2 * most
    while True:
        need = yield value
        previous_low = low
        if need <= capacity:
            low = value, need
        else:
            high = value, need
        floor, ceiling = (low[0] if low else 0), (high[0] if high else most + 1)
        if ceiling - floor <= 1:
            return low or (None, None)
        following = (floor + ceiling) // 2
        if low and high is None:
            following = _interpolate(previous_low, low, capacity) if previous_low else 2 * low[0]
        elif low and high and ceiling - floor <= width // 2:
            following = _interpolate(low, high, capacity)
        value, width = min(max(following, floor + 1), ceiling - 1), ceiling - floor


def _interpolate(a: tuple[int, int], b: tuple[int, int], capacity: int) -> int:
    """Value at which the line through two (value, need) reaches the capacity."""
    slope = (b[1] - a[1]) / (b[0] - a[0])
    return a[0] + int((capacity - a[1]) / slope) if slope > 0 else 2**62
