"""Errors that several packages know: bad input, failed trials, and a full disk."""

from __future__ import annotations

import errno


class InputError(ValueError):
    """Bad input. The message is one line: what was given, and what would do. Exit code 2."""


class TrialsFailed(Exception):
    """Trials failed, or none ended well. The message is one line: which, and where to look. Exit code 3."""


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk was full. Libraries in Rust and C++ report it only in the error's text."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
