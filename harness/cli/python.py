"""The commands as functions of Python, for scripts and notebooks: the same checks and rows, exceptions for exits."""

from __future__ import annotations

import contextlib
import html
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas
import typer
import yaml

from harness.errors import InputError
from harness.grids import document, grid
from harness.grids.yaml_file import read_yaml, spec_to_yaml
from harness.report import notebook
from harness.spec.trial import TrialSpec

Source = str | os.PathLike[str] | Mapping[str, Any]
"""A file, or what would stand in it."""
_INTERRUPTED = 130
"""What a command returns after Ctrl-C: typer answers it."""
_REFUSED = {
    ("run", "dry_run"): "it runs what is there; Grid(…).trials are the trials, and harness.plan predicts them",
    ("plan", "largest"): "it searches for one number and prints it; use `harness plan --largest`",
    ("plan", "fix"): "it searches and prints; use `harness plan --fix`",
    ("plan", "output"): "it returns what the command would write; use its to_parquet",
}
"""Options whose outcome is what a command prints."""


class Grid:
    """A grid of trials, read and checked; a notebook shows its trials.

    Args:
        source: a grid file, a training file as a grid of one trial, or a grid as a mapping, which has a `name`, and
            whose relative paths begin at the current folder.

    Raises:
        InputError: it is not a valid grid.

    Example:
        >>> grid = harness.Grid({"name": "ranks", "base": {"base_model": "random:tiny"}, "vary": {"lora_r": [4, 64]}})
        >>> grid.trials
        >>> results = harness.run(grid)
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        with _file(source) as path:
            self._loaded = grid.load(path)

    @property
    def name(self) -> str:
        """Of its folder of results."""
        return self._loaded.name

    @property
    def title(self) -> str:
        """Of its report."""
        return self._loaded.title

    @property
    def specs(self) -> dict[str, TrialSpec]:
        """The configuration of each trial of the first repeat, by label."""
        return {t.label: t.spec for t in self._loaded.trials if t.repeat == 0 and not t.twin}

    @property
    def trials(self) -> pandas.DataFrame:
        """A row for each trial, in the order in which they run: label, repeat, factor, level, spec_id."""
        columns = ["label", "repeat", "factor", "level", "spec_id"]
        rows = [(t.label, t.repeat, t.factor, t.level, t.spec.id) for t in self._loaded.trials]
        return pandas.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        return f"<Grid {self.name}: {len(self._loaded.trials)} trials>"

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(self.title)}</b></p>{self.trials.to_html(index=False, escape=True)}"


def run(
    grid: Grid | Source, *, results: str | os.PathLike[str] = "results", quiet: bool = False, **options: Any
) -> notebook.Results:
    """Run the trials of a grid that are not recorded yet, as `harness run` does, and load its results.

    Args:
        grid: a `Grid`, or what it is made of.
        results: folder of all results.
        quiet: print nothing.
        options: those of the command, like `repeats=3`, `only=["lora_r=*"]`, `device="cpu"` or `predict=False`.

    Raises:
        InputError: the grid or an option is not valid.
        TrialsFailed: trials failed, or none ended well; what ended well is kept.
    """
    known = grid if isinstance(grid, Grid) else Grid(grid)
    _refuse("run", options)
    with _file(known.source) as path:
        _invoke("run", path, results=results, quiet=quiet, **options)
    return notebook.load(Path(results) / known.name)


def tune(source: Source, *, results: str | os.PathLike[str] = "results", **options: Any) -> notebook.Results:
    """Search for the best configuration, as `harness tune` does, and load its results.

    Args:
        source: a file with a `tune:` section, or the same as a mapping.
        results: folder of all results.
        options: those of the command, like `trials=20` or `sampler="gp"`.

    Raises:
        InputError: the search or an option is not valid.
        TrialsFailed: trials failed, or none ended well; what ended well is kept.
    """
    with _file(source) as path:
        name, _ = document.header(read_yaml(path), path)
        _invoke("tune", path, results=results, **options)
    return notebook.load(Path(results) / name)


def plan(grid: Grid | Source | TrialSpec, **options: Any) -> pandas.DataFrame:
    """Predict memory and time of every trial, as `harness plan` does, without a card and without weights.

    Args:
        grid: a `Grid`, what it is made of, or one configuration.
        options: those of the command, like `gpu="rtx4090,l4"` or `memory=["24GiB"]`.

    Returns:
        A row for each trial: its predicted peaks in bytes, what they are of, and the verdict for each card.

    Raises:
        InputError: the grid or an option is not valid.
    """
    source = grid.source if isinstance(grid, Grid) else grid
    if isinstance(source, TrialSpec):
        keys = yaml.safe_load(spec_to_yaml(source, full_paths=True))
        source = {"name": "configuration", "base": keys, "design": "list"}
    with _file(source) as path, tempfile.TemporaryDirectory() as folder, _nothing_printed():
        _refuse("plan", options)
        _invoke("plan", path, output=folder, **options)
        return pandas.read_parquet(Path(folder) / "plan.parquet")


def write_report(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    environment: str | None = None,
) -> Path:
    """Write the report of a grid, as `harness report` does: a page, Markdown, CSV, LaTeX and plots.

    Args:
        folder: results/<grid>.
        output: folder for it; null: reports/<grid>.
        environment: id of the environment whose trials are compared; null: the only one, or this machine's.

    Returns:
        Its folder, with `report.html`.

    Raises:
        InputError: nothing is recorded there.
    """
    target = Path("reports") / Path(folder).resolve().name if output is None else Path(output)
    with _nothing_printed():
        _invoke("report", folder, output=target, environment=environment)
    return target


@contextlib.contextmanager
def _file(source: Source) -> Iterator[Path]:
    """The file of a grid; of a mapping one in the current folder, at which its relative paths begin."""
    if not isinstance(source, Mapping):
        yield Path(source)
        return
    name = source.get("name")
    if not isinstance(name, str) or not name:
        raise InputError("a grid that is no file needs a name: {'name': 'mine', 'base': …}")
    with tempfile.NamedTemporaryFile("w", dir=Path.cwd(), prefix=".", suffix=".yml") as file:
        yaml.safe_dump(_plain(source), file, sort_keys=False, allow_unicode=True)
        file.flush()
        try:
            yield Path(file.name)
        except InputError as error:  # nobody knows of the file
            raise InputError(str(error).replace(Path(file.name).name, name)) from None


def _plain(value: Any) -> Any:
    """What YAML can write: tuples as lists, numbers of NumPy as Python's, paths as text."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _refuse(command: str, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value is not None and value is not False and (command, name) in _REFUSED:
            raise InputError(f"harness.{command}: {name}: {_REFUSED[command, name]}")


def _invoke(command: str, *arguments: Any, **options: Any) -> None:
    from harness.cli.app import app

    words = [command, *(os.fspath(each) for each in arguments)]
    for name, value in options.items():
        words += _words(name, value)
    try:
        code = typer.main.get_command(app).main(words, prog_name="harness", standalone_mode=False)
    except Exception as error:
        if (message := getattr(error, "format_message", None)) is None:
            raise
        raise InputError(f"harness.{command}: {message()}") from None  # typer's own errors of usage
    if code == _INTERRUPTED:
        raise KeyboardInterrupt


def _words(name: str, value: Any) -> list[str]:
    """An option as it stands on a command line; those that are null or false are left out, `predict=False` is a no."""
    option = "--" + name.replace("_", "-")
    if value is None or (value is False and name != "predict"):
        return []
    if isinstance(value, bool):
        return [option if value else "--no-" + name]
    values = value if isinstance(value, list | tuple) else [value]
    return [word for each in values for word in (option, str(each))]


@contextlib.contextmanager
def _nothing_printed() -> Iterator[None]:
    from harness.cli.console import quietly

    with quietly():
        yield
