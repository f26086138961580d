"""The one error that a user is meant to read."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: one clear line that says what was given and what would do. Exit code 2."""
