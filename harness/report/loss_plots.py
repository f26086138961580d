"""Charts of the training loss: its course, and the time that reaching one takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import altair
import numpy
import pandas

from harness.analysis.comparison import Comparison
from harness.analysis.cost import LEAST_STEPS, Cost, Costs, costs, in_common_repeats
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
    TECHNIQUES,
    TOOLTIP,
    WIDTH,
    Chart,
    Extent,
    about_configs,
    axis_title,
    extents,
    names_at,
    on_axes,
)
from harness.report.labels import FONT_SIZE, PixelAxis, Segment, shortened, width_of

_LINES = (BLUE, ORANGE, GREEN, PINK, SKY, RED, "#7f6d00", GREY)
LEAST_SMOOTHED = 12
"""Steps from which on a loss has a course to be shown through its noise."""
_PANEL = (300, 260)
"""Pixels of each panel of loss curves."""
_END = 40
"""Size of the point at the end of a curve."""
_LOSS = "Training loss (nats per token)"


def window_of(steps: int) -> int:
    """How many steps a smoothed loss is the mean of."""
    return max(3, steps // 10)


def loss_curves(comparison: Comparison, steps: pandas.DataFrame) -> Chart | None:
    """Training loss over tokens, and over the seconds they take at the measured speed."""
    if not comparison.means["eval_loss"].notna().any():
        return None  # losses of random weights are not meaningful
    speed = comparison.speeds
    drawn = [c for c in _curves_of_interest(comparison) if speed.get(c, 0.0) > 0]
    data = _means_by_step(in_common_repeats(steps, drawn))
    data = data[numpy.isfinite(data["loss"].astype(float))]
    if data.empty:
        return None
    data = data.assign(seconds=data["tokens"] / data["config"].map(speed))
    data["smoothed"] = data.groupby("config")["step"].transform("size") >= LEAST_SMOOTHED
    data["smooth"] = data["loss"]
    for _, curve in data[data["smoothed"]].groupby("config"):
        data.loc[curve.index, "smooth"] = _running_mean(curve, window_of(len(curve)))
    about = about_configs(comparison, [c for c in drawn if c in set(data["config"])])
    data = data.merge(about, on="config")
    scale = altair.Scale(domain=about["technique"].tolist(), range=list(_LINES[: len(about)]))
    panels = [
        _curves(data, x, title, scale)
        for x, title in (("tokens", "Tokens trained on"), ("seconds", "Seconds at the measured speed"))
    ]
    chart = altair.hconcat(*panels, title="Training loss")
    return Chart("loss", "Loss over tokens and seconds", _caption(data), chart)


def _means_by_step(steps: pandas.DataFrame) -> pandas.DataFrame:
    """The loss of each configuration and step, and the tokens until then; the means of all repeats."""
    data = steps.sort_values(["config", "repeat", "step"])
    data = data.assign(own=data["tokens"], tokens=data.groupby(["config", "repeat"])["tokens"].cumsum())
    return data.groupby(["config", "step"])[["own", "tokens", "loss"]].mean().reset_index()


def _running_mean(curve: pandas.DataFrame, window: int) -> pandas.Series:
    """The mean loss of the last steps, weighted by their tokens; null before there are enough of them."""
    weighted: pandas.Series = (curve["loss"] * curve["own"]).rolling(window).sum() / curve["own"].rolling(window).sum()
    return weighted


def _caption(data: pandas.DataFrame) -> str:
    caption = "Loss of each optimizer step before its update, averaged over repeats; steps see different stories."
    if not data["smoothed"].any():
        return caption
    windows = sorted({window_of(count) for count in data.loc[data["smoothed"]].groupby("config").size()})
    widths = f"{windows[0]}" if len(windows) == 1 else f"{windows[0]} to {windows[-1]}"
    caption += f" Pale lines are these; strong ones the mean of the last {widths} steps, weighted by tokens."
    if not data["smoothed"].all():
        caption += f" Fewer than {LEAST_SMOOTHED} steps are shown as they are, with points."
    return caption


def _curves(data: pandas.DataFrame, x: str, title: str, scale: altair.Scale) -> Any:
    """A panel: the losses of the steps behind, the smoothed ones in front, and a name at the end of each."""
    width, height = _PANEL
    x_axis = PixelAxis.of([0.0, *data[x].tolist()], width, 4)
    losses = [*data["loss"].dropna().tolist(), *data["smooth"].dropna().tolist()]
    y_axis = PixelAxis.of(losses, height, 8, upright=True)
    titles = title, _LOSS
    colour = altair.Color("technique:N", scale=scale, title=None, legend=None)
    base = altair.Chart().encode(
        color=colour,
        strokeDash=altair.StrokeDash("technique:N", scale=altair.Scale(domain=scale.domain), title=None, legend=None),
        tooltip=["technique:N", altair.Tooltip(f"{x}:Q", title=title, format=",.1f"), "loss:Q", "step:Q"],
    )
    layers = []
    smoothed = data[data["smoothed"]]
    few = data[~data["smoothed"]]
    at = on_axes(x_axis, y_axis, titles, (x, "loss"), ticks=5)
    if len(smoothed):
        layers.append(base.properties(data=smoothed).mark_line(strokeWidth=1, opacity=0.3).encode(**at))
        front = base.properties(data=smoothed.dropna(subset=["smooth"])).mark_line(strokeWidth=2.2)
        layers.append(front.encode(**on_axes(x_axis, y_axis, titles, (x, "smooth"), ticks=5)))
    if len(few):
        layers.append(base.properties(data=few).mark_line(point=True).encode(**at))
    ends = data.dropna(subset=["smooth"]).groupby("config").tail(1).reset_index(drop=True)
    ends = ends.assign(x=ends[x], y=ends["smooth"])
    if len(smoothed):
        points = altair.Chart(ends).mark_point(size=_END, filled=True, opacity=1)
        layers.append(points.encode(**on_axes(x_axis, y_axis, titles, ticks=5), color=colour))
    names = ends["technique"].tolist()
    margin = max(width_of(shortened(name)) for name in names) + 24
    curves = [line for _, curve in data.groupby("config") for line in _segments(curve, x, x_axis, y_axis)]
    layers += names_at(
        ends,
        names,
        x_axis,
        y_axis,
        titles,
        size=_END,
        lines=curves,
        margin=margin,
        to_the_right=x == "tokens",
        colour=colour,
        ticks=5,
    )
    return altair.layer(*layers).properties(width=width, height=height)


def _segments(curve: pandas.DataFrame, x: str, x_axis: PixelAxis, y_axis: PixelAxis) -> Iterator[Segment]:
    """The pieces of a curve, in pixels."""
    known = curve.dropna(subset=["smooth"])
    points = [(x_axis.at(a), y_axis.at(b)) for a, b in zip(known[x], known["smooth"], strict=True)]
    for one, other in itertools.pairwise(points):
        yield (*one, *other)


def _curves_of_interest(comparison: Comparison) -> Iterator[int]:
    """The baseline, and those whose speed or loss differs most from it; more than eight lines are not readable."""
    m = comparison.measurements
    if m.baseline is None:
        yield from comparison.shown[: len(_LINES)]
        return
    sizes: dict[int, float] = {}
    for config in comparison.shown[:MOST_POINTS]:
        loss, speed = comparison.of("eval_loss", config), comparison.of("tokens_per_second", config)
        sizes[config] = (abs(loss.value) if loss else 0.0) + (abs(math.log(speed.value)) if speed else 0.0)
    sizes[m.baseline] = math.inf
    yield from sorted(sizes, key=lambda c: -sizes[c])[: len(_LINES)]


# ------------------------------------------------------------------------------------ time to loss


def time_to_loss(comparison: Comparison, steps: pandas.DataFrame) -> Chart | None:
    """What training takes until the baseline's last loss; of trainings too short for a course, the loss that they end
    with against their time.
    """
    reached = costs(comparison, steps)
    return _until_loss(comparison, steps, reached) if reached else _loss_after_time(comparison, steps)


def _until_loss(comparison: Comparison, steps: pandas.DataFrame, of: Costs) -> Chart:
    """A bar of time for each technique until its loss is as low as the baseline's last one."""
    m = comparison.measurements
    ordered = sorted(of.rows, key=lambda each: (each.seconds is None, each.seconds or 0.0))[:MOST_BARS]
    if m.baseline not in {each.config for each in ordered}:
        ordered = [*ordered[: MOST_BARS - 1], next(each for each in of.rows if each.config == m.baseline)]
    speed = comparison.speeds
    curves = _means_by_step(in_common_repeats(steps, [each.config for each in of.rows]))
    rows = [_reached(each, curves[curves["config"] == each.config], float(speed[each.config]), of) for each in ordered]
    data = pandas.DataFrame(rows).merge(about_configs(comparison, [each.config for each in ordered]), on="config")
    unit, data = _in_unit(data)
    scale = altair.Scale(domain=[0, 1.03 * float(data[["time", "kept"]].max().max())], nice=False)
    y = altair.Y("technique:N", scale=altair.Scale(domain=data["technique"].tolist()), title=None, axis=TECHNIQUES)
    tips = [altair.Tooltip("reached:N", title=f"{of.target:.3f} nats"), *TOOLTIP]

    def x(field: str) -> altair.X:
        return altair.X(field, title=f"Training time ({unit})", scale=scale)

    within, never = data[data["kept"].notna()], data[data["kept"].isna()]
    layers = [altair.Chart(within).mark_bar(color=BLUE).encode(x=x("time:Q"), y=y, tooltip=tips)]
    if len(never):
        dashed = altair.Chart(never).mark_bar(fillOpacity=0, stroke=GREY, strokeDash=[3, 2])
        layers.append(dashed.encode(x=x("time:Q"), y=y, tooltip=tips))
    doubt = altair.Chart(within).mark_rule(color=ORANGE, strokeWidth=3)
    layers.append(doubt.encode(x=x("time:Q"), x2="kept:Q", y=y, tooltip=tips))
    texts = altair.Chart(data).mark_text(align="left", baseline="middle", fontSize=FONT_SIZE)
    layers.append(texts.encode(x=altair.value(WIDTH + 8), y=y, text="reached:N", tooltip=tips))
    chart = altair.layer(*layers).properties(width=WIDTH, title=f"Time to a training loss of {of.target:.3f} nats")
    caption = (
        f"At the speed as it is compared with the baseline's, until the mean loss of {of.window} steps is as "
        "low for the first time as the baseline's at its end. Orange lines: from then until it stays as low, as a "
        "loss falls unevenly. No intervals are known here: times that differ by less than a fifth mean little. "
        "Dashed: not reached within that time."
    )
    return Chart("time-to-loss", "Time to a loss", caption, chart)


def _reached(cost: Cost, curve: pandas.DataFrame, speed: float, of: Costs) -> dict[str, Any]:
    """Seconds until the loss is as low as the target, and from when on it stays so (null: it never is: the seconds are
    those of the whole training).
    """
    seconds = curve["tokens"] / speed
    if cost.seconds is None:
        return {"config": cost.config, "time": float(seconds.iloc[-1]), "kept": None}
    above = numpy.flatnonzero((_running_mean(curve, of.window) > of.target + 1e-12).to_numpy())
    after = min(int(above[-1]) + 1 if len(above) else 0, len(seconds) - 1)
    return {"config": cost.config, "time": cost.seconds, "kept": max(cost.seconds, float(seconds.iloc[after]))}


def _in_unit(data: pandas.DataFrame) -> tuple[str, pandas.DataFrame]:
    """The unit that suits the longest time, and the times in it, with their texts."""
    times = data[["time", "kept"]].astype(float)
    units = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
    unit, size = next((name, size) for name, size in units if times.max().max() > 2 * size or size == 1)
    scaled = data.assign(time=times["time"] / size, kept=times["kept"] / size)
    texts = [
        f"{time:.3g} {unit}" if known else f"not in {time:.3g} {unit}"
        for time, known in zip(scaled["time"], scaled["kept"].notna(), strict=True)
    ]
    return unit, scaled.assign(reached=texts)


_AFTER_HEIGHT, _AFTER_POINT = 420, 60


def _loss_after_time(comparison: Comparison, steps: pandas.DataFrame) -> Chart | None:
    """The eval loss at the end against the seconds of training at the measured speed, with their intervals."""
    means = comparison.means.assign(speed=comparison.speeds).loc[comparison.shown[:MOST_POINTS]]
    means = means[means["eval_loss"].notna() & (means["speed"] > 0)]
    trained = _means_by_step(steps[steps["config"].isin(means.index)]).groupby("config")["tokens"].last()
    means = means.loc[means.index.isin(trained.index)]
    if len(means) < 2:
        return None
    data = about_configs(comparison, means.index.tolist())
    data["x"] = (trained.reindex(means.index) / means["speed"]).to_numpy()
    data["y"] = means["eval_loss"].to_numpy()
    ends = [comparison.of("eval_loss", config) for config in means.index]
    # The interval of the difference from the baseline, round the figure itself.
    for column, side in (("y_low", "low"), ("y_high", "high")):
        data[column] = [
            None if each is None or (end := getattr(each, side)) is None else own + end - each.value
            for each, own in zip(ends, data["y"], strict=True)
        ]
    data[["y_low", "y_high"]] = data[["y_low", "y_high"]].astype(float)
    extent = Extent.of(data, ("y", "y_low", "y_high"))
    titles = "Seconds of training at the measured speed", axis_title("eval_loss", "nats per token")
    x_axis = PixelAxis.of(data["x"].tolist(), WIDTH, 24, log=True)
    y_axis = PixelAxis.of([extent.least, extent.most], _AFTER_HEIGHT, 20, upright=True)
    base = altair.Chart(data).encode(tooltip=TOOLTIP)
    layers = []
    if data["y_low"].notna().any():
        rules = base.mark_rule(color=SKY, clip=extent.cuts).encode(
            **on_axes(x_axis, y_axis, titles, ("x", "y_low")), y2="y_high:Q"
        )
        layers.append(rules)
    points = base.mark_point(size=_AFTER_POINT, filled=True, color=BLUE, opacity=1)
    layers.append(points.encode(**on_axes(x_axis, y_axis, titles)))
    lines: list[Segment] = []
    for _, row in data.iterrows():
        top, bottom = extents(y_axis, y_axis.at(row["y"]), row["y_low"], row["y_high"])
        lines.append((x_axis.at(row["x"]), top, x_axis.at(row["x"]), bottom))
    layers += names_at(data, data["technique"].tolist(), x_axis, y_axis, titles, size=_AFTER_POINT, lines=lines)
    chart = altair.layer(*layers).properties(
        width=WIDTH, height=_AFTER_HEIGHT, title="Loss after training, and its time"
    )
    caption = (
        "Further left is faster, further down learnt better; lines are intervals of the difference from the baseline's "
        "loss, which hold all at once at 95 %. The time until a loss is shown where the baseline and another one have "
        f"{LEAST_STEPS} steps."
    )
    caption += CUT * extent.cuts
    return Chart("time-to-loss", "Loss and time of training", caption, chart)
