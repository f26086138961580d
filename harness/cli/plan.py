"""`harness plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness._util.terminal import plain
from harness.cli import options, plan_fix
from harness.cli.console import out, stdout_for_data
from harness.cli.predictions import capability_of, device_rates, predict_all
from harness.cli.training_files import print_training_file
from harness.errors import InputError

if TYPE_CHECKING:  # imported where they are used: --help must answer at once
    from harness.grids.grid import Trial
    from harness.predict.cards import Capability
    from harness.predict.predictor import Predictor
    from harness.report.predictions import Plan
    from harness.spec.trial import TrialSpec

TARGET = "What it must fit"
DOES_NOT_FIT = 4
"""Exit code where a trial does not fit, or none is predicted."""


def plan(
    context: typer.Context,
    grid: Annotated[
        Path | None,
        typer.Argument(metavar="GRID", help="A grid file, or a training file as a grid of one trial."),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=TARGET,
            help="Available memory, like 24GiB; may be repeated, a column for each.",
        ),
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CARDS", rich_help_panel=TARGET, help="Cards, like rtx4090,l4,a100-80; a column for each."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", rich_help_panel=TARGET, help="cpu or cuda, instead of the file's; --gpu means cuda."
        ),
    ] = None,
    largest: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            rich_help_panel=options.PREDICTION,
            help="Largest value that fits: of micro_batch_size, sequence_length or lora_r.",
        ),
    ] = None,
    full_length: Annotated[
        bool,
        typer.Option(
            "--full-length",
            rich_help_panel=options.PREDICTION,
            help="As if every example filled the sequence, however short the stories are.",
        ),
    ] = False,
    expandable_segments: Annotated[
        bool,
        typer.Option(
            "--expandable-segments",
            rich_help_panel=options.PREDICTION,
            help="As with expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF.",
        ),
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="RESULTS",
            rich_help_panel=options.PREDICTION,
            help="Learn the error of predictions from these results; kept for later plans.",
        ),
    ] = None,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix",
            rich_help_panel=options.PREDICTION,
            help="For trials that do not surely fit: the changes that make them fit, cheapest first.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            rich_help_panel=options.OUTPUT,
            help="Folder for plan.json, plan.parquet, plan.svg and plan.png, and for what --fix proposes first.",
        ),
    ] = None,
    as_json: options.AsJson = False,
    results: options.Results = Path("results"),
    max_trials: options.MaxTrials = None,
    without_unsupported: options.WithoutUnsupported = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Predict memory and time of every trial, without a GPU and without weights, and say what fits.

    The exit code is 4 where a trial does not fit, and where none could be predicted.
    """
    if as_json:
        context.with_resource(stdout_for_data())
    memory, gpu = memory or [], gpu or []
    if calibrate is not None:
        _calibrate(calibrate, results, trust_remote_code)
        if grid is None:
            return
    if grid is None:
        raise InputError("harness plan needs a grid file, or --calibrate with a results folder")
    from harness import environment
    from harness.cli.matching import matched
    from harness.grids import preflight
    from harness.grids.grid import MAX_TRIALS, load
    from harness.predict import calibration, cards
    from harness.predict.prediction import LOCAL_MACHINE, capacity_of
    from harness.predict.predictor import Predictor
    from harness.report import predictions
    from harness.runner.learning_rates import grid_of_rates

    capacities = _capacities(memory, gpu)
    if gpu and device == "cpu":
        raise InputError("--gpu names CUDA cards, and --device is cpu; leave one of them out")
    if largest is not None and output is not None:
        raise InputError("--largest writes no files; leave --output out")
    if largest is not None and (fix or as_json):
        raise InputError(f"--largest does not go with {'--fix' if fix else '--json'}; leave one of them out")
    if fix and len(capacities) > 1:
        raise InputError(f"--fix is for one card or amount of memory, and {', '.join(capacities)} are given; give one")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)  # an error here comes before the work
    overrides = {} if device is None else {"device": device}
    loaded = load(
        grid,
        repeats=1,
        overrides=overrides,
        max_trials=max_trials or MAX_TRIALS,
        without_unsupported=without_unsupported,
    )
    loaded = matched(loaded, trust_remote_code=trust_remote_code)
    print_training_file(loaded.training_file, grid)
    preflight.preflight(loaded, to_plan=True)
    trials = sorted((trial for trial in loaded.trials if not trial.twin), key=_by_factor)
    targets = {environment.resolve_device("cuda" if gpu else trial.spec.device) for trial in trials}
    if len(targets) > 1:
        raise InputError(f"{loaded.name}: its trials are for cpu and for cuda; give --device, one plan for each")
    target = targets.pop()
    here = environment.current(target)
    is_here = target == "cpu" or environment.resolve_device("auto") == "cuda"
    if is_here and not gpu:
        capacities = capacities or {LOCAL_MACHINE: capacity_of(here)}
    for option, is_given in (("--largest", largest is not None), ("--fix", fix)):
        if is_given and not capacities:
            raise InputError(f"{option} needs an amount of memory: give --memory 24GiB or --gpu rtx4090")
    about: dict[str, Any] = {
        "title": loaded.title,
        "device_type": target,
        "capacities": capacities,
        "calibration": calibration.load(results, target, here),
    }
    if len(capacities) == 1 and capacities.keys() <= cards.RATES.keys():
        (card,) = capacities
        about |= {"rates": cards.RATES[card], "rates_from": f"the {card}'s data sheet"}
    elif is_here and not gpu and largest is None:
        about["rates"] = device_rates(target)
    how: dict[str, Any] = {
        "full_length": full_length or largest is not None,
        "expandable_segments": expandable_segments,
        "trust_remote_code": trust_remote_code,
    }
    capabilities = _capabilities(capacities, capability_of(here) if is_here else cards.AMPERE)
    first_card = next((cards.CARDS[name] for name in capacities if name in cards.CARDS), None)
    about["context_bytes"] = first_card.context_bytes if first_card else cards.CONTEXT_BYTES
    with Predictor(target, **how) as predictor:
        if largest is not None:
            specs = {trial.label: trial.spec for trial in trials}
            _print_largest(predictions.Plan(lines=(), **about), predictor, specs, largest, capabilities)
            return
        predicted = {
            each: {p.spec.id: p for p in predict_all(predictor, [trial.spec for trial in trials], each)}
            for each in dict.fromkeys(capabilities.values())
        }
    first = next(iter(predicted.values()))
    by_card = {name: predicted[capability] for name, capability in capabilities.items()}
    lines = tuple(
        predictions.Line(
            trial.label,
            trial.spec,
            first[trial.spec.id].prediction,
            first[trial.spec.id].error,
            {name: each for name, by_id in by_card.items() if (each := by_id[trial.spec.id].prediction) is not None},
        )
        for trial in trials
    )
    made = predictions.Plan(lines=lines, **about)
    for table in predictions.terminal(made, out.width):
        out.print(table)
    for note in made.footnotes():
        out.print(plain(note), style="dim", highlight=False)
    if loaded.rates:
        count = len(grid_of_rates(loaded).trials)
        out.print(f"before them, {count} trainings as large as these find the learning rates", style="dim")
    written = predictions.write(made, output) if output is not None else []
    proposed = []
    if fix:
        with Predictor(target, **how) as predictor:
            for proposals in plan_fix.propose(made, predictor, next(iter(capabilities.values())), results, here):
                proposed += proposals.rows
                written += plan_fix.show(proposals, output, written)
    if written:
        names = ", ".join(file.name for file in written)
        out.print(f"{names} written to {plain(str(output))}", highlight=False, soft_wrap=True)
    if as_json:
        document = {"trials": predictions.rows(made)} | ({"fixes": proposed} if fix else {})
        print(json.dumps(document, indent=1))
    unknown = bool(lines) and all(line.prediction is None for line in lines)
    if unknown or any(made.verdict(line, name) == "does not fit" for line in lines for name in capacities):
        raise typer.Exit(DOES_NOT_FIT)


def _by_factor(trial: Trial) -> tuple[Any, ...]:
    """The baseline first, then factor by factor, levels in their natural order."""
    number = trial.level if isinstance(trial.level, str) else ""
    natural = float(number) if number.replace(".", "", 1).isdigit() else float("inf")
    return not trial.baseline, trial.factor or "", natural, trial.label


def _capacities(memory: list[str], gpu: list[str]) -> dict[str, int]:
    """Bytes available, by the name of a card or the amount as it was given."""
    from harness._util.units import parse_bytes
    from harness.predict import cards

    capacities = {}
    for text in memory:
        try:
            capacities[text] = parse_bytes(text)
        except ValueError as error:
            raise InputError(f"--memory: {error}") from None
    given = [part.strip() for names in gpu for part in names.split(",")]
    if gpu and not any(given):
        raise InputError("--gpu is empty; give cards, like --gpu rtx4090,a100-80")
    for name in filter(None, given):
        try:
            key = cards.key_of(name)
        except ValueError as error:
            raise InputError(f"--gpu: {error}") from None
        capacities[key] = cards.capacity(key)
    return capacities


def _capabilities(capacities: dict[str, int], own: Capability) -> dict[str, Capability]:
    """The generation of each card; for an amount of memory that of the first card, or `own`."""
    from harness.predict import cards

    named = {name: cards.generation(cards.CARDS[name].capability) for name in capacities if name in cards.CARDS}
    other = next(iter(named.values()), own)
    return {name: named.get(name, other) for name in capacities} or {"": other}


def _print_largest(
    plan: Plan,
    predictor: Predictor,
    trials: dict[str, TrialSpec],
    key: str,
    capabilities: dict[str, Capability],
) -> None:
    """The largest value of a key that fits, for each trial and each amount of memory."""
    from harness.predict import largest
    from harness.report import predictions

    try:
        specs = largest.distinct_specs(trials, key)
        total = len(specs) * len(plan.capacities)
        with out.status("searching") as status:
            answers = largest.largest(
                predictor,
                list(specs.values()),
                key,
                capabilities,
                plan.capacity_of,
                plan.need,
                lambda done: status.update(f"{done} of {total} answers"),
            )
    except InputError as error:
        raise InputError(f"--largest: {error}") from None
    labels = {spec.id: label for label, spec in specs.items()}
    bound = largest.UPPER_BOUNDS[key]
    out.print(predictions.terminal_largest(plan.title, key, labels, list(plan.capacities), answers, bound))
    note = f"In brackets its predicted need, with a margin of {plan.margin:.1%}; every example fills the sequence."
    out.print(note, style="dim", highlight=False)
    limits = dict.fromkeys((labels[spec_id], each.limit) for (spec_id, _), each in answers.items() if each.limit)
    for label, limit in limits:
        out.print(plain(f"{label}: no larger {key}: {limit}"), style="dim", highlight=False, soft_wrap=True)


def _calibrate(folder: Path, results: Path, trust_remote_code: bool) -> None:
    """Learn from measured rows how far their predictions are off, for each environment in them."""
    from harness.environment import Environment
    from harness.predict import calibration
    from harness.predict.predictor import Predictor
    from harness.results.schema import spec_of

    rows = calibration.measured_rows(folder)
    if not rows:
        raise InputError(f"--calibrate {folder}: no trial ended ok there; give results, or results/<grid>")
    for text in sorted({row["environment"] for row in rows}):
        environment = Environment.model_validate_json(text)
        mine = [row for row in rows if row["environment"] == text]
        with Predictor(environment.device_type, trust_remote_code=trust_remote_code) as predictor:
            predicted = predict_all(predictor, [spec_of(row) for row in mine], capability_of(environment))
        try:
            fitted = calibration.fit_rows(mine, {p.spec.memory_key: p.prediction for p in predicted}, environment)
        except ValueError as error:
            out.print(f"environment {environment.id}: {plain(str(error))}", style="yellow", highlight=False)
            continue
        file = plain(str(calibration.save(fitted, results)))
        out.print(f"{plain(fitted.describe())}; written to {file}", highlight=False, soft_wrap=True)
