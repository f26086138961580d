"""What trials need from the machine and the hub, checked before the first process starts."""

from __future__ import annotations

from typing import Any

from harness.environment import cards, current, missing_for_compiler, resolve_device
from harness.errors import InputError
from harness.grids.grid import Grid, Trial
from harness.sources import splits, stories, task_files
from harness.sources.splits import Counts
from harness.spec.keys import FUSED_LOSSES


def preflight(grid: Grid, *, to_plan: bool = False, remote: bool = False) -> None:
    """Check that what the trials need is available: a card, datasets with their columns and enough rows, models.

    Args:
        grid: the trials.
        to_plan: nothing will be trained: no card is needed, and only the config of a model.
        remote: trials run on other machines: no card is needed here.

    Raises:
        InputError: something is missing.
    """
    from harness.sources import models

    runs_locally = not to_plan and not remote
    if runs_locally and any(t.spec.device == "cuda" for t in grid.trials) and resolve_device("auto") != "cuda":
        raise InputError(
            f"{grid.name}: device is cuda, and there is no card that torch could use; "
            "give --device cpu, or look at harness doctor"
        )
    if runs_locally:
        for trial in grid.trials:
            _refuse_too_many_processes(trial)
            _refuse_without_compiler(trial)
    for name, folder in dict.fromkeys(
        (name, t.spec.folder) for t in grid.trials for name in t.spec.evaluate_tasks or ()
    ):
        task_files.check(name, folder)
    counted: dict[Any, Counts] = {}
    for spec in (t.spec for t in grid.trials):
        data = (spec.datasets, spec.test_datasets, spec.folder, spec.skip_empty_rows)
        if data not in counted:
            counted[data] = splits.counts(stories.read_all(spec))
        counted[data].held_out(spec.val_set_size)
    for name, folder in dict.fromkeys((t.spec.base_model, t.spec.folder) for t in grid.trials):
        models.check(name, folder, weights=not to_plan)


def _refuse_too_many_processes(trial: Trial) -> None:
    on_cards = resolve_device(trial.spec.device) == "cuda"
    there, what = (len(cards()), "card") if on_cards else (current("cpu").cpu_cores, "core")
    if trial.spec.num_processes > max(1, there):
        raise InputError(
            f"{trial.label}: num_processes {trial.spec.num_processes}, and {there} {what}{'s' * (there != 1)} here; "
            f"each process takes a {what}"
        )


def _refuse_without_compiler(trial: Trial) -> None:
    spec, device_type = trial.spec, resolve_device(trial.spec.device)
    on_cards = device_type == "cuda"
    compiled = {
        ("torch_compile", "torch_compile: false"): spec.torch_compile,
        ("attention flex_attention", "attention: sdpa"): on_cards and spec.attention == "flex_attention",
        (f"loss {spec.loss}", "loss: chunked"): on_cards and spec.loss in FUSED_LOSSES,  # triton's launchers are in C
    }
    for names, asked in compiled.items():
        if asked and (missing := missing_for_compiler(device_type, *names)):
            raise InputError(f"{trial.label}: {missing}")
