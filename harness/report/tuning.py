"""What a search found: the winner and what it was confirmed against, the front, and where the gains come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.metrics import METRICS, show_seconds
from harness.report import tuning_plots, words
from harness.report.found import Found, read
from harness.report.measurements import Measurements
from harness.report.plots import Chart
from harness.report.tables import HEADLINE, Cell, Table

_NAMES = {"peak_memory_bytes": "peak memory", "tokens_per_second": "tokens/s", "eval_loss": "eval loss"}

_ANSWERS = ("ok", "oom", "skipped")
"""Ends that say something of what was looked for."""


@dataclass(frozen=True)
class Findings:
    """A search as the report and the terminal show it."""

    sentences: tuple[str, ...]
    tables: tuple[Table, ...]
    charts: tuple[Chart, ...]
    label: str
    yaml: str
    """The recommended configuration, which runs as a grid."""


def findings(m: Measurements, folder: Path) -> Findings | None:
    """What a search found; null where the folder holds none, or none of its trials is within the bounds."""
    found = read(m, folder)
    if found is None or found.ranked.empty:
        return None
    values = {k: v for k, v in found.spec(found.winner).canonical().items() if v is not None}
    return Findings(
        tuple(_sentences(found)),
        (_confirmation(found), _front(found)),
        tuple(tuning_plots.all_charts(found)),
        found.label(found.winner),
        yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
    )


# ------------------------------------------------------------------------------------ words


def _sentences(found: Found) -> list[str]:
    points, search = found.points, found.search
    whole = points[points["whole"]]
    beyond = int((~whole["feasible"] & (whole["status"].isin(_ANSWERS))).sum())
    failed = int((~points["status"].isin(_ANSWERS)).sum())
    parts = [f"{len(whole)} configurations were tried", f"{int(whole['before'].sum())} of them measured before"]
    bounds = [str(c) for c in search.constraints]
    if search.memory is not None:
        bounds.insert(0, f"memory <= {METRICS['peak_memory_bytes'].show(search.memory)}")
    tail = (
        f"; {beyond} were beyond {' and '.join(bounds)}"
        if bounds
        else f"; {beyond} ran out of memory"
        if beyond
        else ""
    )
    tail += f"; {failed} did not end well" if failed else ""
    said = [f"The search: {parts[0]}{', ' + parts[1] if whole['before'].any() else ''}{tail}."]
    winner = found.ranked.iloc[0]
    means = found.measurements.trials[found.measurements.trials["config"] == found.winner]
    figures = ", ".join(
        f"{_NAMES[metric]} {words.figure(metric, means[metric].mean())}"
        for metric in HEADLINE
        if means[metric].notna().any()
    )
    said.append(f"Take {winner['label']}: {figures}.")
    said += [_meeting(found, name, rival) for name, rival in found.rivals.items()]
    said += _other_end(found)
    said += _saved(found)
    return said


def _meeting(found: Found, name: str, rival: int) -> str:
    """The winner against one of the others in the first objective, and in what memory and speed it costs."""
    first = found.search.objectives[0].metric
    estimate, repeats = found.against(rival, first)
    over = (
        f"in {repeats} fresh repeat{'s' * (repeats != 1)}"
        if repeats
        else "in the search alone, not confirmed in fresh repeats"
    )
    what = f"Against {name}" + ("" if name == "the baseline" else f" ({found.label(rival)})")
    if estimate is None:
        return f"{what}: not comparable."
    price = []
    for metric in HEADLINE:
        other = found.against(rival, metric)[0]
        if metric != first and other is not None:
            price.append(f"{_NAMES[metric]} {words.effect_and_word(other)}")
    tail = f"; {', '.join(price)}" if price else ""
    return f"{what}, {over}: {_NAMES.get(first, first)} {words.effect(estimate)} {estimate.said}{tail}."


def _other_end(found: Found) -> list[str]:
    """What the rest of the front offers."""
    said = []
    for objective in found.search.objectives[1:]:
        lower = objective.direction == "minimize"
        end = found.front.sort_values(objective.metric, ascending=lower).iloc[0]
        if end.name != found.winner:
            values = ", ".join(
                f"{_NAMES.get(o.metric, o.metric)} {words.figure(o.metric, end[o.metric])}"
                for o in found.search.objectives
            )
            least = "least" if lower else "most"
            said.append(f"For the {least} {_NAMES.get(objective.metric, objective.metric)}: {end['label']} ({values}).")
    return said


def _saved(found: Found) -> list[str]:
    """What looking at shorter trainings saved: an estimate, from what whole ones took."""
    points = found.points
    whole = points[points["whole"] & ~points["before"]]
    stopped = points[~points["whole"] & ~points["number"].isin(whole["number"]) & (points["status"] == "ok")]
    if stopped.empty or whole["seconds"].isna().all():
        return []
    count = stopped["number"].nunique()
    spent = float(points.loc[~points["whole"], "seconds"].sum())
    instead = count * float(whole["seconds"].median())
    return [
        f"Successive halving stopped {count} trials early. All shorter trainings took {show_seconds(spent)}; these "
        f"{count} at full length would have taken about {show_seconds(instead)}."
    ]


# ------------------------------------------------------------------------------------ tables


def _confirmation(found: Found) -> Table:
    """The winner against each rival in all three figures."""
    rows = []
    for name, rival in found.rivals.items():
        cells = [Cell(name), Cell(found.label(rival))]
        repeats = 0
        for metric in HEADLINE:
            estimate, repeats = found.against(rival, metric)
            cells.append(Cell(words.effect_and_word(estimate), estimate.value if estimate else None))
        rows.append((*cells, Cell(str(repeats), float(repeats))))
    headings = ("Against", "Configuration", "Peak memory", "Tokens/s", "Eval loss", "Fresh repeats")
    note = (
        f"The winner is {found.label(found.winner)}. It was chosen for its figures, so it is compared in repeats under "
        "seeds that had no part in the choice; the held-out stories are the ones that it was chosen by."
    )
    return Table("tuning", "The winner and its rivals", headings, tuple(rows), note)


def _front(found: Found) -> Table:
    """Every configuration that no other one beats in all objectives."""
    means = found.measurements.trials.groupby("config")[list(HEADLINE)].mean()
    rows = []
    row: Any
    for config, row in found.front.iterrows():
        figures: Any = means.loc[config]  # type: ignore[call-overload]  # the index holds configurations
        cells = [Cell(str(row["label"]))]
        cells += [Cell(words.figure(x, figures[x]), None if math.isnan(figures[x]) else figures[x]) for x in HEADLINE]
        rows.append((*cells, Cell("yes" if row["before"] else "no")))
    headings = ("Configuration", "Peak memory", "Tokens/s", "Eval loss", "Measured before")
    wanted = " and ".join(f"{_NAMES.get(o.metric, o.metric)} ({o.direction})" for o in found.search.objectives)
    note = f"Within the bounds, no other configuration tried is better in {wanted} together."
    return Table("tuning-front", "The front", headings, tuple(rows), note, tuple(int(c) for c in found.front.index))
