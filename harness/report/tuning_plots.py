"""The charts of a search: its front, its history, the importance of its parameters, and each of them by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import altair
import pandas

from harness._util.messages import as_written
from harness._util.units import byte_unit
from harness.analysis.words import figure
from harness.metrics import METRICS
from harness.report.plots import BLUE, GREY, ORANGE, RED, Chart, axis_title
from harness.tuning.search_results import SearchResults, importances, target_quantile

_ON, _BEATEN, _BEYOND = "on the front", "beaten by another", "beyond a bound"
_STATES = altair.Scale(domain=[_ON, _BEATEN, _BEYOND], range=[BLUE, GREY, RED])
_SHAPES = altair.Scale(domain=[_ON, _BEATEN, _BEYOND], range=["circle", "diamond", "cross"])
_WIDTH = 640
_MOST_SLICES = 9


def all_charts(results: SearchResults) -> list[Chart]:
    """Every chart that has enough trials."""
    drawn = (front(results), history(results), importance(results), slices(results))
    return [chart for chart in drawn if chart is not None]


def _scaled(metric: str, values: pandas.Series) -> tuple[pandas.Series, str, float]:
    """Values in the unit of the axis, the axis title, and the unit's size."""
    declared = METRICS[metric]
    if declared.unit == "B":
        unit, size = byte_unit(values.max())
        return values / size, axis_title(metric, unit), size
    return values, axis_title(metric, "" if "/" in declared.label else declared.unit), 1.0


def _points(results: SearchResults) -> pandas.DataFrame:
    """Whole trials with their state and the texts of their tooltips."""
    points = results.points[results.points["whole"]]
    front = set(results.front.index)
    state = [
        _ON if config in front else _BEATEN if feasible else _BEYOND
        for config, feasible in zip(points.index, points["feasible"], strict=True)
    ]
    texts = {
        f"{o.metric}_text": [figure(o.metric, value) for value in points[o.metric]] for o in results.search.objectives
    }
    return points.drop(columns=["params"]).assign(state=state, **texts).reset_index(drop=True)


def _tooltip(results: SearchResults) -> list[Any]:
    return [
        altair.Tooltip("label:N", title="configuration"),
        altair.Tooltip("state:N"),
        altair.Tooltip("status:N"),
        *(altair.Tooltip(f"{o.metric}_text:N", title=METRICS[o.metric].heading) for o in results.search.objectives),
    ]


def _marks(chart: Any, results: SearchResults, legend: Any) -> Any:
    return chart.mark_point(size=90, filled=True, opacity=0.9).encode(
        color=altair.Color("state:N", scale=_STATES, title=None, legend=legend),
        shape=altair.Shape("state:N", scale=_SHAPES, title=None, legend=legend),
        tooltip=_tooltip(results),
    )


_LEGEND = altair.Legend(orient="top")


def front(results: SearchResults) -> Chart | None:
    """The first objective over the second, with the front as a line and the memory bound."""
    if len(results.search.objectives) < 2:
        return None
    y, x = (o.metric for o in results.search.objectives[:2])
    data = _points(results).dropna(subset=[x, y])
    if data.empty:
        return None
    data["x"], x_title, size = _scaled(x, data[x])
    data["y"], y_title, _ = _scaled(y, data[y])
    base = altair.Chart(data).encode(
        x=altair.X("x:Q", title=x_title, scale=altair.Scale(zero=False, padding=20)),
        y=altair.Y("y:Q", title=y_title, scale=altair.Scale(zero=False, padding=20)),
    )
    line = base.transform_filter(altair.datum.state == _ON).mark_line(
        interpolate="step-after", color=BLUE, strokeWidth=1.5
    )
    layers = [line, _marks(base, results, _LEGEND).interactive()]
    if x == "peak_memory_bytes" and results.search.memory is not None:
        bound = pandas.DataFrame({"at": [results.search.memory / size]})
        layers.insert(0, altair.Chart(bound).mark_rule(strokeDash=[4, 3], color=RED).encode(x="at:Q"))
    chart = altair.layer(*layers).properties(width=_WIDTH, height=360, title="The front of the search")
    missing = int(results.points["whole"].sum()) - len(data)
    caption = "Each point is a configuration; the dashed line is the bound on memory."
    if missing:
        caption += f" {missing} ended before they had both figures."
    return Chart("tuning-front", "The front of the search", caption, chart)


def history(results: SearchResults) -> Chart | None:
    """Each objective over the trials in their order, and the best so far within the bounds."""
    panels = []
    for objective in results.search.objectives:
        data = _points(results).dropna(subset=[objective.metric])
        if data.empty:
            return None
        data["y"], title, _ = _scaled(objective.metric, data[objective.metric])
        within = data.loc[data["feasible"], "y"]
        best = within.cummin() if objective.direction == "minimize" else within.cummax()
        data["best"] = best.reindex(data.index).ffill()
        base = altair.Chart(data).encode(x=altair.X("number:Q", title="Trial", axis=altair.Axis(tickMinStep=1)))
        line = base.mark_line(interpolate="step-after", color=ORANGE, strokeWidth=2).encode(y="best:Q")
        points = _marks(base.encode(y=altair.Y("y:Q", title=title, scale=altair.Scale(zero=False))), results, _LEGEND)
        panels.append((line + points).properties(width=_WIDTH, height=180))
    chart = altair.vconcat(*panels, title="History of the search")
    return Chart("tuning-history", "History of the search", "The line is the best so far within the bounds.", chart)


def importance(results: SearchResults) -> Chart | None:
    """The importance of each parameter for each objective."""
    rows = [
        {"parameter": name, "importance": value, "objective": METRICS[o.metric].heading}
        for o in results.search.objectives
        for name, value in importances(results, o.metric).items()
    ]
    if not rows:
        return None
    data = pandas.DataFrame(rows)
    chart = (
        altair.Chart(data)
        .mark_bar(color=BLUE)
        .encode(
            x=altair.X("importance:Q", title="Importance", axis=altair.Axis(format="%")),
            y=altair.Y("parameter:N", sort="-x", title=None, axis=altair.Axis(labelLimit=220)),
            tooltip=["parameter:N", altair.Tooltip("importance:Q", format=".0%"), "objective:N"],
        )
        .properties(width=260, height={"step": 22})
        .facet(column=altair.Column("objective:N", title=None), title="What mattered")
        .resolve_scale(y="independent")
    )
    caption = (
        f"PED-ANOVA: how far the values of the best {target_quantile(results.points):.0%} of the trials differ from "
        "those of all. A converging search makes parameters that it held constant look important; comparing two trials "
        "is stronger evidence."
    )
    return Chart("tuning-importance", "What mattered", caption, chart)


def slices(results: SearchResults) -> Chart | None:
    """The first objective over each parameter by itself."""
    metric = results.search.objectives[0].metric
    points = results.points[results.points["whole"]].dropna(subset=[metric])
    if len(points) < 2:
        return None
    panels = []
    for parameter in results.search.parameters[:_MOST_SLICES]:
        has = [parameter.name in params for params in points["params"]]
        data = _points(results).dropna(subset=[metric]).loc[has]
        if data.empty:
            continue
        values = [params[parameter.name] for params in points.loc[has, "params"]]
        data["y"], title, _ = _scaled(metric, data[metric])
        if parameter.choices:
            data["x"] = _as_text(values)
            x = altair.X(
                "x:N", title=parameter.name, sort=_as_text(list(parameter.choices)), axis=altair.Axis(labelAngle=0)
            )
        else:
            data["x"] = [float(value) for value in values]
            bounds = [parameter.low, parameter.high]
            scale = altair.Scale(type="log" if parameter.log else "linear", domain=bounds, nice=False)
            x = altair.X("x:Q", title=parameter.name, scale=scale, axis=altair.Axis(format="~g", tickCount=5))
        y = altair.Y("y:Q", title=title, scale=altair.Scale(zero=False))
        panels.append(_marks(altair.Chart(data).encode(x=x, y=y), results, None).properties(width=200, height=170))
    chart = altair.concat(*panels, columns=3, title="Each parameter by itself")
    return Chart("tuning-slices", "Each parameter by itself", "Other parameters vary at the same time.", chart)


def _as_text(values: Iterable[Any]) -> list[str]:
    """Choices as labels of an axis."""
    return [as_written(value) for value in values]
