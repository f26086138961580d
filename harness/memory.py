"""What memory a training step holds: the live-tensor tracker, and the counters of the device.

The tracker follows every storage that an operation creates until it is freed, on a CPU as on
CUDA, so that a peak has the same meaning on both: the highest sum of live tensor storage.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import re
import resource
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness import card_watch, distributed
from harness.flops import operations
from harness.metrics import COMPONENTS

Component = Literal["weights", "adapters", "gradients", "optimizer", "activations"]


class OutOfBudget(Exception):
    """The live tensors passed the memory budget.

    Attributes:
        reached: bytes held before the allocation that passed it.
        requested: bytes of that allocation.
    """

    def __init__(self, reached: int, requested: int, budget: int) -> None:
        super().__init__(f"memory budget of {budget} bytes passed: {reached} held, {requested} requested")
        self.reached = reached
        self.requested = requested


class LiveTensors(TorchDispatchMode):
    """Sum of live tensor storage on one device, its peak, and the peak's split into components.

    It counts floating-point operations on the way: a second mode would double the cost of a call.

    Only storages that were created under the mode, or adopted, are counted. A kernel's inner
    workspace is not seen.

    Args:
        device_type: which tensors count.
        budget: bytes beyond which `OutOfBudget` is raised; null: none.
    """

    def __init__(self, device_type: str, budget: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch declares no types for its modes
        self.component: Component = "activations"
        """What new storages are taken for."""
        self.flops = 0
        """Operations of matrix products and attention under the mode so far."""
        self.live: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
        self.total = 0
        self.peak = 0
        self.peak_shares = dict(self.live)
        self._device_type = device_type
        self._budget = budget
        # Keyed by the storage's address, which is unique while it lives; the callback removes it.
        self._storages: dict[int, tuple[weakref.ref[Any], int, Component]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would wrap each dispatch to keep its compiler out; nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
        """Follow storages, and those that shrink and grow again: a shared-out weight is gathered into the same one."""
        self._resizes = mock.patch.object(torch.UntypedStorage, "resize_", self._telling(torch.UntypedStorage.resize_))
        self._resizes.start()
        for storage in [ref() for ref, _, _ in self._storages.values()]:
            if storage is not None:  # while nobody looked
                self._resized(storage)
        super().__enter__()  # type: ignore[no-untyped-call]  # torch declares no types for its modes
        return self

    def __exit__(self, *exception: Any) -> None:
        self._resizes.stop()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]  # as above

    def _telling(self, resize: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
        """No operation tells of a storage's new size."""

        def resized(storage: Any, size: int) -> Any:
            found = resize(storage, size)
            self._resized(storage)
            return found

        return resized

    def _resized(self, storage: torch.UntypedStorage) -> None:
        entry = self._storages.get(storage._cdata)
        if entry is None or entry[1] == self._size(storage):
            return
        (ref, former, component), size = entry, self._size(storage)
        self._refuse_over_budget(size - former)
        self._storages[storage._cdata] = (ref, size, component)
        self._count(size - former, component)

    def _refuse_over_budget(self, size: int) -> None:
        if self._budget is not None and self.total + size > self._budget:
            raise OutOfBudget(self.total, size, self._budget)

    def _count(self, size: int, component: Component) -> None:
        self.live[component] += size
        self.total += size
        if self.total > self.peak:
            self.peak = self.total
            self.peak_shares = dict(self.live)

    def _add(self, tensor: torch.Tensor, component: Component) -> None:
        tensor = distributed.part(tensor)
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or not self._is_counted(tensor):
            return
        size = self._size(storage)
        self._refuse_over_budget(size)
        self._storages[key] = (weakref.ref(storage, functools.partial(self._freed, key)), size, component)
        self._count(size, component)

    def _is_counted(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._device_type

    def _size(self, storage: torch.UntypedStorage) -> int:
        return storage.nbytes()

    def _freed(self, key: int, _: Any) -> None:
        entry = self._storages.pop(key, None)
        if entry is not None:
            _, size, component = entry
            self.live[component] -= size
            self.total -= size

    def adopt(self, tensors: Iterable[torch.Tensor], component: Component) -> None:
        """Count these tensors' storages as `component`, whether or not they were seen before."""
        for tensor in tensors:
            key = distributed.part(tensor).untyped_storage()._cdata
            if key not in self._storages:
                self._add(tensor, component)
                continue
            ref, size, former = self._storages[key]
            if former != component:
                self._storages[key] = (ref, size, component)
                self.live[former] -= size
                self.live[component] += size

    def restart(self) -> None:
        """Begin a new peak at what is live now."""
        self.peak = self.total
        self.peak_shares = dict(self.live)


class MemoryMeter:
    """Peaks of one trial on its device, phase by phase, and the enforced budget.

    On CUDA the allocator's counters give the peaks and its limit is the budget; the tracker adds
    the split into components. On a CPU the tracker does all three.

    Args:
        device: where the trial's tensors live.
        budget: bytes that the trial may hold; null: what the device has.
    """

    def __init__(self, device: torch.device, budget: int | None) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self.tracker = LiveTensors(device.type, None if self._cuda else budget)
        if self._cuda and budget is not None:
            card = torch.cuda.current_device()  # torch wants its number here
            total = torch.cuda.get_device_properties(card).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), card)

    @contextlib.contextmanager
    def phase(self, *, split: bool) -> Iterator[None]:
        """Follow memory within; a new peak begins. `split` asks for components on CUDA too."""
        self.restart()
        with self.tracker if split or not self._cuda else contextlib.nullcontext():
            yield

    def restart(self) -> None:
        """Begin a new peak at what is held now."""
        self.tracker.restart()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def adopt_model(self, model: torch.nn.Module, adapters: Iterable[torch.Tensor]) -> None:
        """Call what loading left behind weights or adapters.

        The parameters are named here because those of a CPU come from a mapped file, which no
        operation creates. The scales of quantised layers are no parameters; the tracker has seen them.
        """
        gc.collect()
        self.tracker.adopt((*model.parameters(), *model.buffers()), "weights")
        self.tracker.adopt(adapters, "adapters")

    def peak(self) -> int:
        """Bytes since the last restart."""
        return torch.cuda.max_memory_allocated(self.device) if self._cuda else self.tracker.peak

    def reserved(self) -> int | None:
        """Most that the allocator took from the driver; null on a CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self._cuda else None

    def shares(self, peak: int) -> dict[str, int]:
        """The peak by component, as metrics. What the allocator counts and the tracker does not see
        (workspaces of kernels) goes to the activations, so that the shares add up.
        """
        shares = {f"memory_{name}_bytes": size for name, size in self.tracker.peak_shares.items()}
        shares["memory_activations_bytes"] += peak - sum(shares.values())
        return shares

    def process(self) -> int | None:
        """Bytes that the driver (NVML) or the operating system (peak RSS) counts for this process."""
        if not self._cuda:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return _nvml_process_bytes(self.device)


def _nvml_process_bytes(device: torch.device) -> int | None:
    """The driver's figure for this process, or null where it gives none (containers hide process ids)."""
    import pynvml

    try:
        with card_watch.handle(device) as card:
            mine = [p for p in pynvml.nvmlDeviceGetComputeRunningProcesses(card) if p.pid == os.getpid()]
        return int(mine[0].usedGpuMemory) if mine and mine[0].usedGpuMemory else None
    except pynvml.NVMLError:
        return None


# CUDA's runtime and driver, ROCm, PyTorch's allocator of a CPU, cuBLAS and its kin (which have no room for a
# workspace), and the kernel (to a mapping).
_SPELLINGS = re.compile(
    r"out of memory|can't allocate memory|OutOfMemory|(?:CUBLAS|CUDNN|CUSPARSE|CUSOLVER|CUFFT)_STATUS_ALLOC_FAILED"
    r"|std::bad_alloc|Unable to allocate"
)


def _says_so(error: BaseException, text: str) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _SPELLINGS.search(text) is not None


_REQUESTED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(B|bytes|KiB|MiB|GiB)")
_UNITS = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def out_of_memory(error: BaseException, meter: MemoryMeter) -> dict[str, int | None] | None:
    """The lower bound on what the trial needs if `error` means out of memory, else null.

    Returns:
        `oom_reached_bytes` and `oom_requested_bytes`; either may be unknown.
    """
    if isinstance(error, OutOfBudget):
        return {"oom_reached_bytes": error.reached, "oom_requested_bytes": error.requested}
    text = str(error)
    if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or _says_so(error, text)):
        return None
    match = _REQUESTED.search(text)
    requested = int(float(match.group(1)) * _UNITS[match.group(2)]) if match else None
    return {"oom_reached_bytes": meter.peak() or None, "oom_requested_bytes": requested}
