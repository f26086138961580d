"""What every chart is made with: its declaration, its colours, its tooltips, and the names at its points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import altair
import numpy
import pandas

from harness.analysis.comparison import Comparison, differences
from harness.analysis.words import figure
from harness.metrics import HEADLINE, METRICS
from harness.report.labels import FONT_SIZE, Align, Box, Label, PixelAxis, Segment, place

# Okabe and Ito (2008): distinguishable under any colour vision.
BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8a8a8a"
MOST_BARS = 40
MOST_POINTS = 500
WIDTH = 640
"""Pixels of a chart of one panel."""
_ALIGNS: tuple[Align, ...] = ("left", "center", "right")


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


def about_configs(comparison: Comparison, configs: Sequence[int]) -> pandas.DataFrame:
    """Texts for tooltips on configurations: label, figures, and differences from the baseline."""
    m = comparison.measurements
    rows = []
    for config, label, differs in zip(configs, m.labels(configs), differences(m, configs), strict=True):
        means = comparison.mean(config)
        rows.append(
            {
                "config": config,
                "technique": label,
                "differs": differs,
                **{f"{metric}_text": figure(metric, means.get(metric)) for metric in HEADLINE},
            }
        )
    return pandas.DataFrame(rows)


TOOLTIP = [
    altair.Tooltip("technique:N", title="technique"),
    altair.Tooltip("differs:N", title="differs in"),
    *(altair.Tooltip(f"{metric}_text:N", title=METRICS[metric].label) for metric in HEADLINE),
]
TECHNIQUES = altair.Axis(labelLimit=260, ticks=False)
"""The axis of techniques, a row each."""


def scale_of(axis: PixelAxis) -> altair.Scale:
    """The same axis for Vega-Lite, which then draws each value at the pixel that `axis` says."""
    return altair.Scale(type="log" if axis.log else "linear", domain=[axis.low, axis.high], nice=False)


@dataclass(frozen=True)
class Extent:
    """What an axis shows: all estimates, and of their intervals what lies near them, as a few wide ones would press
    everything else together. Marks of intervals are clipped at the frame.
    """

    least: float
    most: float
    cuts: bool
    """Whether an interval goes on beyond it."""

    @classmethod
    def of(
        cls, data: pandas.DataFrame, columns: Sequence[str], *, holds: Sequence[float] = (), log: bool = False
    ) -> Extent:
        """An extent that goes beyond the estimates by the range of them, or by two usual half widths, at most.

        Args:
            data: a row for each estimate, one at least.
            columns: of the estimates, of the low and of the high ends; nulls are not known.
            holds: values that are shown in any case.
            log: whether they are ratios, and the axis logarithmic.
        """
        table = data[list(columns)].astype(float)
        table = table.clip(lower=1e-9).map(math.log) if log else table
        table = table[numpy.isfinite(table[columns[0]])].replace([math.inf, -math.inf], math.nan)
        values = table[columns[0]]
        points = [*(math.log(value) if log else value for value in holds), *values.tolist()]
        least, most = min(points), max(points)
        half_widths = pandas.concat([(table[end] - values).abs() for end in columns[1:]]).dropna()
        reach = max(most - least, _USUAL * float(half_widths.median()) if len(half_widths) else 0.0)
        lowest, highest = min(least, *table.min()), max(most, *table.max())
        low, high = max(lowest, least - reach), min(highest, most + reach)
        cuts = low > lowest or high < highest
        return cls(math.exp(low), math.exp(high), cuts) if log else cls(low, high, cuts)


_USUAL = 2.0
"""Half widths of the median interval that an axis has room for beyond the estimates."""
CUT = " Intervals that go on at the frame are wider than the picture; tables and comparisons.csv have them whole."


def extents(axis: PixelAxis, at: float, low: Any, high: Any) -> tuple[float, float]:
    """An interval in pixels; where it is not known, the point itself."""
    ends = [at if pandas.isna(end) else axis.at(end) for end in (low, high)]
    return min(ends), max(ends)


def names_at(
    data: pandas.DataFrame,
    names: Sequence[str | None],
    x: PixelAxis,
    y: PixelAxis,
    titles: tuple[str, str],
    *,
    size: float,
    lines: Sequence[Segment] = (),
    margin: float = 0.0,
    to_the_right: bool = False,
    colour: Any = None,
    ticks: int = 10,
) -> list[Any]:
    """Layers that name the points of a chart: texts, and lines from points to those texts that are far from them.

    Args:
        data: columns x and y, and those of the tooltip.
        names: of each row; null: it is not named.
        x: axis of x.
        y: axis of y.
        titles: of both axes.
        size: of the points, in square pixels as Vega-Lite counts them.
        lines: of the chart, in pixels, which names should not cross.
        margin: pixels right of the plot where names may be, too.
        to_the_right: names stand right of their points, moved up or down; else anywhere around.
        colour: channel of the lines to texts; null: grey.
        ticks: of x, about.
    """
    points = [(x.at(of_x), y.at(of_y)) for of_x, of_y in zip(data["x"], data["y"], strict=True)]
    within = Box(0.0, 0.0, x.pixels + margin, y.pixels)
    radius = (size / 3.14) ** 0.5
    placed = place(points, names, within, radius=radius, lines=lines, to_the_right=to_the_right)
    there = [label for label in placed if label is not None]
    rows = data.loc[[label is not None for label in placed]].drop(columns=["x", "y"])
    clip = margin == 0
    layers: list[Any] = []
    ends = [label.leader for label in there]
    if any(ends):
        leaders = rows.assign(**_ends(ends, x, y)).dropna(subset=["x"])
        mark = altair.Chart(leaders).mark_rule(strokeWidth=1, opacity=0.7, clip=clip)
        at = on_axes(x, y, titles, ticks=ticks)
        layers.append(mark.encode(**at, x2="x2", y2="y2", color=altair.value(GREY) if colour is None else colour))
    for align in _ALIGNS:
        aligned = [label.align == align for label in there]
        if any(aligned):
            texts = rows.loc[aligned].assign(**_texts([label for label in there if label.align == align], x, y))
            mark = altair.Chart(texts).mark_text(align=align, baseline="middle", fontSize=FONT_SIZE, clip=clip)
            layers.append(mark.encode(**on_axes(x, y, titles, ticks=ticks), text="name:N", tooltip=TOOLTIP))
    return layers


def on_axes(
    x: PixelAxis, y: PixelAxis, titles: tuple[str, str], fields: tuple[str, str] = ("x", "y"), *, ticks: int = 10
) -> dict[str, Any]:
    """The channels of both axes. All layers name the titles, as those that differ would be joined.

    Args:
        x: axis of x.
        y: axis of y.
        titles: of both.
        fields: columns of x and y.
        ticks: of x, about.
    """
    of_x = altair.Axis() if x.log else altair.Axis(tickCount=ticks)
    return {
        "x": altair.X(f"{fields[0]}:Q", title=titles[0], scale=scale_of(x), axis=of_x),
        "y": altair.Y(f"{fields[1]}:Q", title=titles[1], scale=scale_of(y)),
    }


def _texts(labels: Sequence[Label], x: PixelAxis, y: PixelAxis) -> dict[str, Any]:
    return {
        "x": [x.value(label.x) for label in labels],
        "y": [y.value(label.y) for label in labels],
        "name": [label.text for label in labels],
    }


def _ends(leaders: Sequence[Segment | None], x: PixelAxis, y: PixelAxis) -> dict[str, Any]:
    axes = {"x": x, "y": y, "x2": x, "y2": y}
    return {
        column: [None if leader is None else axis.value(leader[number]) for leader in leaders]
        for number, (column, axis) in enumerate(axes.items())
    }
