"""What runs leave behind and nothing needs. Never results: no part, and no adapter that a trial names."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness._util.files import is_old
from harness.results.store import Store
from harness.runner.leases import Leases
from harness.sources import fingerprints, models


@dataclass(frozen=True)
class Leftover:
    """A file or a folder that may be removed."""

    path: Path
    what: str
    """Why it may be removed."""
    size: int
    """In bytes."""


def leftovers(store: Store) -> list[Leftover]:
    """Of one grid: unfinished files, leases of killed runners, logs that no record names, and adapters of no recorded
    trial. Nothing while a runner is running there.
    """
    leases = Leases(store.folder)
    if not leases.none_held():
        return []
    rows = store.read("trials", ["trial_id", "adapter_id", "log"]).to_pylist()
    logs = {Path(row["log"]).name for row in rows if row["log"]}
    adapters = {row["adapter_id"] for row in rows}
    unfinished = [entry for entry in store.folder.rglob(".*.aside") if is_old(entry)]
    # A search and a merge lease no trial: what is recent may be theirs. Rows that cannot be read may name any of them.
    readable = not store.damage() and not (store.folder / "set-aside").is_dir()
    kept = [e for e in (store.folder / "adapters").glob("*") if readable and not e.name.startswith(".") and is_old(e)]
    printed = (store.folder / "logs").glob("*.log")
    return [
        *_leftovers(unfinished, "half written"),
        *_leftovers(leases.stale(), "lease of a runner that is gone"),
        *_leftovers((log for log in printed if log.name not in logs), "log that no record names"),
        *_leftovers((entry for entry in kept if entry.name not in adapters), "adapter of no recorded trial"),
    ]


def cached() -> list[Leftover]:
    """Converted models, random weights, measured rates and the scripts of charts, which are made again when they are
    needed. The folder may be shared with other programs: nothing but what harness has put there.
    """
    own = [f"{shape}{models.BUNDLED}-*" for shape in ("", ".")] + ["random-*", ".random-*", "rates-*.json"]
    own += [fingerprints.CACHE_NAME, "vega-*.js"]
    return list(_leftovers({path for name in own for path in models.cache_folder().glob(name)}, "cache"))


def remove(leftovers: Iterable[Leftover]) -> None:
    """Remove them; what has gone meanwhile is ignored.

    Raises:
        OSError: one cannot be removed.
    """
    for left in leftovers:
        if left.path.is_dir() and not left.path.is_symlink():
            shutil.rmtree(left.path, ignore_errors=True)
        else:
            left.path.unlink(missing_ok=True)


def _leftovers(paths: Iterable[Path], what: str) -> Iterable[Leftover]:
    for path in sorted(paths):
        inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
        yield Leftover(path, what, sum(file.lstat().st_size for file in inside if file.is_file()))
