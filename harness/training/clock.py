"""Times work on a device by the device's own clock."""

from __future__ import annotations

import time
from typing import Any

import torch


class DeviceClock:
    """A clock of one device. On CUDA it is read within the stream: queued work is timed, not the host.

    Args:
        device: to time.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        """A moment, for `seconds_since`."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_since(self, moment: Any) -> float:
        """Seconds from a moment until all work queued so far is done."""
        now = self.now()
        if not self._cuda:
            return float(now - moment)
        now.synchronize()
        return float(moment.elapsed_time(now)) / 1000
