"""Private data kept out of records, logs and pages: the home folder's name, tokens and passwords."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HIDDEN = "[hidden]"

# Access tokens (Hugging Face, GitHub, OpenAI, those of a header), passwords in URLs, and keys in their queries.
_TOKENS = re.compile(
    r"\b(?:hf|api_org|gh[a-z]|github_pat|sk)[_-][A-Za-z0-9_-]{16,}|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"
    r"|(?<=[Bb]earer )[\w.~+/=-]{8,}|(?<=Authorization: Basic )[\w+/=-]+"
)
_IN_QUERIES = re.compile(r"([?&](?:[\w-]*token|[\w-]*key|sig|[\w-]*signature)=)[^\s&#]+", re.IGNORECASE)
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_LEAST_SECRET = 8
"""A shorter value may be an ordinary word."""


def redact(text: str) -> str:
    """Hide the home folder (as `~`), tokens of a known shape, and values of environment variables named like secrets
    (at least 8 characters long).
    """
    secrets = [value for name, value in os.environ.items() if _SECRET_NAMES.search(name)]
    lines = {line for value in secrets for line in (value, *value.splitlines())}  # a key may have several
    for line in sorted(lines, key=len, reverse=True):  # the beginning of another one would leave the rest of it
        if len(line) >= _LEAST_SECRET:
            text = text.replace(line, _HIDDEN)
    return redact_home(_IN_QUERIES.sub(rf"\1{_HIDDEN}", _TOKENS.sub(_HIDDEN, text)))


def redact_home(text: str) -> str:
    """Write `~` for the home folder: the same path for every user, and no user's name."""
    try:
        home = str(Path.home())
    except RuntimeError:  # the user is unknown
        return text
    if home.count("/") < 1 or home == "/":
        return text
    return re.sub(rf"{_NO_PATH_BEFORE}{re.escape(home)}(?=/|\W|$)", "~", text)


_NO_PATH_BEFORE = r"""(?:(?<![\w./-])|(?<=://)|(?<=:///)|(?<=[\s"'=,(\[]-[A-Za-z])|(?<=\A-[A-Za-z]))"""
"""Where a path begins: not within another one, but after the slashes of a URL, and after an option of one letter."""
