"""Which examples each optimizer step has, and which steps hold most memory."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import InputError
from harness.spec import length
from harness.spec.trial import TrialSpec
from harness.training.batches import Example

FRONT_STEPS = 2
"""First optimizer steps, which have the longest examples. Two: the optimizer's state exists from the second on."""

_GROUPED_STEPS = 50
"""Steps whose examples are sorted together: transformers (5.23), `get_length_grouped_indices`."""
TIMED_STEPS = 3
"""Different steps that a timing visit repeats."""


def optimizer_steps(spec: TrialSpec, examples: Sequence[Example]) -> list[list[Example]]:
    """The examples of each optimizer step of a spec, in the order of its micro-batches.

    Memory peaks in the second step, and running out of it shows there: the first two steps have the longest examples,
    and the last micro-batch of the second one, which finds gradients and optimizer state in memory, has the longest of
    them, padded wherever any example is shorter. Which examples a step has depends on the effective batch alone: they
    are the same for 4x1, 2x2 and 1x4.
    """
    sizes = length.step_sizes(spec, len(examples))
    order = _order(spec, examples, sum(sizes), grouped=spec.group_by_length)
    ends = itertools.accumulate(sizes)
    steps = [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    if len(steps) > 1:
        steps[1] = _widest_last(steps[1], spec)
    return steps


def check_schedules(spec: TrialSpec, examples: int) -> None:
    """Check that a spec has steps enough for its schedules: warm-up begins at a learning rate of 0, and AdaLoRA takes
    ranks away between its first steps and its last.

    Args:
        spec: what to train.
        examples: the distinct ones.

    Raises:
        InputError: there is one step, and it is the warm-up's first; or `polynomial` has no step left after warm-up; or
            AdaLoRA none; or an epoch has no step at all.
    """
    sizes = length.step_sizes(spec, examples)
    samples, steps = sum(sizes), len(sizes)
    options: dict[str, Any] = dict(spec.adapter_options or ()) if spec.adapter == "adalora" else {}
    first, last = options.get("tinit", 0), options.get("tfinal", 0)
    if first + last >= steps:
        raise InputError(
            f"adapter_options: tinit {first} and tfinal {last} leave no step of {steps} to take ranks away in; use "
            "smaller ones, or more steps"
        )
    warm_up = warm_up_steps(spec, steps)
    if not warm_up or spec.schedule == "constant":  # an optimizer's own warm-up begins above 0
        return
    key = "warmup_ratio" if spec.warmup_steps is None else "warmup_steps"
    given = f"{key} {getattr(spec, key):g} of {steps} optimizer step{'s' * (steps > 1)}"
    if spec.lr_scheduler == "polynomial" and warm_up >= steps:
        most = steps - 1 if key == "warmup_steps" else math.floor(100 * (steps - 1) / steps) / 100
        raise InputError(f"{given} leaves none to lr_scheduler polynomial; use {key}: {most:g} at most")
    if steps == 1:
        more = "max_steps: 2" if spec.max_steps is not None else f"train_samples: {spec.effective_batch_size + 1}"
        raise InputError(
            f"{given} ({samples} examples in effective batches of {spec.effective_batch_size}): its learning rate is "
            f"0; use {key}: 0, or {more} or more"
        )


def warm_up_steps(spec: TrialSpec, steps: int) -> int:
    """Over how many of its optimizer steps the learning rate of a spec rises."""
    return math.ceil(spec.warmup_ratio * steps) if spec.warmup_steps is None else spec.warmup_steps


def _order(spec: TrialSpec, examples: Sequence[Example], samples: int, *, grouped: bool) -> list[Example]:
    """The examples of all steps: where epochs end with a step, each of them is in an order of its own, and the longest
    ones come first in the first.
    """
    size = spec.effective_batch_size
    if spec.epoch_end == "continue":
        return training_order(examples, samples, size, spec.seed, grouped=grouped)
    of_epoch = length.examples_of_epoch(spec, len(examples))
    order: list[Example] = []
    for epoch in _epochs(examples, spec.seed):
        kept = epoch[: min(of_epoch, samples - len(order))]
        order += _arranged(kept, size, front=not order, grouped=grouped)
        if len(order) == samples:
            break
    return order


def _epochs(examples: Sequence[Example], seed: int) -> Iterator[list[Example]]:
    """Seeded shuffles of the examples, without end."""
    generator = random.Random(seed)
    while True:
        epoch = list(examples)
        generator.shuffle(epoch)
        yield epoch


def training_order(
    examples: Sequence[Example], samples: int, size: int, seed: int, *, grouped: bool = False
) -> list[Example]:
    """`samples` examples: epochs of a seeded shuffle, the longest moved into the first `FRONT_STEPS` steps.

    The longest of all lengths but one stand there too where the longest have all the same: a micro-batch of examples
    of one length is not padded, and a padded one holds more.

    Args:
        examples: the distinct ones.
        samples: how many are trained on.
        size: examples of an optimizer step.
        seed: of the shuffle.
        grouped: examples of similar length come together: after the first steps, of each `_GROUPED_STEPS` steps (or a
            quarter of all, if that is less) the longest ones first, as in transformers' Trainer.
    """
    shuffled = itertools.chain.from_iterable(_epochs(examples, seed))
    return _arranged(list(itertools.islice(shuffled, samples)), size, front=True, grouped=grouped)


def _arranged(order: list[Example], size: int, *, front: bool, grouped: bool) -> list[Example]:
    """Examples with the longest ones in the first steps, where `front` says so, and the others grouped by length."""
    by_length = sorted(range(len(order)), key=lambda i: len(order[i]), reverse=True)
    first = by_length[: FRONT_STEPS * size] if front else []
    shorter = next((i for i in by_length if len(order[i]) < len(order[by_length[0]])), None)
    if first and size > 1 and shorter is not None and shorter not in first:
        first[-1] = shorter
    moved = set(first)
    rest = [e for i, e in enumerate(order) if i not in moved]
    if grouped:
        together = size * max(1, min(len(rest) // (4 * size), _GROUPED_STEPS))
        starts = range(0, len(rest), together)
        rest = [e for start in starts for e in sorted(rest[start : start + together], key=len, reverse=True)]
    return [order[i] for i in first] + rest


def _widest_last(examples: list[Example], spec: TrialSpec) -> list[Example]:
    """A step's examples with the longest and the shortest in the last micro-batch of the first process; packed ones,
    which are never padded, with the longest.
    """
    count, size = len(examples), spec.micro_batch_size
    micro_batches = -(-count // size)
    last = (-(-micro_batches // spec.num_processes) - 1) * spec.num_processes
    width = min(size, count - last * size)
    longest_first = sorted(examples, key=len, reverse=True)
    if spec.sample_packing:
        return longest_first[width : width + last * size] + longest_first[:width] + longest_first[width + last * size :]
    wide = longest_first[: width - 1] + longest_first[-1:] if width > 1 else longest_first[:1]
    rest = longest_first[width - 1 : -1] if width > 1 else longest_first[1:]
    return rest[: last * size] + wide + rest[last * size :]


@dataclass(frozen=True)
class MicroBatchKind:
    """What the memory of a forward and backward pass depends on."""

    examples: int
    width: int
    """Tokens of its longest example; packed examples are one."""
    padded: bool
    """Whether the lengths differ, or several examples are packed: attention then needs a mask."""
    later: bool
    """Whether the gradients of an earlier micro-batch of the step are held meanwhile."""

    def holds_at_least(self, other: MicroBatchKind) -> bool:
        """Whether it surely holds as much as the other, which is no larger in anything."""
        return (
            self.padded == other.padded
            and self.examples >= other.examples
            and self.width >= other.width
            and self.later >= other.later
        )


def timed_steps(spec: TrialSpec, examples: Sequence[Example]) -> list[list[Example]]:
    """The steps that a timing visit repeats: their examples stand for all lengths that are trained on.

    Speeds of two specs are compared: with the same lengths in the timed steps of both, accumulation, micro-batch and
    sequence length are not confounded with how long the timed examples happen to be. Together the steps have the
    (k + 1/2) / n quantiles of the lengths, k = 0 … n − 1, each step an equal spread of them. Where examples of similar
    length are trained on together, they are in one step, and next to each other in it; with few examples in a step
    they are less alike than in training, so that the gain is rather larger there.
    """
    sizes = length.step_sizes(spec, len(examples))
    size = min(spec.effective_batch_size, max(sizes))  # no larger than the steps that are trained
    by_length = sorted(_order(spec, examples, sum(sizes), grouped=False), key=len)
    steps = []
    for number in range(TIMED_STEPS):
        quantiles = [(i + (number + 0.5) / TIMED_STEPS) / size for i in range(size)]
        step = [by_length[int(quantile * len(by_length))] for quantile in quantiles]
        random.Random(number).shuffle(step)  # micro-batches of sorted examples would have hardly any padding
        steps.append(step)
    if spec.group_by_length:
        longest_first = sorted((example for step in steps for example in step), key=len, reverse=True)
        return [longest_first[start : start + size] for start in range(0, len(longest_first), size)]
    return steps


def kinds(step: Sequence[Example], spec: TrialSpec) -> list[MicroBatchKind]:
    """The kind of each micro-batch of a step, over all processes."""
    step_kinds = []
    for number, start in enumerate(range(0, len(step), spec.micro_batch_size)):
        lengths = [len(example) for example in step[start : start + spec.micro_batch_size]]
        later = number >= spec.num_processes
        if spec.sample_packing:
            step_kinds.append(MicroBatchKind(1, sum(lengths), len(lengths) > 1, later))
            continue
        width = spec.sequence_length if spec.pad_to_sequence_len else max(lengths)
        step_kinds.append(MicroBatchKind(len(lengths), width, min(lengths) < width, later))
    return step_kinds


def heaviest(occurring: Iterable[MicroBatchKind]) -> list[MicroBatchKind]:
    """The kinds of which no other surely holds as much: one of them holds most."""
    largest: list[MicroBatchKind] = []
    for kind in dict.fromkeys(occurring):
        if not any(each.holds_at_least(kind) for each in largest):
            largest = [each for each in largest if not kind.holds_at_least(each)] + [kind]
    return largest


def heaviest_steps(steps: Sequence[Sequence[Example]], spec: TrialSpec) -> list[int]:
    """Numbers, from 0, of steps of which one holds most memory: the first, the second, and one for each heaviest kind
    of micro-batch that neither the second nor an earlier one of these has.
    """
    of_step = [kinds(step, spec) for step in steps]
    chosen = list(range(min(FRONT_STEPS, len(steps))))
    for kind in heaviest(kind for each in of_step[1:] for kind in each):
        if not any(kind in of_step[number] for number in chosen[1:]):
            chosen.append(next(n for n, each in enumerate(of_step) if n > 0 and kind in each))
    return sorted(chosen)
