"""Private data kept out of records, logs and pages: the home folder's name, tokens and passwords."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HIDDEN = "[hidden]"

# Access tokens (Hugging Face, GitHub, OpenAI, those of a bearer header), and passwords in URLs.
_TOKENS = re.compile(
    r"\b(?:hf|api_org|ghp|gho|github_pat|sk)[_-][A-Za-z0-9_-]{16,}|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"
    r"|(?<=[Bb]earer )[\w.~+/=-]{8,}"
)
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_LEAST_SECRET = 8
"""A shorter value may be an ordinary word."""


def redact(text: str) -> str:
    """Hide the home folder (as `~`), tokens of a known shape, and values of environment variables named like secrets
    (at least 8 characters long).
    """
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name):
            for line in (value, *value.splitlines()):  # a key may have several
                if len(line) >= _LEAST_SECRET:
                    text = text.replace(line, _HIDDEN)
    return redact_home(_TOKENS.sub(_HIDDEN, text))


def redact_home(text: str) -> str:
    """Write `~` for the home folder: the same path for every user, and no user's name."""
    try:
        home = str(Path.home())
    except RuntimeError:  # the user is unknown
        return text
    if home.count("/") < 1 or home == "/":
        return text
    return re.sub(rf"(?<![\w./-]){re.escape(home)}(?=/|\W|$)", "~", text)
