"""The one error that a user is meant to read."""

from __future__ import annotations

import errno


class InputError(ValueError):
    """Bad input: one clear line that says what was given and what would do. Exit code 2."""


def says_disk_full(error: BaseException) -> bool:
    """Whether there was no room for what was written. Libraries in Rust and C++ say so in words alone."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
