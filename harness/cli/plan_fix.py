"""`harness plan --fix`: what makes the trials of a plan fit, and the best of it as a training file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness._util.terminal import plain
from harness.cli.console import out
from harness.cli.predictions import predict_all

if TYPE_CHECKING:  # imported where they are used: --help must answer at once
    from harness.environment import Environment
    from harness.predict.cards import Capability
    from harness.predict.fixes import Proposal
    from harness.predict.prediction import Prediction, SpecPrediction, Verdict
    from harness.predict.predictor import Predictor
    from harness.report.predictions import Line, Plan
    from harness.spec.trial import TrialSpec


@dataclass(frozen=True)
class Proposals:
    """What was proposed for one trial."""

    line: Line
    capacity_name: str
    capacity: int
    """Bytes that the trial may take."""
    now_seconds: float
    """Per token, as the trial is."""
    proposals: Sequence[Proposal]
    unpredicted: Mapping[str, str]
    """Changes that could not be predicted, with why."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Records, cheapest first."""
        from harness.report import fixes

        return fixes.rows(self.line.label, self.capacity_name, self.now_seconds, self.proposals)


def propose(
    plan: Plan, predictor: Predictor, capability: Capability, results: Path, here: Environment
) -> Iterator[Proposals]:
    """Proposals for each trial that does not surely fit.

    Args:
        plan: for one capacity.
        predictor: for its device.
        capability: compute capability of a CUDA device.
        results: folder with measured speeds of this environment.
        here: this environment.
    """
    from harness.predict import fixes

    (name,) = plan.capacities
    own = plan.rates is not None and plan.rates_from.startswith("this device")
    measured = _measured_seconds(results, here) if own else {}

    def predict(specs: Sequence[TrialSpec]) -> Mapping[str, SpecPrediction]:
        return {each.spec.id: each for each in predict_all(predictor, list(specs), capability)}

    def verdict(spec: TrialSpec, prediction: Prediction) -> Verdict:
        return plan.verdict_of(spec, prediction, name)

    for line in plan.lines:
        now = line.on(name)
        if now is None or plan.verdict(line, name) == "fits":
            continue
        # A measured time is compared with measured ones: the others are predicted, times this trial's own error.
        error = measured[line.spec.id] / plan.seconds_per_token(now) if line.spec.id in measured else None

        def seconds_per_token(spec: TrialSpec, prediction: Prediction, error: float | None = error) -> float:
            if error is None:
                return plan.seconds_per_token(prediction)
            return measured.get(spec.id, error * plan.seconds_per_token(prediction))

        capacity = plan.capacity_of(line.spec, name)
        attention = predictor.attention_layers(line.spec)
        proposals, unpredicted = fixes.proposals(
            line.spec, now, predict, verdict, seconds_per_token, capacity, attention
        )
        yield Proposals(line, name, capacity, seconds_per_token(line.spec, now), proposals, unpredicted)


def _measured_seconds(results: Path, here: Environment) -> dict[str, float]:
    """Measured seconds per padded token in this environment, by spec id."""
    from harness.results.store import Store, grid_folders

    rows = [row for folder in grid_folders(results) for row in Store(folder).read("trials").to_pylist()]
    return {
        row["spec_id"]: 1 / row["padded_tokens_per_second"]
        for row in rows
        if row["environment_id"] == here.id and row["status"] == "ok" and row["padded_tokens_per_second"]
    }


def file_name(label: str, others: Collection[str] = ()) -> str:
    """The name of a file for a trial, unlike those of others."""
    name = re.sub(r"[^\w.=+-]+", "-", label).strip("-.") or "trial"
    numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(each for each in (f"{one}.fixed.yml" for one in numbered) if each not in others)


def show(proposals: Proposals, output: Path | None, written: Sequence[Path] = ()) -> list[Path]:
    """Print what was proposed; the first one that fits is written, or printed where there is no folder.

    Args:
        proposals: for one trial.
        output: folder of the file.
        written: files of other trials, which stay.
    """
    from harness._util.files import write_whole
    from harness._util.units import show_bytes
    from harness.grids.yaml_file import spec_to_yaml
    from harness.report import fixes

    label, made = proposals.line.label, proposals.proposals
    if made:
        out.print(fixes.terminal(label, proposals.capacity_name, proposals.capacity, proposals.now_seconds, made))
    else:
        out.print(f"{plain(label)}: there is nothing to change", highlight=False)
    if proposals.unpredicted:
        out.print(_note_of(proposals.unpredicted), style="dim", highlight=False)
    if not made:
        return []
    best = made[0]
    if best.verdict != "fits":
        least = min(made, key=lambda each: each.prediction.needed_bytes)
        out.print(
            f"nothing here makes it fit; the least is {show_bytes(least.prediction.needed_bytes)}, with "
            f"{plain(least.text)}{_where(least.prediction)}",
            style="yellow",
            highlight=False,
        )
        return []
    if output is None:
        out.print(f"{plain(label)} fits with {plain(best.text)}; -o DIR writes it as a training file", highlight=False)
        return []
    file = output / file_name(label, [each.name for each in written])
    write_whole(file, spec_to_yaml(best.spec, full_paths=True).encode())
    return [file]


def _note_of(unpredicted: Mapping[str, str]) -> str:
    """One line about the changes that could not be predicted."""
    reason = next(iter(unpredicted.values())).rstrip(".")
    return plain(f"not predicted: {'; '.join(unpredicted)} ({'the first: ' * (len(unpredicted) > 1)}{reason})")


def _where(prediction: Prediction) -> str:
    """Where the peak is, if it is not in training, which most changes are for."""
    if prediction.highest_bytes == prediction.peak_memory_bytes:
        return ""
    loads = prediction.highest_bytes == prediction.peak_load_bytes
    what = "the model is loaded" if loads else "held-out examples are evaluated"
    return f"; its peak is where {what}, not in training"
