"""Predictions in processes of their own, as many at a time as there are cores: the runner imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import environment, model_source
from harness.files import write_whole
from harness.launch.isolated import context, isolated
from harness.launch.local import main_module_hidden
from harness.prediction import DeviceType, Prediction
from harness.private import withheld
from harness.roofline import Rates
from harness.spec import TrialSpec


@dataclass(frozen=True)
class Planned:
    """A spec's prediction, or why there is none."""

    spec: TrialSpec
    prediction: Prediction | None
    error: str | None = None


class Planner:
    """Predicts specs, for a device that need not be there. Processes start with the first of them.

    Use as a context manager: what has not begun when it is left is not begun.

    Args:
        device_type: where they would be trained; null: where each spec says, as that is here.
        full_length: as if every example filled the sequence.
        trust_remote_code: let models from the hub run their own code.
    """

    def __init__(
        self, device_type: DeviceType | None = None, *, full_length: bool = False, trust_remote_code: bool = False
    ) -> None:
        self._device_type = device_type
        self._options = {"full_length": full_length, "trust_remote_code": trust_remote_code}
        self._pool: ProcessPoolExecutor | None = None
        self._known: dict[tuple[str, DeviceType], dict[str, Any]] = {}

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def plan(self, specs: Iterable[TrialSpec]) -> Iterator[Planned]:
        """Predict each spec; those that differ in nothing that takes memory or time are predicted once.

        Args:
            specs: in any order; the answers come as they are ready.
        """
        groups: dict[tuple[str, DeviceType], list[TrialSpec]] = {}
        for spec in specs:
            device_type = self._device_type or environment.resolve_device(spec.device)
            groups.setdefault((spec.memory_key, device_type), []).append(spec)
        running: dict[Future[dict[str, Any]], tuple[str, DeviceType]] = {}
        for key, group in groups.items():
            if key in self._known:
                yield from _planned(group, self._known[key])
            else:
                text = group[0].model_dump_json()
                with main_module_hidden():
                    running[self._processes().submit(_predict, text, key[1], self._options)] = key
        lost = []
        for future in as_completed(running):
            try:
                self._known[running[future]] = future.result()
            except BrokenProcessPool:
                lost.append(running[future])
                continue
            yield from _planned(groups[running[future]], self._known[running[future]])
        for key in lost:  # one by one: only what ends its own process is to blame
            self._known[key] = self._alone(groups[key][0], key[1])
            yield from _planned(groups[key], self._known[key])

    def _alone(self, spec: TrialSpec, device_type: DeviceType) -> dict[str, Any]:
        self._end()
        try:
            with main_module_hidden():
                return self._processes().submit(_predict, spec.model_dump_json(), device_type, self._options).result()
        except BrokenProcessPool:
            self._end()
            return {"error": "the process that predicted it was ended"}

    def _end(self) -> None:
        if self._pool is None:
            return
        for process in list(self._pool._processes.values()):  # there is no public way before Python 3.14
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None

    def _processes(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(os.cpu_count() or 1, mp_context=context(), initializer=_ignore_interrupts)
        return self._pool


def _planned(specs: list[TrialSpec], said: dict[str, Any]) -> Iterator[Planned]:
    prediction = None if "error" in said else Prediction.model_validate(said)
    for spec in specs:
        yield Planned(spec, prediction, said.get("error"))


def _ignore_interrupts() -> None:
    """An interrupt is for the runner."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _predict(text: str, device_type: DeviceType, options: dict[str, bool]) -> dict[str, Any]:
    """In the child: what `plan.predict` says, or the one line of its refusal."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        from harness import plan

        try:
            found = plan.predict(TrialSpec.model_validate_json(text), device_type, **options)
        except Exception as error:  # a model's own code may raise anything; the grid goes on
            first = withheld(next(iter(str(error).strip().splitlines()), type(error).__name__))
            return {"error": first if isinstance(error, plan.Unpredictable) else f"{type(error).__name__}: {first}"}
    return found.model_dump(mode="json")


# ------------------------------------------------------------------------------------ the device's rates


def rates(device_type: DeviceType) -> Rates | None:
    """What this machine's device was measured to do; null where it was not yet."""
    try:
        return Rates.model_validate_json(_rates_file(device_type).read_bytes())
    except (OSError, ValueError):
        return None


def measure_rates(device_type: DeviceType) -> Rates:
    """Measure the device, in a process of its own, and keep what was found for the next time.

    Raises:
        InputError: the process did not come back with figures.
    """
    found = Rates.model_validate(isolated(_measure, device_type))
    with contextlib.suppress(OSError):  # a cache that cannot be written: they are measured again the next time
        write_whole(_rates_file(device_type), found.model_dump_json(indent=1).encode())
    return found


def _rates_file(device_type: DeviceType) -> Path:
    return model_source.cache_folder() / f"rates-{environment.current(device_type).id}.json"


def _measure(device_type: DeviceType) -> dict[str, Any]:
    import torch

    from harness import half_matmul
    from harness import rates as measuring

    half_matmul.install()
    return measuring.measure(torch.device(device_type)).model_dump(mode="json")
