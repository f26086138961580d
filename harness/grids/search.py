"""A search: its space, objectives, constraints and limits.

Independent of the optimiser: `walk` takes the function that chooses each value, so that proposing a spec and finding
a spec's place in the space share their code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from harness._util.messages import as_written, one_line
from harness.dialects.training_file import TrainingFile
from harness.grids.document import NO_TIMING, Timing
from harness.grids.levels import ACCUMULATION, hold_effective_batch, make_spec
from harness.grids.spellings import merge
from harness.metrics import FITS, METRICS
from harness.record import Status
from harness.spec.trial import TrialSpec

Sampler = Literal["tpe", "gp", "nsga2", "random", "brute-force"]
Scalar = bool | int | float | str | None
BEFORE = "measured before"
"""Level of a trial that was recorded before the search."""
_UNKNOWN = 1e-3
"""How far beyond a bound, or within it, a trial is of which only that is known."""
BUDGETS = ("train_samples", "max_steps")
"""Keys that set the length of a trial; the pruner shortens them."""


class Untrainable(ValueError):
    """Values that were chosen make no spec that can be trained."""


@dataclass(frozen=True)
class Parameter:
    """One dimension of the space: either choices or a range."""

    name: str
    choices: Mapping[Scalar, Mapping[str, Any]]
    """By choice, the spec keys that it sets; empty for a range."""
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    whole: bool = False
    """Whether the range is of whole numbers."""
    when: Mapping[str, tuple[Any, ...]] | None = None
    """Values of other keys with which it is active; null: always."""
    hold: bool = False
    """Derive the accumulation so that the effective batch stays the base's."""
    equal: tuple[str, ...] = ()
    """Labels of choices that others have too, of which the last alone is in `choices`."""

    @property
    def keys(self) -> set[str]:
        """The spec keys that it sets, whichever value is chosen."""
        return {key for changes in self.choices.values() for key in changes} or {self.name}

    def changes(self, value: Any) -> Mapping[str, Any]:
        """The spec keys that a value sets."""
        return self.choices[value] if self.choices else {self.name: value}

    def excludes(self, other: Parameter) -> bool:
        """Whether no trial has both: a key has other values with the one than with the other."""
        mine, theirs = self.when or {}, other.when or {}
        return any(not any(value in theirs[key] for value in mine[key]) for key in mine.keys() & theirs.keys())

    def can_set(self, key: str, value: Any) -> bool:
        """Whether one of its values gives a key this one."""
        if self.choices:
            return any(key in changes and changes[key] == value for changes in self.choices.values())
        return key == self.name and isinstance(value, int | float) and self.low <= value <= self.high

    def value_in(self, spec: TrialSpec) -> Any:
        """The value that this spec has.

        Raises:
            LookupError: it is not a value of this parameter.
        """
        if self.choices:
            for choice, changes in self.choices.items():
                if all(getattr(spec, key) == value for key, value in changes.items()):
                    return choice
            raise LookupError(self.name)
        value = getattr(spec, self.name)
        if value is None or not self.low <= value <= self.high:
            raise LookupError(self.name)
        if self.step is not None and not math.isclose(
            (value - self.low) / self.step, round((value - self.low) / self.step), abs_tol=1e-9
        ):
            raise LookupError(self.name)
        return value


@dataclass(frozen=True)
class Objective:
    """A metric to minimise or maximise."""

    metric: str
    direction: Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Constraint:
    """A bound on a metric."""

    metric: str
    sign: Literal["<=", ">="]
    bound: float

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {METRICS[self.metric].show(self.bound)}"

    def violation(self, value: float) -> float:
        """How far a value is beyond the bound, as a fraction of it; 0 or less: within."""
        beyond = value - self.bound if self.sign == "<=" else self.bound - value
        return beyond / abs(self.bound) if self.bound else beyond


@dataclass(frozen=True)
class Pruner:
    """Successive halving over trainings of increasing length, each with a schedule of that length."""

    factor: int = 3
    """One of this many trials goes on to the next rung, which is this many times as long."""
    rungs: int = 3
    """Number of lengths; the last is the full one."""


@dataclass(frozen=True)
class Score:
    """The result of one trial for the optimiser."""

    values: tuple[float | None, ...]
    """By objective; null where it was not measured."""
    violations: Mapping[str, float]
    """By constraint, `memory` first, the same for all trials of a search. Above 0 is a violation; 0: not measured."""

    @property
    def fits(self) -> bool:
        """Whether it had memory enough, which does not depend on the length of the training."""
        return self.violations["memory"] <= 0

    @property
    def feasible(self) -> bool:
        """Whether it violates no bound."""
        return all(v <= 0 for v in self.violations.values())


@dataclass(frozen=True)
class Search:
    """A validated `tune:` section and its base."""

    name: str
    title: str
    base: TrialSpec
    """The baseline configuration; it is tried first."""
    parameters: tuple[Parameter, ...]
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    """Without the one on memory, which is enforced as the base's `memory_budget`."""
    sampler: Sampler
    trials: int
    """Total number of trials, over all processes."""
    timeout: float | None
    """Seconds after which no further trial is started."""
    pruner: Pruner | None
    confirm: int
    """Repeats under fresh seeds in which the winner is compared with the others."""
    seed: int
    given: Mapping[str, Any]
    """`base` and `tune` as plain JSON values, from which `search_file.parse` makes an equal search."""
    timing: Timing = NO_TIMING
    """How much is timed: each trial of the search in one visit, those that confirm it in all of them."""
    training_file: TrainingFile | None = None
    """What the training file that its base comes from means; null: the base is harness's own."""

    # -------------------------------------------------------------------------------- walking

    def walk(self, choose: Callable[[Parameter], Any]) -> tuple[dict[str, Any], TrialSpec]:
        """Choose a value for each parameter that is active given those chosen before.

        Returns:
            The values by parameter, and the spec that they make.

        Raises:
            Untrainable: the keys make a spec that cannot be trained, or do not divide the effective batch that is held.
        """
        chosen: dict[str, Any] = {}
        values = self._base_values
        given: set[str] = set()
        held = False
        for parameter in self.parameters:
            if all(values.get(key) in allowed for key, allowed in (parameter.when or {}).items()):
                chosen[parameter.name] = choose(parameter)
                changes = parameter.changes(chosen[parameter.name])
                values = merge(values, changes)
                given |= changes.keys()
                held |= parameter.hold
        where = ", ".join(f"{k}={as_written(v)}" for k, v in chosen.items())
        if held and ACCUMULATION in given:
            raise Untrainable(f"{where}: hold: effective_batch_size derives the accumulation; drop one of them")
        try:
            if held:  # of the micro-batch and the processes that were chosen together
                values = hold_effective_batch(values, self.base, where)
            return chosen, make_spec(values, where)
        except ValueError as error:
            raise Untrainable(str(error)) from None

    @cached_property
    def _base_values(self) -> dict[str, Any]:
        return self.base.model_dump()

    def place(self, spec: TrialSpec) -> dict[str, Any] | None:
        """The values that make this spec; null where it is not in the space."""
        try:
            chosen, made = self.walk(lambda parameter: parameter.value_in(spec))
        except (LookupError, ValueError):
            return None
        return chosen if made.id == spec.id else None

    @property
    def reading(self) -> tuple[TrialSpec, ...]:
        """The base, and it with each choice of other data or another model: all that the trials read."""
        choices = [changes for parameter in self.parameters for changes in parameter.choices.values()]
        others = [changes for changes in choices if changes.keys() & {"base_model", "datasets"}]
        return (self.base, *(self.base.model_copy(update=changes) for changes in others))

    @property
    def processes(self) -> set[int]:
        """All numbers of processes that a trial may have."""
        numbers = {self.base.num_processes}
        for parameter in self.parameters:
            numbers |= {changes.get("num_processes", self.base.num_processes) for changes in parameter.choices.values()}
            if parameter.name == "num_processes" and not parameter.choices:
                numbers |= {*range(int(parameter.low), int(parameter.high) + 1)}
        return numbers

    def label(self, number: int, chosen: Mapping[str, Any]) -> str:
        """The label of a trial of the search."""
        shown = (f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={as_written(v)}" for k, v in chosen.items())
        return one_line(f"#{number} {', '.join(shown)}")

    # -------------------------------------------------------------------------------- rungs

    @property
    def rungs(self) -> tuple[int, ...]:
        """Relative lengths of the rungs: 1, 3, 9; without a pruner 1."""
        return tuple(self.pruner.factor**k for k in range(self.pruner.rungs)) if self.pruner else (1,)

    def at_rung(self, spec: TrialSpec, rung: int) -> TrialSpec:
        """The spec with the length of a rung; at the last rung the spec itself."""
        if rung == self.rungs[-1]:
            return spec
        key = budget_key(spec)
        whole = getattr(spec, key)
        return spec.model_copy(update={key: max(1, round(whole * rung / self.rungs[-1]))})

    # -------------------------------------------------------------------------------- judging

    @property
    def memory(self) -> int | None:
        """Memory budget of a trial in bytes; null: what the device has."""
        return self.base.memory_budget

    def score(self, status: Status, figures: Mapping[str, float | None]) -> Score | None:
        """The score of a trial that has ended; null where it has none (it failed, or a figure is missing).

        Out of memory violates the bound on memory by the bytes reached and requested; a trial that was skipped for its
        prediction violates it by the predicted bytes.
        """
        if status == "ok":
            need = max((figures.get(name) or 0.0) for name in FITS)
            violations = {"memory": -_UNKNOWN if self.memory is None else need / self.memory - 1.0}
            values = [figures.get(objective.metric) for objective in self.objectives]
            bounded = {str(c): figures.get(c.metric) for c in self.constraints}
            if any(v is None for v in (*values, *bounded.values())):
                return None
            bounds = {str(c): c for c in self.constraints}
            violations |= {name: bounds[name].violation(v) for name, v in bounded.items() if v is not None}
            return Score(tuple(values), violations)
        if status in ("oom", "skipped"):
            held = ("oom_reached_bytes", "oom_requested_bytes") if status == "oom" else ("predicted_peak_memory_bytes",)
            wanted = sum(figures.get(name) or 0.0 for name in held)
            beyond = wanted / self.memory - 1.0 if self.memory else 0.0
            if status == "skipped" and beyond <= 0:  # it was skipped for a smaller budget than this one
                return None
            known = {"peak_memory_bytes": wanted or None}
            # A fragmented card runs out of memory below its size: a violation too.
            violations = {"memory": max(beyond, _UNKNOWN)} | {str(c): 0.0 for c in self.constraints}
            return Score(tuple(known.get(o.metric) for o in self.objectives), violations)
        return None

    def better(self, a: float, b: float, objective: int = 0) -> bool:
        """Whether `a` is a better value of an objective than `b`."""
        return a < b if self.objectives[objective].direction == "minimize" else a > b


def budget_key(spec: TrialSpec) -> str:
    """The key of `BUDGETS` that a spec gives; empty where it gives none."""
    return next((key for key in BUDGETS if getattr(spec, key) is not None), "")
