"""`harness merge`, `evaluate` and `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from harness._util.terminal import plain
from harness.cli import options
from harness.cli.console import out
from harness.errors import InputError


def merge(
    trial: Annotated[
        str | None,
        typer.Argument(metavar="TRIAL", help="Beginning of the id, or label, of a trial with save_adapter: true."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A training file, for an adapter that no trial kept.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="That adapter's folder, in peft's format.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            rich_help_panel=options.OUTPUT,
            help="Folder for the model; default merged/<trial>.",
        ),
    ] = None,
    allow_difference: Annotated[
        bool, typer.Option("--allow-difference", help="Write a model that is off by more than rounding too.")
    ] = False,
    results: options.Results = Path("results"),
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Merge a LoRA adapter into its base: a model that transformers loads by itself, and what merging changed."""
    from rich.table import Table

    from harness._util.units import show_bytes
    from harness.adapters import trained
    from harness.adapters.merge import merge as merge_adapter
    from harness.analysis.inference import mean_losses, merging_effect

    if trial is not None and config is None and adapter is None:
        source: trained.TrainedAdapter = trained.find_adapter(results, trial)
    elif trial is None and config is not None and adapter is not None:
        source = trained.TrainedAdapter(trained.spec_of_file(config), adapter, config.stem, {})
    else:
        raise InputError("give either a trial, or --config and --adapter")
    folder = output or Path("merged") / source.name
    with out.status("merging"):
        merged = merge_adapter(
            source, folder, allow_difference=allow_difference, trust_remote_code=trust_remote_code,
            on_note=lambda note: out.print(f"[yellow]{plain(note)}[/]", highlight=False, soft_wrap=True),
        )  # fmt: skip
    if merged["losses"]:
        table = Table("model", "loss (nats per token)", title="What merging changes")
        for name, loss in mean_losses(merged["losses"], merged["tokens"]).items():
            table.add_row(name, f"{loss:.4f}")
        out.print(table)
        out.print(merging_effect(merged["losses"], merged["tokens"]), highlight=False)
    difference, error = merged["largest_logit_difference"], merged["merge_error"]
    exchange = f", of which merging {error:.3g}" if error != difference else ""  # the rest is a quantised base's
    out.print(f"largest difference of logits, merged from unmerged: {difference:.3g}{exchange}", style="dim")
    size = show_bytes(merged["weights_bytes"])
    out.print(f"{size} of {merged['dtype']} weights written to {plain(str(folder))}", highlight=False, soft_wrap=True)


def evaluate(
    trial: options.TrialName,
    rounds: Annotated[
        int,
        typer.Option(min=2, metavar="N", help="Timed rounds; each loads every model again and asks it the same."),
    ] = 6,
    generated_stories: Annotated[
        int, typer.Option("--stories", min=0, metavar="N", help="Held-out synopses to generate a story for.")
    ] = 3,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens of a generated story.")] = 200,
    results: options.Results = Path("results"),
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure speed, memory and loss of a trained model: its base, the base under its adapter, and the two merged."""
    from harness.adapters import benchmark, trained
    from harness.analysis import loading
    from harness.analysis.comparison import compare
    from harness.cli.progress import bar
    from harness.report import inference_tables, writers
    from harness.results.versions import Version

    adapter = trained.find_adapter(results, trial)
    with bar(out, "loading") as on_progress:
        benchmark.measure(
            adapter,
            rounds=rounds,
            generated_stories=generated_stories,
            most_tokens=tokens,
            on_progress=on_progress,
            trust_remote_code=trust_remote_code,
        )
    row = adapter.row
    # The grid may have been edited since.
    version = Version(baselines=(row["baseline_id"],), specs={row["label"]: (row["spec_id"],)}, whole=False)
    measurements = loading.load(adapter.results, row["environment_id"], version)
    compared = compare(measurements.unselected)  # as the report does
    for table in (inference_tables.models(measurements, compared), inference_tables.generated_stories(measurements)):
        if table.rows:
            out.print(writers.rich_table(table))
    folder = plain(str(adapter.results))
    out.print(f"kept with the trial; see it with: harness report {folder}", highlight=False, soft_wrap=True)


def generate(
    trial: options.TrialName,
    synopsis: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Of the story; without it, the first held-out synopsis.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="base, unmerged or merged; may be repeated, side by side. Default unmerged."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens of a story.")] = 300,
    temperature: Annotated[float, typer.Option(min=0, metavar="T", help="0: the most likely token each time.")] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of sampling; without effect at temperature 0.")
    ] = 0,
    results: options.Results = Path("results"),
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Generate a story with a trained model; with its base and the merged model side by side where asked."""
    from harness.adapters import benchmark, trained
    from harness.cli.progress import story_display
    from harness.record import Model

    wanted = list(dict.fromkeys(model or ["unmerged"]))
    known: tuple[Model, ...] = get_args(Model)
    for name in wanted:
        if name not in known:
            raise InputError(f"unknown --model {name!r}; use {', '.join(known)}")
    if synopsis is not None and not synopsis.strip():
        raise InputError("--synopsis is empty; say what the story is about, or leave it out")
    models = sorted((name for name in known if name in wanted), key=wanted.index)
    adapter = trained.find_adapter(results, trial)
    with story_display(out, models) as on_text:
        benchmark.generate(
            adapter,
            synopsis,
            models,
            most_tokens=tokens,
            temperature=temperature,
            seed=seed,
            on_text=on_text,
            trust_remote_code=trust_remote_code,
        )
