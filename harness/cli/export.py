"""`harness export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness._util.messages import first_line
from harness._util.terminal import plain
from harness.cli.console import out
from harness.cli.options import GridFolder
from harness.errors import InputError


def export(
    folder: GridFolder = Path("results/techniques"),
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="TRACKER", help="mlflow, tensorboard, trackio or wandb; may be repeated."),
    ] = None,
    place: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE", help="Where it keeps them: an address or a database of MLflow, a folder of the others."
        ),
    ] = None,
) -> None:
    r"""Send recorded trials to experiment trackers: parameters, figures with intervals, losses, the page.

    A trial that was sent before is replaced. Each tracker is an extra: pip install 'finetune-harness\[mlflow]'.
    """
    from harness.report import trackers

    if not to:
        raise InputError(f"give --to, one of {', '.join(trackers.TRACKERS)}")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give results/<grid>, which `harness run` writes")
    if place is not None and len(to) > 1:
        raise InputError(f"--place is of one tracker, and {', '.join(to)} are given; give one")
    page = Path("reports") / folder.resolve().name / "report.html"
    for tracker in to:
        try:
            count, where = trackers.send(folder, tracker, place=place, page=page if page.is_file() else None)
        except (InputError, OSError):
            raise
        except Exception as error:  # trackers have errors of their own
            at = "" if place is None else f" --place {place}"
            raise InputError(f"--to {tracker}{at}: {first_line(error)}") from None
        out.print(f"{count} trials sent to {tracker}: {plain(where)}", highlight=False, soft_wrap=True)


def report_to(folder: Path, names: list[str]) -> None:
    """Send the results of a run; what goes wrong is a warning."""
    from harness.report import trackers

    page = Path("reports") / folder.resolve().name / "report.html"
    for name in names:
        where = trackers.send_or_warn(folder, name, page if page.is_file() else None)
        if where is not None:
            out.print(f"sent to {name}: {plain(where)}", highlight=False, soft_wrap=True)


def check(names: list[str] | None) -> list[str]:
    """The trackers that a run is to send its results to.

    Raises:
        InputError: there is no such tracker, or it is not installed.
    """
    from harness.report import trackers

    for name in names or []:
        trackers.check(name)
    return names or []
