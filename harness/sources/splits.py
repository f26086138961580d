"""How many rows are held out: rows that the data themselves give for it, or some of those to train on. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harness.errors import InputError
from harness.sources import stories
from harness.sources.stories import Row, Rows


@dataclass(frozen=True)
class Counts:
    """Distinct rows of a spec's datasets."""

    others: int
    """Rows that the data do not give to be held out."""
    given: int
    """Rows that they do; 0: some of the others are held out."""

    def held_out(self, wanted: float) -> int:
        """Number of rows that are held out.

        Of rows that are given: as many as a count says, or all where they are fewer; all for a fraction, which is one
        of rows to train on, of which none is then held out.

        Args:
            wanted: `val_set_size` of a spec.

        Raises:
            InputError: none is left to train on.
        """
        if not self.given:
            return stories.held_out(wanted, self.others)
        if not self.others:
            raise InputError(
                f"nothing to train on: each row is one of the {self.given} that the data hold out; "
                "give other rows to train on, or to hold out"
            )
        return min(int(wanted), self.given) if wanted >= 1 else self.given if wanted else 0

    def trained_on(self, wanted: float) -> int:
        """Number of distinct rows that are left to train on.

        Raises:
            InputError: there is none.
        """
        held_out = self.held_out(wanted)
        return self.others if self.given else self.others - held_out


def counts(rows: Rows) -> Counts:
    """Count distinct rows."""
    given = {row.id for row in rows.held_out}
    return Counts(len({row.id for row in rows.stories} - given), len(given))


def distinct(rows: Iterable[Row]) -> list[Row]:
    """One row of each id, in the order of the ids."""
    by_id = {row.id: row for row in rows}
    return [by_id[key] for key in sorted(by_id)]
