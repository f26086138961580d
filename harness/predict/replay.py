"""The tracker of a step on fake tensors: sizes as on the target device, peaks by phase, and operations."""

from __future__ import annotations

import contextlib
import itertools
import traceback
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from harness.environment import DeviceType
from harness.predict import cuda_kernels
from harness.predict.cards import Capability
from harness.predict.roofline import Work
from harness.predict.trace import Entry
from harness.record import Phase
from harness.training import distributed
from harness.training.live_tensors import Component, LiveTensors, is_quantised_state

_ROUNDING: dict[DeviceType, int] = {"cpu": 1, "cuda": 512}
"""Smallest block of the allocator, in bytes (c10/cuda/CUDACachingAllocator.h, kMinBlockSize)."""
_CPU = torch.device("cpu")
_TRANSIENT = 0
"""Key in the trace of what a kernel holds while it runs."""
_device = torch.ops.prim.device.default
_VALUE = torch.ops.aten._local_scalar_dense.default
_WITHOUT_TRAFFIC = frozenset({"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_OF_STORAGES = frozenset({torch.ops.aten.set_.source_Storage, torch.ops.aten.set_.source_Tensor})
"""In place, but not in the storage that was there."""
_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format})


@dataclass(frozen=True)
class _Output:
    """A tensor that an operation returns."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None
    """Into the storage of the first argument, of which it is a view; null: a storage of its own."""


@dataclass(frozen=True)
class _Call:
    """What an operation does, where its arguments' shapes determine it."""

    returns: Literal["tensor", "tuple", "first argument", "nothing"]
    outputs: tuple[_Output, ...]
    """The tensors that it makes."""
    work: tuple[str | None, int, int] | None
    """Type, operations and bytes; null: none."""
    transient: int
    """Bytes that the kernel holds for a moment next to it."""


_cache: dict[tuple[Any, ...], _Call] = {}
"""By operation and shapes, which repeat over a model's layers and a grid's trials. FakeTensorMode has a cache too, but
takes three times as long."""


class Replay(LiveTensors):
    """`LiveTensors` for a step under FakeTensorMode.

    It uses private API of torch (2.13): `_make_subclass`, `FakeTensor`'s constructor, attributes and `constant`,
    `_DisableTorchDispatch`, an operator's `_schema` and `_overloadpacket`, `_cdata`. Most of it serves the cache;
    without the cache, predictions are the same and take three times as long.

    Args:
        device_type: target device.
        fake: the mode that makes the tensors.
        capability: compute capability of a CUDA device.
    """

    def __init__(self, device_type: DeviceType, fake: FakeTensorMode, capability: Capability) -> None:
        super().__init__("cpu")
        self.trace: list[Entry] = []
        """What has happened so far, in order. Peaks are taken from it, not from the sums of `LiveTensors`."""
        self.phase: Phase = "load"
        self.updates_in: tuple[Phase, ...] = ("optimizer",)
        """Phases with updates of weights. Some limit their size by a value that they read: it is 1."""
        self.counting = True
        """Whether new storages are counted."""
        self.work: Counter[tuple[str | None, int, int]] = Counter()
        """Calls of operations by type, operations and bytes."""
        self._made: list[tuple[tuple[str | None, int, int], weakref.ref[Any]]] | None = None
        """Work of calls and the storages that they made, where it is noted."""
        self._keys: dict[int, int] = {}
        """In the trace, by the storage's address, which is unique while it lives."""
        self._numbers = itertools.count(1)
        self._rounding = _ROUNDING[device_type]
        # Of every fake tensor of the mode.
        self._attributes = dict(FakeTensor(fake, torch.empty(0, device="meta"), _CPU).__dict__)
        self._cuda = device_type == "cuda"
        self._workspaces: dict[Phase, Any] = {}
        """cuBLAS's, of the threads of the forward and of the backward pass."""
        self._workspace_bytes = cuda_kernels.workspace_bytes(capability)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _device:  # two thirds of all calls, and slow in FakeTensorMode
            return args[0].fake_device
        if any(map(is_quantised_state, types)):
            return NotImplemented  # as of the tracker
        if func is _VALUE and self.phase in self.updates_in:
            return 1.0 if args[0].is_floating_point() else 1
        key = _key(func, args, kwargs)
        cached = _cache.get(key) if key is not None else None
        if cached is not None:
            return self._from_cache(cached, args)
        before = self.flops
        out = super().__torch_dispatch__(func, types, args, kwargs)
        work = _work_of(func, args, out, self.flops - before)
        if work is not None:
            self._count(work, () if func._schema.is_mutable else (out,))
        transient = cuda_kernels.transient_bytes(func, args, kwargs or {})
        self._hold_for_a_moment(transient)
        if key is not None:
            _store(key, args, out, work, transient)
        return out

    def _from_cache(self, cached: _Call, args: Any) -> Any:
        """What FakeTensorMode would return."""
        made = tuple(self._make(output, args) for output in cached.outputs)
        if cached.work is not None:
            self._count(cached.work, made)
        self._hold_for_a_moment(cached.transient)
        if cached.returns == "nothing":
            return None
        if cached.returns == "first argument":
            return args[0]
        return made if cached.returns == "tuple" else made[0]

    def _count(self, work: tuple[str | None, int, int], made: Any) -> None:
        self.work[work] += 1
        if self._made is not None:
            self._made += [(work, weakref.ref(each.untyped_storage())) for each in _tensors(made)]

    @contextlib.contextmanager
    def work_of_later_calls(self) -> Iterator[None]:
        """Within, the first update of an optimizer counts as a later one, which does not make what is left of it."""
        there = {key for key, (ref, _, _) in self._storages.items() if ref() is not None}
        self._made = []
        yield
        left = (work for work, ref in self._made if (storage := ref()) is not None and storage._cdata not in there)
        self.work -= Counter(left)
        self._made = None

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as `torch.empty_like` makes one under the modes, in half the time where it is not sharded."""
        if type(tensor) is not FakeTensor or not tensor.is_contiguous():
            return torch.empty_like(tensor)
        return self._make(_Output(tuple(tensor.shape), tensor.stride(), tensor.dtype, None), ())

    def _make(self, output: _Output, args: Any) -> torch.Tensor:
        with torch._C._DisableTorchDispatch():  # as in FakeTensorMode
            if output.offset is None:
                meta = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
            else:
                meta = torch.empty(0, dtype=output.dtype, device="meta")
                meta.set_(args[0].untyped_storage(), output.offset, output.shape, output.stride)
            # FakeTensor's constructor does the same, with checks that take four times as long.
            made: torch.Tensor = torch.Tensor._make_subclass(
                FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=_CPU
            )
            made.__dict__.update(self._attributes)
        storage = made.untyped_storage()
        if storage._cdata not in self._storages and self.counting:
            self._track(storage, self.component)
        return made

    def _hold_for_a_moment(self, size: int) -> None:
        if size and self._cuda:
            held = self.rounded(size)
            self.trace += [("allocate", _TRANSIENT, held, "activations"), ("release", _TRANSIENT, 0, "")]

    def _resized(self, key: int, before: int, after: int, component: Component) -> None:
        if before:
            self.trace.append(("release", self._keys.pop(key), 0, ""))
        if after:
            own = self._keys[key] = self.new_key()
            self.trace.append(("allocate", own, after, component))

    def _adopted(self, key: int, size: int, previous: Component, component: Component) -> None:
        if size:
            self.trace.append(("adopt", self._keys[key], 0, component))

    def key_of(self, tensor: torch.Tensor) -> int:
        """Key of a tensor's storage in the trace; 0 of an empty one."""
        return self._keys.get(tensor.untyped_storage()._cdata, 0)

    def live_keys(self) -> set[int]:
        """Keys of all that is live."""
        return set(self._keys.values())

    def start_anew(self) -> None:
        """Forget the trace and the work, and hold no workspaces."""
        self._workspaces.clear()
        self.phase, self.component = "load", "activations"
        self.take_trace()
        self.take_work()

    def new_key(self) -> int:
        """A key for a storage that is in the trace alone."""
        return next(self._numbers)

    @contextlib.contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Within, tensors are tracked without entries in the trace that say so."""
        trace, self.trace = self.trace, []
        with self:
            yield
        self.trace = trace

    def take_trace(self) -> list[Entry]:
        """The trace since the last call."""
        trace, self.trace = self.trace, []
        return trace

    def _is_counted(self, tensor: torch.Tensor) -> bool:
        return self.counting and tensor.device.type == "cpu"

    def _size(self, storage: torch.UntypedStorage) -> int:
        return self.rounded(storage.nbytes())

    def rounded(self, size: int) -> int:
        """Bytes that a request takes on the device."""
        return -(-size // self._rounding) * self._rounding

    def enter(self, phase: Phase) -> None:
        """Start a phase."""
        self.hold_workspace("backward" if phase == "backward" else "forward")
        self.phase = phase
        self.trace.append(("enter", 0, 0, phase))

    def hold_workspace(self, thread: Phase) -> None:
        """Hold cuBLAS's workspace of a thread, which it has from its first product on."""
        if self._cuda and thread not in self._workspaces:
            component, self.component = self.component, "activations"
            self._workspaces[thread] = torch.empty(self._workspace_bytes, dtype=torch.uint8)
            self.component = component

    def workspace_keys(self) -> set[int]:
        """Keys of cuBLAS's workspaces."""
        return {self.key_of(workspace) for workspace in self._workspaces.values()}

    def size_of(self, tensor: torch.Tensor) -> int:
        """Bytes that a tensor's storage takes on the device."""
        return self._size(tensor.untyped_storage())

    def take_work(self, times: int = 1) -> list[Work]:
        """The operations since the last call, with `times` their calls."""
        work = [Work(dtype=d, flops=f, moved_bytes=m, calls=n * times) for (d, f, m), n in self.work.items()]
        self.work.clear()
        return work


def _key(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """The operation and its arguments' shapes; null where these do not determine what it does."""
    if func.namespace not in ("aten", "bitsandbytes"):
        return None
    of_optimizer = func.namespace == "bitsandbytes" and func._schema.is_mutable
    key = [func]
    for value in (*args, *(kwargs or {}).items()):
        table = of_optimizer and type(value) is torch.Tensor  # a real one: its values are constants
        signature = tuple(value.shape) if table else _signature(value)
        if signature is None:
            return None
        key.append(signature)
    return tuple(key)


def _signature(value: Any) -> tuple[Any, ...] | None:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.fake_device != _CPU or value.layout is not torch.strided:
            return None
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if kind in _PLAIN:
        return kind, value
    if kind in (list, tuple):
        inner = tuple(_signature(each) for each in value)
        return None if None in inner else (kind, inner)
    return None


def _store(key: tuple[Any, ...], args: Any, out: Any, work: tuple[str | None, int, int] | None, transient: int) -> None:
    func = key[0]
    if func._schema.is_mutable:
        if out is None:
            _cache[key] = _Call("nothing", (), work, transient)
        elif out is args[0] and func not in _OF_STORAGES and _signature(out) == key[1]:
            _cache[key] = _Call("first argument", (), work, transient)
        return
    made = out if type(out) is tuple else (out,)
    outputs = [output for each in made if (output := _output_of(each, args, alone=made is not out)) is not None]
    if len(outputs) == len(made):
        _cache[key] = _Call("tuple" if made is out else "tensor", tuple(outputs), work, transient)


def _output_of(out: Any, args: Any, *, alone: bool) -> _Output | None:
    """Null where it is no tensor, or its storage is of another argument than the first."""
    if type(out) is not FakeTensor or out.constant is not None or out.fake_device != _CPU:
        return None
    storage = out.untyped_storage()._cdata
    owners = [i for i, each in enumerate(args) if any(t.untyped_storage()._cdata == storage for t in _tensors(each))]
    if owners not in ([], [0] if alone else []) or (not owners and out.storage_offset()):
        return None
    if owners and not isinstance(args[0], torch.Tensor):
        return None
    return _Output(tuple(out.shape), out.stride(), out.dtype, int(out.storage_offset()) if owners else None)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _work_of(func: Any, args: Any, out: Any, flops: int) -> tuple[str | None, int, int] | None:
    if func.is_view or func.namespace == "c10d" or func._overloadpacket.__name__ in _WITHOUT_TRAFFIC:
        return None
    dtype = str(next(a for a in args if isinstance(a, torch.Tensor)).dtype).removeprefix("torch.") if flops else None
    return dtype, flops, bytes_of(args) + bytes_of((out,))


def bytes_of(values: Iterable[Any]) -> int:
    """Bytes of all tensors among values."""
    return sum(
        distributed.local_tensor(each).numel() * each.element_size() for value in values for each in _tensors(value)
    )


def operation_of(error: Exception) -> str | None:
    """The innermost operation of torch in which an error arose; null where it was in none."""
    functions = [frame.f_locals.get("func") for frame, _ in traceback.walk_tb(error.__traceback__)]
    operations = [function for function in functions if isinstance(function, torch._ops.OpOverload)]
    return str(operations[-1]) if operations else None
