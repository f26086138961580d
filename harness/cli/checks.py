"""What `harness doctor` checks: this machine, or recorded results."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from harness import environment
from harness._util.redact import redact_home
from harness._util.units import GIB, show_bytes
from harness.environment import version
from harness.errors import InputError
from harness.results.parts import DamagedPart
from harness.results.store import Store
from harness.runner.cleaning import leftovers
from harness.sources import home, models

REQUIRED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "pandas", "pyarrow")
_LEAST_FREE = 2 * GIB


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    what: str
    detail: str
    works: bool | None
    """null: a fact, neither good nor bad."""
    remedy: str = ""


def check_machine() -> list[Check]:
    """Everything that a run needs, in the order in which it needs it."""
    return [*_device(), *_packages(), _bundled_model(), _cache(), *_optional()]


def check_results(stores: Iterable[Store]) -> list[Check]:
    """What is wrong with recorded results, grid by grid."""
    return [check for store in stores for check in _results(store)]


def _results(store: Store) -> list[Check]:
    name, damaged = store.folder.name, store.damage()
    with warnings.catch_warnings(action="ignore", category=DamagedPart):  # each is a check of its own
        statuses = Counter(store.read("trials", ["trial_id", "status"])["status"].to_pylist())
        lost, unneeded = store.incomplete(), leftovers(store)
    ends = ", ".join(f"{count} {status}" for status, count in statuses.most_common()) or "none that can be read"
    checks = [Check(name, f"trials: {ends}", not damaged and not lost)]
    for part, reason in damaged.items():
        remedy = "the next `harness run` sets it aside and does its trials again"
        checks.append(Check(f"{name}/{part.parent.name}/{part.name}", reason, False, remedy))
    gone, aside = "its steps or stories are gone", "was set aside; look at it, or remove it"
    checks += [Check(f"{name}: {trial}", gone, False, "`harness run` does it again") for trial in sorted(lost)]
    checks += [Check(f"{name}/set-aside/{file.name}", aside, None) for file in sorted(store.folder.glob("set-aside/*"))]
    if unneeded:
        size = show_bytes(sum(each.size for each in unneeded))
        checks.append(Check(name, f"{len(unneeded)} leftovers of runs, {size}", None, "`harness clean` frees them"))
    return checks


def _device() -> list[Check]:
    device = environment.resolve_device("auto")
    here = environment.current(device)
    checks = [
        Check("device", f"{device}: {here.device_name}, {show_bytes(here.device_memory_bytes)}", True),
        Check("processor", f"{here.processor}, {here.cpu_cores} cores", None),
    ]
    if environment.cards() and device == "cpu":
        checks.append(
            Check("CUDA", "a card is there, and torch is a CPU build", False, "install a CUDA build of torch")
        )
    elif device == "cpu":
        checks.append(Check("CUDA", "no card; trials run on the CPU, in every precision", None))
    if device == "cpu" and here.half_matmul == "fp32-blocks":
        checks.append(
            Check("16-bit products", "no instructions for them here; done in blocks of fp32, at fp32 speed", None)
        )
    return checks


def _packages() -> list[Check]:
    checks = []
    for name in REQUIRED:
        installed = version(name)
        remedy = "" if installed else f"pip install {name}"
        checks.append(Check(name, installed or "not installed", installed is not None, remedy))
    return checks


def _bundled_model() -> Check:
    try:
        file = models.bundled_file()
    except InputError:
        return Check(models.BUNDLED, "not installed", False, models.INSTALL_BUNDLED)
    return Check(models.BUNDLED, f"{file.name}, {show_bytes(file.stat().st_size)}", True)


def _cache() -> Check:
    try:
        folder = models.cache_folder()
    except InputError as error:
        return Check("cache", str(error), False)
    if not home.can_be_written(folder):
        return Check("cache", f"{folder} cannot be written", False, "set HARNESS_CACHE to a folder that can")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    remedy = "" if free > _LEAST_FREE else "free some space, or set HARNESS_CACHE to a folder with more space"
    return Check("cache", f"{redact_home(str(folder))}, {show_bytes(free)} free", free > _LEAST_FREE, remedy)


_OPTIONAL = {
    "optuna": "for tuning",
    "ray": "for several machines",
    "torchao": "for quantizer: torchao",
    "hqq": "for quantizer: hqq",
    "liger-kernel": "for loss: liger",
    "cut-cross-entropy": "for loss: cce",
}


def _optional() -> list[Check]:
    return [
        Check(name, version(name) or f"not installed ({purpose})", None, "" if version(name) else f"pip install {name}")
        for name, purpose in _OPTIONAL.items()
        if importlib.util.find_spec(name) is None or version(name)
    ]
