"""Proposals that make a trial fit, as a table and as records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table as RichTable

from harness._util.terminal import plain
from harness._util.units import show_bytes
from harness.predict.fixes import Proposal

_SHOWN = 12
"""Proposals of a table."""
_COLOURS = {"fits": "green", "tight": "yellow", "does not fit": "red"}


def terminal(label: str, name: str, capacity: int, now_seconds: float, proposals: Sequence[Proposal]) -> RichTable:
    """A row for each proposal: what changes, its memory, whether it fits, and its time against now.

    Args:
        label: of the trial.
        name: of the card or the amount of memory.
        capacity: bytes that the trial may take there.
        now_seconds: seconds per token of the trial as it is.
        proposals: cheapest first.
    """
    table = RichTable(title=f"{plain(label)}: what makes it fit {name}", title_justify="left")
    table.add_column("change", overflow="fold")
    for heading in ("memory", "of it", "time", "alters"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in proposals[:_SHOWN]:
        need, colour = each.prediction.needed_bytes, _COLOURS[each.verdict]
        table.add_row(
            plain(each.text),
            show_bytes(need),
            f"[{colour}]{need / capacity:.0%}[/]",
            f"×{each.seconds_per_token / now_seconds:.2f}",
            each.alters,
        )
    return table


def rows(label: str, name: str, now_seconds: float, proposals: Sequence[Proposal]) -> list[dict[str, Any]]:
    """A record for each proposal, in base units, cheapest first."""
    return [
        {
            "label": label,
            "capacity": name,
            "changes": each.text,
            "keys": {key: value for change in each.changes for key, value in change.keys.items()},
            "alters": each.alters,
            "fits": each.verdict,
            "predicted_reserved_bytes": each.prediction.peak_reserved_bytes,
            "predicted_peak_memory_bytes": each.prediction.peak_memory_bytes,
            "needed_bytes": each.prediction.needed_bytes,
            "time_ratio": each.seconds_per_token / now_seconds,
        }
        for each in proposals
    ]
