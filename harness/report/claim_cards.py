"""Claims as a page shows them: the measured size on a line with what the claim expects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness._util.units import show_bytes
from harness.analysis import words
from harness.analysis.verdicts import ClaimVerdict
from harness.grids.claims import MODEL, Claim, Expectation
from harness.metrics import FIGURES
from harness.report.scale import Scale, scale_of


@dataclass(frozen=True)
class Picture:
    """A claim on a line, in percent of it."""

    expected: tuple[float, float]
    """Where what is expected begins, and its width."""
    measured: tuple[float, float] | None
    """Where the interval, or the range of several sizes, begins, and its width; null: it has none."""
    at: float | None
    """The measured size; null: there are several."""
    ticks: tuple[tuple[float, str], ...]
    """Round values: where they are, and how they are written."""


@dataclass(frozen=True)
class ClaimCard:
    """A claim with its verdict."""

    verdict: ClaimVerdict
    picture: Picture | None
    """Null where nothing was measured, or what was is no number."""
    would_measure: str
    """What to run where it was not measured; else empty."""

    @property
    def expects(self) -> str:
        """The expectation, with its figure."""
        return expects(self.verdict.claim)


def expects(claim: Claim) -> str:
    """The expectation of a claim, with its figure."""
    figure = " / ".join(filter(None, (claim.metric, claim.per)))
    return f"{figure}: {claim.expect}" if figure else claim.expect


def by_section(judged: Sequence[ClaimVerdict]) -> dict[str, list[ClaimCard]]:
    """The cards of claims, by the section of the lesson or the grid that they are from."""
    cards: dict[str, list[ClaimCard]] = {}
    for verdict in judged:
        measured = verdict.word != "not measured here"
        lacking = verdict.lacking or would_measure(verdict.claim)
        card = ClaimCard(verdict, _picture(verdict), "" if measured else lacking)
        cards.setdefault(verdict.claim.section, []).append(card)
    return cards


def _picture(verdict: ClaimVerdict) -> Picture | None:
    expected = verdict.claim.expectation
    known = [x for x in (verdict.value, verdict.low, verdict.high) if x is not None and math.isfinite(x)]
    if not known or expected.quantity == "status":
        return None
    low, high = _region(verdict.claim, expected)
    ends = [(x, None, None) for x in (*known, low, high) if math.isfinite(x)]
    scale = scale_of(ends, ratio=expected.quantity == "ratio", effects=expected.quantity != "value")
    start = scale.at(low) if math.isfinite(low) else 0.0
    end = scale.at(high) if math.isfinite(high) else 100.0
    measured = None
    if verdict.low is not None and verdict.high is not None:
        first, last = scale.at(verdict.low), scale.at(verdict.high)
        measured = (first, round(last - first, 2))
    value = verdict.low if verdict.value is None and verdict.low == verdict.high else verdict.value
    at = None if value is None else scale.at(value)
    return Picture((start, round(end - start, 2)), measured, at, _ticks(verdict.claim, scale))


def _ticks(claim: Claim, scale: Scale) -> tuple[tuple[float, str], ...]:
    """Those of a figure in the unit that people read."""
    if claim.expectation.quantity != "value" or claim.per:
        return scale.ticks
    return tuple((scale.at(value), words.figure(claim.metric, value)) for value in scale.values)


def _region(claim: Claim, expected: Expectation) -> tuple[float, float]:
    """What is expected; that there is no effect is a negligible one."""
    if expected.same and claim.metric in FIGURES:
        return words.negligible_range(claim.metric)
    return expected.low, expected.high


def would_measure(claim: Claim) -> str:
    """What to put into a grid so that `harness run` measures what a claim is about."""
    if claim.is_about_inference:
        return "set save_adapter: true, then harness run and harness evaluate"
    if claim.compare:
        varied = ", ".join(f"{key}: {_levels(levels)}" for key, levels in claim.compare.items() if key != MODEL)
        held = f" with {_conditions(claim.where)}" if claim.where else ""
        return f"vary {{{varied}}}{held}, then harness run"
    if claim.metric in ("forgetting", "general_loss", "general_loss_before"):
        return "set measure_forgetting: true, then harness run"
    return f"a trial with {_conditions(claim.where) or 'its figure measured'}, then harness run"


def _levels(levels: Sequence[Any]) -> str:
    return f"[{', '.join(map(_level, levels))}]"


_RANKS = {"lowest": "a smaller one", "highest": "a larger one"}


def _level(level: Any) -> str:
    if isinstance(level, list | tuple):
        return " or ".join(map(_level, level))
    if level is None or isinstance(level, bool):
        return str(level).lower()
    return _RANKS.get(level, level) if isinstance(level, str) else str(level)


def _conditions(where: Mapping[str, Any]) -> str:
    shown = {key: show_bytes(level) if key == "memory_budget" else _level(level) for key, level in where.items()}
    return ", ".join(f"{key}: {level}" for key, level in shown.items())
