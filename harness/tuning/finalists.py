"""The configurations that are compared in fresh repeats at the end of a search."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.grids.grid import Grid, Trial, interleave, repeat
from harness.grids.search import BEFORE, Search
from harness.metrics import METRICS
from harness.record import Contents
from harness.results.schema import spec_of
from harness.spec.trial import TrialSpec


def finalists(search: Search, rows: Sequence[Mapping[str, Any]], study: str) -> list[Mapping[str, Any]]:
    """Rows of the winner, the runner-up and the best trial of the warm start, by the first objective within bounds."""
    ranked = []
    for row in rows:
        if row["study"] != study or row["seed"] != search.base.seed or row["twin"]:
            continue
        if search.place(spec_of(row)) is None:
            continue  # a shorter training
        score = search.score(row["status"], {name: row[name] for name in METRICS})
        if score is not None and score.feasible and score.values[0] is not None:
            ranked.append((score.values[0], row))
    lower = search.objectives[0].direction == "minimize"
    ranked.sort(key=lambda item: item[0] if lower else -item[0])
    ordered = [row for _, row in ranked]
    before = [row for row in ordered if row["level"] == BEFORE]
    return ordered[:2] + [row for row in before[:1] if row not in ordered[:2]]


def confirmation(
    search: Search,
    rows: Sequence[Mapping[str, Any]],
    described: Grid,
    contents_of: Callable[[TrialSpec], Contents],
) -> Grid:
    """The baseline and the finalists in repeats under fresh seeds; the baseline alone where nothing is confirmed.

    Args:
        search: which was run.
        rows: of its trials.
        described: the search as it is kept with its rows.
        contents_of: fingerprints of what a trial reads.
    """
    chosen = {search.base.id: Trial(search.base, "baseline", None, None, contents=contents_of(search.base))}
    timing = search.timing
    if not search.confirm:  # a base outside of the space is measured all the same, once as the trials were
        timing = dataclasses.replace(timing, visits=min(1, timing.visits))
    study = str((described.tune or {})["study"])
    for row in finalists(search, rows, study) if search.confirm else []:
        spec = spec_of(row).model_copy(update={"folder": search.base.folder})
        chosen.setdefault(spec.id, Trial(spec, row["label"], None, row["level"], contents=contents_of(spec)))
    # Repeat 0 was recorded by the search, except for the baseline's second run.
    trials = [t for k in range(search.confirm + 1) for t in repeat(tuple(chosen.values()), search.base, k)]
    return dataclasses.replace(described, trials=tuple(interleave(trials, search.name)), timing=timing)
