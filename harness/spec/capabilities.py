"""What the methods of peft can do at each precision, as found by trying: `benchmarks/methods.py` writes the table."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path

from harness.spec.datasets import Frozen
from harness.spec.keys import QUANTISED
from harness.spec.trial import TrialSpec

TABLE = Path(__file__).with_name("capabilities.json")
"""Where the table is."""
_LIKE = {"fp16": "bf16", "fp4": "nf4", "bf16-mixed": "fp32", "fp16-mixed": "fp32"}
"""Precisions that were not tried, by one whose weights are of the same kind."""


class Capability(Frozen):
    """What one method was seen to do at one precision, over a small Llama. Null where it was not tried."""

    method: str
    """As in `adapter`."""
    precision: str
    """As in `precision`, quantised by bitsandbytes."""
    fails: str | None = None
    """Why it does not train, or trains something else; null: it does train."""
    reload_error: float | None = None
    """Distance of the saved and loaded model's logits from the trained one's, as a fraction of their norm."""
    not_reloaded: str | None = None
    """Why it cannot be saved and loaded."""
    merge_error: float | None = None
    """The same of the merged model's logits; over a quantised base the rounding of the merged weights is in it."""
    not_merged: str | None = None
    """Why it cannot be merged."""
    not_checkpointed: str | None = None
    """Why it does not train with gradient checkpointing, or trains something else then; null: it does."""
    not_sharded: str | None = None
    """Why it does not train sharded over two processes; null: it does, or the precision is never sharded."""
    prediction_error: float | None = None
    """Predicted peak over the measured one, minus 1."""
    not_predicted: str | None = None
    """Why its peak is not predicted."""


class Capabilities(Frozen):
    """The table, and what it was made with."""

    versions: tuple[tuple[str, str], ...]
    """Packages by name."""
    cells: tuple[Capability, ...]
    """A cell of each method and precision."""

    def find(self, method: str, precision: str) -> Capability | None:
        """The cell of a method at a precision; null: it was not tried."""
        return next((cell for cell in self.cells if (cell.method, cell.precision) == (method, precision)), None)


@functools.cache
def table() -> Capabilities:
    """The table that comes with the package."""
    return Capabilities.model_validate_json(TABLE.read_text(encoding="utf-8"))


def refusal(spec: TrialSpec) -> str | None:
    """Why a method cannot train as a spec says; null where it can, was not tried, or another peft may know how."""
    of_another_library = spec.precision in QUANTISED and spec.quantizer != "bitsandbytes"
    if of_another_library or dict(table().versions)["peft"] != importlib.metadata.version("peft"):
        return None
    cell = table().find(spec.adapter, _LIKE.get(spec.precision, spec.precision))
    if cell is None:
        return None
    reasons = {
        f"precision {spec.precision}": cell.fails,
        "gradient_checkpointing": cell.not_checkpointed if spec.gradient_checkpointing else None,
        f"sharding {spec.sharding}": cell.not_sharded if spec.sharding != "none" else None,
    }
    failing = next((key for key, reason in reasons.items() if reason), None)
    if failing is None:
        return None
    return (
        f"adapter {spec.adapter} with {failing}: {reasons[failing]} (`harness methods {spec.adapter}` says what works)"
    )


def why_not_merged(method: str) -> str | None:
    """Why a method's adapters cannot be merged; null where they can, or were not tried."""
    cell = table().find(method, "bf16")
    return None if cell is None else cell.not_merged
