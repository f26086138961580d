"""What a replayed step allocates and releases, in order. Its peak follows from it, and what an allocator reserves."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.metrics import COMPONENTS
from harness.predict.allocator import Event
from harness.record import Phase

_COPY = -(1 << 60)
"""Key of the first entry of a copied trace; those after it have lower ones."""


Entry = tuple[Literal["allocate", "release", "adopt", "enter"], int, int, str]
"""One thing that happens in a step: its kind, the key of a storage, its size in bytes where it is allocated, and a
label: the component of what is allocated, or adopted by another component; the phase that is entered.

A plain tuple: of the hundred thousand that a prediction makes, each would take five times as long with names."""


@dataclass(frozen=True)
class Peak:
    """Highest sum of live storage over a trace."""

    size: int
    breakdown: dict[str, int]
    """That sum by component."""
    phases: dict[Phase, int]
    """Highest sum within each phase that is entered."""


class Live:
    """Live storage as traces go on, one after another."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[int, str]] = {}
        self._components: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
        self._total = 0

    def run(self, trace: Iterable[Entry]) -> Peak:
        """Follow a trace; its peak is at least what is live before it, and so is that of each phase it enters.

        Raises:
            KeyError: it releases what is not live.
        """
        storages, components, total = self._storages, self._components, self._total
        peak, breakdown = total, dict(components)
        phases: dict[str, int] = {}
        phase: str | None = None
        for kind, key, size, label in trace:
            if kind == "allocate":
                storages[key] = size, label
                components[label] += size
                total += size
                if total > peak:
                    peak, breakdown = total, dict(components)
                if phase is not None and total > phases[phase]:
                    phases[phase] = total
            elif kind == "release":
                size, label = storages.pop(key)
                components[label] -= size
                total -= size
            elif kind == "adopt":
                size, previous = storages[key]
                storages[key] = size, label
                components[previous] -= size
                components[label] += size
            else:
                phase = label
                phases[phase] = max(phases.get(phase, 0), total)
        self._total = total
        return Peak(peak, breakdown, phases)  # type: ignore[arg-type]  # labels of entered phases are phases


def requests(trace: Iterable[Entry]) -> list[Event]:
    """What an allocator is asked for."""
    return [(key, size) for kind, key, size, _ in trace if kind in ("allocate", "release")]


def as_first_step(trace: Sequence[Entry], lasting: Collection[int]) -> list[Entry]:
    """The trace of a step's micro-batches as of another step, which ends with the release of what it holds.

    Args:
        trace: of the micro-batches.
        lasting: keys of what is held to the end of the training.
    """
    copied, held = list[Entry](), dict[int, int]()
    for number, entry in enumerate(trace):
        kind, key, size, label = entry
        if kind == "enter" or key in lasting:
            copied.append(entry)
            continue
        if kind == "allocate":
            held[key] = _COPY - number
        if key in held:
            copied.append((kind, held[key], size, label))
        if kind == "release":
            held.pop(key, None)
    return copied + [("release", key, 0, "") for key in held.values()]


def as_later_update(trace: Sequence[Entry], gradients: dict[int, int]) -> list[Entry]:
    """The trace of an optimizer's first update as of a later one, which finds what the first one left behind.

    Args:
        trace: of the first update.
        gradients: keys of the later one's gradients by those of the first one's.
    """
    left = set[int]()
    for kind, key, _, _ in trace:
        if kind == "allocate":
            left.add(key)
        elif kind == "release":
            left.discard(key)
    return [(kind, gradients.get(key, key), size, label) for kind, key, size, label in trace if key not in left]
