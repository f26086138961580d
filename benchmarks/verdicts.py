"""False differences in whole reports, and the power that is left: from made rows to the page.

The techniques grid is filled with rows in which no technique makes any difference to speed or loss, as such rows vary:
speeds drift from block to block and differ from visit to visit; losses differ between stories, between seeds, and by
story and configuration, which is correlated between configurations. Each set of rows is stored, loaded, judged and
written as a report, and its page is read: a word for a difference in any cell, a claim that holds only if there is one,
or a sentence that names a fastest or best configuration, is false. Then one configuration is made 0.1 nats better and
a tenth slower, and counted is how often its row says so.

    python benchmarks/verdicts.py [--reports 1000] [--processes 2]
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import math
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow as pa
import pyarrow.parquet as pq

from harness.analysis import loading
from harness.environment import current
from harness.grids.grid import Grid, load
from harness.metrics import FIGURES
from harness.record import Job, Record, Step, StoryLoss
from harness.report import document as documents
from harness.report import writers
from harness.results.schema import SCHEMAS, Table
from harness.results.store import Store

ROOT = Path(__file__).parent.parent
BETTER = "lora_r=64"
"""The configuration that is made different to see how often it is noticed."""
BETTER_BY, SLOWER_BY = -0.1, 0.9
MOST_FALSE = 0.05
STORIES, BLOCKS, STEPS = 32, 3, 3
SPEED_WORDS, LOSS_WORDS = re.compile("slower|faster"), re.compile("better|loss")


@dataclass(frozen=True)
class Spread:
    """Standard deviations of what varies. Those of losses are near the measured ones (see `analysis/pilot.py`)."""

    drift: float = 0.1
    """Of the logarithm of speeds, between blocks."""
    visit: float = 0.03
    """Between visits of a block."""
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
def template() -> Template:
    """Rows of the grid, made once in each process."""
    grid: Grid = load(ROOT / "grids/techniques.yml")
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


def fill(folder: Path, seed: int, spread: Spread, *, one_differs: bool) -> None:
    """Write rows of one measurement of the grid."""
    made, generator = template(), numpy.random.default_rng(seed)
    ids = made.trials["trial_id"].to_pylist()
    index = {trial: number for number, trial in enumerate(ids)}
    count, configs = len(ids), made.configs
    differs = numpy.array([label == BETTER for label in made.trials["label"].to_pylist()]) & one_differs

    of_steps = numpy.array([index[trial] for trial in made.steps["trial_id"].to_pylist()])
    blocks = numpy.array([block or 0 for block in made.steps["block"].to_pylist()])
    slow = generator.normal(0, spread.drift, BLOCKS + 1) + generator.normal(0, spread.visit, (count, BLOCKS + 1))
    slow -= numpy.log(SLOWER_BY) * differs[:, None]
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
        + BETTER_BY * differs[:, None]
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


def report(folder: Path) -> tuple[documents.Document, str]:
    """The report of a folder, and its page as text."""
    made = documents.document(loading.load(folder), folder)
    return made, writers.markdown(made)


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
            false.add(FIGURES[claim.metric].group)
    false |= {"speed"} if any(line.startswith("Fastest") for line in made.summary) else set()
    return false | ({"loss"} if any(line.startswith("Lowest loss") for line in made.summary) else set())


def null_report(seed: int) -> set[str]:
    """What a report of rows without any difference claims."""
    with tempfile.TemporaryDirectory() as name:
        fill(Path(name), seed, Spread(), one_differs=False)
        return false_differences(*report(Path(name)))


def seen(seed: int) -> tuple[bool, bool]:
    """Whether a report notices the one configuration that is slower, and that has a lower loss."""
    with tempfile.TemporaryDirectory() as name:
        fill(Path(name), seed, Spread(), one_differs=True)
        comparison = report(Path(name))[0].comparison
    configs = comparison.measurements.configs
    config = int(configs.index[configs["label"] == BETTER][0])
    speed, loss = (comparison.of(metric, config) for metric in ("tokens_per_second", "eval_loss"))
    return speed is not None and speed.verdict == "worse", loss is not None and loss.verdict == "better"


def main() -> int:
    """Print the rates with their standard errors; 1 where false differences are too frequent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    with multiprocessing.Pool(given.processes) as pool:
        false = list(pool.imap_unordered(null_report, range(given.reports)))
        noticed = list(pool.imap_unordered(seen, range(given.reports, given.reports + given.reports // 5)))
    print(f"{given.reports:,} reports of rows without any difference")
    failed = False
    for group in ("speed", "loss"):
        rate = sum(group in each for each in false) / len(false)
        error = math.sqrt(rate * (1 - rate) / len(false))
        failed |= rate > MOST_FALSE
        print(f"  a false difference in {group}: {rate:.1%} ± {error:.1%} (at most {MOST_FALSE:.0%} is promised)")
    for name, each in zip(_described(), zip(*noticed, strict=True), strict=True):
        rate = sum(each) / len(noticed)
        print(f"  power for {name}: {rate:.0%} ± {math.sqrt(rate * (1 - rate) / len(noticed)):.0%}")
    return int(failed)


def _described() -> Iterator[str]:
    spread = Spread()
    yield f"×{SLOWER_BY:g} of the speed at {spread.visit:.0%} from visit to visit"
    yield f"{BETTER_BY:+g} nats at {STORIES} stories"


if __name__ == "__main__":
    sys.exit(main())
