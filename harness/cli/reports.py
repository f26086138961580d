"""`harness report`, `recommend` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness._util.terminal import plain
from harness._util.units import counted
from harness.errors import InputError

if TYPE_CHECKING:  # imported where they are used: --help must answer at once
    from harness.analysis.compare_runs import RunComparison
    from harness.analysis.measurements import Measurements
    from harness.report.document import Document
from harness.cli import options
from harness.cli.console import out
from harness.cli.options import AsJson, EnvironmentId, GridFolder


def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="results/<grid>; several are joined into one report."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for it; default reports/<grid>.")
    ] = None,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="Title, instead of the grid's.")] = None,
    formats: Annotated[
        str | None, typer.Option("--format", metavar="LIST", help="Of html,md,csv,tex,svg,png; default all.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Print the whole comparison, not the answers alone.")] = False,
    environment: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Environment id; several folders may have one each.")
    ] = None,
    across_environments: Annotated[
        bool, typer.Option("--across-environments", help="Join grids of different machines or versions too.")
    ] = False,
) -> None:
    """Write the report of a grid, or of several: a page, Markdown, CSV, LaTeX and plots; and print its answers.

    Several grids make one report, in which each table and claim is filled from whichever of them measured it.
    """
    from dataclasses import replace

    from harness.report import document, joined, writers

    title = title or None
    given = folders or [Path("results/techniques")]
    wanted = _formats(formats)
    ids = environment or []
    if len(ids) not in (0, 1, len(given)):
        raise InputError(f"--environment is given {len(ids)} times for {len(given)} folders; give it once or for each")
    chosen = [ids[min(number, len(ids) - 1)] if ids else None for number in range(len(given))]
    loaded = [_load(folder, id_) for folder, id_ in zip(given, chosen, strict=True)]
    _refuse_to_join(given, loaded, across_environments=across_environments)
    options.check_output(output, is_folder=True)
    target = output or Path("reports") / _name(loaded, title)
    with out.status("reading the rows") as status:
        parts = [document.document(m, f, grids=len(given)) for m, f in zip(loaded, given, strict=True)]
        content = joined.join(parts, title or "; ".join(part.title for part in parts)) if len(parts) > 1 else parts[0]
        content = content if title is None else replace(content, title=title)
        written = writers.write(content, target, lambda name: status.update(f"writing {name}"), formats=wanted)
    if full:
        for part in parts:
            out.print(writers.terminal(part.comparison))
    _print_answers(content, full=full)
    where = target / "report.html" if "html" in wanted else target
    out.print(f"{counted(len(written), 'file')} written; open {plain(str(where))}", highlight=False, soft_wrap=True)


def _formats(text: str | None) -> tuple[str, ...]:
    from harness.report.writers import FORMATS

    formats = FORMATS if text is None else tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        given = ", ".join(unknown) or "nothing"
        raise InputError(f"--format names {plain(given)}; give some of {','.join(FORMATS)}")
    return formats


def _refuse_to_join(folders: list[Path], loaded: list[Measurements], *, across_environments: bool) -> None:
    names = [measurements.name for measurements in loaded]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two of the folders are named {twice}; a joined report tells grids by the names of folders")
    first, *others = loaded
    for folder, other in zip(folders[1:], others, strict=True):
        if other.environment_id != first.environment_id and not across_environments:
            raise InputError(
                f"{folders[0]} ran in environment {first.environment_id}, {folder} in {other.environment_id}: one "
                "report is of one environment; choose it with --environment, or join them with --across-environments"
            )


def _name(loaded: list[Measurements], title: str | None) -> str:
    """Of the report's folder: the grid's; of several grids, by the title."""
    import re

    if len(loaded) == 1:
        return loaded[0].name
    of_title = re.sub(r"[^a-z0-9]+", "-", (title or "").lower()).strip("-")
    name = (of_title or "-".join(measurements.name for measurements in loaded))[:60]
    return f"{name}-joined" if name in {measurements.name for measurements in loaded} else name


def _print_answers(content: Document, *, full: bool) -> None:
    """The first screen for a terminal, and in how much memory to take what; everything else on request."""
    from harness._util.units import show_bytes

    out.print(f"[bold]{plain(content.title)}[/]")
    out.print(plain(content.front.about), style="dim", highlight=False)
    lines = (
        [*content.uncompared, *content.summary]
        if full
        else [
            *content.ends,
            *(card.sentence for card in content.front.cards),
            *content.longer,
            content.summary[-1],
        ]
    )
    for line in lines:
        out.print(f"- {plain(line)}", highlight=False)
    if content.front.choices:
        of = f" ({plain(content.front.grid)})" if content.front.grid else ""
        out.print(f"Take{of}, from so much memory on:", highlight=False)
        *fewer, most = content.front.choices
        for choice in [*fewer[:_MOST_CHOICES], most]:
            out.print(f"  {show_bytes(choice.memory):>11}  {plain(choice.label)}", highlight=False)
    if not full:
        out.print("[dim]all figures: --full, or the page[/]")


_MOST_CHOICES = 5
"""Amounts of memory that a terminal shows, and the last."""


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

    options.check_memory(memory)
    options.check_output(output, is_folder=False)
    limit = None if memory is None else parse_bytes(memory)
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
    others: Annotated[list[Path], typer.Argument(metavar="OTHER", help="Results to compare with the first.")],
    environment: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Environment id in the first, and again in each other."),
    ] = None,
    across_environments: Annotated[
        bool, typer.Option("--across-environments", help="Compare speeds of different machines or versions too.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write a page too, like compare.html.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs of a grid, on several machines or under several versions, and say what differs between them."""
    from harness._util.files import write_whole
    from harness.analysis.compare_runs import compare_runs
    from harness.cli.documents import print_document
    from harness.report import compare_page

    options.check_output(output, is_folder=False)
    ids = environment or []
    if len(ids) > 1 + len(others):
        raise InputError(f"--environment is given {len(ids)} times; there are {1 + len(others)} results")
    one, *rest = (_load(folder, ids[i] if i < len(ids) else None) for i, folder in enumerate((first, *others)))
    compared = [compare_runs(one, other, across_environments=across_environments, runs=len(others)) for other in rest]
    names = [
        f"{folder} ({other.environment_id})" if others.count(folder) > 1 else str(folder)
        for folder, other in zip(others, rest, strict=True)
    ]
    if output is not None:
        write_whole(output, compare_page.html(str(first), list(zip(names, compared, strict=True))).encode())
    if as_json:
        listed = [{"of": name, "comparison": each} for name, each in zip(names, compared, strict=True)]
        print_document(compared[0] if len(compared) == 1 else {"comparisons": listed})
        return
    for name, comparison in zip(names, compared, strict=True):
        if len(compared) > 1:
            out.print(f"[bold]{plain(name)}[/]")
        _print_comparison(comparison)
    if output is not None:
        out.print(f"written to {plain(str(output))}", highlight=False, soft_wrap=True)


_WIDE = 140
"""Columns that all figures of two runs take."""


def _print_comparison(comparison: RunComparison) -> None:
    from rich.table import Column, Table

    from harness.report.tables import run_comparison

    if comparison.environments:
        table = Table("environment", "first", "second", title="What differs between the two")
        for names in comparison.environments:
            table.add_row(*map(plain, names))
        out.print(table)
    else:
        out.print("both ran in the same environment")
    figures = run_comparison(comparison)
    every = range(1, len(figures.headings))
    # Of a narrow terminal, each figure has a table of its own.
    for columns in [every] if out.width >= _WIDE else [every[n : n + 3] for n in range(0, len(every), 3)]:
        shown = (0, *columns)
        headings = [plain(figures.headings[n]) for n in shown]
        table = Table(Column(headings[0], overflow="fold"), *headings[1:], title=plain(figures.title))
        for row in figures.rows:
            table.add_row(*(plain(row[n].text) for n in shown))
        out.print(table)
    for line in filter(None, (comparison.unpaired, comparison.warning)):
        out.print(f"[yellow]{plain(line)}[/]", highlight=False)
