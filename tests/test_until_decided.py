"""Repeats are added only while a comparison is undecided."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import SMALL
from rows import keep

from harness.analysis.sequential import until_decided
from harness.grids import grid
from harness.grids.grid import Grid
from harness.results.store import Store
from harness.spec import TrialSpec

Small = Callable[..., TrialSpec]


def test_decided_comparisons_are_not_repeated(tmp_path: Path) -> None:
    base = ", ".join(f"{key}: {value}" for key, value in SMALL.items())
    file = tmp_path / "g.yml"
    file.write_text(f"name: g\nbase: {{{base}}}\nvary: {{lora_r: [8, 64]}}\n")
    store = Store(tmp_path / "g")
    ran: list[list[tuple[str, int]]] = []

    def run(now: Grid) -> bool:
        done = store.completed()
        todo = [
            t for t in now.trials if not any(i.startswith(t.spec.id) and i.endswith("-twin") == t.twin for i in done)
        ]
        ran.append(sorted((t.label, t.repeat) for t in todo))
        for t in todo:
            # Rank 64 is clearly slower; rank 8 alternates around the baseline.
            speed = {"lora_r=64": 50.0, "lora_r=8": 100.0 + 15 * (-1) ** t.repeat}.get(t.label, 100.0)
            speed *= 1 + t.repeat / 10_000
            keep(store, t.spec, t.label, [], twin=t.twin, baseline_id=t.baseline_id, tokens_per_second=speed)
        return True

    def grid_of(times: int) -> Grid:
        return grid.load(file, repeats=times)

    assert until_decided(grid_of, 2, 4, run, tmp_path / "g") == {"lora_r=8"}
    first, second, third = ran
    assert [label for label, _ in first].count("lora_r=64") == 2
    again = [("baseline", 2), ("baseline again", 2), ("lora_r=8", 2)]
    assert second == again
    assert third == [(label, 3) for label, _ in again]


def test_it_stops_when_interrupted(tmp_path: Path) -> None:
    file = tmp_path / "g.yml"
    file.write_text("name: g\nbase: {base_model: random:tiny}\nvary: {lora_r: [8]}\n")
    calls: list[int] = []

    def interrupted(now: Grid) -> bool:
        calls.append(now.repeats)
        return False

    assert until_decided(lambda k: grid.load(file, repeats=k), 1, 9, interrupted, tmp_path) == set()
    assert calls == [1]
