"""The largest value of a key with which a trial fits, by bisection over predictions."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

from harness.launch.planner import Planned, Planner
from harness.prediction import HERE, DeviceType, Prediction, room_of_each
from harness.spec import TrialSpec
from harness.wording import unknown

MOST = {"micro_batch_size": 4096, "sequence_length": 131_072, "lora_r": 4096}
"""Keys that can be asked for, and where the search ends."""

_ANY = 8
"""A value that every key may have."""

NO_EFFECT = "the key changes nothing here"
"""What is said of the rank of a trial without adapters."""


@dataclass(frozen=True)
class Largest:
    """What was found for one trial and one amount of memory."""

    value: int | None
    """Null: not even 1 fits."""
    need: int | None
    """Predicted bytes at that value, the margin included."""
    error: str | None = None
    """Why there is no answer."""


def largest(
    planner: Planner,
    specs: Sequence[TrialSpec],
    key: str,
    rooms: Mapping[str, int],
    need: Callable[[Prediction], int],
    device_type: DeviceType,
    progress: Callable[[int], None] = lambda answered: None,
) -> dict[tuple[str, str], Largest]:
    """For each spec and each amount of memory, the largest value of a key that fits.

    Every example is taken to fill the sequence, and every micro-batch to be full, whatever the stories are.

    Args:
        planner: made with `full_length`.
        specs: the trials.
        key: one of `MOST`.
        rooms: bytes by name.
        need: bytes that a prediction asks for, with its margin.
        device_type: where they would be trained.
        progress: told after each round how many answers there are.

    Returns:
        By spec id and name of the room.

    Raises:
        ValueError: a key that cannot be asked for.
    """

    def room_of(spec: TrialSpec, name: str) -> int:
        return room_of_each(rooms[name], spec, device_type) if name == HERE else rooms[name]

    effective = [spec for spec in specs if _with(spec, key, _ANY).id != _with(spec, key, 2 * _ANY).id]
    found = {(spec.id, name): Largest(None, None, NO_EFFECT) for spec in specs for name in rooms}
    searches = {
        (spec.id, name): (spec, _search(getattr(spec, key), room_of(spec, name), MOST[key]))
        for spec in effective
        for name in rooms
    }
    asked = {place: next(search) for place, (_, search) in searches.items()}
    while asked:
        wanted = {
            (searches[place][0].id, value): _with(searches[place][0], key, value) for place, value in asked.items()
        }
        planned: dict[str, Planned] = {p.spec.id: p for p in planner.plan(wanted.values())}
        for place, value in list(asked.items()):
            answer = planned[wanted[place[0], value].id]
            if answer.prediction is None:
                found[place] = Largest(None, None, answer.error)
                del asked[place]
                continue
            try:
                asked[place] = searches[place][1].send(need(answer.prediction))
            except StopIteration as end:
                found[place] = Largest(*end.value)
                del asked[place]
        progress(len(found) - len(asked))
    return found


def apart(specs: Mapping[str, TrialSpec], key: str) -> dict[str, TrialSpec]:
    """Of specs by label, the first of each that differ in more than this key."""
    seen: dict[str, str] = {}
    for label, spec in specs.items():
        seen.setdefault(_with(spec, key, _ANY).id, label)
    return {label: specs[label] for label in seen.values()}


def _with(spec: TrialSpec, key: str, value: int) -> TrialSpec:
    """The spec with another value, trained for long enough that its micro-batches are full."""
    if key not in MOST:
        raise ValueError(unknown("key", key, MOST))
    changed = {key: value, "train_samples": None, "num_epochs": None, "max_steps": 2}
    if key == "sequence_length":
        changed["eval_sequence_length"] = None
    return TrialSpec.model_validate(spec.model_dump() | changed)


def _search(start: int, room: int, most: int) -> Generator[int, int, tuple[int | None, int | None]]:
    """Yields values, is sent their needs, returns the largest that fits and its need.

    Needs grow with the value and nearly in proportion: a line through two of them points at the answer, and the
    middle is taken after a line that did not halve what is left.
    """
    low: tuple[int, int] | None = None
    high: tuple[int, int] | None = None
    value, left = min(start, most), 2 * most
    while True:
        need = yield value
        former = low
        if need <= room:
            low = value, need
        else:
            high = value, need
        floor, ceiling = (low[0] if low else 0), (high[0] if high else most + 1)
        if ceiling - floor <= 1:
            return low or (None, None)
        pointed = (floor + ceiling) // 2
        if low and high is None:
            pointed = _ahead(former, low, room) if former else 2 * low[0]
        elif low and high and ceiling - floor <= left // 2:
            pointed = _ahead(low, high, room)
        value, left = min(max(pointed, floor + 1), ceiling - 1), ceiling - floor


def _ahead(a: tuple[int, int], b: tuple[int, int], room: int) -> int:
    """Where the line through two needs reaches the room."""
    slope = (b[1] - a[1]) / (b[0] - a[0])
    return a[0] + int((room - a[1]) / slope) if slope > 0 else 2**62
