"""Predictions against what others measured on their cards, and against the predictions that they published.

    python benchmarks/predict_elsewhere.py [--rows N]

The rows are in `tests/measured_by_others/`, each with its source: facts of public repositories. A row's step is said by
a preset (`like`) and a few keys; nothing is fitted to any row. Printed are the errors of what is allocated and
reserved, and the verdict for the row's own card and for 85 % and 115 % of what it took: a right one says *does not fit*
for the former and *fits* for the latter. `tests/test_measured_by_others.py` holds some of the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness._util.units import MIB
from harness.grids.levels import changes_of, make_spec
from harness.predict import cards, peak
from harness.predict.prediction import MARGIN, Prediction, Verdict, fits
from harness.spec.trial import TrialSpec

ROWS = Path(__file__).parent.parent / "tests/measured_by_others"
NEAR = 0.15
"""Fraction below and above what a row took, at which the verdict is asked for too."""


@dataclass(frozen=True)
class Row:
    """One measured configuration."""

    name: str
    spec: TrialSpec
    card: str
    allocated: int
    """Largest `memory_allocated`, bytes."""
    reserved: int
    """Largest `memory_reserved`, bytes."""
    rival: dict[str, Any]
    """A published prediction: `name`, `allocated_bytes`, `reserved_bytes`."""

    def predict(self) -> Prediction:
        """For the row's card, with examples that fill the sequence."""
        return peak.predict(self.spec, "cuda", capability=cards.CARDS[self.card].capability, full_length=True)

    def verdicts(self, prediction: Prediction) -> dict[str, Verdict]:
        """For its own card, and for less and more than it took."""
        limits = {
            "own card": cards.capacity(self.card),
            "85 %": round((1 - NEAR) * self.reserved),
            "115 %": round((1 + NEAR) * self.reserved),
        }
        return {name: fits(prediction, limit, MARGIN["cuda"]) for name, limit in limits.items()}


RIGHT: dict[str, Verdict] = {"own card": "fits", "85 %": "does not fit", "115 %": "fits"}
"""All rows ran on their cards."""


def rows(folder: Path) -> Iterator[Row]:
    """The rows; configs of their models are written into a folder."""
    for file in sorted(ROWS.glob("*.jsonl")):
        for number, line in enumerate(file.read_text().splitlines()):
            row = json.loads(line)
            config = folder / f"{file.stem}-{number}.json"
            config.write_text(json.dumps(row["config"]))
            keys = {"base_model": f"random:{config}", "val_set_size": 0, "like": row["like"], **row["keys"]}
            yield Row(
                f"{row['model'].rpartition('/')[2]} {_settings(row['keys'])}",
                make_spec(changes_of(keys, "row"), "row"),
                row["card"],
                row["allocated_bytes"],
                row["reserved_bytes"],
                row["rival"],
            )


def _settings(keys: dict[str, Any]) -> str:
    checkpointed = "" if keys["gradient_checkpointing"] else ", no checkpointing"
    return f"{keys['precision']}, {keys['micro_batch_size']} x {keys['sequence_length']}{checkpointed}"


def main() -> None:
    """Print a line for each row, and the errors over all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="the first N only")
    asked = parser.parse_args().rows
    headings = ("row", "allocated", "error", "reserved", "error", *RIGHT, "rival: allocated", "reserved")
    table = Table(*headings, title="Measured by others, MiB, and errors of predictions")
    figures = ("allocated", "reserved", "rival allocated", "rival reserved")
    errors: dict[str, list[float]] = {name: [] for name in figures}
    right = 0
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        for row in list(rows(Path(folder)))[:asked]:
            prediction = row.predict()
            verdicts = row.verdicts(prediction)
            right += sum(verdicts[name] == wanted for name, wanted in RIGHT.items())
            of_row = {
                "allocated": prediction.peak_memory_bytes / row.allocated - 1,
                "reserved": prediction.needed_bytes / row.reserved - 1,
                "rival allocated": row.rival["allocated_bytes"] / row.allocated - 1,
                "rival reserved": row.rival["reserved_bytes"] / row.reserved - 1,
            }
            for name, error in of_row.items():
                errors[name].append(error)
            ours, reserve, theirs, their_reserve = (f"{error:+.2%}" for error in of_row.values())
            measured = f"{row.allocated / MIB:,.0f}", f"{row.reserved / MIB:,.0f}"
            table.add_row(row.name, measured[0], ours, measured[1], reserve, *verdicts.values(), theirs, their_reserve)
    console.print(table)
    for name, each in errors.items():
        absolute = sorted(map(abs, each))
        within = sum(error <= 0.05 for error in absolute)
        console.print(
            f"{name}: median {statistics.median(absolute):.2%}, largest {absolute[-1]:.2%}, "
            f"within 5 % {within} of {len(each)}"
        )
    console.print(f"verdicts right: {right} of {len(RIGHT) * len(errors['reserved'])}")


if __name__ == "__main__":
    main()
