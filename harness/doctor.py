"""What this machine is and what works on it. Packages are looked up, not imported."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness import environment, model_source
from harness.cleaning import leftovers
from harness.environment import version
from harness.errors import InputError
from harness.metrics import show_bytes
from harness.results import DamagedPart, Store

REQUIRED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "pandas", "pyarrow")
_LEAST_FREE = 2 * 2**30


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    what: str
    detail: str
    works: bool | None
    """null: a matter of fact, neither good nor bad."""
    remedy: str = ""


def examine() -> list[Check]:
    """Everything that a run rests on, in the order in which it needs it."""
    return [*_device(), *_packages(), _bundled_model(), _cache(), *_optional()]


def examine_results(stores: Iterable[Store]) -> list[Check]:
    """What is wrong with recorded results, grid by grid."""
    return [check for store in stores for check in _results(store)]


def _results(store: Store) -> list[Check]:
    name, damaged = store.folder.name, store.damage()
    with warnings.catch_warnings(action="ignore", category=DamagedPart):  # each is a check of its own
        statuses = Counter(store.read("trials", ["trial_id", "status"])["status"].to_pylist())
        lost, left = store.incomplete(), leftovers(store)
    said = ", ".join(f"{count} {status}" for status, count in statuses.most_common()) or "none that can be read"
    found = [Check(name, f"trials: {said}", not damaged and not lost)]
    for part, reason in damaged.items():
        remedy = "the next `harness run` sets it aside and does its trials again"
        found.append(Check(f"{name}/{part.parent.name}/{part.name}", reason, False, remedy))
    gone, aside = "its steps or stories are gone", "was set aside; look at it, or remove it"
    found += [Check(f"{name}: {trial}", gone, False, "`harness run` does it again") for trial in sorted(lost)]
    found += [Check(f"{name}/set-aside/{file.name}", aside, None) for file in sorted(store.folder.glob("set-aside/*"))]
    if left:
        size = show_bytes(sum(each.size for each in left))
        found.append(Check(name, f"{len(left)} leftovers of runs, {size}", None, "`harness clean` frees them"))
    return found


def _device() -> list[Check]:
    device = environment.resolve_device("auto")
    here = environment.current(device)
    found = [
        Check("device", f"{device}: {here.device_name}, {show_bytes(here.device_memory_bytes)}", True),
        Check("processor", f"{here.cpu_name}, {here.cpu_cores} cores", None),
    ]
    if environment.cards() and device == "cpu":
        found.append(Check("CUDA", "a card is there, and torch is a CPU build", False, "install a CUDA build of torch"))
    elif device == "cpu":
        found.append(Check("CUDA", "no card; trials run on the CPU, in every precision", None))
    if device == "cpu" and here.half_matmul == "fp32-blocks":
        found.append(
            Check("16-bit products", "no instructions for them here; done in blocks of fp32, at fp32 speed", None)
        )
    return found


def _packages() -> list[Check]:
    found = []
    for name in REQUIRED:
        installed = version(name)
        remedy = "" if installed else f"pip install {name}"
        found.append(Check(name, installed or "not installed", installed is not None, remedy))
    return found


def _bundled_model() -> Check:
    try:
        file = model_source.bundled_file()
    except InputError:
        return Check(model_source.BUNDLED, "not installed", False, model_source.INSTALL_BUNDLED)
    return Check(model_source.BUNDLED, f"{file.name}, {show_bytes(file.stat().st_size)}", True)


def _cache() -> Check:
    folder = model_source.cache_folder()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    remedy = "" if free > _LEAST_FREE else "free some space, or set HARNESS_CACHE to a roomier folder"
    return Check("cache", f"{_short(folder)}, {show_bytes(free)} free", free > _LEAST_FREE, remedy)


def _short(folder: Path) -> str:
    return str(folder).replace(str(Path.home()), "~", 1)


def _optional() -> list[Check]:
    return [
        Check(name, version(name) or f"not installed ({purpose})", None, "" if version(name) else f"pip install {name}")
        for name, purpose in (("optuna", "for tuning"), ("ray", "for several machines"))
        if importlib.util.find_spec(name) is None or version(name)
    ]
