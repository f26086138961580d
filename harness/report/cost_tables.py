"""Table of what reaching a loss takes."""

from __future__ import annotations

from harness._util.units import show_seconds
from harness.analysis import words
from harness.analysis.cost import Costs
from harness.analysis.measurements import Measurements
from harness.report.tables import Cell, Table


def costs(of: Costs, m: Measurements) -> Table:
    """Seconds, energy and money until the baseline's loss, and the loss after equal time, the cheapest first."""
    ordered = sorted(of.rows, key=lambda each: (each.seconds is None, each.seconds or 0.0))
    with_energy = any(each.joules is not None for each in ordered)
    with_money = m.price_per_hour is not None
    baseline = next((each.seconds for each in ordered if each.config == m.baseline), None)
    headings = ["Technique", f"Time to {of.target:.3f} nats", "Times the baseline's"]
    headings += ["Energy (kJ)"] * with_energy + ["Money"] * with_money
    headings.append(f"Loss after {show_seconds(of.equal_seconds)} (nats)")
    rows = []
    for each in ordered:
        ratio = each.seconds / baseline if each.seconds and baseline else None
        row = [
            Cell(str(m.configs.at[each.config, "label"])),
            Cell("not reached" if each.seconds is None else show_seconds(each.seconds), each.seconds),
            Cell(words.MISSING if ratio is None else f"×{ratio:.2f}", ratio),
        ]
        row += [_cell(each.joules and each.joules / 1000, "{:.2f}")] * with_energy
        row += [_cell(each.money, "{:.4f}")] * with_money
        rows.append((*row, _cell(each.loss, "{:.3f}")))
    price = f" Money is at {m.price_per_hour:g} an hour." if with_money else ""
    return Table(
        "costs",
        "What reaching a loss takes",
        tuple(headings),
        tuple(rows),
        f"Time of training at the speed as it is compared with the baseline's, until the training loss, the mean of "
        f"{of.window} steps, is as low for the first time as the baseline's at its end. Techniques see the same "
        "examples in the same order; the means of all repeats are shown. A loss falls unevenly, and no intervals are "
        f"known here: times that differ by less than a fifth mean little.{price}",
        tuple(each.config for each in ordered),
    )


def _cell(value: float | None, form: str) -> Cell:
    return Cell(words.MISSING if value is None else form.format(value), value)
