"""Rates of this machine's device: measured once per environment in a separate process, then read from the cache."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from harness import environment
from harness._util.files import write_whole
from harness.environment import DeviceType
from harness.launch.isolated import run_isolated
from harness.predict.roofline import Rates
from harness.sources import models


def load(device_type: DeviceType) -> Rates | None:
    """The cached rates; null where they were not measured yet."""
    try:
        return Rates.model_validate_json(_file(device_type).read_bytes())
    except (OSError, ValueError):
        return None


def measure(device_type: DeviceType) -> Rates:
    """Measure the device and cache its rates, unless other processes took the processors meanwhile.

    Raises:
        InputError: the process that measures failed.
    """
    measured = run_isolated(_measure, device_type)
    rates = Rates.model_validate(measured["rates"])
    if measured["disturbed"]:
        return rates
    with contextlib.suppress(OSError):  # a cache that cannot be written: they are measured again next time
        write_whole(_file(device_type), rates.model_dump_json(indent=1).encode())
    return rates


def _file(device_type: DeviceType) -> Path:
    return models.cache_folder() / f"rates-{environment.current(device_type).id}.json"


def _measure(device_type: DeviceType) -> dict[str, Any]:
    import torch

    from harness.predict import device_rates
    from harness.training import half_matmul
    from harness.training.waiting import Waiting, is_disturbed

    half_matmul.install()
    waiting, started = Waiting(), time.perf_counter()
    rates = device_rates.measure(torch.device(device_type))
    disturbed = is_disturbed(waiting.since_last(), time.perf_counter() - started)
    return {"rates": rates.model_dump(mode="json"), "disturbed": disturbed}
