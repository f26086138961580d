"""Two runs side by side: another machine, another version."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pandas

from harness.errors import InputError
from harness.report.measurements import Estimate, Measurements
from harness.report.tables import HEADLINE, Cell, Table
from harness.report.words import MISSING, effect_and_word, figure


@dataclass(frozen=True)
class Versus:
    """What differs between two runs, and what that did to the figures."""

    environments: tuple[tuple[str, str, str], ...]
    """Field, in the first, in the second; where they differ."""
    table: Table
    warning: str | None
    """The doubt that stands beside speeds of two environments."""


def versus(first: Measurements, second: Measurements, *, across_environments: bool = False) -> Versus:
    """Compare the configurations that both runs measured, the second against the first.

    Args:
        first: what is compared with.
        second: what is looked at.
        across_environments: compare speeds of different machines or versions too.

    Raises:
        InputError: they have no configuration in common.
    """
    differs = tuple(_differences(first.environment, second.environment))
    both, pairs = _joined(first, second)
    if pairs.empty:
        raise InputError(f"{first.name} and {second.name} have no measured configuration in common")
    with_speed = not differs or across_environments
    metrics = [metric for metric in HEADLINE if with_speed or metric != "tokens_per_second"]
    estimates = {metric: both.compare(pairs, metric) for metric in metrics}
    ok = both.trials[both.trials["status"] == "ok"]
    means = ok.groupby("config")[list(HEADLINE)].mean()
    rows = [_row(first, estimates, means, *pair) for pair in pairs.itertuples(index=False, name=None)]
    headings = ["Technique"]
    for name in ("Peak memory", "Tokens/s", "Eval loss"):
        headings += [f"{name}, first", "second", "second against first"]
    warning = None
    if differs:
        warning = (
            "these speeds are of different environments: a difference may be the machine's or a version's"
            if with_speed
            else "speeds of different environments are not compared; --across-environments compares them all the same"
        )
    title = f"{second.title} against {first.title}"
    return Versus(differs, Table("versus", title, tuple(headings), tuple(rows)), warning)


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    flat_a, flat_b = ({**e, **{f"version of {k}": v for k, v in e["versions"].items()}} for e in (a, b))
    names = [name for name in (*flat_a, *(n for n in flat_b if n not in flat_a)) if name != "versions"]
    return [(n, str(flat_a.get(n)), str(flat_b.get(n))) for n in names if flat_a.get(n) != flat_b.get(n)]


def _joined(first: Measurements, second: Measurements) -> tuple[Measurements, pandas.DataFrame]:
    """Both runs' rows as one, the second's numbers moved behind the first's, and the pairs of equal specs."""
    trials, configs = 1 + int(first.trials.index.max()), 1 + int(first.configs.index.max())
    moved = second.trials.set_axis(second.trials.index + trials)
    moved[["config", "stands_for"]] += configs
    ours = first.trials.loc[~first.trials["twin"], ["spec_id", "config"]]
    theirs = moved.loc[~moved["twin"], ["spec_id", "config"]]
    pairs = ours.rename(columns={"config": "reference"}).merge(theirs, on="spec_id")[["reference", "config"]]
    pairs = pairs.drop_duplicates().reset_index(drop=True)
    floors = [floor for floor in (first.floor, second.floor) if floor is not None]
    both = _Joined(
        **{
            **{name: getattr(first, name) for name in Measurements.__dataclass_fields__},
            "trials": pandas.concat([first.trials, moved]),
            "rates": pandas.concat([first.rates, second.rates.set_axis(second.rates.index + trials)]),
            "stories": _both(first.stories, second.stories, trials),
            "changes": {name: _both(first.changes[name], second.changes[name], trials) for name in first.changes},
        }
    )
    return replace(both, noise=max(floors, default=None)), pairs.assign(comparison=range(len(pairs)))


def _both(first: pandas.DataFrame, second: pandas.DataFrame, trials: int) -> pandas.DataFrame:
    return pandas.concat([first, second.assign(trial=second["trial"] + trials)])


@dataclass(frozen=True)
class _Joined(Measurements):
    noise: float | None = None

    @property
    def floor(self) -> float | None:
        """The larger of the two runs' noise floors."""
        return self.noise


def _row(
    first: Measurements, estimates: dict[str, dict[int, Estimate]], means: pandas.DataFrame,
    reference: int, config: int, comparison: int,
) -> tuple[Cell, ...]:  # fmt: skip
    cells = [Cell(str(first.configs.at[reference, "label"]))]
    for metric in HEADLINE:
        one, other = (means[metric].get(number) for number in (reference, config))
        estimate = estimates.get(metric, {}).get(comparison)
        cells += [Cell(figure(metric, one), one), Cell(figure(metric, other), other)]
        cells.append(Cell(effect_and_word(estimate), estimate.value) if estimate else Cell(MISSING))
    return tuple(cells)
