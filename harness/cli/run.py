"""`harness run`."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from harness._util.terminal import plain
from harness._util.units import counted
from harness.cli import beforehand, export, failures, options
from harness.cli.console import err, out, quietly, stdout_for_data
from harness.cli.inspection import inspect_trials
from harness.cli.launchers import LauncherOptions, make_launcher
from harness.cli.predictions import predict_trials
from harness.cli.training_files import print_training_file
from harness.errors import InputError

if TYPE_CHECKING:  # imported where they are used: --help must answer at once
    from harness.analysis.sequential import Undecided
    from harness.grids.grid import Grid
    from harness.record import Status, Tuned
    from harness.results.store import Store
    from harness.runner.grid_run import Summary


def run(
    context: typer.Context,
    grid: Annotated[
        Path, typer.Argument(metavar="GRID", help="A grid file, or a training file as a grid of one trial.")
    ],
    model: options.Model = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=options.TRIALS, help="Repeats of each trial, instead of the file's."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            rich_help_panel=options.TRIALS,
            help="Run matching trials and the baseline alone, like 'lora_r=*'; may be repeated.",
        ),
    ] = None,
    rerun: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATUS",
            rich_help_panel=options.TRIALS,
            help="Run recorded trials of this status again (failed, oom, …, or all).",
        ),
    ] = None,
    until_decided: Annotated[
        int | None,
        typer.Option(
            "--until-decided",
            min=2,
            metavar="N",
            rich_help_panel=options.TRIALS,
            help="Visit or repeat what is not decided yet, up to N times each.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            rich_help_panel=options.TRIALS,
            help="Choose visits, repeats and held-out stories that decide most in a time like 90s, 30min or 2h.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=options.TRIALS, help="Run at most N trials now."),
    ] = None,
    max_trials: options.MaxTrials = None,
    without_unsupported: options.WithoutUnsupported = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", rich_help_panel=options.TRIALS, help="Print the trials and what they can show; run none."
        ),
    ] = False,
    memory: options.Memory = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, metavar="N", rich_help_panel=options.LIMITS, help="Start no trial after so many minutes."),
    ] = None,
    timeout: options.Timeout = None,
    stall: options.Stall = options.STALL_SECONDS,
    retries: options.Retries = 0,
    retry_timeouts: Annotated[
        bool,
        typer.Option("--retry-timeouts", rich_help_panel=options.LIMITS, help="Retry trials that took too long too."),
    ] = False,
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
    predict: Annotated[
        bool,
        typer.Option(
            rich_help_panel=options.PREDICTION, help="Predict each peak first, and record it with the measured one."
        ),
    ] = True,
    skip_infeasible: Annotated[
        bool,
        typer.Option(
            "--skip-infeasible",
            rich_help_panel=options.PREDICTION,
            help="Do not start what is predicted not to fit; record it as skipped.",
        ),
    ] = False,
    results: options.Results = Path("results"),
    trust_remote_code: options.TrustRemoteCode = False,
    report_to: options.ReportTo = None,
    live: options.Live = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the trials of a grid that are not recorded yet, each in a process of its own."""
    began = time.monotonic()
    if as_json:
        context.with_resource(stdout_for_data())
    if quiet:
        context.with_resource(quietly())
    from harness.cli.documents import print_document, run_document
    from harness.cli.matching import matched
    from harness.cli.rates import find_rates, planned_rates
    from harness.grids import preflight
    from harness.grids.grid import MAX_TRIALS, labels_like, load
    from harness.launch.local import LocalLauncher
    from harness.results.store import Store
    from harness.runner import grid_run, learning_rates
    from harness.sources import models
    from harness.sources.fingerprints import Snapshot

    # From the command line, a relative path begins at the current folder.
    options.check_memory(memory)
    given = {"base_model": model and models.absolute(model, os.getcwd()), "memory_budget": memory, "device": device}
    overrides = {key: value for key, value in given.items() if value is not None}

    most_trials = max_trials or MAX_TRIALS
    tuned: Tuned | None = None
    labels = set[str]()

    def grid_of(times: int | None, stories: int | None = None) -> Grid:
        held_out = {} if stories is None else {"val_set_size": float(stories)}
        loaded = load(
            grid,
            repeats=times,
            overrides=overrides | held_out,
            max_trials=most_trials,
            without_unsupported=without_unsupported,
        )
        labels.update(trial.label for trial in loaded.trials)
        chosen = loaded.only(labels_like(loaded, only)) if only else loaded
        sized = matched(chosen, trust_remote_code=trust_remote_code)
        return sized if tuned is None else learning_rates.with_rates(sized, tuned)

    where = LauncherOptions(engine, workers, address, cpus, accelerator, partition, job_minutes, array)
    where.check()
    tracked_by = export.check(report_to)
    if size is not None:
        _refuse_with_size(repeats, until_decided, where)
        budget = beforehand.seconds_of(size)
    loaded = grid_of(repeats)
    if until_decided is not None and until_decided < loaded.repeats:
        raise InputError(f"--until-decided {until_decided} is less than the {loaded.repeats} repeats of the grid")
    if skip_infeasible and not predict:
        raise InputError("--skip-infeasible needs the predictions; leave --no-predict out")
    if skip_infeasible and where.remote:
        raise InputError(f"--skip-infeasible needs predictions, which --engine {engine} does not make; leave it out")
    if live and dry_run:
        raise InputError("--dry-run runs nothing that --live could show; leave one of them out")
    # A trial that was skipped before is run where skipping is not asked for.
    to_repeat = [] if skip_infeasible else ["skipped"]
    statuses = _statuses([*(rerun or []), *to_repeat])
    store = Store(results / loaded.name)
    # It is asked for environments alone; nothing is started.
    planned = LocalLauncher() if where.remote else make_launcher(where, loaded)
    here = () if where.remote else beforehand.environments_of(loaded, planned)
    if size is not None:
        if loaded.rates:
            raise InputError("--size does not know how long tune_first takes; leave one of them out")
        sizing = beforehand.Sizing(budget, trust_remote_code, predict, most_trials)
        loaded = beforehand.sized(grid_of, store, here, sizing)
    snapshot = Snapshot()

    def refuse_bad_input(version: Grid) -> None:
        preflight.preflight(version if until_decided is None else grid_of(until_decided), remote=where.remote)
        known = version.with_contents(snapshot.of)
        inspect_trials(grid_run.pending(known, store, planned, statuses), trust_remote_code, remote=where.remote)

    if dry_run:
        print_training_file(loaded.training_file, grid)
        beforehand.print_merged(loaded)
        with contextlib.suppress(InputError):  # said below; what is recorded is told by it
            loaded = loaded.with_contents(snapshot.of)
        stop = None
        try:
            refuse_bad_input(loaded)
        except InputError as error:  # it may be there where the grid will run
            stop = str(error)
            err.print(f"[yellow]a run here would stop:[/] {plain(stop)}", soft_wrap=True, highlight=False)
        beforehand.print_forecast(loaded, store, here)
        if loaded.rates:
            trainings = learning_rates.grid_of_rates(loaded)
            with contextlib.suppress(InputError):
                trainings = trainings.with_contents(snapshot.of)
            rates_store = Store(results / trainings.name)
            recorded, before = planned_rates(loaded, trainings, rates_store, planned, statuses, limit)
            limit = limit and max(0, limit - before)
            loaded = loaded if recorded is None else learning_rates.with_rates(loaded, recorded)
        beforehand.print_trials(loaded, store, planned, statuses, limit, stop, as_json=as_json)
        return
    refuse_bad_input(loaded)
    loaded = loaded.with_contents(snapshot.of)
    store.set_aside()
    print_training_file(loaded.training_file, grid)

    from harness.analysis import comparison, loading, longer, sequential
    from harness.cli.live import serving, shown
    from harness.predict.prediction import NO_PREDICTIONS
    from harness.report import writers
    from harness.runner.execution import Policy

    policy = Policy(timeout, stall or None, retries, retry_timeouts, trust_remote_code, skip_infeasible)
    until = None if minutes is None else began + 60 * minutes
    interrupted = False
    out.print(f"[bold]{plain(loaded.title)}[/]: {counted(len(loaded.trials), 'trial')}", highlight=False)
    beforehand.print_merged(loaded)
    beforehand.print_forecast(loaded, store, here)

    with (
        failures.allowed(allow_failures),
        make_launcher(where, loaded) as launcher,
        serving(out, loaded.title, wanted=live) as live_page,
    ):

        def find(trainings: Grid, own: Store) -> Summary:
            nonlocal limit, interrupted
            pending = grid_run.pending(trainings, own, launcher, statuses)
            inspect_trials(pending, trust_remote_code, remote=where.remote)
            with shown(out, live_page, trainings, own, launcher) as progress:
                summary = grid_run.run_grid(
                    trainings, own, launcher, progress, policy, rerun=statuses, limit=limit, until=until
                )
            limit = limit and limit - len(summary.records)
            interrupted = summary.asked  # the comparison is left
            return summary

        if loaded.rates:
            trainings = learning_rates.grid_of_rates(loaded).with_contents(snapshot.of)
            tuned = find_rates(loaded, trainings, Store(results / trainings.name), launcher, find)
            if tuned is None or limit == 0 or interrupted:
                if tuned is not None:
                    out.print("the comparison begins with the next run of the same command", highlight=False)
                if as_json:
                    print_document(run_document(loaded, store, launcher))
                if interrupted:
                    raise typer.Exit(failures.INTERRUPTED)
                return
            if only:
                tuned = tuned.joined(loading.tuned_of(store.description(), store.folder / "grid.json"), labels)
            loaded = learning_rates.with_rates(loaded, tuned).with_contents(snapshot.of)
        executed = loaded

        def execute(version: Grid) -> bool:
            """Run a version of the grid; false: none may follow, for it was interrupted, or its time or limit is up."""
            nonlocal executed, interrupted, limit, statuses
            executed = version
            predictions = NO_PREDICTIONS
            for line in grid_run.kept_apart(grid_run.pending(version, store, launcher, statuses), store, launcher):
                out.print(plain(line), highlight=False, soft_wrap=True)
            if predict and not where.remote:
                specs = [trial.spec for trial in grid_run.pending(version, store, launcher, statuses)[:limit]]
                predictions = predict_trials(specs, trust_remote_code, with_rates=launcher.workers == 1)
            with shown(out, live_page, version, store, launcher) as progress:
                summary = grid_run.run_grid(
                    version,
                    store,
                    launcher,
                    progress,
                    policy,
                    rerun=statuses,
                    limit=limit,
                    until=until,
                    predictions=predictions,
                )
            _print_summary(summary, store)
            limit = limit and limit - len(summary.records)
            statuses = _statuses(to_repeat)  # what was asked for is run again once, not for each further version
            # Whether a further version would have followed is not known.
            interrupted = summary.interrupted if until_decided is None else summary.asked
            return summary.left == 0 and not summary.over

        environments = beforehand.environments_of(loaded, launcher)
        stopped = False
        if until_decided is None:
            execute(loaded)
        else:
            undecided = sequential.until_decided(
                lambda times: grid_of(times).with_contents(snapshot.of),
                loaded.repeats,
                until_decided,
                execute,
                store.folder,
                here=environments,
            )
            stopped = undecided is None
            _print_undecided(undecided, until_decided)
        left = grid_run.pending(executed, store, launcher)
        if store.completed():
            measurements = loading.load(store.folder, here=environments)
            compared = comparison.compare(measurements)
            out.print(writers.terminal(compared))
            for line in [] if left or stopped else longer.sentences(compared):  # what is left may decide them
                out.print(plain(line), highlight=False)
            if live_page is not None:
                live_page.write_report(measurements, store.folder)
        export.report_to(store.folder, tracked_by)
        rows = grid_run.recorded(executed, store, launcher)
        if as_json:
            print_document(run_document(executed, store, launcher))
        hint = "; run them again with --rerun and that status"
        failures.refuse(rows, store.folder, complete=not left, hint=hint)
    if interrupted:  # failures that are allowed end the block above
        raise typer.Exit(failures.INTERRUPTED)


def _refuse_with_size(repeats: int | None, until_decided: int | None, where: LauncherOptions) -> None:
    if repeats is not None or until_decided is not None:
        other = "--repeats" if repeats is not None else "--until-decided"
        raise InputError(f"--size chooses the repeats; leave {other} out")
    if where.remote or where.workers not in (None, "1"):
        other = f"--engine {where.engine}" if where.remote else "--workers"
        raise InputError(f"--size knows how long trials take one at a time on this machine; leave {other} out")


def _print_undecided(undecided: Undecided | None, most: int) -> None:
    """Which configurations are not decided, which were not compared at all, and the stories that would decide a loss,
    which no repeat does.
    """
    from harness.analysis import words

    if undecided is None:
        out.print("stopped before all was decided; the same command goes on", highlight=False)
        return
    open_ = {label for estimates in undecided.values() for label, estimate in estimates.items() if estimate is not None}
    missing = {metric: [label for label, each in of.items() if each is None] for metric, of in undecided.items()}
    if open_ or not any(missing.values()):
        labels = ", ".join(sorted(open_)) or "none"
        out.print(f"not decided within {most} visits and repeats: {plain(labels)}", highlight=False)
    for metric, name in (("tokens_per_second", "speed"), ("eval_loss", "loss")):
        if missing.get(metric):
            out.print(f"{name} not compared: {plain(', '.join(missing[metric]))}", highlight=False)
    for label, estimate in undecided.get("eval_loss", {}).items():
        if estimate is not None and estimate.unit == "stories":
            out.print(f"loss of {plain(label)}: about {words.what_decides(estimate)}", highlight=False)


def _statuses(given: list[str]) -> frozenset[Status]:
    from harness.record import Status

    known: tuple[Status, ...] = get_args(Status)
    for status in given:
        if status not in (*known, "all"):
            raise InputError(f"unknown --rerun status {status!r}; use {', '.join(known)} or all")
    return frozenset(status for status in known if "all" in given or status in given)


def _print_summary(summary: Summary, store: Store) -> None:
    from collections import Counter

    if summary.by_others:
        out.print(f"{summary.by_others} trials were done by another runner meanwhile", highlight=False)
    if summary.untimed and not summary.visits_left:
        _print_untimed(summary, store)
    left = [counted(n, what) for n, what in ((summary.left, "trial"), (summary.visits_left, "timing visit")) if n]
    if summary.records:
        counts = Counter(record.status for record in summary.records)
        ends = ", ".join(f"{count} {status}" for status, count in counts.most_common())
        ended = counted(len(summary.records), "trial")
        out.print(f"{ended} ended ({ends}), kept in {plain(str(store.folder))}", highlight=False)
    elif summary.visits:
        out.print(f"{counted(summary.visits, 'timing visit')} added", highlight=False)
    elif not left and not summary.untimed:
        out.print("all of them are recorded already; nothing to run", highlight=False)
    if left:
        out.print(f"{' and '.join(left)} left; go on with the same command", highlight=False)


def _print_untimed(summary: Summary, store: Store) -> None:
    failed = {
        label: f"{visit.status}, see {store.folder / visit.log}" if visit.log else visit.status
        for label, visit in summary.failed_visits.items()
    }
    labels = ", ".join(f"{each} ({failed[each]})" if each in failed else each for each in summary.untimed)
    reason = "the machine worked for others during their visits or the baseline's, or these failed or were not reached"
    if len(failed) == len(summary.untimed):
        reason = "their visits failed"
    out.print(
        f"[yellow]not timed well enough: {plain(labels)}[/]: {reason}; their speeds enter no "
        "comparison. Time them again with the same command",
        highlight=False,
    )
