"""`harness publish`."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from harness._util.messages import first_line
from harness._util.terminal import plain
from harness.cli.console import out
from harness.cli.options import EnvironmentId, GridFolder
from harness.errors import InputError

_OF_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def publish(
    folder: GridFolder,
    to: Annotated[
        str, typer.Option(metavar="WHERE", help="A folder, or owner/dataset on the Hugging Face hub.")
    ] = "published",
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Licence of the rows, as the hub names it; default none."),
    ] = None,
    for_all: Annotated[bool, typer.Option("--public", help="On the hub, for all; else for its owner alone.")] = False,
    environment: EnvironmentId = None,
) -> None:
    """Publish results: their rows as parquet, the report, and a dataset card; in a folder, or on the hub.

    owner/dataset is on the hub, unless there is such a folder, or a folder of the owner's name; ./owner/dataset is a
    folder.
    """
    from huggingface_hub import HfApi

    from harness.analysis import loading
    from harness.report import document, publishing
    from harness.results.store import Store

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give results/<grid>, which `harness run` writes")
    measurements = loading.load(folder, environment)
    on_hub = _OF_HUB.fullmatch(to) is not None and not Path(to).parent.is_dir()
    if for_all and not on_hub:
        raise InputError(f"--public is for the hub, and {to} is a folder; leave it out")
    if not on_hub and Path(to).exists() and not Path(to).is_dir():
        raise InputError(f"--to {to} is a file; give a folder, or owner/dataset")
    if on_hub:
        with _refusals_of_hub(to):
            HfApi().whoami()  # before the work
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) if on_hub else Path(to)
        with out.status("reading the rows"):
            content = document.document(measurements, folder)
            written = publishing.write(content, Store(folder), target, licence=licence, environment=environment)
        if not on_hub:
            out.print(f"{len(written)} files in {plain(to)}; README.md is the card", highlight=False, soft_wrap=True)
            return
        with _refusals_of_hub(to):
            visibility: Literal["private", "public"] = "public" if for_all else "private"
            address = HfApi().create_repo(to, repo_type="dataset", visibility=visibility, exist_ok=True)
            if not for_all and not HfApi().dataset_info(to).private:  # one that was there stays as it was
                raise InputError(f"--to {to}: it is public already; give --public, or another name")
            HfApi().upload_folder(
                repo_id=to,
                repo_type="dataset",
                folder_path=target,
                commit_message="Measured rows",
                # Tables and plots that there no longer are.
                delete_patterns=["data/*.parquet", "report/tables/*", "report/plots/*"],
            )
    out.print(f"{len(written)} files published: {plain(address)}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _refusals_of_hub(dataset: str) -> Iterator[None]:
    """Within, what the hub and its library raise becomes one line."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    otherwise = f"a folder, as in --to ./{dataset}, can be uploaded later"
    try:
        yield
    except InputError:
        raise
    except LocalTokenNotFoundError:
        raise InputError(
            f"--to {dataset}: the hub wants a token; give one with: hf auth login; or {otherwise}"
        ) from None
    except Exception as error:  # of the hub, of its library, or of that for HTTP
        raise InputError(f"--to {dataset}: the hub does not take it ({first_line(error)}); {otherwise}") from None
