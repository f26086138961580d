"""`harness doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness._util.terminal import plain
from harness.cli.console import out
from harness.cli.options import AsJson
from harness.cli.results import stores_in


def doctor(
    results: Annotated[
        Path | None,
        typer.Argument(metavar="RESULTS", help="Results to check: a grid's folder, or the folder of several."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: what works on it, what is missing and how to get it; or check recorded results."""
    from harness.cli import checks
    from harness.cli.documents import print_document

    done = checks.check_machine() if results is None else checks.check_results(stores_in(results))
    if as_json:
        print_document(done)
    for check in [] if as_json else done:
        mark = {True: "[green]yes[/]", False: "[red]no [/]", None: "[yellow]-  [/]"}[check.works]
        out.print(f"{mark} {plain(check.what)}: {plain(check.detail)}", highlight=False, soft_wrap=True)
        if check.remedy:
            out.print(f"      {plain(check.remedy)}", highlight=False, soft_wrap=True)
    if any(check.works is False for check in done):
        raise SystemExit(1)
