"""A plan as people read it: a table, a plot, and files for other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table as RichTable

from harness.calibration import Calibration
from harness.cards import CARDS
from harness.files import write_whole
from harness.largest import NO_EFFECT, Largest
from harness.metrics import COMPONENTS, GIB, show_bytes, show_scientific, show_seconds
from harness.prediction import HERE, MARGIN, DeviceType, Prediction, fits, room_of_each
from harness.report.faces import images
from harness.report.plots import BLUE, GREEN, ORANGE, PINK, SKY, Chart
from harness.results import Phase
from harness.roofline import Rates, expected_seconds, least_seconds
from harness.spec import TrialSpec
from harness.terminal import plain

_WIDE = 130
"""Columns of a terminal that has room for everything."""
_COLOURS = {"fits": "green", "tight": "yellow", "no": "red"}


@dataclass(frozen=True)
class Line:
    """One trial of a plan."""

    label: str
    spec: TrialSpec
    prediction: Prediction | None
    error: str | None
    """Why there is no prediction."""


@dataclass(frozen=True)
class Plan:
    """Predictions of a grid's trials for one kind of device."""

    title: str
    device_type: DeviceType
    lines: tuple[Line, ...]
    rooms: Mapping[str, int]
    """Bytes that there are, by the name of a card or an amount."""
    calibration: Calibration | None = None
    """Corrects the peaks."""
    rates: Rates | None = None
    """Of the device, where they are known."""
    rates_from: str = "this device's measured rates"
    """Where they come from."""

    @property
    def margin(self) -> float:
        """Share by which a need may exceed its prediction."""
        least = MARGIN[self.device_type]
        # On CUDA the default stands for what the allocator reserves, of which calibrated peaks know nothing.
        return least if self.calibration is None else max(least, self.calibration.margin)

    def peak(self, prediction: Prediction) -> int:
        """Predicted bytes, corrected where there is a calibration."""
        return prediction.peak_memory_bytes if self.calibration is None else self.calibration.peak(prediction)

    def need(self, prediction: Prediction) -> int:
        """Predicted bytes with the margin."""
        return round(self.peak(prediction) * (1 + self.margin))

    def step_seconds(self, prediction: Prediction) -> float | None:
        """Expected of a step, corrected where there is a calibration; null without rates."""
        if self.rates is None:
            return None
        factor = self.calibration.step_factor if self.calibration is not None else None
        return expected_seconds(prediction.work, self.rates) * (factor or 1.0)

    @property
    def unit(self) -> tuple[str, float]:
        """The unit that suits the largest peak, and its bytes."""
        most = max((self.peak(line.prediction) for line in self.lines if line.prediction), default=0)
        return ("GiB", float(GIB)) if most >= 2 * GIB else ("MiB", 2.0**20)

    def footnotes(self) -> list[str]:
        """What the figures are, and how far they can be trusted."""
        on = "CUDA" if self.device_type == "cuda" else "this CPU"
        said = [
            f"{line.label}: not predicted, {(line.error or '').rstrip('.')}."
            for line in self.lines
            if line.prediction is None
        ]
        said.append(f"Live tensors of the training step on {on}, at the moment of the peak.")
        if any(line.spec.num_processes > 1 for line in self.lines):
            said.append("Of several processes, what each holds; a step's time is without what they send each other.")
        if self.calibration is not None:
            said.append(f"Calibrated on {self.calibration.said()}.")
        said.append(
            f"A need may exceed its prediction by {self.margin:.1%}: fits counts this margin in, tight fits without it."
            + ("" if self.calibration else " It is the default; harness plan --calibrate learns from your own rows.")
        )
        if self.device_type == "cuda" and self.rooms.keys() & CARDS.keys():
            said.append("Of a card, what the CUDA context takes (0.5 GiB) is left out of what there is.")
        if self.rates is not None:
            said.append(
                f"Step: expected from {self.rates_from}, and in brackets the share that arithmetic and bandwidth need "
                "of it."
            )
        return said


# ------------------------------------------------------------------------------------ the terminal


def terminal(plan: Plan, width: int) -> RichTable:
    """A row for each trial: peak and whether it fits; where there is width, components, phase and work too."""
    unit, size = plan.unit
    wide = width >= _WIDE
    table = RichTable(title=f"{plain(plan.title)}: predicted peaks, {unit}", title_justify="left")
    table.add_column("trial", overflow="fold")
    more = (*COMPONENTS, "in", "FLOP/step") if wide else ()
    step = ("step",) if plan.rates is not None else ()
    for heading in ("peak", *more, *step, *plan.rooms):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in plan.lines:
        found = line.prediction
        if found is None:
            table.add_row(plain(line.label), "[red]–[/]")
            continue
        peak = plan.peak(found)
        details = (
            *(f"{found.shares[f'memory_{name}_bytes'] / size:.2f}" for name in COMPONENTS),
            max(found.phases, key=found.phases.__getitem__),
            show_scientific(found.flops),
        )
        table.add_row(
            plain(line.label),
            f"[bold]{peak / size:.2f}[/]",
            *(details if wide else ()),
            *((_step(plan, found),) if step else ()),
            *(_verdict(plan, peak, _room(plan, line, name)) for name in plan.rooms),
        )
    return table


def _step(plan: Plan, found: Prediction) -> str:
    seconds = plan.step_seconds(found)
    if seconds is None or plan.rates is None:
        return ""
    return f"{show_seconds(seconds)} ({least_seconds(found.work, plan.rates) / seconds:.0%})"


def _room(plan: Plan, line: Line, name: str) -> int:
    """Bytes that a trial's process may take in a room: its own budget may be less."""
    room = plan.rooms[name]
    if name == HERE:
        room = room_of_each(room, line.spec, plan.device_type)
    return min(room, line.spec.memory_budget or room)


def _verdict(plan: Plan, peak: int, room: int) -> str:
    verdict = fits(peak, room, plan.margin)
    return f"[{_COLOURS[verdict]}]{verdict}[/] ({peak / room:.0%})"


def terminal_largest(
    title: str,
    key: str,
    labels: Mapping[str, str],
    rooms: Sequence[str],
    found: Mapping[tuple[str, str], Largest],
    most: int,
) -> RichTable:
    """A row for each trial: the largest value that fits each amount of memory, and what it needs.

    Args:
        title: of the grid.
        key: what was searched.
        labels: by spec id.
        rooms: names of the amounts.
        found: answers by spec id and name.
        most: where the search ended.
    """
    table = RichTable(title=f"{plain(title)}: largest {key} that fits", title_justify="left")
    table.add_column("trial")
    for name in rooms:
        table.add_column(name, justify="right")
    for spec_id, label in labels.items():
        table.add_row(plain(label), *(_answer(found[spec_id, name], most) for name in rooms))
    return table


def _answer(found: Largest, most: int) -> str:
    if found.error is not None:
        return "[dim]–[/]" if found.error == NO_EFFECT else f"[red]{plain(found.error)}[/]"
    if found.value is None or found.need is None:
        return "[red]not even 1[/]"
    bound = "≥ " if found.value >= most else ""
    return f"[bold]{bound}{found.value:,}[/] ({show_bytes(found.need)})"


# ------------------------------------------------------------------------------------ files


def rows(plan: Plan) -> list[dict[str, Any]]:
    """A row for each trial, in base units; null where nothing is known."""
    found = []
    for line in plan.lines:
        p = line.prediction
        found.append(
            {
                "label": line.label,
                "spec_id": line.spec.id,
                "device_type": plan.device_type,
                "predicted_peak_memory_bytes": plan.peak(p) if p else None,
                "uncorrected_peak_memory_bytes": p.peak_memory_bytes if p else None,
                "margin": plan.margin,
                **{f"memory_{c}_bytes": p.shares[f"memory_{c}_bytes"] if p else None for c in COMPONENTS},
                **{f"peak_{phase}_bytes": p.phases.get(phase) if p else None for phase in _PHASES},
                "flops": float(p.flops) if p else None,
                "moved_bytes": float(sum(w.moved_bytes * w.calls for w in p.work)) if p else None,
                "positions": p.positions if p else None,
                "step_seconds": plan.step_seconds(p) if p else None,
                "least_step_seconds": least_seconds(p.work, plan.rates) if p and plan.rates else None,
                **{
                    f"fits {name}": fits(plan.peak(p), _room(plan, line, name), plan.margin) if p else None
                    for name in plan.rooms
                },
                "error": line.error,
            }
        )  # fmt: skip
    return found


_PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")


def write(plan: Plan, folder: Path) -> list[Path]:
    """`plan.json`, `plan.parquet`, and the plot as `plan.svg` and `plan.png`.

    Raises:
        OSError: the folder cannot be written.
    """
    said = rows(plan)
    content = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(said), content)
    files: dict[str, bytes] = {
        "plan.json": (json.dumps(said, indent=1) + "\n").encode(),
        "plan.parquet": content.getvalue().to_pybytes(),
    }
    drawn = chart(plan)
    if drawn is not None:
        svg, files["plan.png"] = images(drawn)
        files["plan.svg"] = svg.encode()
    for name, data in files.items():
        write_whole(folder / name, data)
    return [folder / name for name in files]


def chart(plan: Plan) -> Chart | None:
    """Peaks by component, with a line at each amount of memory that there is; null where nothing was predicted."""
    unit, size = plan.unit
    parts = [
        {
            "trial": line.label,
            "component": name,
            "rank": rank,
            "size": line.prediction.shares[f"memory_{name}_bytes"] / size,
        }
        for line in plan.lines
        if line.prediction is not None
        for rank, name in enumerate(COMPONENTS)
    ]
    if not parts:
        return None
    order = [line.label for line in plan.lines]
    colours = altair.Scale(domain=list(COMPONENTS), range=[BLUE, ORANGE, GREEN, PINK, SKY])
    bars = (
        altair.Chart(pandas.DataFrame(parts))
        .mark_bar()
        .encode(
            y=altair.Y("trial:N", sort=order, title=None, axis=altair.Axis(labelLimit=260)),
            x=altair.X("sum(size):Q", title=f"Predicted peak memory ({unit})"),
            color=altair.Color("component:N", scale=colours, title=None, legend=altair.Legend(orient="top")),
            order="rank:O",
        )
    )
    layers = [bars]
    if plan.rooms:
        limits = altair.Chart(
            pandas.DataFrame({"name": list(plan.rooms), "size": [r / size for r in plan.rooms.values()]})
        )
        layers.append(limits.mark_rule(strokeDash=[4, 3]).encode(x="size:Q"))
        layers.append(
            limits.mark_text(align="left", dx=3, dy=-4, baseline="bottom").encode(
                x="size:Q", y=altair.value(0), text="name:N"
            )
        )
    drawn = altair.layer(*layers).properties(width=640, title=f"Predicted peak memory: {plan.title}")
    return Chart("plan", "Predicted peak memory", "What will hold memory at the moment of the peak.", drawn)
