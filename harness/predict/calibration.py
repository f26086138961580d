"""Corrects predicted peaks by what was measured on a device.

Three corrections are compared by leave-one-out cross-validation: none, one factor for the whole peak, one factor per
component. The one with the smallest error is chosen; a simpler one where the next gains little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
from pydantic import BaseModel, ConfigDict

from harness._util.files import write_whole
from harness.environment import DeviceType, Environment
from harness.metrics import COMPONENTS
from harness.predict.prediction import Prediction
from harness.results.schema import spec_of
from harness.results.store import Store, grid_folders

MIN_ROWS = 5
"""Fewer rows do not support a correction."""
_RIDGE = 1e-3
"""Ridge penalty towards a factor of 1, which small components therefore keep."""
_MAX_ERROR_RATIO = 0.8
"""A richer correction is chosen if its error is below this fraction of the simpler one's,"""
_MIN_GAIN = 0.001
"""and smaller by this at least."""
Kind = Literal["none", "overall", "components"]
_KINDS: tuple[Kind, ...] = ("none", "overall", "components")


@dataclass(frozen=True)
class Pair:
    """One configuration's predicted breakdown and measured peak."""

    predicted: Mapping[str, int]
    """Bytes by component, `memory_<component>_bytes`."""
    measured: int
    """`peak_memory_bytes`."""


class Calibration(BaseModel):
    """A correction of predicted peaks, and its error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    environment: Environment
    """Environment of the measured rows."""
    rows: int
    """Number of configurations that it was fitted to."""
    kind: Kind
    """The chosen correction."""
    factors: dict[str, float]
    """By component; all equal for `overall`."""
    error_before: float
    """Median of |predicted ÷ measured − 1| without a correction."""
    error: float
    """The same with it, by leave-one-out cross-validation."""
    margin: float
    """Largest fraction by which a left-out row exceeded its corrected prediction; 0 where none did."""
    step_factor: float | None = None
    """Median of measured ÷ predicted step seconds: most products are smaller than those that rates are measured with.
    Null where no step time was predicted."""

    def peak(self, prediction: Prediction) -> int:
        """The corrected peak, in bytes."""
        return round(_corrected(prediction.breakdown, self.factors))

    def describe(self) -> str:
        """The correction, its rows and its error in one line."""
        known = {"none": "no correction", "overall": f"one factor, {self.factors[COMPONENTS[0]]:.4f}"}
        each = ", ".join(f"{name} {factor:.4f}" for name, factor in self.factors.items())
        return (
            f"{self.rows} configurations of {self.environment.device_name} (environment {self.environment.id}): "
            f"{known.get(self.kind, each)}; error {self.error_before:.2%} before and {self.error:.2%} after in the "
            f"median, on left-out rows; at most {self.margin:.2%} too low"
            + ("" if self.step_factor is None else f"; steps take {self.step_factor:.2f} times what the rates allow")
        )


def measured_rows(folder: Path) -> list[dict[str, Any]]:
    """Measured rows of a results folder, of one grid or of all, without repeats.

    Repeats are equal configurations: none of them would be left out by itself.
    """
    return [
        row
        for each in grid_folders(folder)
        for row in Store(each).read("trials").to_pylist()
        if row["status"] == "ok"
        and row["peak_memory_bytes"] is not None
        and not (row["twin"] or row["repeat"] or row["watched"])
    ]


def fit_rows(
    rows: Sequence[Mapping[str, Any]], predictions: Mapping[str, Prediction | None], environment: Environment
) -> Calibration:
    """Fit the correction for an environment.

    Args:
        rows: from `measured_rows`, of that environment.
        predictions: of the rows' specs, by `memory_key`; null where there is none.
        environment: of the rows.

    Raises:
        ValueError: too few rows.
    """
    measured = {spec_of(row).memory_key: row["peak_memory_bytes"] for row in rows}
    pairs = [Pair(p.breakdown, measured[key]) for key, p in predictions.items() if p is not None]
    timed = [(row["step_seconds_median"], row["predicted_step_seconds"]) for row in rows]
    return fit(pairs, environment, [measured / predicted for measured, predicted in timed if measured and predicted])


def fit(pairs: Sequence[Pair], environment: Environment, step_ratios: Sequence[float] = ()) -> Calibration:
    """Fit the correction for an environment.

    Args:
        pairs: `MIN_ROWS` configurations or more.
        environment: of the pairs.
        step_ratios: measured ÷ predicted step seconds, one per configuration.

    Raises:
        ValueError: too few rows.
    """
    if len(pairs) < MIN_ROWS:
        raise ValueError(f"{len(pairs)} configurations are too few to calibrate on; {MIN_ROWS} are needed")
    errors = {kind: _leave_one_out(pairs, kind) for kind in _KINDS}
    medians = {kind: float(numpy.median(numpy.abs(e))) for kind, e in errors.items()}
    chosen: Kind = "none"
    for kind in _KINDS[1:]:
        if medians[kind] < min(_MAX_ERROR_RATIO * medians[chosen], medians[chosen] - _MIN_GAIN):
            chosen = kind
    return Calibration(
        environment=environment,
        rows=len(pairs),
        kind=chosen,
        factors=_factors(pairs, chosen),
        error_before=medians["none"],
        error=medians[chosen],
        margin=float(max(0.0, errors[chosen].max())),
        step_factor=float(numpy.median(step_ratios)) if step_ratios else None,
    )


def _leave_one_out(pairs: Sequence[Pair], kind: Kind) -> numpy.ndarray:
    """Measured ÷ predicted − 1 of each row, with a correction fitted to all others."""
    errors = []
    for i, pair in enumerate(pairs):
        factors = _factors([*pairs[:i], *pairs[i + 1 :]], kind)
        errors.append(pair.measured / _corrected(pair.predicted, factors) - 1)
    return numpy.array(errors)


def _factors(pairs: Sequence[Pair], kind: Kind) -> dict[str, float]:
    if kind == "none":
        return dict.fromkeys(COMPONENTS, 1.0)
    ratios = numpy.array([pair.measured / sum(pair.predicted.values()) for pair in pairs])
    if kind == "overall":
        return dict.fromkeys(COMPONENTS, float(numpy.exp(numpy.median(numpy.log(ratios)))))
    # Ridge regression on relative errors: each row has the same weight, whatever its size.
    fractions = numpy.array(
        [[pair.predicted[f"memory_{name}_bytes"] / pair.measured for name in COMPONENTS] for pair in pairs]
    )
    system = numpy.vstack([fractions, numpy.sqrt(_RIDGE) * numpy.eye(len(COMPONENTS))])
    residuals = numpy.concatenate([1.0 - fractions.sum(axis=1), numpy.zeros(len(COMPONENTS))])
    deviations = numpy.linalg.lstsq(system, residuals, rcond=None)[0]
    return {name: float(1.0 + deviation) for name, deviation in zip(COMPONENTS, deviations, strict=True)}


def _corrected(breakdown: Mapping[str, int], factors: Mapping[str, float]) -> float:
    return sum(factors[name] * breakdown[f"memory_{name}_bytes"] for name in COMPONENTS)


def save(calibration: Calibration, results: Path) -> Path:
    """Write a calibration into a results folder, one file per environment.

    Raises:
        OSError: the folder cannot be written.
    """
    file = results / "calibration" / f"{calibration.environment.id}.json"
    write_whole(file, (calibration.model_dump_json(indent=1) + "\n").encode())
    return file


def load(results: Path, device_type: DeviceType, environment: Environment) -> Calibration | None:
    """The calibration for a device: the environment's own, else for CUDA the one with most rows.

    Cards differ little in what a step holds; for a CPU only its own applies.
    """
    calibrations = []
    for file in sorted((results / "calibration").glob("*.json")):
        try:
            calibrations.append(Calibration.model_validate_json(file.read_bytes()))
        except (OSError, ValueError):
            continue  # another file, or one of a later version
    calibrations = [c for c in calibrations if c.environment.device_type == device_type]
    own = next((c for c in calibrations if c.environment.id == environment.id), None)
    if own is not None or device_type == "cpu":
        return own
    return max(calibrations, key=lambda c: c.rows, default=None)
