"""The outcome of a search: its winner and the confirmation, the front, and what the parameters contributed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness._util.units import show_seconds
from harness.analysis import words
from harness.analysis.comparison import Comparison
from harness.analysis.measurements import Measurements
from harness.grids.yaml_file import spec_to_yaml
from harness.metrics import HEADLINE, METRICS
from harness.report import tuning_plots
from harness.report.plots import Chart
from harness.report.tables import Cell, Table, headings_of
from harness.tuning.search_results import SearchResults, read

_EXPECTED_STATUS = ("ok", "oom", "skipped")
"""Statuses of trials that ended without a fault."""


@dataclass(frozen=True)
class SearchSummary:
    """A search for the report and the terminal."""

    comparison: Comparison
    """All comparisons of the report, those of the winner among them."""
    sentences: tuple[str, ...]
    tables: tuple[Table, ...]
    charts: tuple[Chart, ...]
    label: str
    yaml: str
    """The recommended configuration, which runs as a grid."""


def summarize(m: Measurements, folder: Path) -> SearchSummary | None:
    """The newest search of a results folder; null where there is none, or no trial of it is within the bounds."""
    results = read(m, folder)
    if results is None or results.ranked.empty:
        return None
    return SearchSummary(
        results.comparison,
        tuple(_sentences(results)),
        (_confirmation(results), _front(results)),
        tuple(tuning_plots.all_charts(results)),
        results.label(results.winner),
        spec_to_yaml(results.spec(results.winner), full_paths=True),
    )


def _sentences(results: SearchResults) -> list[str]:
    return [
        _counts(results),
        _winner(results),
        *(_against_rival(results, name, rival) for name, rival in results.rivals.items()),
        *_ends_of_the_front(results),
        *_saved_by_halving(results),
    ]


def _counts(results: SearchResults) -> str:
    points, search = results.points, results.search
    whole = points[points["whole"]]
    beyond = int((~whole["feasible"] & (whole["status"].isin(_EXPECTED_STATUS))).sum())
    failed = int((~points["status"].isin(_EXPECTED_STATUS)).sum())
    bounds = [str(c) for c in search.constraints]
    if search.memory is not None:
        bounds.insert(0, f"memory <= {METRICS['peak_memory_bytes'].show(search.memory)}")
    text = f"The search: {len(whole)} configurations were tried"
    if whole["before"].any():
        text += f", {int(whole['before'].sum())} of them measured before"
    if bounds:
        text += f"; {beyond} were beyond {' and '.join(bounds)}"
    elif beyond:
        text += f"; {beyond} ran out of memory"
    if failed:
        text += f"; {failed} did not end well"
    return f"{text}."


def _winner(results: SearchResults) -> str:
    fresh = results.confirmed
    figures = []
    for metric in HEADLINE:
        value = (results.fresh_figures(metric) if len(fresh) else _of_search(results, metric)).get(results.winner)
        if value is not None and not math.isnan(value):
            figures.append(f"{METRICS[metric].label} {words.figure(metric, value)}")
    text = f"Take {results.label(results.winner)}: {', '.join(figures)}"
    if fresh.empty:
        return f"{text}. Nothing is confirmed: figures that something was chosen by are too good."
    return f"{text}, over figures that had no part in choosing the finalists. {_how_sure(results)}"


def _how_sure(results: SearchResults) -> str:
    first = METRICS[results.search.objectives[0].metric]
    if len(results.confirmed) < 2:
        return "No other finalist was within the bounds."
    if math.isinf(results.regret):
        return f"How much better another finalist may be is not known: their {first.label} has no interval over seeds."
    shown = f"{math.expm1(results.regret):.1%}" if first.scale == "ratio" else f"{results.regret:.2g} {first.unit}"
    return f"No other finalist is better in {first.label} by more than {shown}, at 95%."


def _of_search(results: SearchResults, metric: str) -> Any:
    """A figure by configuration, of the trials of the search itself."""
    trials = results.measurements.trials
    return trials[(trials["repeat"] == 0) & ~trials["twin"]].groupby("config")[metric].mean()


def _against_rival(results: SearchResults, name: str, rival: int) -> str:
    """The winner against a rival in the first objective, and its effect on the other headline figures."""
    first = results.search.objectives[0].metric
    estimate = results.estimate(first, rival)
    repeats = results.repeats
    where = (
        f"in {repeats} fresh repeat{'s' * (repeats != 1)}"
        if repeats
        else "in the search alone, not confirmed in fresh repeats"
    )
    against = f"Against {name}" + ("" if name == "the baseline" else f" ({results.label(rival)})")
    if estimate is None:
        return f"{against}: not comparable."
    effects = [f"{METRICS[first].label} {words.effect(estimate)} {estimate.text}"]
    others = []
    for metric in HEADLINE:
        other = results.estimate(metric, rival)
        if metric != first and other is not None:
            others.append(f"{METRICS[metric].label} {words.effect_and_word(other)}")
    effects += [", ".join(others)] if others else []
    return f"{against}, {where}: {'; '.join(effects)}."


def _ends_of_the_front(results: SearchResults) -> list[str]:
    """The best configuration of the front by each further objective."""
    sentences = []
    for objective in results.search.objectives[1:]:
        lower = objective.direction == "minimize"
        end = results.front.sort_values(objective.metric, ascending=lower).iloc[0]
        if end.name != results.winner:
            values = ", ".join(
                f"{METRICS[o.metric].label} {words.figure(o.metric, end[o.metric])}" for o in results.search.objectives
            )
            extreme = "least" if lower else "most"
            sentences.append(f"For the {extreme} {METRICS[objective.metric].label}: {end['label']} ({values}).")
    return sentences


def _saved_by_halving(results: SearchResults) -> list[str]:
    """An estimate of the time that shorter trainings saved, from the duration of whole ones."""
    points = results.points
    whole = points[points["whole"] & ~points["before"]]
    stopped = points[~points["whole"] & ~points["number"].isin(whole["number"]) & (points["status"] == "ok")]
    if results.search.pruner is None or stopped.empty or whole["seconds"].isna().all():
        return []
    count = stopped["number"].nunique()
    spent = float(points.loc[~points["whole"], "seconds"].sum())
    instead = count * float(whole["seconds"].median())
    return [
        f"Successive halving stopped {count} trials early. All shorter trainings took {show_seconds(spent)}; these "
        f"{count} at full length would have taken about {show_seconds(instead)}."
    ]


def _confirmation(results: SearchResults) -> Table:
    """The winner against each rival in all headline figures."""
    rows = []
    for name, rival in results.rivals.items():
        cells = [Cell(name), Cell(results.label(rival))]
        for metric in HEADLINE:
            estimate = results.estimate(metric, rival)
            cells.append(Cell(words.effect_and_word(estimate), estimate.value if estimate else None))
        rows.append((*cells, Cell(str(results.repeats), float(results.repeats))))
    headings = ("Against", "Configuration", *headings_of(HEADLINE), "Fresh repeats")
    note = (
        f"The winner is {results.label(results.winner)}. The search's own figures chose the finalists and are too good "
        "for that; the winner is the best of them in repeats under fresh seeds (speeds: in visits of all of them "
        "together). The held-out stories are those of the search."
    )
    return Table("tuning", "The winner and its rivals", headings, tuple(rows), note)


def _front(results: SearchResults) -> Table:
    """The Pareto front of the objectives."""
    of_search = {metric: _of_search(results, metric) for metric in HEADLINE}
    rows = []
    row: Any
    for config, row in results.front.iterrows():
        figures = {metric: float(values.get(config, math.nan)) for metric, values in of_search.items()}
        cells = [Cell(str(row["label"]))]
        cells += [Cell(words.figure(x, figures[x]), None if math.isnan(figures[x]) else figures[x]) for x in HEADLINE]
        rows.append((*cells, Cell("yes" if row["before"] else "no")))
    headings = ("Configuration", *headings_of(HEADLINE), "Measured before")
    wanted = " and ".join(f"{METRICS[o.metric].label} ({o.direction})" for o in results.search.objectives)
    note = (
        f"Within the bounds, no other configuration tried is better in {wanted} together. These are figures of the "
        "search itself: the best of many are better than they will be again."
    )
    return Table("tuning-front", "The front", headings, tuple(rows), note, tuple(int(c) for c in results.front.index))
