"""`harness import`, and what commands say of the training file of another tool that they were given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness._util.terminal import plain
from harness.cli import options
from harness.cli.console import out
from harness.errors import InputError

if TYPE_CHECKING:  # imported where they are used: --help must answer at once
    from harness.dialects.training_file import TrainingFile


def print_training_file(file: TrainingFile | None, path: Path) -> None:
    """Say which tool a training file is of, and what became of the keys that are not simply taken over."""
    if file is None:
        return
    out.print(f"{plain(path.name)}: a training file of {file.tool}, read with its defaults", highlight=False)
    if file.no_effect:
        reasons: dict[str, list[str]] = {}
        for key, why in file.no_effect.items():
            reasons.setdefault(why, []).append(key)
        listed = "; ".join(f"{', '.join(keys)} ({why})" for why, keys in reasons.items())
        out.print(f"no effect on what is measured: {plain(listed)}", style="dim", highlight=False)
    if file.notes:
        listed = "; ".join(f"{key} -> {text}" for key, text in file.notes.items())
        out.print(f"other than there: {plain(listed)}", highlight=False)
    if file.without:
        out.print(
            f"[yellow]left out, so another training than the file's:[/] {plain('; '.join(file.without.values()))}"
        )


def import_file(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A training file of Axolotl, LLaMA-Factory, TRL or torchtune.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="GRID",
            rich_help_panel=options.OUTPUT,
            help="The grid file to write; without it the grid is printed.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=options.OUTPUT, help="Replace an existing file.")
    ] = False,
) -> None:
    """Write the grid file that a training file of another tool means, with a comment to each key."""
    from harness._util.files import write_whole
    from harness.grids import imported

    if output is not None and output.exists() and not overwrite:
        raise InputError(f"{output} exists; give another name, or --overwrite")
    if output is not None and not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    meant = imported.read(file)
    text = imported.grid_file(meant, file, (output or file).parent)
    if output is None:
        typer.echo(text, nl=False)
        return
    write_whole(output, text.encode())
    print_training_file(meant, file)
    out.print(f"written to {plain(str(output))}; run it with: harness run {plain(str(output))}", highlight=False)
