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
        if _SECRET_NAMES.search(name):
            for line in (value, *value.splitlines()):  # a key may have many
                if len(line) >= _LEAST_SECRET:
                    text = text.replace(line, _HIDDEN)
    return without_home(_TOKENS.sub(_HIDDEN, text))


def without_home(text: str) -> str:
    """The text with `~` for the home folder: the same file for everybody, and nobody's name."""
    try:
        home = str(Path.home())
    except RuntimeError:  # an unknown user has none
        return text
    if home.count("/") < 1 or home == "/":
        return text
    return re.sub(rf"(?<![\w./-]){re.escape(home)}(?=/|\W|$)", "~", text)
