"""Tracks live tensor storage: every storage from the operation that creates it until it is freed.

The peak, the highest sum of live tensor storage, thus means the same on a CPU and on CUDA.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal
from unittest import mock

import torch
from torch._C._dynamo import guards
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from harness.metrics import COMPONENTS
from harness.training import distributed
from harness.training.flops import operations

Component = Literal["weights", "adapters", "gradients", "optimizer", "activations"]


class OutOfBudget(Exception):
    """Live tensors would exceed the memory budget.

    Attributes:
        reached: bytes held before the allocation that would exceed it.
        requested: bytes of that allocation.
    """

    def __init__(self, reached: int, requested: int, budget: int) -> None:
        super().__init__(f"memory budget of {budget} bytes passed: {reached} held, {requested} requested")
        self.reached = reached
        self.requested = requested


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a tensor is made of, like values and scales of a weight of torchao's; itself if it is plain."""
    tensor = distributed.local_tensor(tensor)
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from parts(getattr(tensor, name))


@functools.cache
def is_quantised_state(kind: type) -> bool:
    """Whether tensors of a class are the state of torchao's optimizers, made of tensors that they work on."""
    return kind.__module__.startswith("torchao.optim.")


class LiveTensors(TorchDispatchMode):
    """Bytes of live tensor storage on one device, their peak, and its breakdown into components.

    Storages are counted that are created under the mode, or adopted; a kernel's workspace is not. Floating-point
    operations are counted too: a second mode would double the cost of each call.

    It uses private API of torch (2.13): `torch.utils._python_dispatch` and `_pytree`, `_should_skip_dynamo`, and a
    storage's `_cdata` as its address. It patches `UntypedStorage.resize_`: no operation reports a resize. A public hook
    for allocations on a CPU, with their sizes, would replace all of it.

    Args:
        device_type: device whose tensors count.
        budget: bytes beyond which `OutOfBudget` is raised; null: no limit.
    """

    def __init__(self, device_type: str, budget: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch declares no types for its modes
        self.component: Component = "activations"
        """Component of new storages."""
        self.flops = 0
        """Operations of matrix products and attention so far."""
        self.live: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
        self.total = 0
        self.peak = 0
        self.peak_breakdown = dict(self.live)
        self._device_type = device_type
        self._budget = budget
        # By the storage's address, which is unique while it lives; the callback removes it.
        self._storages: dict[int, tuple[weakref.ref[Any], int, Component]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would wrap each dispatch to keep its compiler out; nothing is compiled under this mode."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_quantised_state, types)):
            return NotImplemented  # the tensor's own code comes first, and its operations come here
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.flops += operations(func, args, kwargs, out)
        if isinstance(out, torch.Tensor):
            self._add(out, self.component)
        elif out is not None:
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._add(leaf, self.component)
        return out

    def __enter__(self) -> LiveTensors:
        """Track storages, those too that are resized: FSDP gathers a weight into the same storage each time."""
        resize = torch.UntypedStorage.resize_
        self._resize_patch = mock.patch.object(torch.UntypedStorage, "resize_", self._tracking_resize(resize))
        self._resize_patch.start()
        for storage in [ref() for ref, _, _ in self._storages.values()]:
            if storage is not None:  # it may have been resized outside the mode
                self._update_size(storage)
        super().__enter__()  # type: ignore[no-untyped-call]  # torch declares no types for its modes
        return self

    def __exit__(self, *exception: Any) -> None:
        self._resize_patch.stop()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]  # as above

    def _tracking_resize(self, resize: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
        def resize_(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            self._update_size(storage)
            return result

        return resize_

    def _update_size(self, storage: torch.UntypedStorage) -> None:
        entry = self._storages.get(storage._cdata)
        if entry is None or entry[1] == self._size(storage):
            return
        (ref, previous, component), size = entry, self._size(storage)
        self._check_budget(size - previous)
        self._storages[storage._cdata] = (ref, size, component)
        self._resized(storage._cdata, previous, size, component)

    def _check_budget(self, size: int) -> None:
        if self._budget is not None and self.total + size > self._budget:
            raise OutOfBudget(self.total, size, self._budget)

    def _resized(self, key: int, before: int, after: int, component: Component) -> None:
        """A storage has changed its size: from 0 when it is new, to 0 when it is freed."""
        self.live[component] += after - before
        self.total += after - before
        if self.total > self.peak:
            self.peak = self.total
            self.peak_breakdown = dict(self.live)

    def _add(self, tensor: torch.Tensor, component: Component) -> None:
        tensor = distributed.local_tensor(tensor)
        if type(tensor) is not torch.Tensor and is_traceable_wrapper_subclass(tensor):
            for part in parts(tensor):  # its own storage has a size and no memory
                self._add(part, component)
            return
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages and self._is_counted(tensor):
            self._track(storage, component)

    def _track(self, storage: torch.UntypedStorage, component: Component) -> None:
        key = storage._cdata
        size = self._size(storage)
        self._check_budget(size)
        self._storages[key] = (weakref.ref(storage, functools.partial(self._freed, key)), size, component)
        self._resized(key, 0, size, component)

    def _is_counted(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._device_type

    def _size(self, storage: torch.UntypedStorage) -> int:
        return storage.nbytes()

    def _freed(self, key: int, _: Any) -> None:
        entry = self._storages.pop(key, None)
        if entry is not None:
            _, size, component = entry
            self._resized(key, size, 0, component)

    def adopt(self, tensors: Iterable[torch.Tensor], component: Component) -> None:
        """Count the tensors' storages as `component`, whether or not they were tracked before."""
        for tensor in (part for whole in tensors for part in parts(whole)):
            key = distributed.local_tensor(tensor).untyped_storage()._cdata
            if key not in self._storages:
                self._add(tensor, component)
                continue
            ref, size, previous = self._storages[key]
            if previous != component:
                self._storages[key] = (ref, size, component)
                self._adopted(key, size, previous, component)

    def _adopted(self, key: int, size: int, previous: Component, component: Component) -> None:
        self.live[previous] -= size
        self.live[component] += size

    def restart(self) -> None:
        """Start a new peak from what is live now."""
        self.peak = self.total
        self.peak_breakdown = dict(self.live)


class CompiledLiveTensors(LiveTensors):
    """The same of steps with compiled layers. Their matrix products and attention are operations as ever; what they
    fuse are kernels, whose buffers are allocated by functions that no operation reports.

    It patches these functions of torch (2.13): generated code takes them from `torch._C._dynamo.guards` when it is
    imported. It uses private API too: `ignore_compile_internals` lets torch compile under the mode, which would run
    layers uncompiled, and `torch._ops.HigherOrderOperator`. The hook for allocations that would replace all of
    `LiveTensors` would replace these too.
    """

    supports_higher_order_operators = True
    entered: ClassVar[list[CompiledLiveTensors]] = []
    """Those in use, the innermost last."""

    def __init__(self, device_type: str, budget: int | None = None) -> None:
        super().__init__(device_type, budget)
        for name in ("_empty_strided_cpu", "_empty_strided_cuda"):
            allocate = getattr(guards, name)
            if not hasattr(allocate, "__wrapped__"):  # for good: generated code keeps what it has taken
                setattr(guards, name, _reporting(allocate))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Torch compiles with the mode switched off, and runs what it has compiled with the mode switched on."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, HigherOrderOperator):
            return super().__torch_dispatch__(func, types, args, kwargs)
        # Recomputed layers run operations that draw random numbers, as attention may, with a generator's state.
        out = func(*args, **(kwargs or {}))
        for at, inner in enumerate(args):
            if isinstance(inner, torch._ops.OpOverload):
                self.flops += operations(inner, args[at + 1 :], kwargs or {}, out[-1] if at == 0 else out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf, self.component)
        return out

    def __enter__(self) -> CompiledLiveTensors:
        super().__enter__()
        self.entered.append(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.entered.pop()
        super().__exit__(*exception)

    def allocated(self, allocate: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        """A buffer of generated code, which counts."""
        tensor = allocate(*arguments)
        self._add(tensor, self.component)
        return tensor


def _reporting(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def reported(*arguments: Any) -> torch.Tensor:
        trackers = CompiledLiveTensors.entered[-1:]
        return trackers[0].allocated(allocate, *arguments) if trackers else allocate(*arguments)

    return reported
