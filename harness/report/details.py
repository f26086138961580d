"""What a row of the techniques table opens to: configuration, figures, steps, and losses by story."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.compute as pc

from harness._util.redact import redact_home
from harness._util.terminal import printable
from harness.analysis import words
from harness.analysis.comparison import Comparison, differences, order
from harness.grids.yaml_file import spec_to_yaml
from harness.metrics import METRICS
from harness.results.store import Store

MOST_DETAILED = 200
"""Configurations whose steps and stories a page holds; the others have their YAML and figures."""
_MOST_STEPS = 200
_MOST_STORIES = 64


@dataclass(frozen=True)
class Configuration:
    """One configuration: as YAML that `harness run` takes, and what was measured of it."""

    key: str
    """Of its rows in the page."""
    label: str
    status: str
    yaml: str
    differs: str
    """In which keys from the baseline, and their values."""
    ends: tuple[str, ...] = ()
    """How its trials ended that did not end well, with the file of their output."""
    figures: tuple[tuple[str, str], ...] = ()
    """Every figure that was measured: its name, and its value with its unit."""
    losses: tuple[tuple[float, float], ...] = ()
    """Tokens trained on so far, and the training loss of the step, over repeats."""
    stories: tuple[tuple[str, int, float, float | None], ...] = ()
    """Each held-out story: its id, tokens, loss after training, and difference from the baseline's, over repeats."""

    @property
    def shown(self) -> dict[str, Any]:
        """What the page shows when its row is opened; its script sets each text as text."""
        texts = {"yaml": printable(self.yaml), "differs": printable(self.differs), "ends": [*map(printable, self.ends)]}
        return texts | {"figures": self.figures, "losses": self.losses, "stories": self.stories}


def configurations(comparison: Comparison, folder: Path, steps: pandas.DataFrame, most: int) -> list[Configuration]:
    """The configurations of a report in the order of its tables, without the baseline's second run.

    Args:
        comparison: of the report.
        folder: where the rows are.
        steps: optimizer steps with the columns config, repeat, step, loss and tokens.
        most: of them.
    """
    m = comparison.measurements
    numbers = [number for number in order(m)[:most] if not m.configs.at[number, "twin"]]
    ends = _ends(m.trials, folder)
    losses = _losses(steps[steps["config"].isin(numbers[:MOST_DETAILED])])
    stories = _stories(comparison, folder, numbers[:MOST_DETAILED])
    return [
        Configuration(
            str(number),
            str(m.configs.at[number, "label"]),
            str(m.configs.at[number, "status"]),
            spec_to_yaml(m.spec(number)),
            differs,
            ends.get(number, ()),
            tuple(_figures(comparison.mean(number))),
            losses.get(number, ()),
            stories.get(number, ()),
        )
        for number, differs in zip(numbers, differences(m, numbers), strict=True)
    ]


def _figures(means: dict[str, float]) -> Iterable[tuple[str, str]]:
    for name, value in means.items():
        metric = METRICS[name]
        if pandas.notna(value):
            unit = "" if metric.unit in ("", "B", "s") else f" {metric.unit}"
            yield metric.heading, words.figure(name, value) + unit


def _ends(trials: pandas.DataFrame, folder: Path) -> dict[int, tuple[str, ...]]:
    """By configuration, how its trials failed."""
    failed = trials[~trials["status"].isin(["ok", "skipped"])]
    logs: dict[str, str] = {}
    if len(failed):
        wanted = pc.field("trial_id").isin(pa.array(failed["trial_id"].tolist(), pa.string()))
        rows = Store(folder).read("trials", columns=["trial_id", "log"]).filter(wanted).to_pylist()
        logs = {row["trial_id"]: row["log"] for row in rows if row["log"]}
    ends: dict[int, tuple[str, ...]] = {}
    row: Any
    for _, row in failed.iterrows():
        where = logs.get(row["trial_id"])
        text = f"repeat {row['repeat']}: {row['status']} in {row['phase']}: {row['error']}"
        text += f"; its output: {redact_home(str(folder / where))}" if where else ""
        ends[int(row["config"])] = (*ends.get(int(row["config"]), ()), text)
    return ends


def _losses(steps: pandas.DataFrame) -> dict[int, tuple[tuple[float, float], ...]]:
    """By configuration, the mean loss of each step over repeats; of many steps evenly chosen ones."""
    if steps.empty:
        return {}
    known = steps.dropna(subset=["loss"]).sort_values(["config", "repeat", "step"])
    known = known.assign(tokens=known.groupby(["config", "repeat"])["tokens"].cumsum())
    means = known.groupby(["config", "step"])[["tokens", "loss"]].mean().reset_index()
    curves = {}
    for config, curve in means.groupby("config"):
        points = list(zip(curve["tokens"].round(), curve["loss"].round(4), strict=True))
        every = -(-len(points) // _MOST_STEPS)
        curves[int(config)] = tuple(points[::every])  # type: ignore[arg-type]  # a group's key is its configuration
    return curves


def _stories(
    comparison: Comparison, folder: Path, configs: list[int]
) -> dict[int, tuple[tuple[str, int, float, float | None], ...]]:
    """By configuration, the loss of each held-out story; the largest differences from the baseline first."""
    m = comparison.measurements
    ok = m.trials[(m.trials["status"] == "ok") & m.trials["stands_for"].isin([*configs, m.baseline])]
    wanted = pc.field("trial_id").isin(pa.array(ok["trial_id"].tolist(), pa.string())) & (pc.field("when") == "after")
    columns = ["trial_id", "story_id", "when", "kind", "loss", "tokens"]
    rows = Store(folder).read("stories", columns=columns).filter(wanted).to_pandas()
    own = rows[rows["kind"] != "general"].join(ok.set_index("trial_id")[["stands_for", "repeat"]], on="trial_id")
    means = own.groupby(["stands_for", "repeat", "story_id", "tokens"])["loss"].mean()
    none = means.iloc[:0].droplevel("stands_for")
    measured = {*means.index.get_level_values("stands_for")}
    of_baseline = means.xs(m.baseline) if m.baseline in measured else none
    return {
        config: tuple(_by_story(means.xs(config), none if config == m.baseline else of_baseline))
        for config in configs
        if config in measured
    }


def _by_story(by_repeat: pandas.Series, reference: pandas.Series) -> Iterable[tuple[str, int, float, float | None]]:
    """Its mean over repeats, and its difference over those that the reference has too."""
    story = ["story_id", "tokens"]
    losses = by_repeat.groupby(story).mean()
    differences = (by_repeat - reference.reindex(by_repeat.index)).groupby(story).mean().rename("difference")
    both = pandas.concat([losses, differences], axis=1)
    both = both.reindex(differences.abs().sort_values(ascending=False, kind="stable").index)[:_MOST_STORIES]
    key: Any
    for key, loss, difference in zip(both.index, both["loss"], both["difference"], strict=True):
        story, tokens = key
        yield str(story), int(tokens), round(loss, 4), None if pandas.isna(difference) else round(difference, 4)
