"""Peak memory of a trial: the live-tensor tracker and the counters of the device."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from harness.training import card_watch
from harness.training.live_tensors import CompiledLiveTensors, LiveTensors


class MemoryMeter:
    """Peaks of one trial on its device, phase by phase, and its enforced budget.

    CUDA: the allocator's counters give the peaks and its limit is the budget; the tracker adds the breakdown into
    components. CPU: the tracker does all three.

    Args:
        device: of the trial's tensors.
        budget: bytes that the trial may hold; null: what the device has.
        compiled: whether layers of the model are compiled.
    """

    def __init__(self, device: torch.device, budget: int | None, *, compiled: bool = False) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        tracker = CompiledLiveTensors if compiled else LiveTensors
        self.tracker = tracker(device.type, None if self._cuda else budget)
        if self._cuda and budget is not None:
            card = torch.cuda.current_device()  # torch requires its number here
            total = torch.cuda.get_device_properties(card).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), card)

    @contextlib.contextmanager
    def phase(self, *, breakdown: bool) -> Iterator[None]:
        """Start a new peak and track it within. `breakdown` asks for components on CUDA too."""
        self.restart()
        with self.tracking(breakdown=breakdown):
            yield

    def tracking(self, *, breakdown: bool) -> AbstractContextManager[Any]:
        """Within, the tracker is in use if it is needed."""
        return self.tracker if breakdown or not self._cuda else contextlib.nullcontext()

    def restart(self) -> None:
        """Start a new peak from what is held now."""
        self.tracker.restart()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def adopt_model(self, model: torch.nn.Module, adapters: Iterable[torch.Tensor]) -> None:
        """Count a loaded model's tensors as weights or adapters.

        On a CPU parameters come from a mapped file, which no operation creates. The tracker has seen the scales of
        quantised layers, which are no parameters.
        """
        gc.collect()
        self.tracker.adopt((*model.parameters(), *model.buffers()), "weights")
        self.tracker.adopt(adapters, "adapters")

    def peak(self) -> int:
        """Highest bytes since the last restart."""
        return torch.cuda.max_memory_allocated(self.device) if self._cuda else self.tracker.peak

    def reserved(self) -> int | None:
        """Highest bytes that the allocator reserved; null on a CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self._cuda else None

    def breakdown(self, peak: int) -> dict[str, int]:
        """A peak by component, as metrics. Activations include what the allocator counts and the tracker does not see
        (workspaces of kernels).
        """
        parts = {f"memory_{name}_bytes": size for name, size in self.tracker.peak_breakdown.items()}
        parts["memory_activations_bytes"] += peak - sum(parts.values())
        return parts

    def process(self) -> int | None:
        """Memory of this process by the driver (NVML), or by the operating system (peak RSS)."""
        if not self._cuda:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return _nvml_process_bytes(self.device)


def _nvml_process_bytes(device: torch.device) -> int | None:
    """The driver's figure for this process; null where it has none (containers hide process ids)."""
    import pynvml

    try:
        with card_watch.handle(device) as card:
            own = [p for p in pynvml.nvmlDeviceGetComputeRunningProcesses(card) if p.pid == os.getpid()]
        return int(own[0].usedGpuMemory) if own and own[0].usedGpuMemory else None
    except pynvml.NVMLError:
        return None
