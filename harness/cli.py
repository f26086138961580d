"""The commands. Errors become one line and an exit code: 2 for bad input, 1 for a run that could not go on."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from harness import __version__
from harness.errors import InputError, says_disk_full
from harness.terminal import plain, printable

if TYPE_CHECKING:  # imported where they are used: --help shall answer at once
    from harness.grid import Grid, Trial
    from harness.launch.planner import Planned, Planner
    from harness.prediction import Expected
    from harness.report.measurements import Measurements
    from harness.report.planned import Plan
    from harness.results import Store
    from harness.roofline import Rates
    from harness.spec import TrialSpec
    from harness.tune import Outcome

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure what each fine-tuning technique costs and buys: memory, speed and loss, on your machine.",
    epilog="[dim]Begin with[/] harness run grids/smoke.yml[dim], then[/] harness report results/smoke",
)
out = Console(emoji=False)  # a label may say :boom:
err = Console(stderr=True, emoji=False)

Results = Annotated[Path, typer.Option("--results", help="Folder that holds a folder for each grid.")]


_Timeout = Annotated[float | None, typer.Option(min=1, help="Seconds that a trial may take.")]
_Stall = Annotated[float, typer.Option(min=0, help="Seconds that a step may give no sign of life; 0: any.")]
_Retries = Annotated[int, typer.Option(min=0, help="More attempts at a trial whose process was killed or lost.")]


_Workers = Annotated[
    str | None,
    typer.Option(help="Trials at the same time, each with its share of the cores; auto: one for each card."),
]
_Engine = Annotated[
    str, typer.Option(help="local: processes here; ray: tasks of a cluster; inline: this process, for a debugger.")
]
_Address = Annotated[str | None, typer.Option(help="With --engine ray: the cluster's address, or auto.")]
_Cpus = Annotated[int | None, typer.Option(min=1, help="With --engine ray: cores of a trial, instead of a node's.")]
_Accelerator = Annotated[str | None, typer.Option(help="With --engine ray: kind of card, like H100; no other is used.")]


def main() -> None:
    """Entry point of the `harness` command."""
    warnings.showwarning = _warn
    try:
        app()
    except InputError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped; what was finished is kept, and the same command goes on from there", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away (| head); there is nobody to tell
        raise SystemExit(1) from None
    except OSError as error:
        after = "; what was finished is kept: free some space, and run the same again" if says_disk_full(error) else ""
        _fail((f"{error.strerror or error}: {error.filename}" if error.filename else str(error)) + after, 1)


def _fail(message: str, code: int) -> None:
    err.print(f"[red]harness:[/] {plain(' '.join(message.split()))}", soft_wrap=True, highlight=False)
    raise SystemExit(code)


def _warn(message: Warning | str, category: type[Warning], *where: Any, **how: Any) -> None:
    """One line for what a user should know of; what libraries tell each other is for logs."""
    if category.__module__.startswith("harness"):
        err.print(f"[yellow]harness:[/] {plain(' '.join(str(message).split()))}", soft_wrap=True, highlight=False)


def _version(asked: bool) -> None:
    if asked:
        out.print(f"harness {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="[dim]Examples:[/]  harness run grids/techniques.yml   |   harness run grids/smoke.yml --repeats 3   |   "
    "harness run my.yml --memory 8GiB --dry-run"
)
def run(
    grid: Annotated[Path, typer.Argument(help="A grid file, or a training file as a grid of one trial.")],
    results: Results = Path("results"),
    model: Annotated[str | None, typer.Option(help="Base model of every trial, instead of the file's.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Repeats of each trial, instead of the file's.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory budget of every trial, like 24GiB; enforced.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, instead of the file's.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run no more than the trials of this label ('lora_r=*' means several), and the baseline."),
    ] = None,
    timeout: _Timeout = None,
    stall: _Stall = 1800,
    workers: _Workers = None,
    engine: _Engine = "local",
    address: _Address = None,
    cpus: _Cpus = None,
    accelerator: _Accelerator = None,
    retries: _Retries = 0,
    retry_timeouts: Annotated[
        bool, typer.Option("--retry-timeouts", help="Count a trial that took too long among those.")
    ] = False,
    rerun: Annotated[
        list[str] | None, typer.Option(help="Run recorded trials of this status again (failed, oom, …, or all).")
    ] = None,
    until_decided: Annotated[
        int | None,
        typer.Option("--until-decided", min=2, help="Go on repeating, up to so many times, what is not yet decided."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Run at most so many trials now.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Begin no trial after so many minutes.")] = None,
    max_trials: Annotated[int | None, typer.Option(min=1, help="Accept a grid of so many trials.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials and run none.")] = False,
    predict: Annotated[bool, typer.Option(help="Predict each peak beforehand, to be kept beside the measured.")] = True,
    skip_infeasible: Annotated[
        bool, typer.Option("--skip-infeasible", help="Do not start what is predicted not to fit; record it as skipped.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let models from the hub run their own code here.")
    ] = False,
) -> None:
    """Run the trials of a grid that are not recorded yet, each in a process of its own."""
    began = time.monotonic()
    from harness import grid as grids
    from harness.results import Store

    given = {"base_model": model, "memory_budget": memory, "device": device}
    overrides = {key: value for key, value in given.items() if value is not None}
    most_trials = max_trials or grids.MAX_TRIALS

    def grid_of(times: int | None) -> Grid:
        found = grids.load(grid, repeats=times, overrides=overrides, max_trials=most_trials)
        return found.only(grids.labels_like(found, only)) if only else found

    _refuse_in_vain(engine, address=address, cpus=cpus, accelerator=accelerator)
    loaded = grid_of(repeats)
    if until_decided is not None and until_decided < loaded.repeats:
        raise InputError(f"--until-decided {until_decided} is less than the {loaded.repeats} repeats of the grid")
    if skip_infeasible and not predict:
        raise InputError("--skip-infeasible needs the predictions; leave --no-predict out")
    # What was skipped is run by whoever does not ask for skipping.
    statuses = _statuses([*(rerun or []), *([] if skip_infeasible else ["skipped"])])
    store = Store(results / loaded.name)
    if dry_run:
        _print_trials(loaded, store, statuses)
        return
    grids.preflight(loaded if until_decided is None else grid_of(until_decided), elsewhere=engine == "ray")
    store.set_aside()

    from harness import environment, launch
    from harness.display import display
    from harness.launch.local import LocalLauncher
    from harness.prediction import NOTHING_EXPECTED
    from harness.report import faces, measurements, tables
    from harness.until_decided import until_decided as decide

    out.print(f"[bold]{plain(loaded.title)}[/]: {len(loaded.trials)} trials", highlight=False)
    until = None if minutes is None else began + 60 * minutes

    def execute(grid_now: Grid) -> bool:
        with contextlib.ExitStack() as stack:
            pending = launch.pending(grid_now, store, statuses)[:limit]
            if pending and engine == "local":  # a server that imports torch is not started for nothing
                stack.enter_context(launcher)
            foretold = predict and engine != "ray"  # what a node would hold is not known here
            specs = [trial.spec for trial in pending]
            expected = _expected(specs, trust_remote_code, alone=team == 1) if foretold else NOTHING_EXPECTED
            shown = display(out)
            stack.enter_context(shown)
            summary = launch.run_grid(
                grid_now,
                store,
                launcher,
                shown,
                policy,
                rerun=statuses,
                limit=limit,
                until=until,
                expected=expected,
            )
        _print_summary(summary, store, grid)
        return summary.left == 0

    with contextlib.ExitStack() as where:
        # The table too is of the environment that trials find themselves in.
        if engine == "local":
            launcher: Any = LocalLauncher()
            team = _workers(workers, loaded)
            where.enter_context(environment.divided(team))
        else:
            launcher = where.enter_context(_launcher(engine, loaded, address, cpus, accelerator))
            team = _most(workers, launcher.workers)
            where.enter_context(environment.elsewhere(getattr(launcher, "nodes", ())))
        policy = launch.Policy(
            timeout, stall or None, retries, retry_timeouts, trust_remote_code, skip_infeasible, workers=team
        )
        if until_decided is None:
            execute(loaded)
        else:
            still_open = decide(grid_of, loaded.repeats, until_decided, execute, store.folder)
            said = ", ".join(sorted(still_open)) or "none"
            out.print(f"not decided within {until_decided} repeats: {plain(said)}", highlight=False)
        if store.completed():
            found = measurements.load(store.folder, baseline_ids={t.baseline_id for t in loaded.trials})
            out.print(faces.terminal(tables.compare(found)))


@app.command(
    epilog="[dim]Examples:[/]  harness tune grids/tune.yml --from results/techniques   |   "
    "harness tune grids/tune.yml --trials 60 --export best.yml   |   harness tune my.yml --memory 12GiB --sampler gp"
)
def tune(
    grid: Annotated[Path, typer.Argument(help="A grid file with a tune: section.")],
    results: Results = Path("results"),
    source: Annotated[
        list[Path] | None, typer.Option("--from", help="Results whose rows the search starts from; may be repeated.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in all, instead of the file's.")] = None,
    timeout: Annotated[float | None, typer.Option(min=1, help="Seconds in which a trial may begin.")] = None,
    trial_timeout: _Timeout = None,
    stall: _Stall = 1800,
    retries: _Retries = 0,
    workers: _Workers = None,
    engine: _Engine = "local",
    address: _Address = None,
    cpus: _Cpus = None,
    accelerator: _Accelerator = None,
    memory: Annotated[str | None, typer.Option(help="Memory budget, like 12GiB, instead of the file's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, instead of the file's.")] = None,
    sampler: Annotated[str | None, typer.Option(help="tpe, gp, nsga2, random or brute-force.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the sampler, instead of the file's.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL; default an SQLite file, results/<grid>/study.db.")
    ] = None,
    export: Annotated[Path | None, typer.Option(help="Write the recommended configuration as a grid file.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let models from the hub run their own code here.")
    ] = False,
) -> None:
    """Search a space for the best configuration within bounds, and confirm what was found in fresh repeats.

    The same command goes on with the same study, and several of them may work on it at once.
    """
    from harness import grid as grids
    from harness import search as searches
    from harness.grid import Grid, Trial
    from harness.results import Store

    _refuse_in_vain(engine, address=address, cpus=cpus, accelerator=accelerator)
    overrides = {key: value for key, value in (("memory_budget", memory), ("device", device)) if value is not None}
    search = searches.load(grid, overrides)
    search = searches.with_limits(search, trials=trials, timeout=timeout, sampler=sampler, seed=seed)
    counts = [search.base.model_copy(update={"num_processes": n}) for n in sorted(search.processes)]
    base = Grid(search.name, search.title, "list", tuple(Trial(spec, "tune", None, None) for spec in counts))
    grids.preflight(base, elsewhere=engine == "ray")
    for folder in source or []:
        if not (folder / "trials").is_dir():
            raise InputError(f"--from {folder}: no trials there; give results/<grid>, which `harness run` writes")

    from harness import environment
    from harness import tune as tuning
    from harness.display import display
    from harness.launch import Policy
    from harness.launch.local import LocalLauncher
    from harness.launch.planner import Planner

    store = Store(results / search.name)
    store.set_aside()
    said = ", ".join(f"{o.metric} ({o.direction})" for o in search.objectives)
    out.print(f"[bold]{plain(search.title)}[/]: {len(search.parameters)} parameters, {said}", highlight=False)
    opened = tuning.open_storage(storage, store)
    with contextlib.ExitStack() as where:
        if engine == "local":
            team = _workers(workers, base)
            where.enter_context(environment.divided(team))
            launcher: Any = where.enter_context(LocalLauncher())
        else:
            launcher = where.enter_context(_launcher(engine, base, address, cpus, accelerator))
            team = _most(workers, launcher.workers)
            where.enter_context(environment.elsewhere(getattr(launcher, "nodes", ())))
        policy = Policy(
            trial_timeout,
            stall or None,
            retries,
            trust_remote_code=trust_remote_code,
            skip_infeasible=True,
            workers=team,
        )
        options = tuning.Options(storage=opened, sources=tuple(source or ()), policy=policy)
        with contextlib.ExitStack() as stack:
            if engine != "ray":  # what a node would hold is not known here
                planner = stack.enter_context(Planner(trust_remote_code=trust_remote_code))
                rates = _rates(environment.resolve_device(search.base.device)) if team == 1 else None
                options = dataclasses.replace(options, planner=planner, rates=rates)
            shown: Any = stack.enter_context(display(out))
            done = tuning.tune(
                search, store, launcher, shown, options, lambda line: out.print(plain(line), style="dim")
            )
        _print_tuned(done, store, grid, export)


def _print_tuned(done: Outcome, store: Store, grid: Path, export: Path | None) -> None:
    """What a search came to.

    Raises:
        InputError: to nothing.
    """
    from harness.report import measurements
    from harness.report import tuning as reporting

    name = plain(store.folder.name)
    before = f", {done.warm} known before" if done.warm else ""
    out.print(f"{done.tried} trials{before} in study {done.study}, kept in {plain(str(store.folder))}", highlight=False)
    if done.left:
        out.print(f"{done.left} trials are left; go on with: harness tune {plain(str(grid))}", highlight=False)
    found = reporting.findings(measurements.load(store.folder, baseline_ids=None), store.folder)
    if found is None:
        raise InputError(f"{name}: no trial of the study ended well; look at harness ls {name}")
    for sentence in found.sentences:
        out.print(f"- {plain(sentence)}", highlight=False)
    if export is not None:
        export.parent.mkdir(parents=True, exist_ok=True)
        export.write_text(found.yaml, encoding="utf-8")
        out.print(
            f"written to {plain(str(export))}; run it with: harness run {plain(str(export))}",
            highlight=False,
            soft_wrap=True,
        )
    out.print(f"see it with: harness report {plain(str(store.folder))}", highlight=False)


def _refuse_in_vain(engine: str, **options: object) -> None:
    """What is for a cluster says nothing elsewhere.

    Raises:
        InputError: one of the options is given without it.
    """
    given = [name for name, value in options.items() if value is not None]
    if given and engine != "ray":
        raise InputError(f"--{given[0]} goes with --engine ray; add that, or leave it out")


def _launcher(engine: str, grid: Grid, address: str | None, cpus: int | None, accelerator: str | None) -> Any:
    """What runs trials elsewhere than in processes of this machine.

    Raises:
        InputError: there is no such engine, or it is not installed.
    """
    if engine == "inline":
        from harness.launch.inline import InlineLauncher

        return InlineLauncher()
    if engine != "ray":
        raise InputError(f"--engine {engine} is none; use local, ray or inline")
    try:
        from harness.launch.cluster import RayLauncher
    except ImportError:
        raise InputError("--engine ray needs Ray; install it with: pip install 'harness-bench[ray]'") from None
    devices = {trial.spec.device for trial in grid.trials}
    if len(devices) > 1:
        raise InputError(f"trials for {' and '.join(sorted(devices))}; with --engine ray give --device, one for all")
    processes = {trial.spec.num_processes for trial in grid.trials}
    return RayLauncher(address, device=next(iter(devices)), cpus=cpus, accelerator=accelerator, processes=processes)


def _most(asked: str | None, there: int) -> int:
    """How many trials run at the same time, of as many as there is room for."""
    if asked in (None, "auto"):
        return there
    return min(there, _count(asked))


def _count(asked: str | None) -> int:
    if asked is None:
        return 1
    if not (asked.isascii() and asked.isdigit() and int(asked)):
        raise InputError(f"--workers {asked} is no number of workers; give 1, 2, … or auto")
    return int(asked)


def _workers(asked: str | None, grid: Grid) -> int:
    """How many trials run at the same time.

    Raises:
        InputError: it is no number, the machine has no room for so many, or trials differ in where they run.
    """
    from harness import environment

    devices = {environment.resolve_device(trial.spec.device) for trial in grid.trials}
    by_cards = max(1, len(environment.cards())) if devices == {"cuda"} else 1
    count = by_cards if asked == "auto" else _count(asked)
    if count > 1:
        if len(devices) > 1:
            raise InputError(f"--workers {count}: trials for cpu and for cuda; give --device, one for all")
        if any(trial.spec.num_processes > 1 for trial in grid.trials):
            raise InputError(f"--workers {count}: trials over several processes run one at a time; leave it out")
        environment.seats(count, devices.pop())
    return count


def _expected(specs: list[TrialSpec], trust_remote_code: bool, *, alone: bool) -> Expected:
    """What is known of the trials before they begin; what cannot be predicted is run all the same.

    Args:
        specs: of the trials.
        trust_remote_code: let models from the hub run their own code.
        alone: whether each has the machine for itself; what a share of it can do is not known.
    """
    from harness import environment
    from harness.launch.planner import Planner
    from harness.prediction import NOTHING_EXPECTED, Expected

    if not specs:
        return NOTHING_EXPECTED
    rates = _rates(environment.resolve_device(specs[0].device)) if alone else None
    with Planner(trust_remote_code=trust_remote_code) as planner:
        planned = _planned(planner, specs)
    return Expected({p.spec.id: p.prediction for p in planned if p.prediction is not None}, rates)


def _planned(planner: Planner, specs: list[TrialSpec]) -> list[Planned]:
    """Predictions with a bar while they are made."""
    from rich.progress import track

    return list(track(planner.plan(specs), "predicting peaks", total=len(specs), console=out, transient=True))


def _rates(device_type: Literal["cpu", "cuda"]) -> Rates | None:
    """The rates of this machine's device, measured once for each environment; null where they cannot be had."""
    from harness.launch import planner

    known = planner.rates(device_type)
    if known is not None:
        return known
    try:
        with out.status("measuring once what this device can do"):
            found = planner.measure_rates(device_type)
    except (OSError, InputError) as error:
        out.print(
            f"the rates of this {device_type} are not known: {plain(str(error))}", style="yellow", highlight=False
        )
        return None
    out.print(f"this {device_type} at its best: {plain(found.said())}", style="dim", highlight=False)
    return found


@app.command(
    epilog="[dim]Examples:[/]  harness plan grids/llama3-8b.yml --gpu rtx4090,a100-80   |   "
    "harness plan my.yml --memory 24GiB --output plans/my   |   "
    "harness plan my.yml --gpu l4 --largest micro_batch_size   |   harness plan --calibrate results"
)
def plan(
    grid: Annotated[Path | None, typer.Argument(help="A grid file, or a training file as a grid of one trial.")] = None,
    memory: Annotated[
        list[str] | None, typer.Option(help="Memory that there is, like 24GiB; may be repeated, a column for each.")
    ] = None,
    gpu: Annotated[list[str] | None, typer.Option(help="Cards, like rtx4090,l4,a100-80; a column for each.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, instead of the file's; cards are cuda.")] = None,
    largest: Annotated[
        str | None, typer.Option(help="Largest value that fits: micro_batch_size, sequence_length or lora_r.")
    ] = None,
    full_length: Annotated[
        bool, typer.Option("--full-length", help="As if every example filled the sequence, however short the stories.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for plan.json, plan.parquet, plan.svg and plan.png.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Results to learn the predictions' error from; kept for later plans.")
    ] = None,
    results: Results = Path("results"),
    max_trials: Annotated[int | None, typer.Option(min=1, help="Accept a grid of so many trials.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let models from the hub run their own code here.")
    ] = False,
) -> None:
    """Predict the peak memory and time of every trial, without a GPU and without weights, and say what fits."""
    if calibrate is not None:
        _calibrate(calibrate, results, trust_remote_code)
        if grid is None:
            return
    if grid is None:
        raise InputError("harness plan needs a grid file, or --calibrate with a results folder")
    from harness import calibration, cards, environment
    from harness import grid as grids
    from harness.launch import planner as planning
    from harness.prediction import HERE, room_of
    from harness.report import planned

    rooms = _rooms(memory or [], gpu or [])
    if gpu and device == "cpu":
        raise InputError("--gpu names CUDA cards, and --device is cpu; leave one of them out")
    if largest is not None and output is not None:
        raise InputError("--largest writes no files; leave --output out")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)  # that it cannot be written is known before the work
    overrides = {} if device is None else {"device": device}
    loaded = grids.load(grid, repeats=1, overrides=overrides, max_trials=max_trials or grids.MAX_TRIALS)
    grids.preflight(loaded, to_plan=True)
    trials = sorted((trial for trial in loaded.trials if not trial.twin), key=_by_factor)
    targets = {environment.resolve_device("cuda" if gpu else trial.spec.device) for trial in trials}
    if len(targets) > 1:
        raise InputError(f"{loaded.name}: its trials are for cpu and for cuda; give --device, one plan for each")
    target = targets.pop()
    here = environment.current(target)
    is_here = target == "cpu" or environment.resolve_device("auto") == "cuda"
    if is_here and not gpu:
        rooms = rooms or {HERE: room_of(here)}
    about: dict[str, Any] = {
        "title": loaded.title,
        "device_type": target,
        "rooms": rooms,
        "calibration": calibration.kept(results, target, here),
    }
    if len(rooms) == 1 and rooms.keys() <= cards.RATES.keys():
        (card,) = rooms
        about |= {"rates": cards.RATES[card], "rates_from": f"the {card}'s data sheet"}
    elif is_here and not gpu and largest is None:
        about["rates"] = _rates(target)
    with planning.Planner(
        target, full_length=full_length or largest is not None, trust_remote_code=trust_remote_code
    ) as p:
        if largest is not None:
            _print_largest(planned.Plan(lines=(), **about), p, {t.label: t.spec for t in trials}, largest)
            return
        found = {each.spec.id: each for each in _planned(p, [t.spec for t in trials])}
    lines = tuple(planned.Line(t.label, t.spec, found[t.spec.id].prediction, found[t.spec.id].error) for t in trials)
    made = planned.Plan(lines=lines, **about)
    out.print(planned.terminal(made, out.width))
    for note in made.footnotes():
        out.print(plain(note), style="dim", highlight=False)
    if output is not None:
        written = planned.write(made, output)
        out.print(
            f"{', '.join(file.name for file in written)} written to {plain(str(output))}",
            highlight=False,
            soft_wrap=True,
        )


def _by_factor(trial: Trial) -> tuple[Any, ...]:
    """The baseline first, then factor by factor, levels in their natural order."""
    number = trial.level if isinstance(trial.level, str) else ""
    natural = float(number) if number.replace(".", "", 1).isdigit() else float("inf")
    return not trial.baseline, trial.factor or "", natural, trial.label


def _rooms(memory: list[str], gpu: list[str]) -> dict[str, int]:
    """Bytes that there are, by the name of a card or the amount as it was given."""
    from harness import cards
    from harness.spec import parse_bytes

    rooms = {}
    for text in memory:
        try:
            rooms[text] = parse_bytes(text)
        except ValueError as error:
            raise InputError(f"--memory: {error}") from None
    for name in (part.strip().lower() for names in gpu for part in names.split(",")):
        try:
            rooms[name] = cards.available(name)
        except ValueError as error:
            raise InputError(f"--gpu: {error}") from None
    return rooms


def _print_largest(plan: Plan, planner: Planner, trials: dict[str, TrialSpec], key: str) -> None:
    """The largest value of a key that fits, for each trial and each amount of memory."""
    from harness import largest as searching
    from harness.report import planned

    if not plan.rooms:
        raise InputError("--largest needs to know what there is: give --memory 24GiB or --gpu rtx4090")
    try:
        specs = searching.apart(trials, key)
        of = len(specs) * len(plan.rooms)
        with out.status("searching") as status:
            found = searching.largest(
                planner,
                list(specs.values()),
                key,
                plan.rooms,
                plan.need,
                plan.device_type,
                lambda done: status.update(f"{done} of {of} answers"),
            )
    except ValueError as error:
        raise InputError(f"--largest: {error}") from None
    labels = {spec.id: label for label, spec in specs.items()}
    most = searching.MOST[key]
    out.print(planned.terminal_largest(plan.title, key, labels, list(plan.rooms), found, most))
    note = f"In brackets its predicted need, with a margin of {plan.margin:.1%}; every example fills the sequence."
    out.print(note, style="dim", highlight=False)


def _calibrate(folder: Path, results: Path, trust_remote_code: bool) -> None:
    """Learn from measured rows how far their predictions are off, for each environment in them."""
    from harness import calibration
    from harness.environment import Environment
    from harness.launch.planner import Planner
    from harness.results import spec_of

    rows = calibration.measured_rows(folder)
    if not rows:
        raise InputError(f"--calibrate {folder}: no trial ended ok there; give results, or results/<grid>")
    for text in sorted({row["environment"] for row in rows}):
        where = Environment.model_validate_json(text)
        mine = [row for row in rows if row["environment"] == text]
        with Planner(where.device_type, trust_remote_code=trust_remote_code) as planner:
            planned = _planned(planner, [spec_of(row) for row in mine])
        try:
            found = calibration.fit_rows(mine, {p.spec.memory_key: p.prediction for p in planned}, where)
        except ValueError as error:
            out.print(f"environment {where.id}: {plain(str(error))}", style="yellow", highlight=False)
            continue
        file = calibration.keep(found, results)
        out.print(f"{plain(found.said())}; written to {plain(str(file))}", highlight=False, soft_wrap=True)


@app.command(
    epilog="[dim]Examples:[/]  harness merge 3f2a1b --out merged/stories   |   "
    "harness merge --config train.yml --adapter models/adapter --out merged/stories"
)
def merge(
    trial: Annotated[
        str | None, typer.Argument(help="Beginning of a trial's id, or its label; it had save_adapter: true.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A training file, for an adapter from elsewhere.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of that adapter, in peft's format.")] = None,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the model; default merged/<trial>.")
    ] = None,
    results: Results = Path("results"),
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let models from the hub run their own code here.")
    ] = False,
) -> None:
    """Merge a LoRA adapter into its base: a model that transformers loads by itself, and what that changed."""
    from rich.table import Table

    from harness.launch import merging
    from harness.metrics import show_bytes

    if trial is not None and config is None and adapter is None:
        source: merging.Trained = merging.trained(results, trial)
    elif trial is None and config is not None and adapter is not None:
        source = merging.Trained(merging.configured(config), adapter, config.stem, {})
    else:
        raise InputError("give either a trial, or --config and --adapter")
    folder = output or Path("merged") / source.name
    with out.status("merging"):
        found = merging.merge(source, folder, trust_remote_code=trust_remote_code)
    table = Table("model", "loss per story (nats)", title="What merging changes")
    for name, losses in found["losses"].items():
        table.add_row(name, f"{sum(losses) / len(losses):.4f}")
    if found["losses"]:
        out.print(table)
        out.print(merging.cost(found), highlight=False)
    out.print(
        f"largest difference of logits, merged from unmerged: {found['largest_logit_difference']:.3g}", style="dim"
    )
    size = show_bytes(found["weights_bytes"])
    out.print(f"{size} of {found['dtype']} weights written to {plain(str(folder))}", highlight=False, soft_wrap=True)


@app.command(epilog="[dim]Examples:[/]  harness evaluate baseline   |   harness evaluate 3f2a1b --stories 5 --rounds 8")
def evaluate(
    trial: Annotated[str, typer.Argument(help="Beginning of a trial's id, or its label; it had save_adapter: true.")],
    rounds: Annotated[
        int, typer.Option(min=2, help="In each, every model is loaded anew and answers the same timed requests.")
    ] = 6,
    told: Annotated[int, typer.Option("--stories", min=0, help="Held-out synopses to tell a story of.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of such a story.")] = 200,
    results: Results = Path("results"),
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let models from the hub run their own code here.")
    ] = False,
) -> None:
    """Time, judge and hear a trained model: the base, the base under its adapter, and the two merged."""
    from harness.display import bar
    from harness.launch import merging, serving
    from harness.report import faces, measurements, served

    source = merging.trained(results, trial)
    with bar(out, "loading") as hear:
        serving.measure(
            source, rounds=rounds, told=told, most_tokens=tokens, hear=hear, trust_remote_code=trust_remote_code
        )
    of = source.row
    found = measurements.load(source.grid, of["environment_id"], {of["baseline_id"]})
    for table in (served.models(found), served.told(found)):
        if table.rows:
            out.print(faces.rich_table(table))
    out.print(
        f"kept beside the trial; see it with: harness report {plain(str(source.grid))}", highlight=False, soft_wrap=True
    )


@app.command(
    epilog="[dim]Examples:[/]  harness generate baseline --synopsis 'A lighthouse keeper finds a letter.'   |   "
    "harness generate 3f2a1b --model base --model merged --temperature 0.7"
)
def generate(
    trial: Annotated[str, typer.Argument(help="Beginning of a trial's id, or its label; it had save_adapter: true.")],
    synopsis: Annotated[
        str | None, typer.Option(help="What the story is about; without it, the first held-out synopsis.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="base, unmerged or merged; may be repeated, side by side. Default unmerged."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a story.")] = 300,
    temperature: Annotated[float, typer.Option(min=0, help="0: the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice, above temperature 0.")] = 0,
    results: Results = Path("results"),
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let models from the hub run their own code here.")
    ] = False,
) -> None:
    """Let a trained model tell a story, as it comes; its base and the merged model beside it where asked."""
    from typing import get_args

    from harness.display import storytelling
    from harness.launch import merging, serving
    from harness.results import Model

    models = tuple(dict.fromkeys(model or ["unmerged"]))
    for name in models:
        if name not in get_args(Model):
            raise InputError(f"--model {name} is none; use {', '.join(get_args(Model))}")
    if synopsis is not None and not synopsis.strip():
        raise InputError("--synopsis is empty; say what the story is about, or leave it out")
    source = merging.trained(results, trial)
    with storytelling(out, models) as hear:
        serving.generate(
            source,
            synopsis,
            models,  # type: ignore[arg-type]  # looked at above
            most_tokens=tokens,
            temperature=temperature,
            seed=seed,
            hear=hear,
            trust_remote_code=trust_remote_code,
        )


def _statuses(given: list[str]) -> frozenset[Any]:
    from typing import get_args

    from harness.results import Status

    known = get_args(Status)
    for status in given:
        if status not in (*known, "all"):
            raise InputError(f"--rerun {status} is no status; use {', '.join(known)} or all")
    return frozenset(known if "all" in given else given)


def _print_trials(loaded: Any, store: Any, statuses: frozenset[Any]) -> None:
    from rich.table import Table

    from harness import launch

    todo = launch.pending(loaded, store, statuses)
    table = Table(title=f"{plain(loaded.title)}: {len(loaded.trials)} trials, {len(todo)} to run")
    for heading in ("#", "trial", "repeat", "spec id", "recorded"):
        table.add_column(heading)
    for number, trial in enumerate(loaded.trials, start=1):
        recorded = "" if trial in todo else "yes"
        table.add_row(str(number), plain(trial.label), str(trial.repeat), trial.spec.id, recorded)
    out.print(table)


def _print_summary(summary: Any, store: Any, grid: Path) -> None:
    from collections import Counter

    if summary.elsewhere:
        out.print(f"{summary.elsewhere} trials were done by another runner meanwhile", highlight=False)
    if not summary.records:
        if not summary.left:
            out.print("all of them are recorded already; nothing to run", highlight=False)
        return
    counts = Counter(record.status for record in summary.records)
    said = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    out.print(f"{len(summary.records)} trials ended ({said}), kept in {plain(str(store.folder))}", highlight=False)
    for record in summary.records:
        if record.status in ("failed", "killed") and record.log is not None:
            out.print(
                f"[red]{plain(record.label)}[/]: see {plain(str(store.folder / record.log))}",
                highlight=False,
                soft_wrap=True,
            )
    if summary.left:
        out.print(f"{summary.left} trials are left; go on with: harness run {plain(str(grid))}", highlight=False)


_Folder = Annotated[Path, typer.Argument(help="Results of a grid.", show_default=True)]
_EnvironmentId = Annotated[str | None, typer.Option(help="Environment id, where there are several.")]


@app.command(
    epilog="[dim]Examples:[/]  harness report   |   harness report results/smoke --output /srv/pages/smoke   |   "
    "harness report results/techniques --environment 3f2a1b00"
)
def report(
    folder: _Folder = Path("results/techniques"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the report; default reports/<grid>.")
    ] = None,
    environment: _EnvironmentId = None,
) -> None:
    """Write the report of a grid: a page, Markdown, CSV, LaTeX and plots; and print its comparison."""
    from harness.report import document, faces

    found = _measurements(folder, environment)
    target = output or Path("reports") / folder.resolve().name
    with out.status("reading the rows") as status:
        said = document.document(found, folder)
        written = faces.write(said, target, lambda name: status.update(f"writing {name}"))
    out.print(faces.terminal(said.comparison))
    out.print("[bold]On this machine[/]")
    for sentence in said.summary:
        out.print(f"- {plain(sentence)}", highlight=False)
    out.print(
        f"{len(written)} files written; open {plain(str(target / 'report.html'))}", highlight=False, soft_wrap=True
    )


def _measurements(folder: Path, environment: str | None) -> Measurements:
    from harness.report import measurements

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give results/<grid>, which `harness run` writes")
    return measurements.load(folder, environment)


@app.command(
    epilog="[dim]Examples:[/]  harness recommend results/techniques --memory 600MiB   |   "
    "harness recommend --max-loss 3.7 --min-speed 100 --output best.yml"
)
def recommend(
    folder: _Folder = Path("results/techniques"),
    memory: Annotated[str | None, typer.Option(help="Memory that there is, like 12GiB.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Highest eval loss, in nats.")] = None,
    min_speed: Annotated[float | None, typer.Option(help="Least tokens per second.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for its YAML; default reports/<grid>/recommended.yml.")
    ] = None,
    environment: _EnvironmentId = None,
) -> None:
    """Name the best measured configuration within limits, say what it trades, and write its YAML."""
    from rich.table import Table

    from harness.metrics import show_bytes
    from harness.report import recommend as recommending
    from harness.report import words
    from harness.spec import parse_bytes

    try:
        limit = None if memory is None else parse_bytes(memory)
    except ValueError as error:
        raise InputError(f"--memory: {error}") from None
    found = _measurements(folder, environment)
    best = recommending.recommend(found, memory=limit, max_loss=max_loss, min_speed=min_speed)
    table = Table(
        "configuration", "memory", "tokens/s", "eval loss", title="What no other one beats, within the limits"
    )
    for number, row in best.choices.iterrows():
        figures = [words.figure(metric, row[metric]) for metric in ("tokens_per_second", "eval_loss")]
        style = "bold" if number == best.config else None
        table.add_row(plain(row["label"]), show_bytes(row["memory"]), *figures, style=style)
    out.print(table)
    for sentence in best.sentences:
        out.print(plain(sentence), highlight=False)
    target = output or Path("reports") / folder.resolve().name / "recommended.yml"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(best.yaml, encoding="utf-8")
    out.print(
        f"written to {plain(str(target))}; run it with: harness run {plain(str(target))}",
        highlight=False,
        soft_wrap=True,
    )


@app.command(
    epilog="[dim]Examples:[/]  harness compare laptop/results/techniques results/techniques   |   "
    "harness compare A B --across-environments"
)
def compare(
    first: Annotated[Path, typer.Argument(help="Results that are compared with.")],
    second: Annotated[Path, typer.Argument(help="Results that are looked at.")],
    environment: Annotated[
        list[str] | None, typer.Option(help="Environment id in the first, and again in the second.")
    ] = None,
    across_environments: Annotated[
        bool, typer.Option("--across-environments", help="Compare speeds of different machines or versions too.")
    ] = False,
) -> None:
    """Compare two runs of a grid, on two machines or under two versions, and say what differs between them."""
    from rich.table import Table

    from harness.report.versus import versus

    ids = environment or []
    if len(ids) > 2:
        raise InputError(f"--environment is given {len(ids)} times; there are two results")
    one, other = (_measurements(folder, ids[i] if i < len(ids) else None) for i, folder in enumerate((first, second)))
    found = versus(one, other, across_environments=across_environments)
    if found.environments:
        table = Table("environment", "first", "second", title="What differs between the two")
        for names in found.environments:
            table.add_row(*map(plain, names))
        out.print(table)
    else:
        out.print("both ran in the same environment")
    table = Table(*map(plain, found.table.headings), title=plain(found.table.title))
    for row in found.table.rows:
        table.add_row(*(plain(cell.text) for cell in row))
    out.print(table)
    if found.warning:
        out.print(f"[yellow]{plain(found.warning)}[/]", highlight=False)


@app.command(epilog="[dim]Examples:[/]  harness ls   |   harness ls techniques")
def ls(
    grid: Annotated[str | None, typer.Argument(help="Name of a grid; without it, the grids are listed.")] = None,
    results: Results = Path("results"),
) -> None:
    """List the recorded grids, or the trials of one."""
    from collections import Counter

    from rich.table import Table

    from harness.metrics import METRICS
    from harness.results import Store

    folders = sorted(p.parent for p in results.glob("*/trials"))
    if grid is None:
        if not folders:
            raise InputError(f"{results}: nothing is recorded there yet; begin with: harness run grids/smoke.yml")
        table = Table("grid", "trials", "status")
        for folder in folders:
            counts = Counter(Store(folder).read("trials", ["trial_id", "status"])["status"].to_pylist())
            said = ", ".join(f"{n} {s}" for s, n in counts.most_common())
            table.add_row(plain(folder.name), str(sum(counts.values())), said)
        out.print(table)
        return
    if results / grid not in folders:
        there = ", ".join(f.name for f in folders) or "nothing"
        raise InputError(f"no grid {grid!r} in {results}; there is {there}")
    table = Table("trial", "label", "repeat", "status", "peak memory", "tokens/s", "eval loss")
    for row in store_rows(results / grid):
        figures = [
            "–" if row[m] is None else METRICS[m].show(row[m])
            for m in ("peak_memory_bytes", "tokens_per_second", "eval_loss")
        ]
        table.add_row(row["spec_id"], plain(row["label"]), str(row["repeat"]), row["status"], *figures)
    out.print(table)


def store_rows(folder: Path) -> list[dict[str, Any]]:
    """Trials of a results folder, in the order in which they ran."""
    from harness.results import Store

    rows: list[dict[str, Any]] = Store(folder).read("trials").to_pylist()
    return sorted(rows, key=lambda row: row["started_at"])


@app.command(epilog="[dim]Examples:[/]  harness show 3f2a   |   harness show baseline")
def show(
    trial: Annotated[str, typer.Argument(help="Beginning of a trial's id, or its label.")],
    results: Results = Path("results"),
) -> None:
    """Print one trial: its configuration as YAML, its environment and every figure."""
    import json

    import yaml
    from rich.table import Table

    from harness.metrics import METRICS
    from harness.results import find, spec_of

    matches = list(find(results, trial))
    if not matches:
        raise InputError(f"no trial {trial!r} in {results}; `harness ls <grid>` lists them")
    for folder, row in matches:
        out.rule(f"{plain(folder.name)} / {plain(row['label'])} (repeat {row['repeat']}), {row['status']}")
        if row["error"]:
            out.print(plain(f"in {row['phase']}: {row['error_type']}: {row['error']}"), highlight=False)
            if row["attempt"] > 1:
                out.print(f"attempt {row['attempt']}; of the earlier ones nothing came", highlight=False)
            if row["log"]:
                out.print(plain(f"see {folder / row['log']}"), highlight=False, soft_wrap=True)
        spec = {k: v for k, v in spec_of(row).canonical().items() if v is not None}
        out.print(plain(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True)), highlight=False)
        table = Table("figure", "value", "meaning")
        for name, metric in METRICS.items():
            if row[name] is not None:
                table.add_row(name, metric.show(row[name]), metric.definition)
        out.print(table)
        out.print_json(printable(json.dumps(json.loads(row["environment"]), ensure_ascii=False)))


@app.command()
def keys() -> None:
    """List the keys of a trial with their defaults and meanings, and the figures that are recorded."""
    from rich.table import Table

    from harness.metrics import FIGURES
    from harness.spec import TrialSpec

    table = Table("key", "default", "meaning", title="Keys of base and vary")
    for name, field in TrialSpec.model_fields.items():
        default = "required" if field.is_required() else str(field.default)
        default = "storyteller" if name == "datasets" else default
        table.add_row(name, plain(default), plain(field.description or ""))
    out.print(table)
    table = Table("figure", "unit", "meaning", title="Figures")
    for metric in FIGURES.values():
        table.add_row(metric.name, metric.unit, metric.definition)
    out.print(table)


@app.command(epilog="[dim]Examples:[/]  harness doctor   |   harness doctor results")
def doctor(
    results: Annotated[
        Path | None, typer.Argument(help="Results to look at: a grid's folder, or the folder of several.")
    ] = None,
) -> None:
    """Say what this machine is, what works on it, what is missing and how to get it; or how recorded results are."""
    from harness import doctor as checks

    found = checks.examine() if results is None else checks.examine_results(_stores(results))
    for check in found:
        mark = {True: "[green]yes[/]", False: "[red]no [/]", None: "[yellow]-  [/]"}[check.works]
        out.print(f"{mark} {plain(check.what)}: {plain(check.detail)}", highlight=False, soft_wrap=True)
        if check.remedy:
            out.print(f"      {plain(check.remedy)}", highlight=False, soft_wrap=True)
    if any(check.works is False for check in found):
        raise SystemExit(1)


def _stores(folder: Path) -> list[Store]:
    """The results of one grid, or of each in a folder."""
    from harness.results import Store

    if (folder / "trials").is_dir():
        return [Store(folder)]
    found = sorted(p.parent for p in folder.glob("*/trials"))
    if not found:
        raise InputError(f"{folder}: nothing is recorded there; give results, or results/<grid>")
    return [Store(each) for each in found]


@app.command(
    epilog="[dim]Examples:[/]  harness merge-results laptop/results results   |   "
    "harness merge-results a/results/smoke b/results/smoke results/smoke"
)
def merge_results(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Results, the last of them those that the others are added to: grids, or folders of grids."
        ),
    ],
) -> None:
    """Join results of several machines: each trial once, the later record where two have one. What is joined stays."""
    from harness.display import bar
    from harness.results import Store

    *sources, target = folders
    if not sources:
        raise InputError("harness merge-results needs two folders or more, the last to be added to")
    for source in sources:
        single = (source / "trials").is_dir()
        for store in _stores(source):
            into = Store(target if single else target / store.folder.name)
            if into.folder.resolve() == store.folder.resolve():
                raise InputError(f"{store.folder} cannot be joined to itself")
            into.set_aside()
            with bar(out, plain(str(store.folder))) as told:
                joined = into.join(store, lambda done, of, name=str(store.folder): told((done, of, name)))  # type: ignore[misc]  # bound at once
            into.compact()
            out.print(
                f"{plain(str(store.folder))} into {plain(str(into.folder))}: {joined.added} trials added, "
                f"{joined.replaced} replaced by later records, {joined.kept} there already",
                highlight=False,
                soft_wrap=True,
            )


@app.command(
    epilog="[dim]Examples:[/]  harness clean   |   harness clean results/smoke --dry-run   |   harness clean --cache"
)
def clean(
    results: Annotated[Path, typer.Argument(help="A grid's results, or the folder of several.")] = Path("results"),
    cache: Annotated[bool, typer.Option("--cache", help="Converted models and measured rates too; made anew.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
) -> None:
    """Free what runs leave behind: halves of files, logs of what went well, adapters of no trial. Never results."""
    from harness import cleaning
    from harness.metrics import show_bytes

    stores = [] if cache and not results.is_dir() else _stores(results)
    found = [left for store in stores for left in cleaning.leftovers(store)]
    found += cleaning.cached() if cache else []
    for left in found:
        out.print(plain(f"{left.what}: {left.path}"), style="dim", highlight=False, soft_wrap=True)
    freed = sum(left.size for left in found)
    if not dry_run:
        cleaning.remove(found)
    said = "would be freed" if dry_run else "freed"
    out.print(f"{len(found)} files and folders, {show_bytes(freed)} {said}", highlight=False)
