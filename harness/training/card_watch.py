"""Energy, clock, temperature and throttling of a CUDA card while steps are timed.

A thread polls the driver (NVML); the card's queue of work is not touched.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

INTERVAL_SECONDS = 0.2
MIN_ENERGY_SECONDS = 1.0
"""Shortest time for an energy: the driver updates its counter about ten times a second."""


@contextmanager
def handle(device: torch.device) -> Iterator[Any]:
    """NVML's handle of a card.

    Raises:
        pynvml.NVMLError: no driver, or none that answers.
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    finally:
        pynvml.nvmlShutdown()


@dataclass
class _Samples:
    """Samples so far."""

    clock_shares: list[float] = field(default_factory=list)
    temperatures: list[int] = field(default_factory=list)
    throttled: list[bool] = field(default_factory=list)
    millijoules: list[int] = field(default_factory=list)
    disturbed: list[bool] = field(default_factory=list)
    """Whether another process used the card, or heat or a failing supply held its clock down. The power limit holds it
    down too, but that is the work's own doing.
    """


class CardWatch:
    """Samples a card while it is entered; on a CPU nothing. Figures that the card does not support are null."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._samples = _Samples()
        self._seconds = 0.0
        self._seen = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)

    def __enter__(self) -> CardWatch:
        self._started = time.perf_counter()
        if self._device.type == "cuda":
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._seconds = time.perf_counter() - self._started
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def disturbed_since_last(self) -> bool:
        """Whether a sample since the last call found the card disturbed; the newest one always counts."""
        samples, seen = self._samples.disturbed, self._seen
        self._seen = len(samples)
        return any(samples[min(seen, len(samples) - 1) :]) if samples else False

    def metrics(self, tokens: int) -> dict[str, float | int | None]:
        """The figures of a record.

        Args:
            tokens: non-padding tokens trained on meanwhile.
        """
        samples, joules = self._samples, None
        if len(samples.millijoules) > 1 and self._seconds >= MIN_ENERGY_SECONDS and tokens:
            joules = (samples.millijoules[-1] - samples.millijoules[0]) / 1000 / tokens
        return {
            "joules_per_token": joules,
            "card_clock_share": statistics.median(samples.clock_shares) if samples.clock_shares else None,
            "card_temperature": max(samples.temperatures, default=None),
            "throttled_share": statistics.mean(samples.throttled) if samples.throttled else None,
        }

    def _sample_until_stopped(self) -> None:
        import pynvml

        try:
            with handle(self._device) as card:
                _sample(card, self._samples)
                while not self._stopped.wait(INTERVAL_SECONDS):
                    _sample(card, self._samples)
                _sample(card, self._samples)
        except pynvml.NVMLError:
            return


def _sample(card: Any, samples: _Samples) -> None:
    import pynvml

    slow = (
        pynvml.nvmlClocksThrottleReasonHwSlowdown
        | pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        | pynvml.nvmlClocksThrottleReasonSwPowerCap
    )
    kind = pynvml.NVML_CLOCK_SM
    queries = (
        (samples.millijoules, lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(card)),
        (samples.clock_shares, lambda: pynvml.nvmlDeviceGetClockInfo(card, kind) / _max_clock(card, kind)),
        (samples.temperatures, lambda: pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU)),
        (samples.disturbed, lambda: _is_disturbed(card)),
        (samples.throttled, lambda: bool(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card) & slow)),
    )
    for values, query in queries:
        try:
            values.append(query())
        except pynvml.NVMLError:  # older and virtual cards do not support all
            continue


def _is_disturbed(card: Any) -> bool:
    import pynvml

    held_down = (
        pynvml.nvmlClocksThrottleReasonHwSlowdown
        | pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    )
    others = len(pynvml.nvmlDeviceGetComputeRunningProcesses(card)) > 1
    return others or bool(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card) & held_down)


def _max_clock(card: Any, kind: int) -> int:
    import pynvml

    return int(pynvml.nvmlDeviceGetMaxClockInfo(card, kind))
