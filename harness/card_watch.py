"""What a CUDA card does while steps are timed, as its driver sees it: energy, clock, temperature, throttling.

Another thread asks the driver now and then; nothing is asked of the card itself.
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

EVERY_SECONDS = 0.2
_LEAST_SECONDS = 1.0
"""The driver's energy counter moves some ten times a second: over less it says nothing."""


@contextmanager
def handle(device: torch.device) -> Iterator[Any]:
    """The driver's handle of a card, for pynvml's calls.

    Raises:
        pynvml.NVMLError: the driver does not answer.
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    finally:
        pynvml.nvmlShutdown()


@dataclass
class _Seen:
    """What the driver has said so far."""

    clock_shares: list[float] = field(default_factory=list)
    temperatures: list[int] = field(default_factory=list)
    throttled: list[bool] = field(default_factory=list)
    millijoules: list[int] = field(default_factory=list)


class CardWatch:
    """Follows a card while it is entered; on a CPU it follows nothing. What the card does not say is null."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen = _Seen()
        self._seconds = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> CardWatch:
        self._began = time.perf_counter()
        if self._device.type == "cuda":
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._seconds = time.perf_counter() - self._began
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def metrics(self, tokens: int) -> dict[str, float | int | None]:
        """The figures of a record.

        Args:
            tokens: non-padding ones that were trained on meanwhile.
        """
        seen, joules = self._seen, None
        if len(seen.millijoules) > 1 and self._seconds >= _LEAST_SECONDS and tokens:
            joules = (seen.millijoules[-1] - seen.millijoules[0]) / 1000 / tokens
        return {
            "joules_per_token": joules,
            "card_clock_share": statistics.median(seen.clock_shares) if seen.clock_shares else None,
            "card_temperature": max(seen.temperatures, default=None),
            "throttled_share": statistics.mean(seen.throttled) if seen.throttled else None,
        }

    def _follow(self) -> None:
        import pynvml

        try:
            with handle(self._device) as card:
                _ask(card, self._seen)
                while not self._over.wait(EVERY_SECONDS):
                    _ask(card, self._seen)
                _ask(card, self._seen)
        except pynvml.NVMLError:
            return


def _ask(card: Any, seen: _Seen) -> None:
    import pynvml

    slow = (
        pynvml.nvmlClocksThrottleReasonHwSlowdown
        | pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        | pynvml.nvmlClocksThrottleReasonSwPowerCap
    )
    kind = pynvml.NVML_CLOCK_SM
    questions = (
        (seen.millijoules, lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(card)),
        (seen.clock_shares, lambda: pynvml.nvmlDeviceGetClockInfo(card, kind) / _most(card, kind)),
        (seen.temperatures, lambda: pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU)),
        (seen.throttled, lambda: bool(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card) & slow)),
    )
    for answers, question in questions:
        try:
            answers.append(question())
        except pynvml.NVMLError:  # an older or a virtual card does not know
            continue


def _most(card: Any, kind: int) -> int:
    import pynvml

    return int(pynvml.nvmlDeviceGetMaxClockInfo(card, kind))
