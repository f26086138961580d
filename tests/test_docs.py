"""docs/memory.md stays true: figures of its tables are predicted anew, its grids are valid, its commands exist."""

from __future__ import annotations

import functools
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from harness import cards, cli, grid, plan
from harness.metrics import COMPONENTS, GIB, show_scientific
from harness.prediction import MARGIN, DeviceType, Prediction, fits
from harness.results import Phase
from harness.spec import TrialSpec, parse_bytes

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
UNITS = {"MiB": 2**20, "GiB": GIB}

AGAIN = {
    "grids/techniques.yml": ("baseline", "full fine-tuning, 8-bit AdamW"),
    "grids/llama3-8b.yml": ("baseline", "full fine-tuning, AdamW"),
    "grids/several-cards.yml": ("baseline", "over 8, LoRA"),
    "surprises.yml": ("lora_dropout=0",),
}
"""Rows that are predicted anew, wherever they stand."""


@dataclass(frozen=True)
class Table:
    """Predictions as they are shown."""

    file: str
    device: str
    """`cpu`, `cuda`; `each`: the headings say."""
    size: int
    """Bytes of the unit."""
    rows: tuple[dict[str, str], ...]
    """By heading."""


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables(kind: str) -> Iterator[tuple[list[str], list[dict[str, str]]]]:
    """What a marker says, and the rows of the table that it stands before."""
    for said, body in re.findall(rf"<!-- {kind}:?(.*?) -->\n(.*?)<!-- end -->", PAGE, re.DOTALL):
        heading, _, *lines = body.strip().splitlines()
        names = cells(heading)
        yield said.split(), [dict(zip(names, cells(line), strict=True)) for line in lines]


TABLES = [Table(file, device, UNITS[unit], tuple(rows)) for (file, device, unit), rows in tables("plan")]


@functools.cache
def written(kind: str) -> str:
    """The YAML of the page that has this key."""
    (found,) = (text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if kind in text)
    return str(found)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, TrialSpec]]:
    """The trials of each grid that the page names, by their names."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "surprises.yml").write_text(written("name: surprises"))
    files = [folder / name if name == "surprises.yml" else ROOT / name for name in AGAIN]
    return {
        name: {trial.label: trial.spec for trial in grid.load(file).trials if not trial.twin}
        for name, file in zip(AGAIN, files, strict=True)
    }


@functools.cache
def predicted(spec: TrialSpec, device: DeviceType) -> Prediction:
    return plan.predict(spec, device)


def expected(heading: str, spec: TrialSpec, table: Table) -> str | None:
    """What stands under a heading; null: it is not known from a prediction."""
    on = re.search(r"--device (\w+)", heading)
    device: DeviceType = "cpu" if (on.group(1) if on else table.device) == "cpu" else "cuda"
    found = predicted(spec, device)
    phase = heading.removesuffix(" step")
    if heading == "peak" or on:
        return f"{found.peak_memory_bytes / table.size:.2f}"
    if heading in COMPONENTS:
        return f"{found.shares[f'memory_{heading}_bytes'] / table.size:.2f}"
    if heading == "in":
        return max(found.phases, key=found.phases.__getitem__)
    if heading == "FLOP/step":
        return show_scientific(found.flops)
    if phase in get_args(Phase):
        return f"{found.phases[phase] / table.size:.2f}"  # type: ignore[index]  # it is one
    if heading in ROOMS:
        room = ROOMS[heading]
        verdict = fits(found.peak_memory_bytes, room, MARGIN[device])
        return f"{verdict} ({found.peak_memory_bytes / room:.0%})"
    assert heading in ("trial", "largest on rtx4090")
    return None


ROOMS = {"24GiB": parse_bytes("24GiB"), "rtx4090": cards.available("rtx4090"), "l4": cards.available("l4")}


@pytest.mark.parametrize("file", AGAIN)
def test_figures_are_predicted_anew(file: str, specs: dict[str, dict[str, TrialSpec]]) -> None:
    seen = set()
    for table in TABLES:
        for row in table.rows:
            if table.file != file or row["trial"] not in AGAIN[file]:
                continue
            seen.add(row["trial"])
            for heading, shown in row.items():
                if table.device == "each" and "--device cpu" in heading:
                    continue  # a second prediction of the same row: time is short
                wanted = expected(heading, specs[file][row["trial"]], table)
                assert wanted in (shown, None), (row["trial"], heading)
    assert seen == set(AGAIN[file])


def test_every_row_is_one_of_its_grid_and_agrees_with_itself(specs: dict[str, dict[str, TrialSpec]]) -> None:
    assert {table.file for table in TABLES} == set(AGAIN)
    peaks: dict[tuple[str, str], str] = {}
    for table in TABLES:
        for row in table.rows:
            label = row["trial"]
            assert label in specs[table.file]
            if "peak" in row:
                assert peaks.setdefault((table.file, label), row["peak"]) == row["peak"], label
            if "weights" in row:
                together = sum(float(row[name]) for name in COMPONENTS)
                assert together == pytest.approx(float(row["peak"]), abs=0.031), label
            if "forward" in row:
                highest = max(row.values(), key=lambda cell: float(cell) if cell != label else 0.0)
                assert highest == peaks[table.file, label]
            for name in ROOMS.keys() & row.keys():
                share = float(row["peak"]) * table.size / ROOMS[name]
                assert row[name] == f"{fits(share, 1, MARGIN['cuda'])} ({share:.0%})", (label, name)


def test_the_sum_adds_up() -> None:
    ((_, rows),) = tables("sum")
    *parts, total = ((row["Arithmetic"], int(row["Bytes"].replace(",", ""))) for row in rows)
    for arithmetic, size in parts:
        assert math.prod(float(factor) for factor in arithmetic.replace(",", "").split("×")) == size, arithmetic
    assert sum(size for _, size in parts) == total[1]


def commands() -> list[str]:
    """What follows `harness` in the page's console blocks and in its sentences."""
    consoles = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    typed = [line.removeprefix("$ ") for block in consoles for line in block.splitlines()]
    within = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    said = [*typed, *(" ".join(span.split()) for span in within)]
    return [line.removeprefix("harness ").split(" #")[0].strip() for line in said if line.startswith("harness ")]


@functools.cache
def known() -> dict[str, Any]:
    """The commands that there are."""
    group: Any = typer.main.get_command(cli.app)
    return dict(group.commands)


@pytest.mark.parametrize("line", dict.fromkeys(commands()))
def test_commands_are_accepted(line: str) -> None:
    name, *arguments = shlex.split(line)
    if arguments:
        known()[name].make_context(name, arguments)
    assert name in known()


def test_options_exist() -> None:
    options = {
        option for command in known().values() for p in command.params for option in (*p.opts, *p.secondary_opts)
    }
    named = set(re.findall(r"`(--?[a-z][a-z-]*)", PAGE))
    assert {"--largest", "--gpu", "-o"} <= named <= options


def test_training_files_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "padded.yml").write_text(written("smollm2-135m"))
    assert len(grid.load(tmp_path / "padded.yml").trials) >= 1
