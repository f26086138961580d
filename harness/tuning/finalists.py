"""The configurations that are compared in fresh repeats at the end of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.grids.search import BEFORE, Search
from harness.metrics import METRICS
from harness.results.schema import spec_of


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
