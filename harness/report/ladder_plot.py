"""The chart of a ladder: techniques one upon the other, until the training fits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair
import pandas

from harness._util.units import show_bytes
from harness.analysis.comparison import Comparison
from harness.analysis.recommend import needed_bytes
from harness.report.chart import BLUE, GREEN, MOST_BARS, MOST_POINTS, RED, TOOLTIP, WIDTH, Chart, about_configs
from harness.report.labels import FONT_SIZE
from harness.report.memory_plots import Limit, MemoryBars, limits_of

_FACTOR = "ladder"
"""Factor whose levels are rungs."""
_PREFIX = "+ "
"""Of the labels that `design: ladder` makes."""
_LEAST_RUNGS = 3


def rungs_of(comparison: Comparison) -> list[int]:
    """The configurations of a ladder from its lowest rung on, each with the techniques of the one before and more.

    Rows do not say that they are of a ladder. It is known by its labels (`+ precision=nf4`, after the baseline), by a
    factor of that name, whose levels are in the order of their names, or by keys: the one longest chain of
    configurations in which each keeps all in which the one before differs from the baseline, and adds something.

    Returns:
        At least three beyond the baseline; none where there is no ladder, or more than one.
    """
    m = comparison.measurements
    configs = m.configs[~m.configs["twin"] & ~m.configs["watched"]]
    labelled = configs.index[configs["label"].str.startswith(_PREFIX)].tolist()
    if m.baseline is not None and len(labelled) >= _LEAST_RUNGS:
        return [m.baseline, *_in_order(dict(zip(labelled, m.differing_keys(labelled), strict=True)))]
    named = configs.index[configs["factor"] == _FACTOR].tolist()
    if len(named) >= _LEAST_RUNGS:
        return sorted(named, key=lambda config: _natural(str(configs.at[config, "label"])))
    others = [config for config in configs.index if config != m.baseline]
    if m.baseline is None or not _LEAST_RUNGS <= len(others) <= MOST_POINTS:
        return []
    chain = longest_chain(dict(zip(others, m.differing_keys(others), strict=True)))
    return [m.baseline, *chain] if len(chain) >= _LEAST_RUNGS else []


def longest_chain(keys: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """The longest chain in which each has all keys and values of the one before and more; none where several are as
    long: the combinations of a grid are no ladder.
    """
    items = {config: {(key, repr(value)) for key, value in values.items()} for config, values in keys.items()}
    order = sorted(items, key=lambda config: len(items[config]))
    best: dict[int, tuple[int, int]] = {}  # length of the longest chain that ends here, and how many there are
    before: dict[int, int] = {}
    for config in order:
        length, ways = 0, 1
        for other in best:
            if items[other] < items[config]:
                if best[other][0] > length:
                    length, ways = best[other]
                    before[config] = other
                elif best[other][0] == length:
                    ways += best[other][1]
        best[config] = (length + 1, ways)
    longest = max((length for length, _ in best.values()), default=0)
    last = [config for config, (length, _) in best.items() if length == longest]
    if len(last) != 1 or best[last[0]][1] != 1:
        return []
    chain = last
    while chain[0] in before:
        chain = [before[chain[0]], *chain]
    return chain


def _in_order(keys: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Rungs by the number of keys in which they differ from the baseline. Of two with as many, one replaced a level of
    the other: that which fewer rungs agree with was replaced.
    """
    items = {config: {(key, repr(value)) for key, value in values.items()} for config, values in keys.items()}
    followers = {config: sum(items[config] <= other for other in items.values()) for config in items}
    return sorted(items, key=lambda config: (len(items[config]), followers[config]))


def _natural(label: str) -> list[tuple[int, str]]:
    """Numbers within a label by size: rung 10 comes after rung 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", label) if part]


def ladder(comparison: Comparison) -> Chart | None:
    """Memory rung by rung, with what limits it, and the first that fits."""
    rungs = rungs_of(comparison)[:MOST_BARS]
    limits = limits_of(comparison, rungs)
    data = _rows(comparison, rungs, limits)
    if len(data) < 2:
        return None
    data = data.merge(about_configs(comparison, data["config"].tolist()), on="config")
    bars = MemoryBars(tuple(data["technique"]), float(data["bytes"].max()), tuple(limits), "Memory needed")
    _, size = bars.unit
    data["size"] = data["bytes"] / size
    tips = [altair.Tooltip("needs:N", title="memory needed"), *TOOLTIP]
    base = altair.Chart(data).encode(y=bars.y(), tooltip=tips)
    layers = []
    styles: tuple[tuple[str, dict[str, Any]], ...] = (
        ("fits", {"color": BLUE}),
        ("first", {"color": GREEN}),
        ("beyond", {"color": RED, "fillOpacity": 0.35, "stroke": RED}),
        ("unknown", {"fillOpacity": 0, "stroke": RED, "strokeDash": [4, 3], "strokeWidth": 1.5}),
    )
    for state, style in styles:
        if (data["state"] == state).any():
            of_state = base.properties(data=data[data["state"] == state])
            layers.append(of_state.mark_bar(**style).encode(x=bars.x("size:Q")))
    texts = base.mark_text(align="left", baseline="middle", fontSize=FONT_SIZE)
    layers.append(texts.encode(x=altair.value(WIDTH + 8), text="needs:N"))
    chart = altair.layer(*layers, *bars.layers()).properties(width=WIDTH, title="Technique by technique")
    caption = (
        "Most of loading, training and evaluating, each rung with the techniques of those before it."
        + " Hollow: ended out of memory, and needs at least as much." * bool((data["state"] == "unknown").any())
        + " Pale: beyond the limit." * bool((data["state"] == "beyond").any())
        + " Green: the first that fits." * bool((data["state"] == "first").any())
        + bars.far
    )
    return Chart("ladder", "A ladder of techniques", caption, chart)


def _rows(comparison: Comparison, rungs: Sequence[int], limits: Sequence[Limit]) -> pandas.DataFrame:
    """What each rung needs, or is known to need at least, in bytes; without those that nothing is known of."""
    m = comparison.measurements
    needs = needed_bytes(m)
    failed = m.trials[(m.trials["status"] == "oom") & m.trials["oom_reached_bytes"].notna()]
    bounds = (failed["oom_reached_bytes"] + failed["oom_requested_bytes"].fillna(0)).groupby(failed["config"]).max()
    smallest = min((limit.size for limit in limits), default=None)
    rows: list[dict[str, Any]] = []
    for config in rungs:
        if config in bounds.index:  # the repeat that holds most must fit
            least = max(int(bounds[config]), needs.get(config, 0))
            rows.append({"config": config, "bytes": least, "state": "unknown",
                         "needs": f"at least {show_bytes(least)}, out of memory"})  # fmt: skip
        elif config in needs:
            beyond = smallest is not None and needs[config] > smallest
            rows.append({"config": config, "bytes": needs[config], "state": "beyond" if beyond else "fits",
                         "needs": show_bytes(needs[config])})  # fmt: skip
    states = [row["state"] for row in rows]
    first = states.index("fits") if "fits" in states else 0
    if first > 0:  # that the lowest rung fits needs no mark
        rows[first] |= {"state": "first", "needs": f"{rows[first]['needs']}, the first that fits"}
    return pandas.DataFrame(rows, columns=["config", "bytes", "state", "needs"])
