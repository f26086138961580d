"""`harness tune`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness._util.terminal import plain
from harness._util.units import counted
from harness.cli import failures, options
from harness.cli.console import out
from harness.cli.inspection import inspect_trials
from harness.cli.launchers import LauncherOptions, make_launcher
from harness.cli.predictions import capability_of, device_rates
from harness.cli.training_files import print_training_file
from harness.errors import InputError, TrialsFailed

if TYPE_CHECKING:  # imported where they are used: --help must answer at once
    from harness.environment import Environment
    from harness.results.store import Store
    from harness.tuning.study import Outcome

SEARCH = "Search"


def tune(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="A grid file with a tune: section.")],
    source: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="RESULTS",
            rich_help_panel=SEARCH,
            help="Results whose rows the search starts from; may be repeated.",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=SEARCH, help="Trials in all, instead of the file's."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=1, metavar="SECONDS", rich_help_panel=SEARCH, help="Time of the search, after which no trial starts."
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=SEARCH, help="tpe, gp, nsga2, random or brute-force."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**31 - 1,
            metavar="N",
            rich_help_panel=SEARCH,
            help="Seed of the sampler, instead of the file's.",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            rich_help_panel=SEARCH,
            help="Optuna storage; default an SQLite file, results/<grid>/study.db.",
        ),
    ] = None,
    memory: options.Memory = None,
    trial_timeout: options.Timeout = None,
    stall: options.Stall = options.STALL_SECONDS,
    retries: options.Retries = 0,
    allow_failures: options.AllowFailures = False,
    device: options.Device = None,
    workers: options.Workers = None,
    engine: options.Engine = "local",
    address: options.Address = None,
    cpus: options.Cpus = None,
    accelerator: options.Accelerator = None,
    partition: options.Partition = None,
    job_minutes: options.JobMinutes = None,
    array: options.Array = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=options.OUTPUT, help="Write the recommended configuration as a grid file."
        ),
    ] = None,
    without_unsupported: options.WithoutUnsupported = False,
    results: options.Results = Path("results"),
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Search a space for the best configuration within bounds, and confirm the winner in fresh repeats.

    The same command continues the same study, and several of them may work on it at once.
    """
    from harness.grids import preflight, search_file
    from harness.grids.grid import Grid, Trial
    from harness.results.store import Store

    where = LauncherOptions(engine, workers, address, cpus, accelerator, partition, job_minutes, array)
    where.check()
    options.check_memory(memory)
    if export is not None and export.is_dir():
        raise InputError(f"--export {export} is a folder; give a file")
    overrides = {key: value for key, value in (("memory_budget", memory), ("device", device)) if value is not None}
    search = search_file.load(grid, overrides, without_unsupported=without_unsupported)
    print_training_file(search.training_file, grid)
    search = search_file.with_limits(search, trials=trials, timeout=timeout, sampler=sampler, seed=seed)
    bases = [search.base.model_copy(update={"num_processes": n}) for n in sorted(search.processes)]
    base = Grid(search.name, search.title, "list", tuple(Trial(spec, "tune", None, None) for spec in bases))
    preflight.preflight(base, remote=where.remote)
    inspect_trials(base.trials, trust_remote_code, remote=where.remote)
    for folder in source or []:
        if not (folder / "trials").is_dir():
            raise InputError(f"--from {folder}: no trials there; give results/<grid>, which `harness run` writes")

    from harness import environment
    from harness.cli.progress import display
    from harness.predict.predictor import Predictor
    from harness.runner.execution import Policy
    from harness.tuning import samplers, study

    store = Store(results / search.name)
    store.set_aside()
    objectives = ", ".join(f"{o.metric} ({o.direction})" for o in search.objectives)
    out.print(f"[bold]{plain(search.title)}[/]: {len(search.parameters)} parameters, {objectives}", highlight=False)
    opened = samplers.open_storage(storage, store)
    policy = Policy(trial_timeout, stall or None, retries, trust_remote_code=trust_remote_code, skip_infeasible=True)
    how = study.Options(storage=opened, sources=tuple(source or ()), policy=policy)
    device_type = environment.resolve_device(search.base.device)
    interrupted = False
    with failures.allowed(allow_failures), make_launcher(where, base) as launcher:
        with contextlib.ExitStack() as stack:
            if not where.remote:
                capability = capability_of(environment.current(device_type))
                made = Predictor(capability=capability, trust_remote_code=trust_remote_code)
                predictor = stack.enter_context(made)
                rates = device_rates(device_type) if launcher.workers == 1 else None
                how = dataclasses.replace(how, predictor=predictor, rates=rates)
            with display(out) as progress:
                outcome = study.tune(
                    search, store, launcher, progress, how, lambda line: out.print(plain(line), style="dim")
                )
        interrupted = outcome.interrupted
        _print_outcome(outcome, store, grid, export, launcher.environments(device_type))
    if interrupted:  # failures that are allowed end the block above
        raise typer.Exit(failures.INTERRUPTED)


def _print_outcome(
    outcome: Outcome, store: Store, grid: Path, export: Path | None, environments: tuple[Environment, ...]
) -> None:
    """The result of a search.

    Raises:
        TrialsFailed: there is none, or a trial failed.
    """
    from harness.analysis import loading
    from harness.report import tuning as reporting

    name = plain(store.folder.name)
    before = f", {outcome.warm} known before" if outcome.warm else ""
    folder = plain(str(store.folder))
    out.print(f"{outcome.tried} trials{before} in study {outcome.study}, kept in {folder}", highlight=False)
    left = [counted(n, what) for n, what in ((outcome.left, "trial"), (outcome.visits_left, "timing visit")) if n]
    if left:
        out.print(f"{' and '.join(left)} left; go on with the same command", highlight=False)
    measurements = loading.load(store.folder, here=environments)
    summary = reporting.summarize(measurements, store.folder)
    if summary is None:
        raise TrialsFailed(f"{name}: no trial of the study ended well; look at harness ls {name}")
    for sentence in summary.sentences:
        out.print(f"- {plain(sentence)}", highlight=False)
    if export is not None:
        export.parent.mkdir(parents=True, exist_ok=True)
        export.write_text(summary.yaml, encoding="utf-8")
        file = plain(str(export))
        out.print(f"written to {file}; run it with: harness run {file}", highlight=False, soft_wrap=True)
    out.print(f"see it with: harness report {folder}", highlight=False)
    rows = store.read("trials", ["trial_id", "label", "repeat", "status", "log", "study"]).to_pylist()
    # Fresh repeats of the winner and its rivals are of no study.
    mine = [row for row in rows if row["study"] in (outcome.study, None)]
    failures.refuse(mine, store.folder, complete=not outcome.left)
