"""The report's charts: one declaration each for the interactive chart, SVG and PNG."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import altair
import numpy
import pandas

from harness._util.units import byte_unit
from harness.analysis.comparison import MICRO_BATCH, SEQUENCE_LENGTH, Comparison
from harness.analysis.pareto import pareto_front
from harness.analysis.words import effect, effect_and_word, figure
from harness.metrics import COMPONENTS, HEADLINE, METRICS, Metric

# Okabe and Ito (2008): distinguishable under any colour vision.
BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8a8a8a"
_LINES = (BLUE, ORANGE, GREEN, PINK, SKY, RED, "#7f6d00", GREY)
_MOST_BARS = 40
_MOST_POINTS = 500
_WIDTH = 640


@dataclass(frozen=True)
class Chart:
    """A chart and its caption."""

    id: str
    title: str
    caption: str
    chart: Any

    def spec(self) -> dict[str, Any]:
        """Vega-Lite, without the colours of a light or dark scheme."""
        vega_lite: dict[str, Any] = self.chart.to_dict()
        return vega_lite


def titled(chart: Chart, title: str) -> Chart:
    """A chart with another title, which stands in the image too."""
    return replace(chart, title=title, chart=chart.chart.properties(title=title))


def axis_title(metric: str, unit: str) -> str:
    """The heading of a metric with its unit: `Peak memory (MiB)`."""
    heading = METRICS[metric].heading
    return f"{heading} ({unit})" if unit else heading


def all_charts(comparison: Comparison, steps: pandas.DataFrame) -> list[Chart]:
    """Every chart that has data.

    Args:
        comparison: against the baseline.
        steps: optimizer steps with the columns config, repeat, step, loss and tokens.
    """
    drawn = (
        memory(comparison),
        pareto(comparison),
        effects(comparison),
        loss_curves(comparison, steps),
        levels(comparison),
        forgetting(comparison),
        predicted(comparison),
    )
    return [chart for chart in drawn if chart is not None]


def _described(comparison: Comparison, configs: Sequence[int]) -> pandas.DataFrame:
    """Texts for tooltips on configurations: label, figures, and differences from the baseline."""
    m = comparison.measurements
    rows = []
    for config, label, keys in zip(configs, m.labels(configs), m.differing_keys(configs), strict=True):
        means = comparison.mean(config)
        rows.append(
            {
                "config": config,
                "technique": label,
                "differs": ", ".join(f"{k}: {v}" for k, v in keys.items()) or "the baseline",
                **{f"{metric}_text": figure(metric, means[metric]) for metric in HEADLINE},
            }
        )
    return pandas.DataFrame(rows)


_TOOLTIP = [
    altair.Tooltip("technique:N", title="technique"),
    altair.Tooltip("differs:N", title="differs in"),
    *(altair.Tooltip(f"{metric}_text:N", title=METRICS[metric].label) for metric in HEADLINE),
]
_TECHNIQUES = altair.Axis(labelLimit=260)


def memory(comparison: Comparison) -> Chart | None:
    """Peak memory of each technique by component."""
    means = comparison.means.reindex(comparison.shown)
    peaks = means["peak_memory_bytes"].dropna().sort_values().head(_MOST_BARS)
    parts = means.loc[peaks.index, [f"memory_{c}_bytes" for c in COMPONENTS]]
    if parts.dropna(how="all").empty:
        return None
    unit, size = byte_unit(peaks.max())
    described = _described(comparison, peaks.index.tolist())
    data = parts.set_axis(list(COMPONENTS), axis=1).rename_axis("config").reset_index()
    data = data.melt("config", var_name="component", value_name="bytes").merge(described, on="config")
    data["size"] = data["bytes"] / size
    data["component_text"] = [figure("peak_memory_bytes", value) for value in data["bytes"]]
    data["rank"] = data["component"].map({c: i for i, c in enumerate(COMPONENTS)})
    colours = altair.Scale(domain=list(COMPONENTS), range=[BLUE, ORANGE, GREEN, PINK, SKY])
    chart = (
        altair.Chart(data)
        .mark_bar()
        .encode(
            y=altair.Y("technique:N", sort=described["technique"].tolist(), title=None, axis=_TECHNIQUES),
            x=altair.X("sum(size):Q", title=axis_title("peak_memory_bytes", unit)),
            color=altair.Color("component:N", scale=colours, title=None, legend=altair.Legend(orient="top")),
            order="rank:O",
            tooltip=[altair.Tooltip("component:N"), altair.Tooltip("component_text:N", title="size"), *_TOOLTIP],
        )
        .properties(width=_WIDTH, title="Peak memory by component")
    )
    return Chart("memory", "Peak memory by component", "Live tensors at the moment of the peak.", chart)


def pareto(comparison: Comparison) -> Chart | None:
    """Loss (or speed, where no loss is meaningful) against memory, with speed as colour and the front labelled."""
    shown = comparison.shown[:_MOST_POINTS]
    means = comparison.means.loc[shown]
    with_loss = bool(means["eval_loss"].notna().any())
    y = "eval_loss" if with_loss else "tokens_per_second"
    means = means.dropna(subset=["peak_memory_bytes", y])
    if means.empty:
        return None
    unit, size = byte_unit(means["peak_memory_bytes"].max())
    figures = means[["peak_memory_bytes"]].assign(slowness=-means["tokens_per_second"].fillna(0.0))
    if with_loss:
        figures["loss"] = means["eval_loss"]
    data = _described(comparison, means.index.tolist()).set_index("config")
    data["memory"] = means["peak_memory_bytes"] / size
    data["y"] = means[y]
    data["speed"] = means["tokens_per_second"]
    data["front"] = numpy.where(pareto_front(figures), "on the front", "beaten by another")
    base = altair.Chart(data.reset_index()).encode(
        x=altair.X(
            "memory:Q",
            title=axis_title("peak_memory_bytes", unit),
            scale=altair.Scale(type="log", nice=False, padding=24),
        ),
        y=altair.Y(
            "y:Q",
            title=axis_title(y, "nats per token" if with_loss else ""),
            scale=altair.Scale(zero=False, padding=18),
        ),
        tooltip=_TOOLTIP,
    )
    points = base.mark_point(size=110, filled=True, opacity=0.95).encode(
        color=altair.Color("speed:Q", title=axis_title("tokens_per_second", ""), scale=altair.Scale(scheme="viridis")),
        shape=altair.Shape(
            "front:N",
            title=None,
            scale=altair.Scale(domain=["on the front", "beaten by another"], range=["circle", "triangle"]),
            legend=altair.Legend(orient="top"),
        ),
    )
    names = base.transform_filter(altair.datum.front == "on the front").mark_text(
        align="left", dx=8, dy=-7, fontSize=10
    )
    chart = (points + names.encode(text="technique:N")).properties(
        width=_WIDTH, height=400, title="Memory, loss and speed" if with_loss else "Memory and speed"
    )
    caption = "A configuration is on the front when no other one is at least as good in all of these and better in one."
    return Chart("pareto", "Memory, speed and loss", caption, chart.interactive())


_VERDICTS = ("better", "worse", "same", "not distinguishable")


def effects(comparison: Comparison) -> Chart | None:
    """Every technique's effect on memory, speed and loss, with its interval."""
    m = comparison.measurements
    others = [c for c in comparison.shown[: _MOST_BARS + 1] if c != m.baseline]
    if not others or m.baseline is None:
        return None
    described = _described(comparison, others)
    named, headings = _under_headings(comparison, described)
    panels: list[Any] = []
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
            panels.append(_effect_panel(data, METRICS[metric], named, headings, first=not panels))
    if not panels:
        return None
    chart = altair.hconcat(*panels, title="Effect of each technique against the baseline").resolve_scale(color="shared")
    return Chart(
        "effects",
        "Effects with their intervals",
        "Dots are estimates, lines intervals that hold all at once at 95 %.",
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


def _effect_panel(data: pandas.DataFrame, metric: Metric, named: list[str], headings: list[str], *, first: bool) -> Any:
    ratio = metric.scale == "ratio"
    title = axis_title(metric.name, "×" if ratio else metric.unit)
    no_effect = 1.0 if ratio else 0.0
    weight = {"condition": {"test": f"indexof({json.dumps(headings)}, datum.value) >= 0", "value": "bold"},
              "value": "normal"}  # fmt: skip
    axis = altair.Axis(labelLimit=260, labelFontWeight=weight) if first else altair.Axis(labels=False, ticks=False)
    x_scale = altair.Scale(type="log", nice=False, padding=10) if ratio else altair.Scale(zero=False)
    colours = altair.Scale(domain=list(_VERDICTS), range=[BLUE, RED, GREEN, GREY])
    shapes = altair.Scale(domain=list(_VERDICTS), range=["circle", "triangle-up", "square", "diamond"])
    # All techniques, measured or not: each panel has the rows that the first one names.
    rows = altair.Scale(domain=named)
    base = altair.Chart(data).encode(
        y=altair.Y("technique:N", scale=rows, title=None, axis=axis),
        color=altair.Color("verdict:N", scale=colours, title=None, legend=altair.Legend(orient="top")),
        tooltip=[altair.Tooltip("text:N", title="effect"), *_TOOLTIP],
    )
    line = altair.Chart(pandas.DataFrame({"at": [no_effect]})).mark_rule(strokeDash=[4, 3], color=GREY).encode(x="at:Q")
    ticks = _ratio_ticks(data) if ratio else None
    x_axis = altair.Axis(values=ticks, format="~g") if ticks else altair.Axis()
    bars = base.mark_rule(strokeWidth=2).encode(
        x=altair.X("low:Q", title=title, scale=x_scale, axis=x_axis), x2=altair.X2("high:Q")
    )
    dots = base.mark_point(size=70, filled=True, opacity=1).encode(
        x=altair.X("value:Q", title=title, scale=x_scale, axis=x_axis),
        shape=altair.Shape("verdict:N", scale=shapes, title=None, legend=altair.Legend(orient="top")),
    )
    # An axis of nothing but nulls has no extent.
    layers = line + bars + dots if data["low"].notna().any() else line + dots
    return layers.properties(width=240)


def _ratio_ticks(data: pandas.DataFrame) -> list[float]:
    low = min(data[["value", "low"]].min().min(), 1.0)
    high = max(data[["value", "high"]].max().max(), 1.0)
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0]
    if high / low < 1.8:
        ticks = [round(0.5 + 0.1 * i, 1) for i in range(16)]
    return [tick for tick in ticks if low * 0.9 <= tick <= high * 1.1]


def loss_curves(comparison: Comparison, steps: pandas.DataFrame) -> Chart | None:
    """Training loss over tokens, and over the seconds they take at the measured speed."""
    m = comparison.measurements
    if not comparison.means["eval_loss"].notna().any():
        return None  # losses of random weights are not meaningful
    speed = comparison.means["tokens_per_second"]
    drawn = [c for c in _curves_of_interest(comparison) if pandas.notna(speed.get(c))]
    data = steps[steps["config"].isin(drawn)].sort_values(["config", "repeat", "step"])
    if data.empty:
        return None
    data = data.assign(tokens=data.groupby(["config", "repeat"])["tokens"].cumsum())
    data = data.groupby(["config", "step"])[["tokens", "loss"]].mean().reset_index()
    data["seconds"] = data["tokens"] / data["config"].map(speed)
    data["technique"] = data["config"].map(m.configs["label"]).astype(str)
    names = [str(m.configs.at[c, "label"]) for c in drawn]
    colours = altair.Scale(domain=names, range=list(_LINES[: len(names)]))
    legend = altair.Legend(labelLimit=220)
    panels = []
    for x, title in (("tokens", "Tokens trained on"), ("seconds", "Seconds at the measured speed")):
        base = altair.Chart(data).encode(
            x=altair.X(f"{x}:Q", title=title),
            y=altair.Y("loss:Q", title="Training loss (nats per token)", scale=altair.Scale(zero=False)),
            color=altair.Color("technique:N", scale=colours, title=None, legend=legend),
            strokeDash=altair.StrokeDash("technique:N", scale=altair.Scale(domain=names), title=None, legend=legend),
            tooltip=["technique:N", altair.Tooltip(f"{x}:Q", title=title, format=",.1f"), "loss:Q", "step:Q"],
        )
        panels.append(base.mark_line(point=True).properties(width=300, height=260))
    chart = altair.hconcat(*panels, title="Training loss")
    caption = "Loss of each optimizer step before its update, averaged over repeats; steps see different stories."
    return Chart("loss", "Loss over tokens and seconds", caption, chart)


def _curves_of_interest(comparison: Comparison) -> Iterator[int]:
    """The baseline, and those whose speed or loss differs most from it; more than eight lines are not readable."""
    m = comparison.measurements
    if m.baseline is None:
        yield from comparison.shown[: len(_LINES)]
        return
    sizes: dict[int, float] = {}
    for config in comparison.shown[:_MOST_POINTS]:
        loss, speed = comparison.of("eval_loss", config), comparison.of("tokens_per_second", config)
        sizes[config] = (abs(loss.value) if loss else 0.0) + (abs(math.log(speed.value)) if speed else 0.0)
    sizes[m.baseline] = math.inf
    yield from sorted(sizes, key=lambda c: -sizes[c])[: len(_LINES)]


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
    data = _described(comparison, configs.index.tolist())
    data["level"] = configs[key].to_numpy()
    data["memory"] = (means["peak_memory_bytes"] / size).to_numpy()
    data["speed"] = means["tokens_per_second"].to_numpy()
    x = altair.X("level:Q", title=title, axis=altair.Axis(values=sorted({*data["level"].tolist()}), format="d"))
    panels = [
        altair.Chart(data)
        .mark_line(point=altair.OverlayMarkDef(size=60, filled=True), color=colour)
        .encode(
            x=x,
            y=altair.Y(f"{column}:Q", title=axis_title(metric, axis_unit), scale=altair.Scale(zero=True)),
            tooltip=_TOOLTIP,
        )
        .properties(width=300, height=170)
        for column, metric, axis_unit, colour in (
            ("memory", "peak_memory_bytes", unit, BLUE),
            ("speed", "tokens_per_second", "", RED),
        )
    ]
    return altair.vconcat(*panels)


def forgetting(comparison: Comparison) -> Chart | None:
    """Change of the loss on general text against that on the stories, with both intervals."""
    m = comparison.measurements
    shown = comparison.shown[:_MOST_POINTS]
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
    data = pandas.DataFrame(rows).merge(_described(comparison, both), on="config")
    tips = [altair.Tooltip("learnt_text:N", title="held-out stories"), altair.Tooltip("forgot_text:N", title="general"),
            *_TOOLTIP]  # fmt: skip
    x_title, y_title = "Change on held-out stories (nats)", "Change on general text: forgetting (nats)"
    scale = altair.Scale(zero=False, padding=18)
    base = altair.Chart(data).encode(tooltip=tips)
    x, y = altair.X("x:Q", title=x_title, scale=scale), altair.Y("y:Q", title=y_title, scale=scale)
    no_change = altair.Chart(pandas.DataFrame({"at": [0.0]})).mark_rule(strokeDash=[4, 3], color=GREY).encode(y="at:Q")
    across = base.mark_rule(color=SKY).encode(x=altair.X("x_low:Q", title=x_title, scale=scale), x2="x_high:Q", y=y)
    upright = base.mark_rule(color=SKY).encode(y=altair.Y("y_low:Q", title=y_title, scale=scale), y2="y_high:Q", x=x)
    points = base.mark_point(size=80, filled=True, color=BLUE, opacity=1).encode(x=x, y=y)
    names = base.mark_text(align="left", dx=8, dy=-7, fontSize=10).encode(x=x, y=y, text="technique:N")
    chart = (no_change + across + upright + points + names).properties(
        width=_WIDTH, height=360, title="Learnt and forgotten"
    )
    caption = (
        "Further left is learnt better, further up forgotten more; lines are intervals that hold all at once at 95 %."
    )
    return Chart("forgetting", "Learnt and forgotten", caption, chart)


def predicted(comparison: Comparison) -> Chart | None:
    """Measured against predicted peak memory."""
    means = comparison.means.loc[comparison.shown[:_MOST_POINTS]]
    means = means.dropna(subset=["predicted_peak_memory_bytes", "peak_memory_bytes"])
    if means.empty:
        return None
    unit, size = byte_unit(means["peak_memory_bytes"].max())
    data = _described(comparison, means.index.tolist())
    data["predicted"] = (means["predicted_peak_memory_bytes"] / size).to_numpy()
    data["measured"] = (means["peak_memory_bytes"] / size).to_numpy()
    most = float(data[["predicted", "measured"]].max().max()) * 1.05
    diagonal = altair.Chart(pandas.DataFrame({"at": [0.0, most]})).mark_line(color=GREY, strokeDash=[4, 3])
    points = altair.Chart(data).mark_point(size=70, filled=True, color=BLUE, opacity=1)
    chart = diagonal.encode(x="at:Q", y="at:Q") + points.encode(
        x=altair.X("predicted:Q", title=axis_title("predicted_peak_memory_bytes", unit)),
        y=altair.Y("measured:Q", title=f"Measured {METRICS['peak_memory_bytes'].label} ({unit})"),
        tooltip=_TOOLTIP,
    )
    chart = chart.properties(width=340, height=340, title="Predicted and measured")
    return Chart("predicted", "Predicted and measured", "Points above the line needed more than predicted.", chart)
