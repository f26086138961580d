"""`harness report`, `recommend` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness._util.terminal import plain
from harness.errors import InputError

if TYPE_CHECKING:  # imported where they are used: --help must answer at once
    from harness.analysis.measurements import Measurements
from harness.cli.console import out
from harness.cli.options import AsJson, EnvironmentId, GridFolder


def report(
    folder: GridFolder = Path("results/techniques"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for it; default reports/<grid>.")
    ] = None,
    environment: EnvironmentId = None,
) -> None:
    """Write the report of a grid: a page, Markdown, CSV, LaTeX and plots; and print its comparison."""
    from harness.report import document, writers

    measurements = _load(folder, environment)
    target = output or Path("reports") / folder.resolve().name
    with out.status("reading the rows") as status:
        content = document.document(measurements, folder)
        written = writers.write(content, target, lambda name: status.update(f"writing {name}"))
    out.print(writers.terminal(content.comparison))
    out.print("[bold]On this machine[/]")
    for sentence in content.summary:
        out.print(f"- {plain(sentence)}", highlight=False)
    out.print(
        f"{len(written)} files written; open {plain(str(target / 'report.html'))}", highlight=False, soft_wrap=True
    )


def _load(folder: Path, environment: str | None) -> Measurements:
    from harness.analysis import loading

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give results/<grid>, which `harness run` writes")
    return loading.load(folder, environment)


def recommend(
    folder: GridFolder = Path("results/techniques"),
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Available memory, like 12GiB.")] = None,
    max_loss: Annotated[float | None, typer.Option(metavar="NATS", help="Highest eval loss.")] = None,
    min_speed: Annotated[float | None, typer.Option(metavar="RATE", help="Least tokens per second.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File for its YAML; default reports/<grid>/recommended.yml."
        ),
    ] = None,
    environment: EnvironmentId = None,
    as_json: AsJson = False,
) -> None:
    """Name the best measured configuration within limits, say what it trades, and write its YAML."""
    from rich.table import Table

    from harness._util.units import parse_bytes, show_bytes
    from harness.analysis import recommend as recommending
    from harness.analysis import words
    from harness.cli.documents import print_document
    from harness.metrics import METRICS

    try:
        limit = None if memory is None else parse_bytes(memory)
    except ValueError as error:
        raise InputError(f"--memory: {error}") from None
    measurements = _load(folder, environment)
    best = recommending.recommend(measurements, memory=limit, max_loss=max_loss, min_speed=min_speed)
    shown = ("tokens_per_second", "eval_loss")
    target = output or Path("reports") / folder.resolve().name / "recommended.yml"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(best.yaml, encoding="utf-8")
    if as_json:
        front = best.choices[["label", "memory", *shown]].to_dict("records")
        about = {"configuration": best.label, "yaml": best.yaml, "file": target, "sentences": best.sentences}
        print_document(about | {"front": front})
        return
    columns = ("configuration", "memory", *(METRICS[metric].label for metric in shown))
    table = Table(*columns, title="The Pareto front within the limits")
    for number, row in best.choices.iterrows():
        figures = [words.figure(metric, row[metric]) for metric in shown]
        style = "bold" if number == best.config else None
        table.add_row(plain(row["label"]), show_bytes(row["memory"]), *figures, style=style)
    out.print(table)
    for sentence in best.sentences:
        out.print(plain(sentence), highlight=False)
    out.print(
        f"written to {plain(str(target))}; run it with: harness run {plain(str(target))}",
        highlight=False,
        soft_wrap=True,
    )


def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="Results to compare with.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Results to compare.")],
    environment: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Environment id in the first, and again in the second."),
    ] = None,
    across_environments: Annotated[
        bool, typer.Option("--across-environments", help="Compare speeds of different machines or versions too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two runs of a grid, on two machines or under two versions, and say what differs between them."""
    from rich.table import Table

    from harness.analysis.compare_runs import compare_runs
    from harness.cli.documents import print_document
    from harness.report.tables import run_comparison

    ids = environment or []
    if len(ids) > 2:
        raise InputError(f"--environment is given {len(ids)} times; there are two results")
    one, other = (_load(folder, ids[i] if i < len(ids) else None) for i, folder in enumerate((first, second)))
    comparison = compare_runs(one, other, across_environments=across_environments)
    if as_json:
        print_document(comparison)
        return
    if comparison.environments:
        table = Table("environment", "first", "second", title="What differs between the two")
        for names in comparison.environments:
            table.add_row(*map(plain, names))
        out.print(table)
    else:
        out.print("both ran in the same environment")
    figures = run_comparison(comparison)
    table = Table(*map(plain, figures.headings), title=plain(figures.title))
    for row in figures.rows:
        table.add_row(*(plain(cell.text) for cell in row))
    out.print(table)
    for line in filter(None, (comparison.unpaired, comparison.warning)):
        out.print(f"[yellow]{plain(line)}[/]", highlight=False)
