"""`harness ls`, `show`, `keys`, `schema`, `merge-results` and `clean`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness._util.terminal import plain, printable
from harness.errors import InputError

if TYPE_CHECKING:  # imported where they are used: --help must answer at once
    from harness.results.store import Store
from harness.cli.console import out
from harness.cli.options import AsJson, Results

_SHOWN = 6
"""Trials of one label that are shown in full: a baseline, its second run and its repeats."""


def ls(
    grid: Annotated[
        str | None, typer.Argument(help="Name of a grid, or results/<grid>; without it, the grids are listed.")
    ] = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """List the recorded grids, or the trials of one."""
    from collections import Counter

    from rich.table import Column, Table

    from harness.cli.documents import print_document, trial_document
    from harness.metrics import HEADLINE, METRICS
    from harness.results.store import Store, grid_folders

    folders = grid_folders(results)
    if grid is None:
        if not folders:
            raise InputError(f"{results}: nothing is recorded there yet; begin with: harness run grids/smoke.yml")
        ended = {
            folder: Counter(Store(folder).read("trials", ["trial_id", "status"])["status"].to_pylist())
            for folder in folders
        }
        if as_json:
            listed = [{"grid": folder.name, "trials": n.total(), "status": n} for folder, n in ended.items()]
            print_document(listed)
            return
        table = Table("grid", "trials", "status")
        for folder, counts in ended.items():
            ends = ", ".join(f"{count} {status}" for status, count in counts.most_common())
            table.add_row(plain(folder.name), str(counts.total()), ends)
        out.print(table)
        return
    by_name = {folder.name: folder for folder in folders}
    of_grid = by_name.get(grid, Path(grid))
    if not (of_grid / "trials").is_dir():
        raise InputError(f"no grid {grid!r} in {results}; there is {', '.join(by_name) or 'nothing'}")
    rows = _rows(of_grid)
    if as_json:
        print_document([trial_document(row) for row in rows])
        return
    label = Column("label", overflow="fold")
    several = len({row["environment_id"] for row in rows}) > 1
    where = ["environment"] if several else []
    columns: list[Column | str] = [label, *where, "repeat", "status", *(METRICS[m].label for m in HEADLINE)]
    table = Table(Column("trial", no_wrap=True), *columns)
    for row in rows:
        figures = ["–" if row[m] is None else METRICS[m].show(row[m]) for m in HEADLINE]
        cells = [plain(row["label"]), *(row[f"{name}_id"] for name in where), str(row["repeat"]), row["status"]]
        table.add_row(row["spec_id"], *cells, *figures)
    out.print(table)


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Trials of a results folder, in the order in which they ran."""
    from harness.results.store import Store

    rows: list[dict[str, Any]] = Store(folder).read("trials").to_pylist()
    return sorted(rows, key=lambda row: row["started_at"])


def show(
    trial: Annotated[str, typer.Argument(help="Beginning of a trial's id, or its label.")],
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Print one trial: its configuration as YAML, its environment and every figure. Many of one label are listed."""
    import json

    from rich.table import Table

    from harness.cli.documents import print_document, trial_document
    from harness.grids.yaml_file import spec_to_yaml
    from harness.metrics import METRICS
    from harness.results.schema import spec_of
    from harness.results.store import find

    matches = list(find(results, trial))
    if not matches:
        raise InputError(f"no trial {trial!r} in {results}; `harness ls <grid>` lists them")
    if as_json:
        print_document(
            [
                {"grid": folder.name, **trial_document(row), "environment": json.loads(row["environment"])}
                for folder, row in matches
            ]
        )
        return
    if len(matches) > _SHOWN:
        table = Table("grid", "trial", "label", "repeat", "status")
        for folder, row in matches:
            table.add_row(plain(folder.name), row["spec_id"], plain(row["label"]), str(row["repeat"]), row["status"])
        out.print(table)
        out.print(f"{len(matches)} trials; give the beginning of an id, or --results results/<grid>", highlight=False)
        return
    for folder, row in matches:
        out.rule(f"{plain(folder.name)} / {plain(row['label'])} (repeat {row['repeat']}), {row['status']}")
        if row["error"]:
            out.print(plain(f"in {row['phase']}: {row['error_type']}: {row['error']}"), highlight=False)
            if row["attempt"] > 1:
                out.print(f"attempt {row['attempt']}; the earlier ones left no record", highlight=False)
            if row["log"]:
                out.print(plain(f"see {folder / row['log']}"), highlight=False, soft_wrap=True)
        spec = spec_of(row)
        known = {key for key, value in spec.canonical().items() if value is not None}
        unseen = sorted(key for key in known if row["watched"] and row[key] is None)
        out.print(plain(spec_to_yaml(spec, without=unseen)), highlight=False)
        if unseen:
            out.print(f"not seen of this loop: {', '.join(unseen)}", highlight=False)
        if row["folder"]:
            out.print(plain(f"relative paths begin at {row['folder']}"), highlight=False, soft_wrap=True)
        if row["data_fingerprint"]:
            fingerprints = f"fingerprints: data {row['data_fingerprint']}, base {row['base_fingerprint']}"
            out.print(plain(fingerprints), highlight=False)
        table = Table("figure", "value", "meaning")
        for name, metric in METRICS.items():
            if row[name] is not None:
                table.add_row(name, metric.show(row[name]), metric.definition)
        out.print(table)
        out.print_json(printable(json.dumps(json.loads(row["environment"]), ensure_ascii=False)))


def keys() -> None:
    """List the keys of a trial with their defaults and meanings, and the figures that are recorded."""
    from rich.table import Table

    from harness.grids.presets import LIKE, MEANING
    from harness.metrics import FIGURES
    from harness.spec.trial import FACTS, TrialSpec

    table = Table("key", "default", "meaning", title="Keys of base and vary")
    table.add_row(LIKE, "", MEANING)
    for name, field in TrialSpec.model_fields.items():
        if not FACTS[name].given:
            continue
        default = "required" if field.is_required() else str(field.default)
        default = "storyteller" if name == "datasets" else default
        table.add_row(name, plain(default), plain(field.description or ""))
    out.print(table)
    table = Table("figure", "unit", "meaning", title="Figures")
    for metric in FIGURES.values():
        table.add_row(metric.name, metric.unit, metric.definition)
    out.print(table)


def schema() -> None:
    """Print the JSON schema of grid files, by which editors complete and check YAML."""
    from harness.cli.documents import print_document
    from harness.grids.json_schema import grid_schema

    print_document(grid_schema())


def stores_in(folder: Path) -> list[Store]:
    """The results of one grid, or of each in a folder."""
    from harness.results.store import Store, grid_folders

    folders = grid_folders(folder)
    if not folders:
        raise InputError(f"{folder}: nothing is recorded there; give results, or results/<grid>")
    return [Store(each) for each in folders]


def merge_results(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS",
            help="Results, each a grid or a folder of grids; the last is the one that the others are added to.",
        ),
    ],
) -> None:
    """Join results of several machines: each trial once, the later record where two have one. The sources stay."""
    from harness.cli.progress import bar
    from harness.results.join import join
    from harness.results.store import Store

    *sources, target = folders
    if not sources:
        raise InputError("harness merge-results needs two folders or more, the last to be added to")
    for source in sources:
        single = (source / "trials").is_dir()
        for store in stores_in(source):
            into = Store(target if single else target / store.folder.name)
            if into.folder.resolve() == store.folder.resolve():
                raise InputError(f"{store.folder} cannot be joined to itself")
            into.set_aside()
            with bar(out, plain(str(store.folder))) as show:

                def on_progress(done: int, total: int, name: str = str(store.folder)) -> None:
                    show((done, total, name))

                joined = join(into, store, on_progress)
            into.compact()
            out.print(
                f"{plain(str(store.folder))} into {plain(str(into.folder))}: {joined.added} trials added, "
                f"{joined.replaced} replaced by later records, {joined.kept} there already",
                highlight=False,
                soft_wrap=True,
            )


def clean(
    results: Annotated[Path, typer.Argument(help="A grid's results, or the folder of several.")] = Path("results"),
    cache: Annotated[
        bool, typer.Option("--cache", help="Converted models and measured rates too; they are made again.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
) -> None:
    """Remove what runs leave behind: unfinished files, unneeded logs, adapters of no trial. Never results."""
    from harness._util.units import show_bytes
    from harness.runner import cleaning

    stores = [] if cache and not results.is_dir() else stores_in(results)
    leftovers = [each for store in stores for each in cleaning.leftovers(store)]
    leftovers += cleaning.cached() if cache else []
    for each in leftovers:
        out.print(plain(f"{each.what}: {each.path}"), style="dim", highlight=False, soft_wrap=True)
    size = show_bytes(sum(each.size for each in leftovers))
    if not dry_run:
        cleaning.remove(leftovers)
    out.print(f"{len(leftovers)} files and folders, {size} {'would be ' if dry_run else ''}freed", highlight=False)
