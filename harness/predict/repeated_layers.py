"""Replays few of a model's equal layers, and has the trace of one of them stand for the others.

Of a run of equal layers the first two and the last two are replayed, and one between them for all that are between
them. Layers next to it are equal, so that what it takes from the one before and hands to the one behind is known by
place: the n-th storage that one layer allocates is the n-th of every other. 16-bit copies of weights, which autocast
keeps, are released with those of the layer that was replayed. Where the traces of the three in the middle differ, or
something else of a layer outlives its passes, all layers have to be replayed.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from harness.predict.replay import Replay
from harness.predict.trace import Entry

_REPLAYED = 5
"""Units of layers that are replayed."""
_LONGEST_UNIT = 8
"""Layers after which a model's kinds of layers repeat: Gemma 3 has 6."""
_POSITION = re.compile(r"(^|_)(idx|index|id|number)$")
"""Names of attributes that say which layer of the model it is."""


class Irregular(Exception):
    """Layers that look equal are not replayed alike."""


@dataclass(frozen=True)
class _Run:
    """Equal units of layers, one after another: `layers[first : first + units * length]`."""

    layers: Sequence[torch.nn.Module]
    first: int
    length: int
    """Layers of a unit."""
    units: int

    def unit(self, number: int) -> Sequence[torch.nn.Module]:
        """The layers of a unit; negative numbers count from the last one."""
        start = self.first + number % self.units * self.length
        return self.layers[start : start + self.length]

    @property
    def skipped(self) -> list[Sequence[torch.nn.Module]]:
        """The units that another one stands for."""
        return [self.unit(number) for number in range(3, self.units - 2)]


@dataclass
class _Marks:
    """Where in the trace forward and backward passes of units begin, and the work until there.

    Units are the second, the third (which stands for others) and the last two.
    """

    forward: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)
    """Where the pass of the last unit ends, and so on to where that of the second one ends."""
    work: list[Counter[Any]] = field(default_factory=list)
    """At each of those places, in their order."""


class RepeatedLayers:
    """The longest run of equal layers of a model, if it has one.

    Args:
        network: on fake weights, with adapters.
        tracker: of its replay.
    """

    def __init__(self, network: Any, tracker: Replay) -> None:
        self._tracker = tracker
        runs = [run for layers in _outermost_lists(network) if (run := _longest_run(layers, network)) is not None]
        self._run = max(runs, key=lambda run: len(run.skipped) * run.length, default=None)
        units = [self._run.unit(2), *self._run.skipped] if self._run else []
        self._trained = [[p for layer in unit for p in layer.parameters() if p.requires_grad] for unit in units]
        """Trained parameters of the unit that stands for others, and of these."""

    @contextlib.contextmanager
    def replayed_once(self) -> Iterator[None]:
        """Within, a forward pass (and a backward pass) skips layers; afterwards the trace and the work have them, and
        their parameters have gradients.

        Raises:
            Irregular: the trace of one layer does not stand for that of others.
        """
        run = self._run
        if run is None:
            yield
            return
        marks = _Marks()
        start = len(self._tracker.trace)
        with ExitStack() as stack:
            for unit in (run.unit(1), run.unit(2), run.unit(-2), run.unit(-1)):
                hook = unit[0].register_forward_pre_hook(self._mark(marks), with_kwargs=True)
                stack.callback(hook.remove)
            following = list[tuple[Any, ...] | None]()
            # What a layer returns behind its hidden states; null: these alone.
            hook = run.unit(2)[-1].register_forward_hook(lambda module, args, output: following.append(_rest(output)))
            stack.callback(hook.remove)
            for layer in (layer for unit in run.skipped for layer in unit):
                stack.enter_context(mock.patch.object(layer, "forward", _hand_on(following)))
                if getattr(layer, "gradient_checkpointing", False):
                    stack.enter_context(mock.patch.object(layer, "gradient_checkpointing", False))
            yield
        if marks.forward:  # else of a part that text does not reach, as of images
            trace = self._tracker.trace
            copies = {self._tracker.rounded(2 * p.numel()) for layer in run.unit(2) for p in layer.parameters()}
            expansion = _Expansion(trace, start, marks, self._gradients(), copies, self._tracker.new_key)
            trace[start:] = expansion.entries()
            self._repeat_work(marks, len(run.skipped))

    def _mark(self, marks: _Marks) -> Callable[..., None]:
        def begin(module: Any, args: Any, kwargs: Any) -> None:
            if self._tracker.phase == "backward":  # its pass is recomputed
                return
            self._place(marks, marks.forward)
            hidden = args[0] if args else kwargs.get("hidden_states")
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda gradient: self._place(marks, marks.backward))

        return begin

    def _place(self, marks: _Marks, places: list[int]) -> None:
        places.append(len(self._tracker.trace))
        marks.work.append(Counter(self._tracker.work))

    def _gradients(self) -> list[dict[int, int]]:
        """For each skipped unit: the keys of its new gradients by those of the unit that stands for it."""
        key_of = self._tracker.key_of
        parameters, *others = self._trained
        by_unit = []
        with self._tracker.unrecorded():
            for trained in others:
                keys = {}
                for own, other in zip(trained, parameters, strict=True):
                    if own.grad is None and other.grad is not None:
                        own.grad = self._tracker.empty_like(other.grad)
                        self._tracker.adopt([own.grad], "gradients")
                        keys[key_of(other.grad)] = key_of(own.grad)
                by_unit.append(keys)
        return by_unit

    def _repeat_work(self, marks: _Marks, times: int) -> None:
        forward, backward = marks.work[:4], marks.work[4:]
        of_unit = forward[2] - forward[1]
        if backward:
            of_unit += backward[2] - backward[1]
        for work, calls in of_unit.items():
            self._tracker.work[work] += times * calls


class _Expansion:
    """The trace of all units, from that of those which were replayed.

    Unit by unit, the third stands for the skipped ones and, as the deepest, for itself: behind it comes the last but
    one.

    Args:
        trace: of the replay.
        start: where that of the step begins.
        marks: of units in it.
        gradients: for each skipped unit: the keys of its new gradients by those of the third one.
        copies: sizes of 16-bit copies of weights.
        new_key: makes a key for a storage.

    Raises:
        Irregular: of a unit that is not like the others.
    """

    def __init__(
        self,
        trace: Sequence[Entry],
        start: int,
        marks: _Marks,
        gradients: Sequence[dict[int, int]],
        copies: set[int],
        new_key: Callable[[], int],
    ) -> None:
        if len(marks.forward) != 4 or len(marks.backward) not in (0, 4):
            raise Irregular
        self._trace, self._start = trace, start
        self._forward, self._backward = marks.forward, marks.backward or [len(trace)] * 4
        self._before, self._own = self._keys(self._forward)[:2]
        self._after, self._own_backward = self._keys(self._backward)[:2]
        self._held = [[new_key() for _ in self._own] for _ in gradients] + [self._own]
        """Keys of the forward pass by unit, the deepest last."""
        self._made = [[keys.get(key) or new_key() for key in self._own_backward] for keys in gradients]
        """Keys of the backward pass."""
        self._made.append(self._own_backward)
        self._gradients = {key for keys in gradients for key in (*keys, *keys.values())}
        self._copies = copies

    def _keys(self, marks: Sequence[int]) -> list[list[int]]:
        """Keys of what each unit allocates between its mark and the next one."""
        units = [
            [entry for entry in self._trace[begin:end] if entry[0] == "allocate" and entry[1]]
            for begin, end in itertools.pairwise(marks)
        ]
        if any([entry[2:] for entry in unit] != [entry[2:] for entry in units[0]] for unit in units):
            raise Irregular
        return [[key for _, key, _, _ in unit] for unit in units]

    def entries(self) -> list[Entry]:
        """The trace of the step."""
        trace, (_, begin, end, _), (_, returned, passed, _) = self._trace, self._forward, self._backward
        deepest = len(self._held) - 1
        entries = [*trace[self._start : begin]]
        for number in range(deepest + 1):
            entries += _renamed(trace[begin:end], self._names(number))
        entries += trace[end:returned]
        for number in range(deepest, -1, -1):
            behind = self._made[number + 1] if number < deepest else self._after
            names = dict(zip(self._after, behind, strict=True))
            names |= dict(zip(self._own_backward, self._made[number], strict=True))
            entries += _renamed(trace[returned:passed], self._names(number) | names)
        handed_on = zip(self._own_backward, self._made[0], strict=True)
        names = {old: new for old, new in handed_on if old not in self._gradients}
        entries += _renamed(trace[passed:], names)
        return self._with_releases(entries)

    def _names(self, number: int) -> dict[int, int]:
        """A unit's keys of its forward pass and of that of the unit before it, by those in the trace."""
        before = self._held[number - 1] if number else self._before
        names = dict(zip(self._before, before, strict=True))
        return names | dict(zip(self._own, self._held[number], strict=True))

    def _with_releases(self, entries: Sequence[Entry]) -> list[Entry]:
        """The entries, with releases of copies of weights; without them only gradients of skipped units remain."""
        sizes, gone = dict[int, int](), set[int]()
        for kind, key, size, _ in entries:
            if kind == "allocate":
                sizes[key] = size
                gone.discard(key)
            elif kind == "release":
                if key in gone:
                    raise Irregular
                sizes.pop(key, None)
                gone.add(key)
        together: dict[int, list[int]] = {}
        for units in (self._held, self._made):
            for *skipped, replayed in zip(*units, strict=True):
                remaining = [key for key in skipped if key in sizes and key not in self._gradients]
                if any(sizes[key] not in self._copies for key in remaining) or (remaining and replayed in sizes):
                    raise Irregular
                if remaining:
                    together[replayed] = remaining
        if not together:
            return list(entries)
        completed = list[Entry]()
        for entry in entries:
            completed.append(entry)
            if entry[0] == "release":
                completed += [("release", key, 0, "") for key in together.get(entry[1], ())]
        return completed


def _renamed(entries: Sequence[Entry], names: dict[int, int]) -> list[Entry]:
    return [(kind, names.get(key, key), size, label) for kind, key, size, label in entries]


def _rest(output: Any) -> tuple[Any, ...] | None:
    """What a layer returns behind its hidden states; null: these alone.

    Raises:
        Irregular: further tensors.
    """
    if isinstance(output, torch.Tensor):
        return None
    if not isinstance(output, tuple) or any(isinstance(each, torch.Tensor) for each in output[1:]):
        raise Irregular
    return output[1:]


def _hand_on(following: Sequence[tuple[Any, ...] | None]) -> Callable[..., Any]:
    """The forward pass of a layer that does nothing.

    Args:
        following: has what to return behind the hidden states by then; null: return these alone.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if hidden is None or not following:
            raise Irregular
        rest = following[-1]
        return hidden if rest is None else (hidden, *rest)

    return forward


def _outermost_lists(network: Any) -> list[torch.nn.ModuleList]:
    """Lists of modules that are not within another one's modules, as lists of experts are."""
    lists: list[torch.nn.ModuleList] = []
    inside = set[int]()
    for module in network.modules():  # from the outside in
        if isinstance(module, torch.nn.ModuleList) and id(module) not in inside:
            lists.append(module)
            inside.update(id(each) for each in module.modules())
    return lists


def _longest_run(layers: torch.nn.ModuleList, network: Any) -> _Run | None:
    """The run with the most layers to skip; null where there are none."""
    if len(layers) <= _REPLAYED:
        return None
    types = getattr(network.config.get_text_config(), "layer_types", None) or ()
    kinds = [_signature(layer) for layer in layers]
    if len(types) == len(layers):
        kinds = [(kind, own) for kind, own in zip(kinds, types, strict=True)]
    runs = []
    for length in range(1, _LONGEST_UNIT + 1):
        first = 0
        while first < len(kinds):
            end = first + length
            while end < len(kinds) and kinds[end] == kinds[end - length]:
                end += 1
            if (units := (end - first) // length) > _REPLAYED:
                runs.append(_Run(list(layers), first, length, units))
            first = max(end - length + 1, first + 1)
    return max(runs, key=lambda run: len(run.skipped) * run.length, default=None)


def _signature(module: torch.nn.Module) -> tuple[Any, ...]:
    """What the memory of a module depends on: its class, settings and tensors, and those of its parts."""
    settings = {
        name: value
        for name, value in vars(module).items()
        if (value is None or isinstance(value, bool | int | float | str)) and not _POSITION.search(name)
    }
    tensors = [
        (name, tuple(each.shape), each.dtype, each.requires_grad)
        for name, each in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    parts = [(name, _signature(part)) for name, part in module.named_children()]
    return type(module), tuple(sorted(settings.items())), tuple(tensors), tuple(parts)
