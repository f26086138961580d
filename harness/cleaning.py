"""What runs leave behind and nobody needs. Never results: no part, and no adapter that a trial names."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness import model_source
from harness.launch.leases import Leases
from harness.results import Store

_OLD_SECONDS = 3600.0


@dataclass(frozen=True)
class Left:
    """A file or a folder that may go."""

    path: Path
    what: str
    size: int
    """In bytes."""


def leftovers(store: Store) -> list[Left]:
    """Of one grid: halves of files that were being written, leases of killed runners, logs that no record names, and
    adapters of no recorded trial. Nothing while a runner is at work there.
    """
    leases = Leases(store.folder)
    if not leases.nobody_works():
        return []
    rows = store.read("trials", ["trial_id", "adapter_id", "log"]).to_pylist()
    logs = {Path(row["log"]).name for row in rows if row["log"]}
    adapters = {row["adapter_id"] for row in rows}
    halves = [entry for entry in store.folder.rglob(".*.aside") if _is_old(entry)]
    # Rows that cannot be read may name any of them.
    whole = not store.damage() and not (store.folder / "set-aside").is_dir()
    kept = [e for e in (store.folder / "adapters").glob("*") if whole and not e.name.startswith(".") and _is_old(e)]
    printed = (store.folder / "logs").glob("*.log")
    return [
        *_left(halves, "half written"),
        *_left(leases.stale(), "lease of a runner that is gone"),
        *_left((log for log in printed if log.name not in logs), "log that no record names"),
        *_left((entry for entry in kept if entry.name not in adapters), "adapter of no recorded trial"),
    ]


def _is_old(entry: Path) -> bool:
    """Whether nobody can be at it any more: a search and a merge lease no trial."""
    try:
        return time.time() - entry.stat().st_mtime > _OLD_SECONDS
    except FileNotFoundError:
        return False


def cached() -> list[Left]:
    """Converted models, random weights and measured rates, which are made anew when they are needed. The folder may be
    somebody else's too: nothing but what harness has put there.
    """
    own = [f"{shape}{model_source.BUNDLED}-*" for shape in ("", ".")] + ["random-*", ".random-*", "rates-*.json"]
    return list(_left({path for name in own for path in model_source.cache_folder().glob(name)}, "cache"))


def remove(what: Iterable[Left]) -> None:
    """Remove them; what has gone meanwhile is gone.

    Raises:
        OSError: one cannot be removed.
    """
    for left in what:
        if left.path.is_dir() and not left.path.is_symlink():
            shutil.rmtree(left.path, ignore_errors=True)
        else:
            left.path.unlink(missing_ok=True)


def _left(paths: Iterable[Path], what: str) -> Iterable[Left]:
    for path in sorted(paths):
        inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
        yield Left(path, what, sum(file.lstat().st_size for file in inside if file.is_file()))
