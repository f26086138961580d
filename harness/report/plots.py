"""The report's charts: one declaration each for the interactive chart, SVG and PNG."""

from __future__ import annotations

import json
from typing import Any

import altair
import numpy
import pandas

from harness._util.units import byte_unit
from harness.analysis.comparison import MICRO_BATCH, SEQUENCE_LENGTH, Comparison
from harness.analysis.pareto import pareto_front
from harness.analysis.words import effect, effect_and_word, negligible_range
from harness.metrics import HEADLINE, METRICS, Metric
from harness.report.chart import (
    BLUE,
    CUT,
    GREEN,
    GREY,
    MOST_BARS,
    MOST_POINTS,
    ORANGE,
    PINK,
    RED,
    SKY,
    TOOLTIP,
    WIDTH,
    Chart,
    Extent,
    about_configs,
    axis_title,
    extents,
    names_at,
    on_axes,
    titled,
)
from harness.report.labels import PixelAxis, Segment
from harness.report.ladder_plot import ladder
from harness.report.loss_plots import loss_curves, time_to_loss
from harness.report.memory_plots import memory, predicted

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PINK",
    "RED",
    "SKY",
    "Chart",
    "all_charts",
    "axis_title",
    "effects",
    "forgetting",
    "ladder",
    "levels",
    "loss_curves",
    "memory",
    "pareto",
    "predicted",
    "time_to_loss",
    "titled",
]


def all_charts(comparison: Comparison, steps: pandas.DataFrame) -> list[Chart]:
    """Every chart that has data.

    Args:
        comparison: against the baseline.
        steps: optimizer steps with the columns config, repeat, step, loss and tokens.
    """
    drawn = (
        memory(comparison),
        ladder(comparison),
        pareto(comparison),
        effects(comparison),
        loss_curves(comparison, steps),
        time_to_loss(comparison, steps),
        levels(comparison),
        forgetting(comparison),
        predicted(comparison),
    )
    return [chart for chart in drawn if chart is not None]


_PARETO_HEIGHT, _PARETO_POINT = 400, 110


def pareto(comparison: Comparison) -> Chart | None:
    """Loss (or speed, where no loss is meaningful) against memory, with speed as colour and the front labelled."""
    means = comparison.means.assign(speed=comparison.speeds).loc[comparison.shown[:MOST_POINTS]]
    with_loss = bool(means["eval_loss"].notna().any())
    y = "eval_loss" if with_loss else "speed"
    means = means.dropna(subset=["peak_memory_bytes", y])
    if means.empty:
        return None
    unit, size = byte_unit(means["peak_memory_bytes"].max())
    timed = means["speed"].notna()
    figures = means[["peak_memory_bytes"]].assign(
        **({"loss": means["eval_loss"]} if with_loss else {}), **({"slowness": -means["speed"]} if timed.any() else {})
    )
    front = pareto_front(figures)
    data = about_configs(comparison, means.index.tolist())
    data["x"] = (means["peak_memory_bytes"] / size).to_numpy()
    data["y"] = means[y].to_numpy()
    data["speed"] = means["speed"].to_numpy()
    kinds = {"on the front": "circle", "beaten by another": "triangle", "no speed": "square"}
    on, off, unknown = kinds
    data["front"] = numpy.where(front, on, off)
    if timed.any():
        data.loc[~timed.to_numpy(), "front"] = unknown
    drawn = [kind for kind in kinds if kind in {on, off, *data["front"]}]
    titles = axis_title("peak_memory_bytes", unit), _Y_TITLES[with_loss]
    x_axis = PixelAxis.of(data["x"].tolist(), WIDTH, 28, log=True)
    y_axis = PixelAxis.of(data["y"].tolist(), _PARETO_HEIGHT, 22, upright=True)
    # By default marks leave out what has no value, and so no place among the colours.
    shown: dict[str, Any] = {"size": _PARETO_POINT, "filled": True, "opacity": 0.95, "color": BLUE, "invalid": None}
    points = altair.Chart(data).mark_point(**shown)
    points = points.encode(
        **on_axes(x_axis, y_axis, titles),
        tooltip=TOOLTIP,
        shape=altair.Shape(
            "front:N",
            title=None,
            scale=altair.Scale(domain=drawn, range=[kinds[kind] for kind in drawn]),
            legend=altair.Legend(orient="top"),
        ),
    )
    if timed.any():
        speed = altair.Color("speed:Q", title=axis_title("tokens_per_second", ""), scale=altair.Scale(scheme="viridis"))
        points = points.encode(color=altair.condition(f"datum.front === '{unknown}'", altair.value(GREY), speed))
    names = [None if kind == off else name for name, kind in zip(data["technique"], data["front"], strict=True)]
    labels = names_at(data, names, x_axis, y_axis, titles, size=_PARETO_POINT)
    seen = [name for name, there in (("memory", True), ("loss", with_loss), ("speed", timed.any())) if there]
    title = " and ".join(filter(None, (", ".join(seen[:-1]), seen[-1]))).capitalize()
    chart = altair.layer(*labels, points.interactive()).properties(width=WIDTH, height=_PARETO_HEIGHT, title=title)
    caption = "A configuration is on the front when no other one is at least as good in all of these and better in one."
    return Chart("pareto", title, caption, chart)


_Y_TITLES = {True: axis_title("eval_loss", "nats per token"), False: axis_title("tokens_per_second", "")}


_VERDICTS = ("better", "worse", "same", "not distinguishable")


def effects(comparison: Comparison) -> Chart | None:
    """Every technique's effect on memory, speed and loss, with its interval."""
    m = comparison.measurements
    others = [c for c in comparison.shown[: MOST_BARS + 1] if c != m.baseline]
    if not others or m.baseline is None:
        return None
    described = about_configs(comparison, others)
    named, headings = _under_headings(comparison, described)
    panels: list[Any] = []
    cut = False
    for metric in HEADLINE:
        rows = []
        for config in others:
            estimate = comparison.of(metric, config)
            if estimate is not None:
                rows.append(
                    {"config": config, "value": estimate.value, "low": estimate.low, "high": estimate.high,
                     "verdict": estimate.verdict, "text": effect_and_word(estimate)}
                )  # fmt: skip
        if rows:
            data = pandas.DataFrame(rows).merge(described, on="config")
            # At least as wide as what is negligible: an effect of a ten thousandth shall look like none.
            shown, is_ratio = negligible_range(metric), METRICS[metric].scale == "ratio"
            extent = Extent.of(data, ("value", "low", "high"), holds=shown, log=is_ratio)
            panels.append(_effect_panel(data, METRICS[metric], extent, named, headings, first=not panels))
            cut = cut or extent.cuts
    if not panels:
        return None
    chart = altair.hconcat(*panels, title="Effect of each technique against the baseline").resolve_scale(color="shared")
    return Chart(
        "effects",
        "Effects with their intervals",
        "Dots are estimates, lines intervals that hold all at once at 95 %." + CUT * cut,
        chart,
    )


def _under_headings(comparison: Comparison, described: pandas.DataFrame) -> tuple[list[str], list[str]]:
    """The techniques in their order, with headings of what they act on between them; and these headings."""
    parts = comparison.measurements.acts_on
    groups: dict[str, list[str]] = {}
    for config, technique in zip(described["config"], described["technique"], strict=True):
        groups.setdefault((parts[config] or "").capitalize(), []).append(technique)
    if len(groups) == 1:
        return described["technique"].tolist(), []
    named = [name for heading, names in groups.items() for name in ([heading, *names] if heading else names)]
    return named, [heading for heading in groups if heading]


def _effect_panel(
    data: pandas.DataFrame, metric: Metric, extent: Extent, named: list[str], headings: list[str], *, first: bool
) -> Any:
    ratio = metric.scale == "ratio"
    title = axis_title(metric.name, "×" if ratio else metric.unit)
    no_effect = 1.0 if ratio else 0.0
    weight = {"condition": {"test": f"indexof({json.dumps(headings)}, datum.value) >= 0", "value": "bold"},
              "value": "normal"}  # fmt: skip
    axis = altair.Axis(labelLimit=260, labelFontWeight=weight) if first else altair.Axis(labels=False, ticks=False)
    ends = [extent.least, extent.most]
    logarithmic = altair.Scale(type="log", nice=False, padding=10, domain=ends)
    x_scale = logarithmic if ratio else altair.Scale(zero=False, domain=ends)
    colours = altair.Scale(domain=list(_VERDICTS), range=[BLUE, RED, GREEN, GREY])
    shapes = altair.Scale(domain=list(_VERDICTS), range=["circle", "triangle-up", "square", "diamond"])
    # All techniques, measured or not: each panel has the rows that the first one names.
    rows = altair.Scale(domain=named)
    base = altair.Chart(data).encode(
        y=altair.Y("technique:N", scale=rows, title=None, axis=axis),
        color=altair.Color("verdict:N", scale=colours, title=None, legend=altair.Legend(orient="top")),
        tooltip=[altair.Tooltip("text:N", title="effect"), *TOOLTIP],
    )
    line = altair.Chart(pandas.DataFrame({"at": [no_effect]})).mark_rule(strokeDash=[4, 3], color=GREY).encode(x="at:Q")
    ticks = _ratio_ticks(*ends) if ratio else None
    x_axis = altair.Axis(values=ticks, format="~g") if ticks else altair.Axis()
    bars = base.mark_rule(strokeWidth=2, clip=extent.cuts).encode(
        x=altair.X("low:Q", title=title, scale=x_scale, axis=x_axis), x2=altair.X2("high:Q")
    )
    dots = base.mark_point(size=70, filled=True, opacity=1).encode(
        x=altair.X("value:Q", title=title, scale=x_scale, axis=x_axis),
        shape=altair.Shape("verdict:N", scale=shapes, title=None, legend=altair.Legend(orient="top")),
    )
    # An axis of nothing but nulls has no extent.
    layers = line + bars + dots if data["low"].notna().any() else line + dots
    return layers.properties(width=240)


def _ratio_ticks(low: float, high: float) -> list[float]:
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0]
    hundredths = next((step for below, step in _NARROW_TICKS if high / low < below), None)
    if hundredths:
        ticks = [tick / 100 for tick in range(50, 201, hundredths)]
    return [tick for tick in ticks if low * 0.99 <= tick <= high * 1.01]


_NARROW_TICKS = ((1.05, 1), (1.12, 2), (1.3, 5), (1.8, 10))
"""Hundredths between ticks where the ends of an axis are less than so many times each other."""


def levels(comparison: Comparison) -> Chart | None:
    """Peak memory and speed over micro-batch size (at equal effective batch) and sequence length."""
    m = comparison.measurements
    columns = []
    for contrast, key, title in (
        (MICRO_BATCH, "micro_batch_size", "Micro-batch size, at equal effective batch"),
        (SEQUENCE_LENGTH, "sequence_length", "Sequence length (tokens)"),
    ):
        configs = m.family(contrast)
        if len(configs) > 1:
            columns.append(_level_panels(comparison, configs, key, title))
    if not columns:
        return None
    chart = altair.hconcat(*columns, title="Micro-batch and sequence length")
    return Chart("levels", "Micro-batch and sequence length", "Each point is a measured configuration.", chart)


def _level_panels(comparison: Comparison, configs: pandas.DataFrame, key: str, title: str) -> Any:
    means = comparison.means.loc[configs.index]
    unit, size = byte_unit(means["peak_memory_bytes"].max())
    data = about_configs(comparison, configs.index.tolist())
    data["level"] = configs[key].to_numpy()
    data["memory"] = (means["peak_memory_bytes"] / size).to_numpy()
    data["speed"] = means["tokens_per_second"].to_numpy()
    x = altair.X("level:Q", title=title, axis=altair.Axis(values=sorted({*data["level"].tolist()}), format="d"))
    panels = [
        altair.Chart(data)
        .mark_line(point=altair.OverlayMarkDef(size=60, filled=True, color=colour), color=colour)
        .encode(
            x=x,
            y=altair.Y(f"{column}:Q", title=axis_title(metric, axis_unit), scale=altair.Scale(zero=True)),
            tooltip=TOOLTIP,
        )
        .properties(width=300, height=170)
        for column, metric, axis_unit, colour in (
            ("memory", "peak_memory_bytes", unit, BLUE),
            ("speed", "tokens_per_second", "", RED),
        )
        if data[column].notna().any()  # an axis of nothing but nulls has no extent
    ]
    return altair.vconcat(*panels)


_FORGETTING_HEIGHT, _FORGETTING_POINT = 360, 80


def forgetting(comparison: Comparison) -> Chart | None:
    """Change of the loss on general text against that on the stories, with both intervals."""
    m = comparison.measurements
    shown = comparison.shown[:MOST_POINTS]
    learnt, forgot = (m.learnt(metric, shown) for metric in ("eval_loss", "forgetting"))
    both = [config for config in shown if config in learnt and config in forgot]
    if not both:
        return None
    rows = [
        {"config": c, **{f"{axis}{end}": getattr(e, attribute) for axis, e in (("x", learnt[c]), ("y", forgot[c]))
                         for end, attribute in (("", "value"), ("_low", "low"), ("_high", "high"))},
         "learnt_text": effect(learnt[c]), "forgot_text": effect(forgot[c])}
        for c in both
    ]  # fmt: skip
    data = pandas.DataFrame(rows).merge(about_configs(comparison, both), on="config")
    tips = [altair.Tooltip("learnt_text:N", title="held-out stories"), altair.Tooltip("forgot_text:N", title="general"),
            *TOOLTIP]  # fmt: skip
    titles = "Change on held-out stories (nats)", "Change on general text: forgetting (nats)"
    of_x = Extent.of(data, ("x", "x_low", "x_high"))
    of_y = Extent.of(data, ("y", "y_low", "y_high"), holds=(0.0,))
    x_axis = PixelAxis.of([of_x.least, of_x.most], WIDTH, 24)
    y_axis = PixelAxis.of([of_y.least, of_y.most], _FORGETTING_HEIGHT, 20, upright=True)
    base = altair.Chart(data).encode(tooltip=tips)
    no_change = altair.Chart(pandas.DataFrame({"at": [0.0]})).mark_rule(strokeDash=[4, 3], color=GREY)
    rules = base.mark_rule(color=SKY, clip=of_x.cuts or of_y.cuts)
    layers = [no_change.encode(y=on_axes(x_axis, y_axis, titles, ("at", "at"))["y"])]
    if data["x_low"].notna().any():  # an axis of nothing but nulls has no extent
        layers.append(rules.encode(**on_axes(x_axis, y_axis, titles, ("x_low", "y")), x2="x_high:Q"))
    if data["y_low"].notna().any():
        layers.append(rules.encode(**on_axes(x_axis, y_axis, titles, ("x", "y_low")), y2="y_high:Q"))
    layers.append(
        base.mark_point(size=_FORGETTING_POINT, filled=True, color=BLUE, opacity=1).encode(
            **on_axes(x_axis, y_axis, titles)
        )
    )
    lines = [line for _, row in data.iterrows() for line in _intervals(row, x_axis, y_axis)]
    lines.append((0.0, y_axis.at(0.0), float(WIDTH), y_axis.at(0.0)))
    names = data["technique"].tolist()
    layers += names_at(data, names, x_axis, y_axis, titles, size=_FORGETTING_POINT, lines=lines)
    chart = altair.layer(*layers).properties(width=WIDTH, height=_FORGETTING_HEIGHT, title="Learnt and forgotten")
    caption = (
        "Further left is learnt better, further up forgotten more; lines are intervals that hold all at once at 95 %."
    )
    caption += CUT * (of_x.cuts or of_y.cuts)
    return Chart("forgetting", "Learnt and forgotten", caption, chart)


def _intervals(row: pandas.Series, x: PixelAxis, y: PixelAxis) -> tuple[Segment, Segment]:
    """The lines of both intervals of a point, in pixels."""
    at_x, at_y = x.at(row["x"]), y.at(row["y"])
    left, right = extents(x, at_x, row["x_low"], row["x_high"])
    top, bottom = extents(y, at_y, row["y_low"], row["y_high"])
    return (left, at_y, right, at_y), (at_x, top, at_x, bottom)
