"""The launcher of a run or a search, set up from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness._util.messages import pip_install
from harness.errors import InputError

if TYPE_CHECKING:  # imported where they are used: --help must answer at once
    from harness.grids.grid import Grid
    from harness.launch.launcher import Launcher


_ENGINES = ("local", "ray", "submitit", "inline")
_REMOTE = ("ray", "submitit")
_OF_ENGINES = {
    "address": ("ray",),
    "cpus": ("ray", "submitit"),
    "accelerator": ("ray",),
    "partition": ("submitit",),
    "job_minutes": ("submitit",),
    "array": ("submitit",),
}
"""Options that go with some engines alone."""


@dataclass(frozen=True)
class LauncherOptions:
    """Options of the command line that say where trials run, and how many at the same time."""

    engine: str
    workers: str | None
    address: str | None
    cpus: int | None
    accelerator: str | None
    partition: str | None = None
    job_minutes: int | None = None
    array: bool | None = None

    @property
    def remote(self) -> bool:
        """Whether trials run on other machines, whose cards and rates are unknown here."""
        return self.engine in _REMOTE

    def check(self) -> None:
        """Refuse what is wrong whatever the grid is.

        Raises:
            InputError: there is no such engine, an option belongs to another one, or `workers` is no number.
        """
        if self.engine not in _ENGINES:
            raise InputError(f"unknown --engine {self.engine!r}; use {', '.join(_ENGINES)}")
        for name, engines in _OF_ENGINES.items():
            if getattr(self, name) is not None and self.engine not in engines:
                option = name.replace("_", "-")
                raise InputError(f"--{option} goes with --engine {' or '.join(engines)}; add that, or leave it out")
        if self.workers not in (None, "auto"):
            _count(self.workers)


def make_launcher(options: LauncherOptions, grid: Grid) -> Launcher:
    """The launcher of a grid's trials; nothing is started before it is entered.

    Raises:
        InputError: the engine cannot run these trials, this machine is too small for the workers, or Ray is missing.
    """
    if options.engine == "inline":
        from harness.launch.inline import InlineLauncher

        processes = max(trial.spec.num_processes for trial in grid.trials)
        if processes > 1:
            raise InputError(f"num_processes {processes} takes processes of its own; use --engine local")
        return InlineLauncher()
    if options.engine == "ray":
        return _ray(options, grid)
    if options.engine == "submitit":
        return _submitit(options, grid)
    from harness.launch.local import LocalLauncher

    return LocalLauncher(_local_workers(options.workers, grid))


def _ray(options: LauncherOptions, grid: Grid) -> Launcher:
    try:
        from harness.launch.cluster import RayLauncher
    except ImportError:
        raise InputError(f"--engine ray: Ray is not installed; {pip_install('ray')}") from None
    return RayLauncher(
        options.address,
        device=_one_device(grid, "ray"),
        most_workers=None if options.workers in (None, "auto") else _count(options.workers),
        cpus=options.cpus,
        accelerator=options.accelerator,
        processes={trial.spec.num_processes for trial in grid.trials},
    )


def _submitit(options: LauncherOptions, grid: Grid) -> Launcher:
    try:
        from harness.launch.scheduler import MINUTES, SubmititLauncher
    except ImportError:
        raise InputError(f"--engine submitit: it is not installed; {pip_install('submitit')}") from None
    if options.workers == "auto":
        raise InputError("--workers auto with --engine submitit: say how many jobs at the same time, like 8")
    return SubmititLauncher(
        options.partition,
        device=_one_device(grid, "submitit"),
        workers=_count(options.workers),
        cpus=options.cpus,
        minutes=options.job_minutes or MINUTES,
        array=bool(options.array),
        processes={trial.spec.num_processes for trial in grid.trials},
    )


def _one_device(grid: Grid, engine: str) -> str:
    devices = {trial.spec.device for trial in grid.trials}
    if len(devices) > 1:
        given = " and ".join(sorted(devices))
        raise InputError(f"trials for {given}; with --engine {engine} give --device, one for all")
    return devices.pop()


def _count(workers: str | None) -> int:
    if workers is None:
        return 1
    if not (workers.isascii() and workers.isdigit() and int(workers)):
        raise InputError(f"--workers {workers} is no number of workers; give 1, 2, … or auto")
    return int(workers)


def _local_workers(workers: str | None, grid: Grid) -> int:
    """How many trials run at the same time on this machine."""
    from harness import environment

    devices = {environment.resolve_device(trial.spec.device) for trial in grid.trials}
    by_cards = max(1, len(environment.cards())) if devices == {"cuda"} else 1
    count = by_cards if workers == "auto" else _count(workers)
    if count > 1:
        if len(devices) > 1:
            raise InputError(f"--workers {count}: trials for cpu and for cuda; give --device, one for all")
        if any(trial.spec.num_processes > 1 for trial in grid.trials):
            raise InputError(f"--workers {count}: trials over several processes run one at a time; leave it out")
        environment.divide_machine(count, devices.pop())
    return count
