"""The user's cache folder; where there is no home, or none that can be written, a folder among the temporary files."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from harness.errors import InputError


def cache_home() -> Path:
    """Folder of the user's caches: `$XDG_CACHE_HOME`, else `~/.cache`, else one of this user's temporary files.

    Raises:
        InputError: none of them can be written.
    """
    usual = _usual_cache_home()
    return usual if usual.is_absolute() and can_be_written(usual) else _temporary_folder()


def name_folders_for_libraries() -> None:
    """Have libraries keep their files in `cache_home`, where there is no home or none that can be written.

    What a variable of the environment names stays, and so does what they have in the home already.
    """
    with contextlib.suppress(InputError):
        usual, cache = _usual_cache_home(), cache_home()
        if cache == usual:
            return
        if not os.path.isdir(usual / "huggingface"):
            os.environ.setdefault("HF_HOME", str(cache / "huggingface"))
        if not _has_home():
            os.environ["HOME"] = str(cache)


def can_be_written(folder: Path) -> bool:
    """Whether a folder can be written, or made where it is missing."""
    # os.path, unlike Path, takes what must not be looked at for missing.
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path) or path == path.parent)
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


def _usual_cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))


def _has_home() -> bool:
    """Whether `HOME` is set, or the user has a name, whose home the system knows."""
    return os.path.expanduser("~") != "~"


def _temporary_folder() -> Path:
    """The one that each process of this user finds again, and that nobody else can have prepared."""
    folder = Path(tempfile.gettempdir()) / f"harness-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    raise InputError(f"neither {_usual_cache_home()} nor {folder} can be used; set HARNESS_CACHE to a folder of yours")
