"""Predictions of a grid as a table, a plot, and files for other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import altair
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
from rich.cells import cell_len
from rich.table import Table as RichTable
from rich.text import Text

from harness._util.files import write_whole
from harness._util.terminal import plain
from harness._util.units import byte_unit, show_bytes, show_scientific, show_seconds
from harness.environment import DeviceType
from harness.metrics import COMPONENTS, METRICS
from harness.predict.calibration import Calibration
from harness.predict.cards import CONTEXT_BYTES
from harness.predict.largest import NO_EFFECT, Largest
from harness.predict.prediction import LOCAL_MACHINE, MARGIN, Prediction, Verdict, capacity_per_process, fits
from harness.predict.roofline import Rates, predicted_seconds, roofline_seconds
from harness.record import Phase
from harness.report.plots import BLUE, GREEN, ORANGE, PINK, SKY, Chart, axis_title
from harness.report.writers import images
from harness.spec.trial import TrialSpec

_WIDE = 130
"""Columns of a terminal that shows what the memory is of."""
_TRIAL_WIDTH = 20
"""Of the table's left border and the trials' column, whose labels are folded."""
_AROUND = 3
"""Of a column's padding and border."""
_Column = tuple[str, Sequence[str]]
"""Heading and cells."""
_COLOURS = {"fits": "green", "tight": "yellow", "does not fit": "red"}


@dataclass(frozen=True)
class Line:
    """One trial of a plan."""

    label: str
    spec: TrialSpec
    prediction: Prediction | None
    error: str | None
    """Why there is no prediction."""
    by_card: Mapping[str, Prediction] = field(default_factory=dict)
    """Those for cards of another generation than the first one's, by name."""

    def on(self, capacity: str) -> Prediction | None:
        """The prediction for a card or an amount of memory."""
        return self.by_card.get(capacity, self.prediction)


@dataclass(frozen=True)
class Plan:
    """Predictions of a grid's trials for one kind of device."""

    title: str
    device_type: DeviceType
    lines: tuple[Line, ...]
    capacities: Mapping[str, int]
    """Bytes available, by the name of a card or an amount."""
    calibration: Calibration | None = None
    """Corrects the peaks."""
    rates: Rates | None = None
    """Of the device; null: unknown."""
    rates_from: str = "this device's measured rates"
    """Source of the rates."""
    context_bytes: int = CONTEXT_BYTES
    """What CUDA takes beyond the reserve."""

    @property
    def margin(self) -> float:
        """Fraction by which a need may exceed its prediction."""
        least = MARGIN[self.device_type]
        return least if self.calibration is None else max(least, self.calibration.margin)

    def factor(self, prediction: Prediction) -> float:
        """What the calibration multiplies a prediction with."""
        return self.peak(prediction) / prediction.peak_memory_bytes

    def peak(self, prediction: Prediction) -> int:
        """Predicted bytes, corrected by the calibration."""
        return prediction.peak_memory_bytes if self.calibration is None else self.calibration.peak(prediction)

    def need(self, prediction: Prediction) -> int:
        """Predicted bytes that a trial takes, with the margin."""
        return round(self.factor(prediction) * prediction.needed_bytes * (1 + self.margin))

    def process(self, prediction: Prediction) -> int | None:
        """Predicted bytes of a process on a card, corrected by the calibration; null on a CPU."""
        if prediction.peak_reserved_bytes is None:
            return None
        return round(self.factor(prediction) * prediction.peak_reserved_bytes) + self.context_bytes

    def verdict(self, line: Line, name: str) -> Verdict | None:
        """Whether a trial fits a capacity; null where it is not predicted."""
        prediction = line.on(name)
        return None if prediction is None else self.verdict_of(line.spec, prediction, name)

    def verdict_of(self, spec: TrialSpec, prediction: Prediction, name: str) -> Verdict:
        """Whether a spec with that prediction fits a capacity."""
        return fits(prediction, self.capacity_of(spec, name), self.margin, self.factor(prediction))

    def capacity_of(self, spec: TrialSpec, name: str) -> int:
        """Bytes that a process of a trial may take, within its own budget."""
        capacity = self.capacities[name]
        if name == LOCAL_MACHINE:
            capacity = capacity_per_process(capacity, spec, self.device_type)
        return min(capacity, spec.memory_budget or capacity)

    def seconds_per_token(self, prediction: Prediction) -> float:
        """Predicted seconds of a step over its padded tokens; without rates, at a rate of one operation a second."""
        seconds = self.step_seconds(prediction)
        return (float(prediction.flops) if seconds is None else seconds) / prediction.positions

    def step_seconds(self, prediction: Prediction) -> float | None:
        """Predicted seconds of a step, corrected by the calibration; null without rates."""
        if self.rates is None:
            return None
        factor = self.calibration.step_factor if self.calibration is not None else None
        return predicted_seconds(prediction.work, self.rates) * (factor or 1.0)

    @property
    def unit(self) -> tuple[str, float]:
        """The unit that suits the largest peak, and its bytes."""
        most = max((self.peak(line.prediction) for line in self.lines if line.prediction), default=0)
        return byte_unit(most)

    def footnotes(self) -> list[str]:
        """What the figures mean, and how accurate they are."""
        device = "CUDA" if self.device_type == "cuda" else "this CPU"
        notes = [f"{labels}: not predicted, {why}." for labels, why in self._unpredicted()]
        lengths = {str(p.assumed_length) for line in self.lines if (p := line.prediction) and p.assumed_length}
        if lengths:
            notes.append(f"No tokenizer: every example is taken to fill its sequence ({', '.join(lengths)} tokens).")
        notes.append(f"Live tensors of the training step on {device}, at the moment of the peak.")
        if any(line.spec.num_processes > 1 for line in self.lines):
            notes.append("Of several processes, the memory of each; a step's time is without communication.")
        if self.calibration is not None:
            notes.append(f"Calibrated on {self.calibration.describe()}.")
        taken = "What the allocator reserves" if self.device_type == "cuda" else "The highest of the three peaks"
        notes.append(
            f"{taken} decides, and may exceed its prediction by {self.margin:.1%}: fits includes this margin; tight "
            + ("may depend on it and on the allocator's cache." if self.device_type == "cuda" else "depends on it.")
            + ("" if self.calibration else " It is the default; harness plan --calibrate learns from your own rows.")
        )
        if other := self._of_other_generations():
            first = next(name for name in self.capacities if name not in other)
            notes.append(f"The figures are those on {first}; the columns of {', '.join(other)} go by their own.")
        if self.device_type == "cuda":
            notes.append("process: the reserve and the CUDA context, which a card's capacity leaves out.")
        if self.rates is not None:
            notes.append(f"Step: predicted from {self.rates_from}; in brackets, the fraction of it at these rates.")
        return notes

    def _of_other_generations(self) -> list[str]:
        """Cards on which a trial needs other memory than on the first."""
        return [
            name
            for name in self.capacities
            if any(
                (own := line.on(name)) and line.prediction and own.needed_bytes != line.prediction.needed_bytes
                for line in self.lines
            )
        ]

    def _unpredicted(self) -> list[tuple[str, str]]:
        """Labels of trials that are not predicted, with why: once for all that have one reason."""
        by_reason: dict[str, list[str]] = {}
        for line in self.lines:
            if line.prediction is None:
                by_reason.setdefault((line.error or "").rstrip("."), []).append(line.label)
        return [(_few(labels), why) for why, labels in by_reason.items()]


_NAMED = 3
"""Trials of a note that are named, at most; of one more, all are."""


def _few(labels: Sequence[str]) -> str:
    if len(labels) <= _NAMED + 1:
        return ", ".join(labels)
    return f"{', '.join(labels[:_NAMED])} and {len(labels) - _NAMED} others"


def terminal(plan: Plan, width: int) -> list[RichTable]:
    """A row for each trial: its memory and whether it fits; in a wide terminal, components, phase and work too.

    Columns that a table of that width cannot hold go to a further one.
    """
    unit, size = plan.unit
    memory = ("allocated", "reserved", "process") if plan.device_type == "cuda" else ("peak",)
    more = (*COMPONENTS, "in", "FLOP/step", "load", "evaluate") if width >= _WIDE else ()
    step = ("step",) if plan.rates is not None else ()
    headings = (*memory, *plan.capacities, *step, *more)
    cells = list[tuple[str, ...]]()
    for line in plan.lines:
        prediction = line.prediction
        if prediction is None:
            cells.append(("[red]–[/]",) + ("",) * (len(headings) - 1))
            continue
        details = (
            *(f"{prediction.breakdown[f'memory_{name}_bytes'] / size:.2f}" for name in COMPONENTS),
            max(prediction.phases, key=prediction.phases.__getitem__),
            show_scientific(prediction.flops),
            f"{prediction.peak_load_bytes / size:.2f}",
            "–" if prediction.peak_evaluate_bytes is None else f"{prediction.peak_evaluate_bytes / size:.2f}",
        )
        cells.append(
            (
                *(f"[bold]{each / size:.2f}[/]" for each in _memory(plan, prediction)),
                *(_verdict(plan, line, name) for name in plan.capacities),
                *((_step(plan, prediction),) if step else ()),
                *(details if more else ()),
            )
        )
    labels = [plain(line.label) for line in plan.lines]
    columns = zip(headings, zip(*cells, strict=True), strict=True)
    title = f"{plain(plan.title)}: predicted memory, {unit}"
    groups, left = [list[_Column]()], width - _TRIAL_WIDTH
    for column in columns:
        needed = max(cell_len(Text.from_markup(text).plain) for text in (column[0], *column[1])) + _AROUND
        if needed > left and groups[-1]:
            groups.append([])
            left = width - _TRIAL_WIDTH
        groups[-1].append(column)
        left -= needed
    return [_table("" if number else title, labels, group) for number, group in enumerate(groups)]


def _table(title: str, labels: Sequence[str], columns: Sequence[_Column]) -> RichTable:
    table = RichTable(title=title or None, title_justify="left")
    table.add_column("trial", overflow="fold", min_width=_TRIAL_WIDTH - 1 - _AROUND)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in zip(labels, *(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def _memory(plan: Plan, prediction: Prediction) -> tuple[int, ...]:
    """Bytes allocated and reserved, and of the process; on a CPU the first only."""
    peak, process = plan.peak(prediction), plan.process(prediction)
    return (peak,) if process is None else (peak, process - plan.context_bytes, process)


def _step(plan: Plan, prediction: Prediction) -> str:
    seconds = plan.step_seconds(prediction)
    if seconds is None or plan.rates is None:
        return ""
    return f"{show_seconds(seconds)} ({roofline_seconds(prediction.work, plan.rates) / seconds:.0%})"


def _verdict(plan: Plan, line: Line, name: str) -> str:
    verdict, prediction = plan.verdict(line, name), line.on(name)
    if verdict is None or prediction is None:
        return ""
    used = plan.factor(prediction) * prediction.needed_bytes / plan.capacity_of(line.spec, name)
    return f"[{_COLOURS[verdict]}]{verdict}[/] ({used:.0%})"


def terminal_largest(
    title: str,
    key: str,
    labels: Mapping[str, str],
    capacities: Sequence[str],
    answers: Mapping[tuple[str, str], Largest],
    most: int,
) -> RichTable:
    """A row for each trial: the largest value that fits each capacity, and its need.

    Args:
        title: of the grid.
        key: the searched key.
        labels: by spec id.
        capacities: their names.
        answers: by spec id and name of the capacity.
        most: upper limit of the search.
    """
    table = RichTable(title=f"{plain(title)}: largest {key} that fits", title_justify="left")
    table.add_column("trial")
    for name in capacities:
        table.add_column(name, justify="right")
    for spec_id, label in labels.items():
        table.add_row(plain(label), *(_answer(answers[spec_id, name], most) for name in capacities))
    return table


def _answer(largest: Largest, most: int) -> str:
    if largest.error is not None:
        return "[dim]–[/]" if largest.error == NO_EFFECT else f"[red]{plain(largest.error)}[/]"
    if largest.value is None or largest.need is None:
        return f"[red]not even {largest.least}[/]"
    bound = "≥ " if largest.value >= most else ""
    return f"[bold]{bound}{largest.value:,}[/] ({show_bytes(largest.need)})"


def rows(plan: Plan) -> list[dict[str, Any]]:
    """A row for each trial, in base units; null where unknown."""
    records = []
    for line in plan.lines:
        p = line.prediction
        records.append(
            {
                "label": line.label,
                "spec_id": line.spec.id,
                "device_type": plan.device_type,
                "predicted_peak_memory_bytes": plan.peak(p) if p else None,
                "uncorrected_peak_memory_bytes": p.peak_memory_bytes if p else None,
                "predicted_load_bytes": p.peak_load_bytes if p else None,
                "predicted_evaluate_bytes": p.peak_evaluate_bytes if p else None,
                "predicted_reserved_bytes": p.peak_reserved_bytes if p else None,
                "least_reserved_bytes": p.least_reserved_bytes if p else None,
                "predicted_process_bytes": plan.process(p) if p else None,
                "margin": plan.margin,
                **{f"memory_{c}_bytes": p.breakdown[f"memory_{c}_bytes"] if p else None for c in COMPONENTS},
                **{f"peak_{phase}_bytes": p.phases.get(phase) if p else None for phase in _PHASES},
                "flops": float(p.flops) if p else None,
                "moved_bytes": float(sum(w.moved_bytes * w.calls for w in p.work)) if p else None,
                "positions": p.positions if p else None,
                "step_seconds": plan.step_seconds(p) if p else None,
                "step_seconds_at_rates": roofline_seconds(p.work, plan.rates) if p and plan.rates else None,
                **{
                    f"fits {name}": plan.verdict(line, name) for name in plan.capacities
                },
                "error": line.error,
            }
        )  # fmt: skip
    return records


_PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")


def write(plan: Plan, folder: Path) -> list[Path]:
    """`plan.json`, `plan.parquet`, and the plot as `plan.svg` and `plan.png`.

    Raises:
        OSError: the folder cannot be written.
    """
    records = rows(plan)
    content = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), content)
    files: dict[str, bytes] = {
        "plan.json": (json.dumps(records, indent=1) + "\n").encode(),
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
    """Peaks by component, with a line at each capacity; null where nothing was predicted."""
    unit, size = plan.unit
    parts = [
        {
            "trial": line.label,
            "component": name,
            "rank": rank,
            "size": line.prediction.breakdown[f"memory_{name}_bytes"] / size,
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
            x=altair.X("sum(size):Q", title=axis_title("predicted_peak_memory_bytes", unit)),
            color=altair.Color("component:N", scale=colours, title=None, legend=altair.Legend(orient="top")),
            order="rank:O",
        )
    )
    layers = [bars]
    if plan.capacities:
        limits = altair.Chart(
            pandas.DataFrame({"name": list(plan.capacities), "size": [c / size for c in plan.capacities.values()]})
        )
        layers.append(limits.mark_rule(strokeDash=[4, 3]).encode(x="size:Q"))
        layers.append(
            limits.mark_text(align="left", dx=3, dy=-4, baseline="bottom").encode(
                x="size:Q", y=altair.value(0), text="name:N"
            )
        )
    heading = METRICS["predicted_peak_memory_bytes"].heading
    drawn = altair.layer(*layers).properties(width=640, title=f"{heading}: {plan.title}")
    return Chart("plan", heading, "Live tensors at the moment of the peak.", drawn)
