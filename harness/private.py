"""What is the user's own and belongs in no record, log or page: the home folder's name, tokens and passwords."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HIDDEN = "[hidden]"
# Access tokens as their issuers shape them (Hugging Face, GitHub, OpenAI, Weights & Biases in a header), and
# passwords within addresses.
_TOKENS = re.compile(
    r"\b(?:hf|api_org|ghp|gho|github_pat|sk)[_-][A-Za-z0-9_-]{16,}|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"
    r"|(?<=[Bb]earer )[\w.~+/=-]{8,}"
)
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_LEAST_SECRET = 8
"""A shorter value may well be a word of the text."""


def withheld(text: str) -> str:
    """The text with `~` for the home folder, and without tokens: those of a known shape, and the values of environment
    variables that are named like secrets.
    """
    for name, value in os.environ.items():
        if len(value) >= _LEAST_SECRET and _SECRET_NAMES.search(name):
            text = text.replace(value, _HIDDEN)
    return without_home(_TOKENS.sub(_HIDDEN, text))


def without_home(text: str) -> str:
    """The text with `~` for the home folder: the same file for everybody, and nobody's name."""
    home = str(Path.home())
    if home.count("/") < 1 or home == "/":
        return text
    return re.sub(rf"(?<![\w./-]){re.escape(home)}(?=/|\W|$)", "~", text)
