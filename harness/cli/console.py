"""Where commands print."""

from __future__ import annotations

from rich.console import Console

out = Console(emoji=False)  # a label may say :boom:
err = Console(stderr=True, emoji=False)
