"""The tracker of a step that is replayed on tensors without contents: sizes as on the target, phases, and the work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from harness import distributed
from harness.memory import Component, LiveTensors
from harness.prediction import DeviceType
from harness.results import Phase
from harness.roofline import Work

_ROUNDING: dict[DeviceType, int] = {"cpu": 1, "cuda": 512}
"""The allocator's smallest block (c10/cuda/CUDACachingAllocator.h, kMinBlockSize)."""

_CPU = torch.device("cpu")
_device = torch.ops.prim.device.default
_WITHOUT_TRAFFIC = frozenset({"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format})


@dataclass(frozen=True)
class _Result:
    """What an operation makes, as far as that can be known from what goes in."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None
    """Into the storage of the first argument, of which it is a view; null: storage of its own."""
    work: tuple[str | None, int, int] | None
    """Type, operations and bytes; null: none."""


_results: dict[tuple[Any, ...], _Result] = {}
"""By operation and shapes. A model's layers ask the same again and again, and so do the trials of a grid; the fake mode
itself takes three times as long for each answer."""


class Replay(LiveTensors):
    """Follows what `LiveTensors` follows, under a FakeTensorMode.

    Args:
        device_type: the target.
        fake: the mode under which the tensors are made.
    """

    def __init__(self, device_type: DeviceType, fake: FakeTensorMode) -> None:
        super().__init__("cpu")
        self.phases: dict[Phase, int] = {}
        """Highest sum by phase."""
        self.phase: Phase = "load"
        self.counting = True
        """Whether new storages count."""
        self._work: Counter[tuple[str | None, int, int]] = Counter()
        self._rounding = _ROUNDING[device_type]
        self._fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _device:  # two of three calls, and the longest way to the answer would be through the fake mode
            return args[0].fake_device
        key = _key(func, args, kwargs)
        known = _results.get(key) if key is not None else None
        if known is not None:
            return self._again(known, args)
        before = self.flops
        out = super().__torch_dispatch__(func, types, args, kwargs)
        work = _work_of(func, args, out, self.flops - before)
        if work is not None:
            self._work[work] += 1
        if key is not None:
            _remember(key, func, args, out, work)
        return out

    def _again(self, known: _Result, args: Any) -> torch.Tensor:
        """The tensor that the fake mode would have made."""
        with torch._C._DisableTorchDispatch():  # as the fake mode itself does
            if known.offset is None:
                bare = torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta")
            else:
                bare = torch.empty(0, dtype=known.dtype, device="meta")
                bare.set_(args[0].untyped_storage(), known.offset, known.shape, known.stride)
            out: torch.Tensor = FakeTensor(self._fake, bare, _CPU)
        if known.work is not None:
            self._work[known.work] += 1
        self._add(out, self.component)
        return out

    def _count(self, size: int, component: Component) -> None:
        super()._count(size, component)
        if self.total > self.phases.get(self.phase, 0):
            self.phases[self.phase] = self.total

    def _is_counted(self, tensor: torch.Tensor) -> bool:
        return self.counting and tensor.device.type == "cpu"

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._rounding) * self._rounding

    def enter(self, phase: Phase) -> None:
        """A phase begins: its peak is at least what is live now."""
        self.phase = phase
        self.phases[phase] = max(self.phases.get(phase, 0), self.total)

    def take_work(self, times: int = 1) -> list[Work]:
        """The operations since the last call, `times` as many."""
        taken = [Work(dtype=d, flops=f, moved_bytes=m, calls=n * times) for (d, f, m), n in self._work.items()]
        self._work.clear()
        return taken


# ------------------------------------------------------------------------------------ what is remembered


def _key(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """The operation and the shapes that go in; null where they do not decide what comes out."""
    if func.namespace != "aten" or func._schema.is_mutable:
        return None
    key = [func]
    for value in (*args, *(kwargs or {}).items()):
        described = _described(value)
        if described is None:
            return None
        key.append(described)
    return tuple(key)


def _described(value: Any) -> tuple[Any, ...] | None:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.fake_device != _CPU or value.layout is not torch.strided:
            return None
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if kind in _PLAIN:
        return kind, value
    if kind in (list, tuple):
        inner = tuple(type(v) if type(v) in _PLAIN else None for v in value)
        return None if None in inner else (kind, inner, *value)
    return None


def _remember(key: tuple[Any, ...], func: Any, args: Any, out: Any, work: tuple[str | None, int, int] | None) -> None:
    if type(out) is not FakeTensor or out.constant is not None or out.fake_device != _CPU:
        return
    storage = out.untyped_storage()._cdata
    owners = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.untyped_storage()._cdata == storage]
    if owners not in ([], [0]) or (not owners and out.storage_offset()):
        return
    offset = int(out.storage_offset()) if owners else None
    _results[key] = _Result(tuple(out.shape), out.stride(), out.dtype, offset, work)


def _work_of(func: Any, args: Any, out: Any, flops: int) -> tuple[str | None, int, int] | None:
    if func.is_view or func.namespace == "c10d" or func._overloadpacket.__name__ in _WITHOUT_TRAFFIC:
        return None
    dtype = str(next(a for a in args if isinstance(a, torch.Tensor)).dtype).removeprefix("torch.") if flops else None
    return dtype, flops, _bytes(args) + _bytes((out,))


def _bytes(values: Iterable[Any]) -> int:
    total = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            total += distributed.part(value).numel() * value.element_size()
        elif isinstance(value, list | tuple):
            total += _bytes(value)
    return total
