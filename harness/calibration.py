"""How far predictions are from what was measured on a device, and a correction that is tested on rows left out.

Three corrections are tried: none, one factor for the whole peak, one factor for each component. The one with the
least error over rows that had no part in its fitting is kept; a simpler one is kept where the richer one gains little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
from pydantic import BaseModel, ConfigDict

from harness.environment import Environment
from harness.files import write_whole
from harness.metrics import COMPONENTS
from harness.prediction import DeviceType, Prediction
from harness.results import Store, spec_of

LEAST_ROWS = 5
"""Fewer than these say nothing of rows to come."""

_RIDGE = 1e-3
"""Pull of a component's factor towards 1: components that are a small part of every peak keep it."""
_WORTH = 0.8
"""A richer correction has to bring the error below this share of the simpler one's."""

_LEAST_GAIN = 0.001
"""And by at least so much."""

Kind = Literal["none", "overall", "components"]
_KINDS: tuple[Kind, ...] = ("none", "overall", "components")


@dataclass(frozen=True)
class Pair:
    """One configuration, predicted and measured."""

    predicted: Mapping[str, int]
    """Bytes at the peak by component, `memory_<component>_bytes`."""
    measured: int
    """`peak_memory_bytes`."""


class Calibration(BaseModel):
    """A correction of predicted peaks, and what it rests on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    environment: Environment
    """Where the rows were measured."""
    rows: int
    """Configurations behind it."""
    kind: Kind
    """Which correction was kept."""
    factors: dict[str, float]
    """By component; all equal for an overall factor."""
    error_before: float
    """Median of |predicted ÷ measured − 1| without a correction."""
    error: float
    """The same with it, each row predicted from all the others."""
    margin: float
    """Largest share by which such a row needed more than was predicted; 0 where none did."""
    step_factor: float | None = None
    """Median of measured ÷ predicted seconds of a step: few products are as large as those that rates are measured
    with. Null where no step was predicted."""

    def peak(self, prediction: Prediction) -> int:
        """The corrected peak, in bytes."""
        return round(_corrected(prediction.shares, self.factors))

    def said(self) -> str:
        """What it is and rests on, in a line."""
        what = {"none": "no correction", "overall": f"one factor, {self.factors[COMPONENTS[0]]:.4f}"}
        each = ", ".join(f"{name} {factor:.4f}" for name, factor in self.factors.items())
        return (
            f"{self.rows} configurations of {self.environment.device_name} (environment {self.environment.id}): "
            f"{what.get(self.kind, each)}; error {self.error_before:.2%} before and {self.error:.2%} after in the "
            f"median, on rows left out; at most {self.margin:.2%} too low"
            + ("" if self.step_factor is None else f"; steps take {self.step_factor:.2f} times what the rates allow")
        )


def measured_rows(folder: Path) -> list[dict[str, Any]]:
    """What was measured in a results folder, of one grid or of all: each configuration once.

    Repeats are the same configuration again: their rows would vouch for one another.
    """
    folders = [folder] if (folder / "trials").is_dir() else sorted(p.parent for p in folder.glob("*/trials"))
    return [
        row
        for each in folders
        for row in Store(each).read("trials").to_pylist()
        if row["status"] == "ok" and row["peak_memory_bytes"] is not None and not row["twin"] and not row["repeat"]
    ]


def fit_rows(
    rows: Sequence[Mapping[str, Any]], predictions: Mapping[str, Prediction | None], where: Environment
) -> Calibration:
    """The correction for a device from rows of it.

    Args:
        rows: as `measured_rows` gives them, of one environment.
        predictions: of their specs, by `memory_key`; null where there is none.
        where: that environment.

    Raises:
        ValueError: too few rows.
    """
    measured = {spec_of(row).memory_key: row["peak_memory_bytes"] for row in rows}
    pairs = [Pair(p.shares, measured[key]) for key, p in predictions.items() if p is not None]
    timed = [(row["step_seconds_median"], row["predicted_step_seconds"]) for row in rows]
    return fit(pairs, where, [took / expected for took, expected in timed if took and expected])


def fit(pairs: Sequence[Pair], where: Environment, steps: Sequence[float] = ()) -> Calibration:
    """The correction for a device from what was measured on it.

    Args:
        pairs: at least `LEAST_ROWS` configurations.
        where: their environment.
        steps: measured ÷ predicted seconds of a step, one a configuration.

    Raises:
        ValueError: too few rows.
    """
    if len(pairs) < LEAST_ROWS:
        raise ValueError(f"{len(pairs)} configurations are too few to calibrate on; {LEAST_ROWS} are needed")
    errors = {kind: _left_out(pairs, kind) for kind in _KINDS}
    medians = {kind: float(numpy.median(numpy.abs(e))) for kind, e in errors.items()}
    kept: Kind = "none"
    for kind in _KINDS[1:]:
        if medians[kind] < min(_WORTH * medians[kept], medians[kept] - _LEAST_GAIN):
            kept = kind
    return Calibration(
        environment=where,
        rows=len(pairs),
        kind=kept,
        factors=_factors(pairs, kept),
        error_before=medians["none"],
        error=medians[kept],
        margin=float(max(0.0, errors[kept].max())),
        step_factor=float(numpy.median(steps)) if len(steps) else None,
    )


def _left_out(pairs: Sequence[Pair], kind: Kind) -> numpy.ndarray:
    """Measured ÷ predicted − 1 of each row, by a correction fitted to all the others."""
    found = []
    for i, pair in enumerate(pairs):
        factors = _factors([*pairs[:i], *pairs[i + 1 :]], kind)
        found.append(pair.measured / _corrected(pair.predicted, factors) - 1)
    return numpy.array(found)


def _factors(pairs: Sequence[Pair], kind: Kind) -> dict[str, float]:
    if kind == "none":
        return dict.fromkeys(COMPONENTS, 1.0)
    ratios = numpy.array([pair.measured / sum(pair.predicted.values()) for pair in pairs])
    if kind == "overall":
        return dict.fromkeys(COMPONENTS, float(numpy.exp(numpy.median(numpy.log(ratios)))))
    # Least squares of relative errors: each row counts alike, whatever its size.
    shares = numpy.array(
        [[pair.predicted[f"memory_{name}_bytes"] / pair.measured for name in COMPONENTS] for pair in pairs]
    )
    system = numpy.vstack([shares, numpy.sqrt(_RIDGE) * numpy.eye(len(COMPONENTS))])
    wanted = numpy.concatenate([1.0 - shares.sum(axis=1), numpy.zeros(len(COMPONENTS))])
    beyond = numpy.linalg.lstsq(system, wanted, rcond=None)[0]
    return {name: float(1.0 + b) for name, b in zip(COMPONENTS, beyond, strict=True)}


def _corrected(shares: Mapping[str, int], factors: Mapping[str, float]) -> float:
    return sum(factors[name] * shares[f"memory_{name}_bytes"] for name in COMPONENTS)


# ------------------------------------------------------------------------------------ kept beside the results


def keep(calibration: Calibration, results: Path) -> Path:
    """Write it beside the results it rests on, one file for each environment.

    Raises:
        OSError: the folder cannot be written.
    """
    file = results / "calibration" / f"{calibration.environment.id}.json"
    write_whole(file, (calibration.model_dump_json(indent=1) + "\n").encode())
    return file


def kept(results: Path, device_type: DeviceType, here: Environment) -> Calibration | None:
    """The calibration for a target: this environment's, else for CUDA the one that rests on most rows.

    Cards differ little in what a step holds. Of a CPU there is none but this one.
    """
    found = []
    for file in sorted((results / "calibration").glob("*.json")):
        try:
            found.append(Calibration.model_validate_json(file.read_bytes()))
        except (OSError, ValueError):
            continue  # not ours, or of a version to come
    found = [c for c in found if c.environment.device_type == device_type]
    mine = [c for c in found if c.environment.id == here.id]
    if mine or device_type == "cpu":
        return mine[0] if mine else None
    return max(found, key=lambda c: c.rows, default=None)
