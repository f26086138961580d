"""Timing visits: which trials lack some, and what their row becomes by one more."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from harness.grids.document import DEFAULT_TIMING, Timing
from harness.grids.grid import Grid, Trial
from harness.launch.launcher import Launcher
from harness.metrics import METRICS
from harness.predict.prediction import Predictions, capacity_of
from harness.record import TIMED_FIGURES, Record, Step
from harness.results.store import Store
from harness.results.timing import counting_steps, row_figures
from harness.runner.identity import ids_by_environment, possible_ids
from harness.spec.trial import TrialSpec

MOST_FURTHER_BLOCKS = 3
"""Blocks that a run adds at its end for trials whose visits were disturbed."""
_OF_CARD = ("joules_per_token", "card_clock_share", "card_temperature", "throttled_share")


def lacking(
    timed: Sequence[Trial], timing: Timing, store: Store, launcher: Launcher, anew: Collection[Trial] = ()
) -> dict[Trial, int]:
    """The trials that ended well and have fewer visits that count than a grid wants, with how many they lack.

    Speeds are compared within blocks (`analysis.timed.effects`): a visit counts if the baseline or its second run was
    timed in its block too. Where neither of them ended well, each does.

    Args:
        timed: all trials whose speed is measured.
        timing: what the grid wants.
        store: where they are recorded.
        launcher: runs them.
        anew: those about to be trained, which loses the visits that they have.
    """
    blocks = _timed_blocks(timed, store, launcher, anew)
    with_reference: dict[str, frozenset[int]] = {}
    for trial in blocks:
        if trial.baseline or trial.twin:
            for environment_id, of_reference in blocks[trial].items():
                with_reference[environment_id] = with_reference.get(environment_id, frozenset()) | of_reference
    counts = {
        trial: max(len(own & with_reference.get(environment_id, own)) for environment_id, own in places.items())
        for trial, places in blocks.items()
    }
    return {trial: timing.visits - count for trial, count in counts.items() if count < timing.visits}


def _timed_blocks(
    timed: Sequence[Trial], store: Store, launcher: Launcher, anew: Collection[Trial]
) -> dict[Trial, dict[str, frozenset[int]]]:
    """By trial that ended well, and by environment, the blocks in which it had enough undisturbed steps."""
    ended_well = _ended_well(store)
    steps = store.read("steps", columns=["trial_id", "block", "disturbed", "seconds"])
    keys = ["trial_id", "block"]
    counting = counting_steps(steps.filter(pc.field("block").is_valid()).to_pandas(), keys)
    of_ids = counting.groupby("trial_id")["block"].agg(frozenset)
    blocks = {}
    for trial in timed:
        ids = ids_by_environment(trial, launcher)
        known = {where: of_ids.get(each, frozenset()) for where, each in ids.items() if each in ended_well}
        blocks[trial] = dict.fromkeys(ids, frozenset[int]()) if trial in anew else known
    return {trial: places for trial, places in blocks.items() if places}


def _ended_well(store: Store) -> set[str]:
    rows = store.read("trials", columns=["trial_id", "status"]).to_pylist()
    return {row["trial_id"] for row in rows if row["status"] == "ok"}


def undisturbed(trial: Trial, store: Store, launcher: Launcher) -> int:
    """How many visits of a trial had enough undisturbed steps, be it with the baseline or alone."""
    rows = [store.row(each, ["timed_visits"]) for each in possible_ids(trial, launcher)]
    return max((row["timed_visits"] or 0 for row in rows if row is not None), default=0)


def with_references(
    due: Mapping[Trial, int], timed: Sequence[Trial], store: Store, launcher: Launcher
) -> dict[Trial, int]:
    """What is due, and the baseline with its second run: the others are compared with it within a block."""
    ended_well = _ended_well(store)
    references = [trial for trial in timed if trial.baseline or trial.twin]
    ready = [trial for trial in references if not ended_well.isdisjoint(possible_ids(trial, launcher))]
    return {**dict.fromkeys(ready, 0), **due}


def to_come(due: Mapping[Trial, int], timed: Sequence[Trial]) -> int:
    """How many visits it takes, with those of the baseline in each block, as long as all of them count.

    Args:
        due: trials, with how many visits each lacks.
        timed: all trials whose speed is measured.
    """
    references = {trial for trial in timed if trial.baseline or trial.twin}
    blocks = range(max(due.values(), default=0))
    return sum(len(references | {trial for trial, lacks in due.items() if lacks > block}) for block in blocks)


def timed_trials(grid: Grid) -> list[Trial]:
    """The trials whose speed is measured: those of the first repeat. A seed does not change the speed."""
    return [trial for trial in grid.trials if trial.repeat == 0]


def stages(repeats: int, visits: int) -> list[tuple[range, int]]:
    """The repeats to train without waiting for one another, each group with the blocks of visits that follow it.

    The blocks are spread evenly, early ones first: a run that is cut off has rather more speeds than losses of later
    repeats. Those after the last group are not counted: a run makes what is lacking then.
    """
    groups: list[tuple[range, int]] = []
    first = made = 0
    for repeat in range(1, repeats):
        wanted = math.ceil(visits * repeat / repeats)
        if wanted > made:
            groups.append((range(first, repeat), wanted - made))
            first, made = repeat, wanted
    return [*groups, (range(first, repeats), 0)]


def in_turn(grid: Grid) -> bool:
    """Whether visits take steps of the baseline in turn with those of their trial: on a CPU, whose speed changes with
    what else its machine does, unless trials have several processes.
    """
    return grid.device_types == ("cpu",) and all(trial.spec.num_processes == 1 for trial in grid.trials)


def references(grid: Grid, store: Store, launcher: Launcher) -> dict[str, TrialSpec]:
    """By its id, the spec of each baseline that ended well, whose steps visits take in turn; none where two models may
    not fit, or where trials of the grid were timed alone before.

    Visits of one grid all have a reference or none has: ratios and speeds cannot be compared.
    """
    if not in_turn(grid):
        return {}
    timed, ended_well = timed_trials(grid), _ended_well(store)
    ids = ended_well & {each for trial in timed for each in possible_ids(trial, launcher)}
    rows = store.read("trials", columns=["trial_id", "peak_process_bytes"]).to_pylist()
    most = max((row["peak_process_bytes"] or 0 for row in rows if row["trial_id"] in ids), default=0)
    if 2 * most > min(map(capacity_of, launcher.environments("cpu"))):
        return {}
    steps = store.read("steps", columns=["trial_id", "block", "reference_seconds"])
    alone = steps.filter(pc.field("block").is_valid() & pc.field("reference_seconds").is_null())
    if not ids.isdisjoint(alone["trial_id"].unique().to_pylist()):
        return {}
    baselines = [trial for trial in timed if trial.baseline and not ids.isdisjoint(possible_ids(trial, launcher))]
    return {trial.spec.id: trial.spec for trial in baselines}


def keep(record: Record, store: Store, predictions: Predictions, wanted: int) -> dict[str, Any] | None:
    """Add a visit to its trial, which gets its speeds; returns the trial's row. A visit that failed adds nothing.

    A trial that has had as many visits as are wanted, of which fewer count than a grid makes by default, is disturbed:
    it has no speeds.

    Raises:
        OSError: it cannot be kept.
    """
    if record.status != "ok":
        return None

    def figures(row: Mapping[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
        of_steps = row_figures(steps)
        made, count = len({step.block for step in steps} - {None}), int(of_steps["timed_visits"] or 0)
        disturbed = count < min(wanted, DEFAULT_TIMING.visits) and wanted <= made
        if disturbed:
            of_steps |= dict.fromkeys(TIMED_FIGURES)
        speed, flops = of_steps["tokens_per_second"], row["flops_per_token"]
        changes = of_steps | {
            "flops_per_second": flops * speed if flops is not None and speed is not None else None,
            "peak_timed_bytes": max(row["peak_timed_bytes"] or 0, record.metrics.get("peak_timed_bytes") or 0) or None,
            "disturbed": disturbed,
            **_of_card(row, record, count),
        }
        return changes | predictions.of_timing(record.spec, steps, changes["padded_tokens_per_second"])

    return store.add_visit(record, figures)


def _of_card(row: Mapping[str, Any], record: Record, visits: int) -> dict[str, Any]:
    """Figures of a card: their mean over the visits so far, the highest temperature."""
    changes: dict[str, Any] = {}
    for name in _OF_CARD:
        before, now = row[name], record.metrics.get(name)
        if now is None or record.disturbed:
            continue
        if before is None or name == "card_temperature":
            changes[name] = max(before or 0, now) if METRICS[name].type == "int" else now
        else:
            changes[name] = before + (now - before) / max(visits, 1)
    return changes
