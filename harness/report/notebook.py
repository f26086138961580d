"""Recorded results in Python and in notebooks: rows with units, comparisons with intervals, tables and charts."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas

from harness.analysis import loading
from harness.errors import InputError
from harness.metrics import FIGURES
from harness.report import document
from harness.report.tables import Table
from harness.results.schema import SCHEMAS
from harness.results.store import Store
from harness.spec.trial import TrialSpec

_ESTIMATE = ("value", "low", "high", "verdict", "n", "basis", "p", "detectable")


@dataclass(frozen=True)
class Results:
    """The results of one grid. A notebook shows the comparison of its techniques.

    Attributes:
        folder: with the rows.
        document: all that the report shows.
    """

    folder: Path
    document: document.Document

    @property
    def trials(self) -> pandas.DataFrame:
        """A row for each trial, failed ones too: its configuration, environment and figures."""
        return self.rows("trials")

    @property
    def steps(self) -> pandas.DataFrame:
        """A row for each optimizer step, those of timing visits too (`block`)."""
        return self.rows("steps")

    @property
    def stories(self) -> pandas.DataFrame:
        """The loss of each held-out story before and after training, in nats per token."""
        return self.rows("stories")

    def rows(self, table: str) -> pandas.DataFrame:
        """The rows of a table as they were recorded, of all environments.

        Args:
            table: trials, steps, stories, models, requests or answers.

        Returns:
            The rows, with the unit of each figure that has one in `attrs["units"]`, by column.

        Raises:
            InputError: there is no such table.
        """
        if table not in SCHEMAS:
            raise InputError(f"no table {table!r}; there are {', '.join(SCHEMAS)}")
        frame: pandas.DataFrame = Store(self.folder).read(table).to_pandas()
        named = [name for name in frame.columns if table != "trials" or name not in TrialSpec.model_fields]
        frame.attrs["units"] = {name: unit for name in named if (unit := _unit(name))}
        return frame

    @cached_property
    def comparisons(self) -> pandas.DataFrame:
        """Each figure of each technique against the baseline's: `value` is a ratio, or a difference in nats, `low` and
        `high` its interval at 95 %, which holds for all comparisons of the figure together.
        """
        comparison = self.document.comparison
        labels = comparison.measurements.configs["label"]
        listed = [
            {"technique": labels[config], "metric": metric} | {name: getattr(each, name) for name in _ESTIMATE}
            for metric, estimates in comparison.estimates.items()
            for config, each in estimates.items()
        ]
        return pandas.DataFrame(listed, columns=["technique", "metric", *_ESTIMATE])

    @property
    def claims(self) -> pandas.DataFrame:
        """Each claim with its verdict."""
        listed = [(each.claim.id, each.claim.says, each.word) for each in self.document.verdicts]
        return pandas.DataFrame(listed, columns=["id", "says", "verdict"])

    @property
    def tables(self) -> dict[str, pandas.DataFrame]:
        """The tables of the report, as text, by their names."""
        return {each.id: _frame(each) for each in self.document.tables}

    @property
    def charts(self) -> dict[str, Any]:
        """The charts of the report, of Altair, by their names; a notebook draws the one that a cell ends with."""
        return {each.id: each.chart for each in self.document.charts}

    def __repr__(self) -> str:
        return f"<Results of {self.document.name}: {self.document.summary[0]}>"

    def _repr_html_(self) -> str:
        first = self.document.tables[0]
        title, where = (html.escape(text) for text in (self.document.title, self.document.where))
        return f"<p><b>{title}</b>, {where}</p>{_frame(first).to_html(index=False, escape=True)}"


def load(folder: str | os.PathLike[str], environment: str | None = None) -> Results:
    """Load the results of a grid.

    Args:
        folder: results/<grid>, which `harness run` writes.
        environment: id of the environment whose trials are compared; null: the only one, or this machine's.

    Raises:
        InputError: nothing is recorded there, or there are several environments, none of them this machine's.

    Example:
        >>> import harness
        >>> results = harness.load("results/techniques")
        >>> results.trials.groupby("label").peak_memory_bytes.mean()
        >>> results.comparisons.query("metric == 'eval_loss' and verdict == 'better'")
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give results/<grid>, which `harness run` writes")
    return Results(path, document.document(loading.load(path, environment), path))


def _unit(column: str) -> str:
    if column in FIGURES:
        return FIGURES[column].unit
    if column.endswith("_bytes"):
        return "B"
    return "s" if column.endswith("seconds") else "nats" if column in ("loss", "auxiliary_loss") else ""


def _frame(table: Table) -> pandas.DataFrame:
    return pandas.DataFrame([[cell.text for cell in row] for row in table.rows], columns=[*table.headings])
