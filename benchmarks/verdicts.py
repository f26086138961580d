"""False differences in whole reports, and the power that is left: from made rows to the page.

The techniques grid is filled with rows in which no technique makes any difference to speed or loss, as such rows vary:
speeds drift from block to block and differ from visit to visit; losses differ between stories, between seeds, and by
story and configuration, which is correlated between configurations. Each set of rows is stored, loaded, judged and
written as a report, and its page is read: a word for a difference in any cell, a claim that holds only if there is one,
or a sentence that names a fastest or best configuration, is false; so is the verdict of any pair or contrast, shown or
not. The techniques grid decides; what varies otherwise, or another grid, is printed beside it. Then one configuration
is made 0.1 nats better and a tenth slower, and counted is how often its row says so.

Last, configurations have losses a little apart, and one is chosen: by `harness recommend`, and by a search that takes
its two best and the first one into fresh repeats. Counted is how often the truly best is better than the chosen one by
no more than is stated.

    python benchmarks/verdicts.py [--reports 1000] [--processes 2]
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import functools
import math
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pandas
import pyarrow as pa
import pyarrow.parquet as pq

from harness.analysis import loading, recommend
from harness.analysis.comparison import Comparison
from harness.environment import current
from harness.grids.grid import Grid, load
from harness.grids.search_file import parse
from harness.metrics import FIGURES
from harness.record import Job, Record, Step, StoryLoss
from harness.report import document as documents
from harness.report import writers
from harness.results.schema import SCHEMAS, Table
from harness.results.store import Store
from harness.tuning.search_results import SearchResults

ROOT = Path(__file__).parent.parent
BETTER = "lora_r=64"
"""The configuration that is made different to see how often it is noticed."""
BETTER_BY, SLOWER_BY = -0.1, 0.9
NOISIER = 2
"""Configurations whose visits `Spread.noisier` is about."""
MOST_FALSE = 0.05
STORIES, BLOCKS, STEPS = 32, 3, 3
APART = 0.02
"""Standard deviation between the true losses of configurations of which one is chosen, in nats."""
CHOICES = """
name: choices
base: {base_model: smollm2-135m-instruct, datasets: [{path: storyteller}], lora_r: 8}
vary: {lora_r: [2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13]}
repeats: 4
"""
FACTORIAL = """
name: factorial
design: grid
base: {base_model: smollm2-135m-instruct, datasets: [{path: storyteller}]}
vary: {lora_r: [8, 16, 32], gradient_checkpointing: [false, true], precision: [fp32, bf16]}
"""
_FIGURES = {"tokens_per_second": "speed", "eval_loss": "loss"}
"""Each figure is a family of its own: the time of a step is none of these."""
SPEED_WORDS, LOSS_WORDS = re.compile("slower|faster"), re.compile("better|loss")


@dataclass(frozen=True)
class Spread:
    """Standard deviations of what varies. Those of losses are near the measured ones (see `analysis/pilot.py`)."""

    drift: float = 0.1
    """Of the logarithm of speeds, between blocks."""
    visit: float = 0.03
    """Between visits of a block."""
    noisier: float = 1.0
    """Factor on it in `NOISIER` configurations."""
    step: float = 0.01
    between_stories: float = 0.4
    """Of a story's loss, in nats, whatever the configuration."""
    story: float = 0.06
    """Of a story's difference between two configurations, of which a half is common to many."""
    seed: float = 0.012
    """Of a seed, in all configurations."""
    trial: float = 0.006
    """Of a seed, in each configuration by itself."""
    left: float = 0.01


@dataclass(frozen=True)
class Template:
    """Rows of the techniques grid whose speeds and losses are still to be made."""

    trials: pa.Table
    steps: pa.Table
    stories: pa.Table
    configs: Any
    """Of each trial row, the number of its configuration; both runs of the baseline have the same."""
    repeats: Any


@functools.cache
def template(file: Path = ROOT / "grids/techniques.yml") -> Template:
    """Rows of a grid, made once in each process."""
    grid: Grid = load(file)
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name))
        for trial in grid.trials:
            place = {key: getattr(trial, key) for key in ("label", "factor", "level", "repeat", "baseline_id")}
            timed = trial.repeat == 0
            steps = [_step(i, None, 1.0) for i in (1, 2)]
            steps += [_step(10 * b + i, b, 1.0) for b in range(1, BLOCKS + 1) for i in range(STEPS) if timed]
            stories = [
                StoryLoss(story_id=f"s{i:02d}", when="after", loss=3.0, tokens=100 + 3 * i) for i in range(STORIES)
            ]
            figures = {"peak_memory_bytes": 2**29, "tokens_per_second": 100.0 if timed else None, "eval_loss": 3.0}
            store.write(
                Record.of(
                    Job(grid=grid.name, spec=trial.spec, twin=trial.twin, **place),
                    environment=current("cpu"), status="ok", started_at=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
                    metrics=figures, steps=tuple(steps), stories=tuple(stories),
                )
            )  # fmt: skip
        tables = [store.read(table) for table in ("trials", "steps", "stories")]
    labels = tables[0]["label"].to_pylist()
    named = [label.removesuffix(" again") for label in labels]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(named))}
    configs = numpy.array([numbers[label] for label in named])
    return Template(*tables, configs, numpy.array(tables[0]["repeat"].to_pylist()))


def _step(number: int, block: int | None, seconds: float) -> Step:
    tokens = 300 + number % 10
    return Step(
        step=number, tracked=block is None, seconds=seconds, loss=3.0, grad_norm=1.0, learning_rate=1e-4, samples=4,
        tokens=tokens, supervised_tokens=tokens // 2, padded_tokens=400, peak_memory_bytes=None, block=block,
    )  # fmt: skip


@functools.cache
def made_of(text: str) -> Template:
    """Rows of a grid that is written here."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "grid.yml"
        file.write_text(text)
        return template(file)


@dataclass(frozen=True)
class Scenario:
    """Reports of rows without any difference."""

    says: str
    spread: Spread = Spread()
    repeats: int | None = None
    """Of `FACTORIAL`; null: the techniques grid."""

    @property
    def made(self) -> Template:
        """Its rows."""
        return template() if self.repeats is None else made_of(f"{FACTORIAL}repeats: {self.repeats}\n")


DECIDES = Scenario("the techniques grid")
OTHERS = (
    Scenario("no noise of a seed that all configurations have", Spread(seed=0.0, trial=0.0134)),
    Scenario(f"visits of {NOISIER} configurations vary twice as much", Spread(noisier=2.0)),
    *(Scenario(f"a factorial grid, {n} seed{'s' * (n > 1)}", repeats=n) for n in (1, 2, 3)),
    *(Scenario(f"the same, {n} seeds that dominate", Spread(story=0.03, trial=0.012), n) for n in (2, 3)),
)


def one_differs(made: Template, *, differs: bool) -> tuple[Any, Any]:
    """By row, factor on the speed and nats more of loss: those of `BETTER`, if it differs."""
    rows = numpy.array([label == BETTER for label in made.trials["label"].to_pylist()]) & differs
    return numpy.where(rows, SLOWER_BY, 1.0), BETTER_BY * rows


def fill(folder: Path, seed: int, made: Template, speeds: Any, more_loss: Any, spread: Spread = Spread()) -> None:
    """Write rows of one measurement of a grid.

    Args:
        folder: of the results.
        seed: of what varies.
        made: the grid's rows.
        speeds: factor on the speed of each row.
        more_loss: nats more in each row.
        spread: how much varies.
    """
    generator = numpy.random.default_rng(seed)
    ids = made.trials["trial_id"].to_pylist()
    index = {trial: number for number, trial in enumerate(ids)}
    count, configs = len(ids), made.configs
    of_steps = numpy.array([index[trial] for trial in made.steps["trial_id"].to_pylist()])
    blocks = numpy.array([block or 0 for block in made.steps["block"].to_pylist()])
    of_visits = generator.normal(0, spread.visit, (count, BLOCKS + 1))
    of_visits[configs > configs.max() - NOISIER] *= spread.noisier
    slow = generator.normal(0, spread.drift, BLOCKS + 1) + of_visits
    slow -= numpy.log(speeds)[:, None]
    seconds = numpy.exp(slow[of_steps, blocks] + generator.normal(0, spread.step, len(blocks)))

    loadings = generator.normal(0, math.sqrt(0.5), configs.max() + 1)
    alone = generator.normal(0, math.sqrt(0.5), (configs.max() + 1, STORIES))
    of_config = (loadings[:, None] * generator.normal(0, 1, STORIES) + alone) * spread.story / math.sqrt(2)
    of_trial = generator.normal(0, spread.trial, (configs.max() + 1, made.repeats.max() + 1))
    losses = (
        3.7
        + generator.normal(0, spread.between_stories, STORIES)
        + of_config[configs]
        + (generator.normal(0, spread.seed, made.repeats.max() + 1) + of_trial)[configs, made.repeats][:, None]
        + generator.normal(0, spread.left, (*of_trial.shape, STORIES))[configs, made.repeats]
        + more_loss[:, None]
    )
    of_stories = numpy.array([index[trial] for trial in made.stories["trial_id"].to_pylist()])
    number = numpy.array([int(story[1:]) for story in made.stories["story_id"].to_pylist()])
    tokens = 100 + 3 * numpy.arange(STORIES)
    _keep(folder, "steps", made.steps, seconds=seconds)
    _keep(folder, "stories", made.stories, loss=losses[of_stories, number])
    _keep(folder, "trials", made.trials, eval_loss=(losses * tokens).sum(axis=1) / tokens.sum())


def _keep(folder: Path, table: Table, rows: pa.Table, **columns: Any) -> None:
    for name, values in columns.items():
        field = SCHEMAS[table].field(name)
        rows = rows.set_column(rows.schema.get_field_index(name), field, pa.array(values, field.type))
    (folder / table).mkdir(parents=True)
    pq.write_table(rows.cast(SCHEMAS[table]), folder / table / "all-made.parquet")


def report(folder: Path, known_pairs: dict[str, pandas.DataFrame]) -> tuple[documents.Document, str]:
    """The report of a folder without its charts, and its page as text.

    Args:
        folder: of the results.
        known_pairs: what earlier reports of the same grid paired.
    """
    m = loading.load(folder)
    m._pairs.update(known_pairs)
    with mock.patch.object(documents.plots, "all_charts", return_value=[]):
        made = documents.document(m, folder)
    known_pairs |= m._pairs
    return made, writers.markdown(made)


@functools.cache
def _pairs_of(scenario: Scenario) -> dict[str, pandas.DataFrame]:
    return {}


def false_verdicts(comparison: Comparison) -> set[str]:
    """Which of speed and loss any pair or contrast differs in."""
    false = set[str]()
    for metric, name in _FIGURES.items():
        judged = [comparison.judgement.contrast(metric, contrast) for contrast in comparison.judgement.pairs]
        judged += comparison.estimates[metric].values()
        if any(each.verdict not in ("same", "not distinguishable") for each in judged if each is not None):
            false.add(name)
    return false


def false_differences(made: documents.Document, page: str) -> set[str]:
    """Which of speed and loss the page claims a difference in."""
    false = set[str]()
    for line in page.splitlines():
        for cell in line.split(" | ") if line.startswith("| ") else ():
            measured = cell.strip("| ")
            if re.match(r"×|depends: ×", measured) and (SPEED_WORDS.search(measured) or "depends" in measured):
                false.add("speed")
            if re.match(r"[+−]|depends: [+−]", measured) and (LOSS_WORDS.search(measured) or "depends" in measured):
                false.add("loss")
    for verdict in made.verdicts:
        claim = verdict.claim
        if not claim.compare or FIGURES[claim.metric].group not in ("speed", "loss"):
            continue
        no_effect = 1.0 if FIGURES[claim.metric].scale == "ratio" else 0.0
        holds = claim.expectation.same or claim.expectation.low <= no_effect <= claim.expectation.high
        wrong = verdict.word == "depends" or verdict.word == ("contradicted" if holds else "supported")
        if wrong:
            false.add(_FIGURES.get(claim.metric, claim.metric))
    named = [line for line in made.summary if ": none " not in line]
    false |= {"speed"} if any(line.startswith("Fastest") for line in named) else set()
    return false | ({"loss"} if any(line.startswith("Lowest loss") for line in named) else set())


def null_report(seed: int, scenario: Scenario = DECIDES) -> set[str]:
    """What a report of rows without any difference claims."""
    with tempfile.TemporaryDirectory() as name:
        fill(Path(name), seed, scenario.made, *one_differs(scenario.made, differs=False), scenario.spread)
        made, page = report(Path(name), _pairs_of(scenario))
    return false_differences(made, page) | false_verdicts(made.comparison)


def seen(seed: int) -> tuple[bool, bool]:
    """Whether a report notices the one configuration that is slower, and that has a lower loss."""
    with tempfile.TemporaryDirectory() as name:
        fill(Path(name), seed, template(), *one_differs(template(), differs=True))
        comparison = report(Path(name), _pairs_of(DECIDES))[0].comparison
    configs = comparison.measurements.configs
    config = int(configs.index[configs["label"] == BETTER][0])
    speed, loss = (comparison.of(metric, config) for metric in ("tokens_per_second", "eval_loss"))
    return speed is not None and speed.verdict == "worse", loss is not None and loss.verdict == "better"


def regrets(seed: int) -> tuple[bool, bool]:
    """Whether what `recommend` and what a search chooses is worse than the truly best by no more than is stated."""
    made = made_of(CHOICES)
    truth = numpy.random.default_rng(seed).normal(0, APART, made.configs.max() + 1)
    with tempfile.TemporaryDirectory() as name:
        fill(Path(name), seed, made, numpy.ones(len(made.configs)), truth[made.configs])
        m = loading.load(Path(name))
    of_label = dict(zip(made.trials["label"].to_pylist(), truth[made.configs].tolist(), strict=True))
    losses = {int(config): of_label[label] for config, label in m.configs["label"].items()}
    first = m.trials[(m.trials["repeat"] == 0) & ~m.trials["twin"]].set_index("config")["eval_loss"].sort_values()
    taken = recommend.recommend(m)
    all_configs = pandas.DataFrame({"eval_loss": first})
    margin = recommend.largest_regret(m, all_configs, taken.config, "eval_loss")
    recommended = losses[taken.config] - min(losses.values()) <= margin

    finalists = [*first.index[:2], m.baseline]
    kept = m.trials[(m.trials["repeat"] == 0) | m.trials["stands_for"].isin(finalists)]
    points = pandas.DataFrame({"eval_loss": first, "number": range(len(first)), "whole": True, "feasible": True,
                               "before": False, "label": "", "status": "ok"})  # fmt: skip
    search = parse(
        "choices",
        "",
        {"base_model": "smollm2-135m-instruct", "datasets": [{"path": "storyteller"}]},
        {"space": {"lora_r": [4, 8]}, "confirm": 3},
    )
    results = SearchResults(search, dataclasses.replace(m, trials=kept), points)
    best_finalist = min(losses[int(config)] for config in results.confirmed.index)
    return recommended, losses[results.winner] - best_finalist <= results.regret


def main() -> int:
    """Print the rates with their standard errors; 1 where false differences are too frequent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    failed, first = False, 0
    with multiprocessing.Pool(given.processes) as pool:

        def results(measure: Callable[[int], Any], count: int) -> list[Any]:
            nonlocal first
            seeds, first = range(first, first + count), first + count
            return list(pool.imap_unordered(measure, seeds))

        for scenario in (DECIDES, *OTHERS):
            count = given.reports if scenario == DECIDES else given.reports // 5
            false = results(functools.partial(null_report, scenario=scenario), count)
            print(f"{count:,} reports of rows without any difference: {scenario.says}")
            for group in ("speed", "loss"):
                rate, shown = _rate(group in each for each in false)
                failed |= scenario == DECIDES and rate > MOST_FALSE
                promised = f" (at most {MOST_FALSE:.0%} is promised)" if scenario == DECIDES else ""
                print(f"  a false difference in {group}: {shown}{promised}", flush=True)
        held = results(regrets, given.reports // 2)
        for name, each in zip(("harness recommend", "a search"), zip(*held, strict=True), strict=True):
            rate, shown = _rate(each)
            failed |= rate < 1 - MOST_FALSE
            print(f"  {name} chooses what is worse by no more than is stated: {shown} of {len(held)}", flush=True)
        noticed = results(seen, given.reports // 5)
        for name, each in zip(_described(), zip(*noticed, strict=True), strict=True):
            print(f"  power for {name}: {_rate(each)[1]} of {len(noticed)}", flush=True)
    return int(failed)


def _rate(outcomes: Iterable[bool]) -> tuple[float, str]:
    """The rate of an outcome, and the same in words with its standard error."""
    known = list(outcomes)
    rate = sum(known) / len(known)
    return rate, f"{rate:.1%} ± {math.sqrt(rate * (1 - rate) / len(known)):.1%}"


def _described() -> Iterator[str]:
    spread = Spread()
    yield f"×{SLOWER_BY:g} of the speed at {spread.visit:.0%} from visit to visit"
    yield f"{BETTER_BY:+g} nats at {STORIES} stories"


if __name__ == "__main__":
    sys.exit(main())
