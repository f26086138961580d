"""How long a training is: its optimizer steps, and how many examples each of them has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from harness.errors import InputError
from harness.spec.trial import TrialSpec


@dataclass(frozen=True)
class _Epoch:
    """One pass over the examples, or over as many as it has room for."""

    examples: int
    steps: int
    """Optimizer steps that end in it."""
    left: int
    """Examples that are left after them, for the first step of the next pass."""


def step_sizes(spec: TrialSpec, available: int) -> list[int]:
    """Examples of each optimizer step.

    Args:
        spec: what to train.
        available: the distinct examples.

    Raises:
        InputError: the examples of an epoch make no step.
    """
    size = spec.effective_batch_size
    if spec.epoch_end == "continue":
        samples = spec.train_samples
        if samples is None and spec.max_steps is None:
            samples = max(1, round((spec.num_epochs or 1.0) * available))
        return [size] * (spec.max_steps or 0) if samples is None else _until(samples, itertools.repeat(size))
    epoch = _epoch(spec, available)
    sizes = _of_epochs(epoch, size)
    if spec.train_samples is not None:
        return _until(spec.train_samples, sizes)
    return list(itertools.islice(sizes, spec.max_steps or math.ceil((spec.num_epochs or 1.0) * epoch.steps)))


def examples_of_epoch(spec: TrialSpec, available: int) -> int:
    """How many of the distinct examples a pass has: all, or those that `max_steps_per_epoch` leaves room for.

    Raises:
        InputError: the examples of an epoch make no step.
    """
    return available if spec.epoch_end == "continue" else _epoch(spec, available).examples


def _epoch(spec: TrialSpec, available: int) -> _Epoch:
    size, most = spec.effective_batch_size, spec.max_steps_per_epoch
    steps = math.ceil(available / size) if spec.epoch_end == "step" else available // size
    if not steps:
        raise InputError(
            f"epoch_end {spec.epoch_end}: {available} examples make no optimizer step of {size}; use a smaller "
            "micro_batch_size or gradient_accumulation_steps, or epoch_end: step"
        )
    if most is not None and most < steps:
        return _Epoch(most * size, most, 0)
    return _Epoch(available, steps, max(0, available - steps * size))


def _of_epochs(epoch: _Epoch, size: int) -> Iterator[int]:
    """Sizes of the steps of one epoch after another, without end."""
    own = epoch.examples - epoch.left
    sizes = [min(size, own - start) for start in range(0, own, size)]
    yield from sizes
    while True:
        yield sizes[0] + epoch.left
        yield from sizes[1:]


def _until(samples: int, sizes: Iterable[int]) -> list[int]:
    """The first of these sizes that have so many samples together; the last one may be cut."""
    taken = list[int]()
    for size in sizes:
        if samples <= 0:
            break
        taken.append(min(size, samples))
        samples -= size
    return taken
