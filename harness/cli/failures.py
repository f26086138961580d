"""What the exit code of `harness run` and `tune` says of the trials: 3 where some failed, or none ended well."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness._util.terminal import plain
from harness.cli.console import err
from harness.errors import TrialsFailed

FAILURES = ("failed", "killed", "timeout")
"""The other statuses are results: an out-of-memory or a divergence says something of the configuration."""
INTERRUPTED = 130
"""Exit code of a command that Ctrl-C stopped before its end."""
_NAMED = 3
"""Failed trials that the message names."""


@contextlib.contextmanager
def allowed(allow: bool) -> Iterator[None]:
    """Within, `TrialsFailed` is no more than a line where failures are allowed."""
    try:
        yield
    except TrialsFailed as failed:
        if not allow:
            raise TrialsFailed(f"{failed}; --allow-failures accepts that") from None
        err.print(f"[yellow]harness:[/] {plain(str(failed))}", soft_wrap=True, highlight=False)


def refuse(rows: Sequence[Mapping[str, Any]], folder: Path, *, complete: bool, hint: str = "") -> None:
    """Judge the trials as they are recorded now, whichever command ran them: the same command gives the same answer.

    Args:
        rows: of the trials: `label`, `repeat`, `status` and `log`.
        folder: the grid's results.
        complete: whether each trial of the grid has a row.
        hint: how failed ones are run again.

    Raises:
        TrialsFailed: some failed, or all are recorded and none ended well.
    """
    failed = [row for row in rows if row["status"] in FAILURES]
    if failed:
        named = "; ".join(_described(row, folder) for row in failed[:_NAMED])
        further = f"; and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        raise TrialsFailed(f"{len(failed)} of {len(rows)} trials failed: {named}{further}{hint}")
    if rows and complete and not any(row["status"] == "ok" for row in rows):
        ends = ", ".join(f"{count} {status}" for status, count in Counter(row["status"] for row in rows).most_common())
        raise TrialsFailed(f"none of {len(rows)} trials ended ok ({ends})")


def _described(row: Mapping[str, Any], folder: Path) -> str:
    label = row["label"] + (f" (repeat {row['repeat']})" if row["repeat"] else "")
    return f"{label} ({row['status']}" + (f", see {folder / row['log']})" if row["log"] else ")")
