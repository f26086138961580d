"""Experiment and ablation benchmarking for fine-tuning language models on small hardware."""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # as in __main__: an interrupt of `import typing` could not be handled yet
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Grid": "harness.cli.python",
    "WatchCallback": "harness.watching.trainer",
    "load": "harness.report.notebook",
    "merge_lora": "harness.adapters.merge",
    "plan": "harness.cli.python",
    "run": "harness.cli.python",
    "tune": "harness.cli.python",
    "watch": "harness.watching.watch",
    "write_report": "harness.cli.python",
}
"""Public functions and their modules, imported on first use."""


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
