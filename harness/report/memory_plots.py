"""Charts of memory: its parts by technique, what limits it, and what was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair
import pandas

from harness._util.units import byte_unit, show_bytes
from harness.analysis.comparison import Comparison
from harness.analysis.words import figure
from harness.metrics import COMPONENTS, METRICS
from harness.report.chart import (
    BLUE,
    GREEN,
    GREY,
    MOST_BARS,
    MOST_POINTS,
    ORANGE,
    PINK,
    RED,
    SKY,
    TECHNIQUES,
    TOOLTIP,
    WIDTH,
    Chart,
    about_configs,
    axis_title,
)
from harness.report.labels import FONT_SIZE, Align

_LEAST_PART = 0.1
"""Of a limit, that the largest bar takes at least: else the limit's line would press all bars together."""
_PREDICTED = "predicted peak"


@dataclass(frozen=True)
class Limit:
    """An amount of memory that trials must stay within."""

    size: int
    """Bytes."""
    text: str
    """What it is: `card: 24.00 GiB`."""


def limits_of(comparison: Comparison, configs: Sequence[int]) -> list[Limit]:
    """The memory budget that all of these configurations have, and the memory of the card; the smallest first.

    The memory of a machine without a card limits nothing that is this small.
    """
    m = comparison.measurements
    limits = []
    budgets = m.configs.loc[list(configs), "memory_budget"]
    if len(budgets) and budgets.notna().all() and budgets.nunique() == 1:
        budget = int(budgets.iloc[0])
        limits.append(Limit(budget, f"memory budget: {show_bytes(budget)}"))
    card = m.environment.get("device_memory_bytes")
    if m.environment.get("device_type") == "cuda" and card:
        limits.append(Limit(int(card), f"card: {show_bytes(int(card))}"))
    return sorted(limits, key=lambda limit: limit.size)


@dataclass(frozen=True)
class MemoryBars:
    """The axes of a chart that has a bar of memory for each technique, and dashed lines for what limits them."""

    names: tuple[str, ...]
    """Of the techniques, from top to bottom."""
    largest: float
    """Bytes of the longest bar."""
    limits: tuple[Limit, ...]
    """All of them, whether drawn or not."""
    title: str
    """Of the axis of memory, without its unit."""

    @property
    def drawn(self) -> tuple[Limit, ...]:
        """Limits that the bars come near enough to."""
        return tuple(limit for limit in self.limits if self.largest >= _LEAST_PART * limit.size)

    @property
    def far(self) -> str:
        """A sentence on each limit that is not drawn, with a space before it."""
        return "".join(f" Far below the {limit.text}." for limit in self.limits if limit not in self.drawn)

    @property
    def most(self) -> float:
        """Bytes that the axis extends to."""
        return 1.04 * max([self.largest, *(limit.size for limit in self.drawn)])

    @property
    def unit(self) -> tuple[str, float]:
        """Of the axis, and its bytes."""
        return byte_unit(self.most)

    @property
    def _rows(self) -> list[str]:
        """Empty rows above the first bar, where the limits are named."""
        return [" " * number for number in range(1, len(self.drawn) + 1)]

    def y(self) -> altair.Y:
        """The channel of techniques, in the column `technique`."""
        scale = altair.Scale(domain=[*self._rows, *self.names])
        return altair.Y("technique:N", scale=scale, title=None, axis=TECHNIQUES)

    def x(self, field: str, **more: Any) -> altair.X:
        """The channel of memory, in the axis' unit."""
        unit, size = self.unit
        scale = altair.Scale(domain=[0, self.most / size], nice=False)
        return altair.X(field, title=f"{self.title} ({unit})", scale=scale, **more)

    def layers(self) -> list[Any]:
        """A dashed line for each drawn limit, and its name."""
        if not self.drawn:
            return []
        rows = pandas.DataFrame(
            {
                "at": [limit.size / self.unit[1] for limit in self.drawn],
                "limit": [limit.text for limit in self.drawn],
                "technique": self._rows,
            }
        )
        lines = altair.Chart(rows).mark_rule(strokeDash=[5, 3], strokeWidth=1.5, color=GREY)
        layers = [lines.encode(x=self.x("at:Q"), tooltip=altair.Tooltip("limit:N"))]
        right = rows["at"] > 0.5 * self.most / self.unit[1]
        sides: tuple[tuple[Align, int, pandas.DataFrame], ...] = (("right", -5, rows[right]), ("left", 5, rows[~right]))
        for align, dx, part in sides:
            if len(part):
                texts = altair.Chart(part).mark_text(align=align, baseline="middle", dx=dx, fontSize=FONT_SIZE)
                layers.append(texts.encode(x=self.x("at:Q"), y=self.y(), text="limit:N"))
        return layers


def memory(comparison: Comparison) -> Chart | None:
    """Peak memory of each technique by component, with what was predicted and what there is."""
    means = comparison.means.reindex(comparison.shown)
    peaks = means["peak_memory_bytes"].dropna().sort_values().head(MOST_BARS)
    parts = means.loc[peaks.index, [f"memory_{c}_bytes" for c in COMPONENTS]]
    if parts.dropna(how="all").empty:
        return None
    about = about_configs(comparison, peaks.index.tolist())
    expected = means.loc[peaks.index, "predicted_peak_memory_bytes"].astype(float)
    bars = MemoryBars(
        tuple(about["technique"]),
        float(max(peaks.max(), expected.fillna(0.0).max())),
        tuple(limits_of(comparison, peaks.index.tolist())),
        METRICS["peak_memory_bytes"].heading,
    )
    _, size = bars.unit
    data = parts.set_axis(list(COMPONENTS), axis=1).rename_axis("config").reset_index()
    data = data.melt("config", var_name="component", value_name="bytes").merge(about, on="config")
    data["size"] = data["bytes"] / size
    data["component_text"] = [figure("peak_memory_bytes", value) for value in data["bytes"]]
    data["rank"] = data["component"].map({c: i for i, c in enumerate(COMPONENTS)})
    colours = altair.Scale(domain=list(COMPONENTS), range=[BLUE, ORANGE, GREEN, PINK, SKY])
    stacked = (
        altair.Chart(data)
        .mark_bar()
        .encode(
            y=bars.y(),
            x=bars.x("sum(size):Q"),
            color=altair.Color("component:N", scale=colours, title=None, legend=altair.Legend(orient="top")),
            order="rank:O",
            tooltip=[altair.Tooltip("component:N"), altair.Tooltip("component_text:N", title="size"), *TOOLTIP],
        )
    )
    layers = [stacked]
    caption = "Live tensors at the moment of the peak."
    if expected.notna().any():
        about["predicted"] = (expected / size).to_numpy()
        about["predicted_text"] = [figure("predicted_peak_memory_bytes", value) for value in expected]
        about["kind"] = _PREDICTED
        layers.append(_ticks(about.dropna(subset=["predicted"]), bars))
        caption += " Upright marks: the peak that was predicted."
    chart = altair.layer(*layers, *bars.layers()).properties(width=WIDTH, title="Peak memory by component")
    return Chart("memory", "Peak memory by component", caption + bars.far, chart)


def _ticks(data: pandas.DataFrame, bars: MemoryBars) -> Any:
    """The predicted peak of each technique on its bar, with a legend of its own. An outline would take the bar's
    tooltips.
    """
    only = altair.Scale(domain=[_PREDICTED], range=[RED])
    return (
        altair.Chart(data)
        .mark_tick(thickness=3, height={"band": 1.0}, opacity=1)
        .encode(
            y=bars.y(),
            x=bars.x("predicted:Q"),
            fill=altair.Fill("kind:N", scale=only, title=None, legend=altair.Legend(orient="top")),
            tooltip=[altair.Tooltip("predicted_text:N", title=_PREDICTED), *TOOLTIP],
        )
    )


def predicted(comparison: Comparison) -> Chart | None:
    """Measured against predicted peak memory."""
    means = comparison.means.loc[comparison.shown[:MOST_POINTS]]
    means = means.dropna(subset=["predicted_peak_memory_bytes", "peak_memory_bytes"])
    if means.empty:
        return None
    unit, size = byte_unit(means["peak_memory_bytes"].max())
    data = about_configs(comparison, means.index.tolist())
    data["predicted"] = (means["predicted_peak_memory_bytes"] / size).to_numpy()
    data["measured"] = (means["peak_memory_bytes"] / size).to_numpy()
    most = float(data[["predicted", "measured"]].max().max()) * 1.05
    diagonal = altair.Chart(pandas.DataFrame({"at": [0.0, most]})).mark_line(color=GREY, strokeDash=[4, 3])
    points = altair.Chart(data).mark_point(size=70, filled=True, color=BLUE, opacity=1)
    chart = diagonal.encode(x="at:Q", y="at:Q") + points.encode(
        x=altair.X("predicted:Q", title=axis_title("predicted_peak_memory_bytes", unit), axis=altair.Axis(tickCount=6)),
        y=altair.Y("measured:Q", title=f"Measured {METRICS['peak_memory_bytes'].label} ({unit})"),
        tooltip=TOOLTIP,
    )
    chart = chart.properties(width=340, height=340, title="Predicted and measured")
    return Chart("predicted", "Predicted and measured", "Points above the line needed more than predicted.", chart)
