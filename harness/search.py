"""What is tuned: a space of specs, what is wanted of them, and how long to look.

The `tune:` section of a grid file. No optimiser is known here: `walk` goes through the space with whoever chooses,
so that proposing a spec and finding a spec's place in the space are one piece of code.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from harness import model_source
from harness.errors import InputError
from harness.grid import SPEC_KEYS, Level, base_of, header, levels_of, make_spec, read_yaml
from harness.metrics import FITS, METRICS
from harness.results import Status
from harness.spec import FLOAT_KEYS, TrialSpec, merge, parse_bytes
from harness.wording import as_written, kind_of, one_line, unknown

Sampler = Literal["tpe", "gp", "nsga2", "random", "brute-force"]
Scalar = bool | int | float | str | None

BEFORE = "measured before"
"""Level of a trial that the search did not run but started from."""

KEYS = ("space", "objectives", "constraints", "sampler", "trials", "timeout", "pruner", "confirm", "seed")
_RANGE_KEYS = ("low", "high", "log", "step", "when")
_BUDGETS = ("train_samples", "max_steps")
"""Keys by which a trial is made shorter for an early look."""
_MOST_COMBINATIONS = 5_000
_MOST_TRIALS = 100_000

_CONSTRAINT = re.compile(r"\s*(?P<metric>\w+)\s*(?P<sign><=|>=)\s*(?P<bound>.+?)\s*")


# ------------------------------------------------------------------------------------ the space


@dataclass(frozen=True)
class Parameter:
    """One dimension: either choices or a range."""

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
    """Values of other keys with which this one has a meaning; null: always."""

    def changes(self, value: Any) -> Mapping[str, Any]:
        """The spec keys that a value sets."""
        return self.choices[value] if self.choices else {self.name: value}

    def value_in(self, spec: TrialSpec) -> Any:
        """The value with which this spec was made.

        Raises:
            LookupError: none of this parameter's.
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
    """A figure that is to be as low or as high as can be."""

    metric: str
    direction: Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Constraint:
    """A bound that a figure has to keep."""

    metric: str
    sign: Literal["<=", ">="]
    bound: float

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {METRICS[self.metric].show(self.bound)}"

    def violation(self, value: float) -> float:
        """How far a value is beyond the bound, as a share of it; 0 or less keeps it."""
        beyond = value - self.bound if self.sign == "<=" else self.bound - value
        return beyond / abs(self.bound) if self.bound else beyond


@dataclass(frozen=True)
class Pruner:
    """Successive halving over shorter trainings, each with a schedule of its own length."""

    factor: int = 3
    """Of so many trials one goes on to the next rung, which is so many times as long."""
    rungs: int = 3
    """Lengths that are looked at, the whole one last."""


@dataclass(frozen=True)
class Score:
    """What one trial says to whoever searches."""

    values: tuple[float | None, ...]
    """By objective; null where the trial did not get so far."""
    violations: Mapping[str, float]
    """By constraint; above 0 is a violation."""

    @property
    def feasible(self) -> bool:
        """Whether it is within every bound."""
        return all(v <= 0 for v in self.violations.values())


@dataclass(frozen=True)
class Search:
    """A validated `tune:` section and its base."""

    name: str
    title: str
    base: TrialSpec
    """The configuration that one would take without a search; it is tried first."""
    parameters: tuple[Parameter, ...]
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    """Without the one on memory, which is the base's `memory_budget` and enforced."""
    sampler: Sampler
    trials: int
    """Trials in all, whatever number of processes share them."""
    timeout: float | None
    """Seconds after which no further trial begins."""
    pruner: Pruner | None
    confirm: int
    """Repeats, under seeds of their own, in which the winner meets the others."""
    seed: int
    given: Mapping[str, Any]
    """`base` and `tune` as plain JSON values: `parse` makes the same search of them."""

    # -------------------------------------------------------------------------------- walking

    def walk(self, choose: Callable[[Parameter], Any]) -> tuple[dict[str, Any], TrialSpec]:
        """Choose a value for each parameter that has a meaning beside those chosen before.

        Returns:
            The values by parameter, and the spec that they make.

        Raises:
            ValueError: the keys make a spec that cannot be trained.
        """
        chosen: dict[str, Any] = {}
        values = self._base_values
        for parameter in self.parameters:
            if all(values.get(key) in allowed for key, allowed in (parameter.when or {}).items()):
                chosen[parameter.name] = choose(parameter)
                values = merge(values, parameter.changes(chosen[parameter.name]))
        return chosen, make_spec(values, ", ".join(f"{k}={as_written(v)}" for k, v in chosen.items()))

    @cached_property
    def _base_values(self) -> dict[str, Any]:
        return self.base.model_dump()

    def place(self, spec: TrialSpec) -> dict[str, Any] | None:
        """The values with which the space makes this spec; null where it does not."""
        try:
            chosen, made = self.walk(lambda parameter: parameter.value_in(spec))
        except (LookupError, ValueError):
            return None
        return chosen if made.id == spec.id else None

    @property
    def processes(self) -> set[int]:
        """Each number of processes that a trial may have."""
        asked = {self.base.num_processes}
        for parameter in self.parameters:
            asked |= {changes.get("num_processes", self.base.num_processes) for changes in parameter.choices.values()}
            if parameter.name == "num_processes" and not parameter.choices:
                asked |= {*range(int(parameter.low), int(parameter.high) + 1)}
        return asked

    def label(self, number: int, chosen: Mapping[str, Any]) -> str:
        """What a trial of the search is called."""
        shown = (f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={as_written(v)}" for k, v in chosen.items())
        return one_line(f"#{number} {', '.join(shown)}")

    # -------------------------------------------------------------------------------- rungs

    @property
    def rungs(self) -> tuple[int, ...]:
        """Lengths of a trial as its pruner sees them: 1, 3, 9; a single 1 without one."""
        return tuple(self.pruner.factor**k for k in range(self.pruner.rungs)) if self.pruner else (1,)

    def at_rung(self, spec: TrialSpec, rung: int) -> TrialSpec:
        """The spec trained for a part of its length; the last rung is the spec itself."""
        if rung == self.rungs[-1]:
            return spec
        key = _budget_key(spec)
        whole = getattr(spec, key)
        return spec.model_copy(update={key: max(1, round(whole * rung / self.rungs[-1]))})

    # -------------------------------------------------------------------------------- judging

    @property
    def memory(self) -> int | None:
        """Bytes that a trial may take; null: what the device has."""
        return self.base.memory_budget

    def score(self, status: Status, figures: Mapping[str, float | None]) -> Score | None:
        """What a trial's end means here; null where it means nothing (it failed, or a figure is missing).

        Out of memory is an answer: the bytes that it held and asked are beyond the bound. So is a trial that was not
        started because its prediction is.
        """
        if status == "ok":
            need = max((figures.get(name) or 0.0) for name in FITS)
            violations = {} if self.memory is None else {"memory": need / self.memory - 1.0}
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
            # A fragmented card runs out below its size: that is a violation all the same.
            return Score(tuple(known.get(o.metric) for o in self.objectives), {"memory": max(beyond, 1e-3)})
        return None

    def better(self, a: float, b: float, objective: int = 0) -> bool:
        """Whether one value of an objective beats another."""
        return a < b if self.objectives[objective].direction == "minimize" else a > b


def _budget_key(spec: TrialSpec) -> str:
    return next((key for key in _BUDGETS if getattr(spec, key) is not None), "")


# ------------------------------------------------------------------------------------ reading


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Search:
    """Read the `tune:` section of a grid file.

    Args:
        path: the YAML file.
        overrides: spec keys that apply to every trial (`memory_budget`, `device`).

    Raises:
        InputError: with one line that says what is wrong and what would do.
    """
    document = read_yaml(path)
    try:
        name, title = header(document, path)
        if not isinstance(document.get("tune"), dict):
            given = kind_of(document["tune"]) if "tune" in document else "missing"
            raise ValueError(f"tune is {given}; it must be a mapping with at least space, as in grids/tune.yml")
        base, changed = base_of(document, path), dict(overrides or {})
        bounded = any(c.metric == "peak_memory_bytes" for c in _constraints(document["tune"].get("constraints", [])))
        if bounded and base.get("memory_budget") is not None and "memory_budget" not in changed:
            raise ValueError("base has a memory_budget and tune a bound on peak_memory_bytes; keep one of them")
        return parse(name, title, base | changed, document["tune"])
    except ValueError as error:
        raise InputError(one_line(f"{path.name}: {error}")) from None


def parse(name: str, title: str, base: Mapping[str, Any], given: Mapping[str, Any]) -> Search:
    """A search from the values of its base and its `tune:` section.

    Raises:
        ValueError: with one line that says what is wrong and what would do.
    """
    for key in given:
        if key not in KEYS:
            raise ValueError(f"tune: {unknown('key', key, KEYS)}")
    objectives = _objectives(given.get("objectives", ["eval_loss"]))
    constraints = _constraints(given.get("constraints", []))
    limits = [c for c in constraints if c.metric == "peak_memory_bytes"]
    values = dict(base)
    if limits:
        # `--memory` has put its own there already; a bound on the peak is enforced, not looked at afterwards.
        values.setdefault("memory_budget", min(int(c.bound) for c in limits))
    spec = make_spec(values, "base")
    sampler = given.get("sampler", "tpe")
    if sampler not in get_args(Sampler):
        raise ValueError(f"tune: {unknown('sampler', sampler, get_args(Sampler))}")
    pruner = _pruner(given.get("pruner"), spec, objectives)
    found = Search(
        name=name,
        title=title,
        base=spec,
        parameters=_parameters(given.get("space"), spec),
        objectives=objectives,
        constraints=tuple(c for c in constraints if c not in limits),
        sampler=sampler,
        trials=_whole(given, "trials", 40, most=_MOST_TRIALS),
        timeout=_seconds(given.get("timeout")),
        pruner=pruner,
        confirm=_whole(given, "confirm", 3, least=0, most=100),
        seed=_whole(given, "seed", 0, least=0, most=2**31 - 1),
        given={"base": spec.model_dump(mode="json"), "tune": dict(given)},
    )
    _refuse_losses_of_random_weights(found)
    _refuse_impossible(found)
    return found


def _parameters(given: Any, base: TrialSpec) -> tuple[Parameter, ...]:
    if not isinstance(given, dict) or not given:
        said = "missing" if given is None else kind_of(given)
        raise ValueError(
            f"tune: space is {said}; it must be a mapping like lora_r: [8, 16] or lora_r: {{low: 4, high: 64}}"
        )
    found: list[Parameter] = []
    for name, values in given.items():
        if not isinstance(name, str):
            raise ValueError(f"space: {kind_of(name)} is no name of a parameter")
        parameter = _parameter(name, values, base)
        owners = {key: p.name for p in found for changes in (p.choices.values() or [{p.name: 0}]) for key in changes}
        mine = {key for changes in (parameter.choices.values() or [{name: 0}]) for key in changes}
        twice = sorted(mine & owners.keys())
        if twice and parameter.when is None:
            raise ValueError(f"space: {name} and {owners[twice[0]]} both set {twice[0]}; keep one, or say when:")
        found.append(parameter)
    return tuple(found)


def _parameter(name: str, given: Any, base: TrialSpec) -> Parameter:
    where = f"space: {name}"
    if isinstance(given, dict) and given.keys() & {"low", "high"}:
        return _range(name, given, base)
    when = None
    if isinstance(given, dict) and "levels" in given:
        when = _when(given.get("when"), where)
        given = {key: value for key, value in given.items() if key != "when"}
    levels = [(level, _level_changes(level, base)) for level in levels_of(name, given, "space")]
    # What one choice sets and another does not is the base's there: so each spec tells which choice made it.
    keys = dict.fromkeys(key for _, changes in levels for key in changes)
    choices: dict[Scalar, dict[str, Any]] = {}
    for level, changes in levels:
        spec = make_spec(merge(base.model_dump(), changes), f"space: {level.label}", keys_alone=True)
        value = changes.get(name)
        # What storage and dashboards can hold as it is stays; a list of layers goes by its text.
        choice = value if name in changes and isinstance(value, bool | int | float | str | None) else level.text
        choices[choice] = {key: getattr(spec, key) for key in keys}
    return Parameter(name, choices, when=when)


def _level_changes(level: Level, base: TrialSpec) -> dict[str, Any]:
    if not level.hold:
        return level.changes
    micro = level.changes["micro_batch_size"]
    if not isinstance(micro, int) or micro < 1 or base.effective_batch_size % micro:
        raise ValueError(
            f"space: {level.label} does not divide the effective batch of {base.effective_batch_size} that is held"
        )
    return level.changes | {"gradient_accumulation_steps": base.effective_batch_size // micro}


def _range(name: str, given: Mapping[str, Any], base: TrialSpec) -> Parameter:
    where = f"space: {name}"
    for key in given:
        if key not in _RANGE_KEYS:
            raise ValueError(f"{where}: {unknown('key', key, _RANGE_KEYS)}")
    if name not in TrialSpec.model_fields:
        raise ValueError(f"space: {unknown('parameter', name, SPEC_KEYS)}")
    bounds = {key: _number(given.get(key), f"{where}: {key}") for key in ("low", "high")}
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"{where}: log is {kind_of(log)}; it must be true or false")
    step = None if given.get("step") is None else _number(given["step"], f"{where}: step")
    whole = name not in FLOAT_KEYS
    for key, value in bounds.items():
        spec = make_spec(
            merge(base.model_dump(), {name: int(value) if whole and value == int(value) else value}),
            f"{where}: {key}",
            keys_alone=True,
        )
        if isinstance(getattr(spec, name), bool | str | None):
            raise ValueError(f"{where} is no number; give a list of levels")
    if not bounds["low"] < bounds["high"]:
        raise ValueError(f"{where}: low {bounds['low']:g} is not below high {bounds['high']:g}")
    if log and (bounds["low"] <= 0 or step is not None):
        raise ValueError(f"{where}: log goes with a low above 0 and without step")
    if step is not None and (step <= 0 or (whole and step != int(step))):
        raise ValueError(f"{where}: step is {step:g}; it must be {'a whole number' if whole else 'a number'} above 0")
    as_type: Callable[[float], float] = int if whole else float
    return Parameter(
        name,
        {},
        as_type(bounds["low"]),
        as_type(bounds["high"]),
        log,
        None if step is None else as_type(step),
        whole,
        _when(given.get("when"), where),
    )


def _number(value: Any, where: str) -> float:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 1e-4 as text
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} is {'missing' if value is None else kind_of(value)}; it must be a number")
    return float(value)


def _when(given: Any, where: str) -> dict[str, tuple[Any, ...]] | None:
    if given is None:
        return None
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{where}: when is {kind_of(given)}; it must be a mapping like {{adapter: lora}}")
    for key in given:
        if key not in TrialSpec.model_fields:
            raise ValueError(f"{where}: when: {unknown('key', key, tuple(TrialSpec.model_fields))}")
    allowed = {key: tuple(value) if isinstance(value, list) else (value,) for key, value in given.items()}
    for key, values in allowed.items():
        for value in values:
            make_spec({"base_model": "any", key: value}, f"{where}: when", keys_alone=True)
    return allowed


def _objectives(given: Any) -> tuple[Objective, ...]:
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list | dict) or not 1 <= len(given) <= 3:
        raise ValueError(f"tune: objectives is {kind_of(given)}; name one to three figures, like [eval_loss]")
    found = []
    for name in given:
        metric = METRICS.get(name) if isinstance(name, str) else None
        if metric is None or metric.better is None:
            there = tuple(m.name for m in METRICS.values() if m.better is not None)
            raise ValueError(f"objectives: {unknown('figure', name, there)}")
        direction = given[name] if isinstance(given, dict) else None
        if direction is None:
            direction = "minimize" if metric.better == "lower" else "maximize"
        if direction not in ("minimize", "maximize"):
            raise ValueError(f"objectives: {name}: {unknown('direction', direction, ('minimize', 'maximize'))}")
        found.append(Objective(name, direction))  # type: ignore[arg-type]  # one of the two
    if len({o.metric for o in found}) < len(found):
        raise ValueError("tune: an objective is named twice")
    return tuple(found)


def _constraints(given: Any) -> tuple[Constraint, ...]:
    if not isinstance(given, list):
        raise ValueError(
            f"tune: constraints is {kind_of(given)}; it must be a list like ['peak_memory_bytes <= 12GiB']"
        )
    found = []
    for text in given:
        match = _CONSTRAINT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"constraints: {kind_of(text)} is none; write it like 'peak_memory_bytes <= 12GiB'")
        metric = METRICS.get(match["metric"])
        if metric is None:
            raise ValueError(f"constraints: {unknown('figure', match['metric'], tuple(METRICS))}")
        if metric.name == "peak_memory_bytes" and match["sign"] == ">=":
            raise ValueError(
                "constraints: peak_memory_bytes has an upper bound; write it like 'peak_memory_bytes <= 12GiB'"
            )
        try:
            bound = float(parse_bytes(match["bound"])) if metric.unit == "B" else float(match["bound"])
        except ValueError:
            like = "12GiB" if metric.unit == "B" else "3.5"
            raise ValueError(f"constraints: {text!r}: {match['bound']!r} is no bound; write it like {like}") from None
        if not math.isfinite(bound):
            raise ValueError(f"constraints: {text!r}: a bound is a finite number")
        found.append(Constraint(metric.name, "<=" if match["sign"] == "<=" else ">=", bound))
    return tuple(found)


def _pruner(given: Any, base: TrialSpec, objectives: Sequence[Objective]) -> Pruner | None:
    if given in (None, "none"):
        return None
    if given == "halving":
        given = {}
    if (
        not isinstance(given, dict)
        or given.keys() - {"factor", "rungs", "kind"}
        or given.get("kind", "halving") != "halving"
    ):
        raise ValueError(f"tune: pruner is {kind_of(given)}; use none, halving, or {{factor: 3, rungs: 3}}")
    if len(objectives) > 1:
        raise ValueError("tune: pruner goes with one objective: what is worse in one may be better in another")
    found = Pruner(_whole(given, "factor", 3, least=2, most=10), _whole(given, "rungs", 3, least=2, most=6))
    key = _budget_key(base)
    if not key:
        raise ValueError("tune: pruner shortens trials; give base a train_samples or max_steps")
    # Two steps are followed for memory, and without a third there is no speed.
    shortest = 3 * (base.effective_batch_size if key == "train_samples" else 1)
    if getattr(base, key) / found.factor ** (found.rungs - 1) < shortest:
        raise ValueError(
            f"tune: pruner: {key} {getattr(base, key)} is too short for {found.rungs} rungs of factor {found.factor}: "
            f"the first has to be {shortest} at least; train longer, or use fewer rungs"
        )
    return found


def _whole(given: Mapping[str, Any], key: str, default: int, *, least: int = 1, most: int) -> int:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"tune: {key} is {kind_of(value)}; it must be a whole number from {least} to {most:,}")
    return value


def _seconds(given: Any) -> float | None:
    if given is None:
        return None
    value = _number(given, "tune: timeout")
    if value <= 0:
        raise ValueError(f"tune: timeout is {value:g}; it must be a number of seconds above 0")
    return value


def _refuse_losses_of_random_weights(found: Search) -> None:
    named = [x.metric for x in found.objectives] + [x.metric for x in found.constraints]
    wanted = [name for name in named if METRICS[name].group == "loss"]
    general = [name for name in wanted if name in ("forgetting", "general_loss_before")]
    if not wanted:
        return
    levels = {str(c["base_model"]) for p in found.parameters for c in p.choices.values() if "base_model" in c}
    if not all(model_source.resolve(model).pretrained for model in levels | {found.base.base_model}):
        raise ValueError(f"tune: {wanted[0]} of random weights means nothing; tune tokens_per_second, or real weights")
    if general and not found.base.measure_forgetting:
        raise ValueError(f"tune: {general[0]} needs the general text; give base measure_forgetting: true")
    if len(general) < len(wanted) and not found.base.val_set_size:
        raise ValueError(f"tune: {wanted[0]} needs held-out stories; give base a val_set_size")


def _refuse_impossible(found: Search) -> None:
    """Every combination of choices has to be one that can be trained: of any other a sampler learns nothing."""
    choices = [list(p.choices) or [p.low] for p in found.parameters]
    if math.prod(map(len, choices)) > _MOST_COMBINATIONS:
        return
    for combination in itertools.product(*choices):
        values = dict(zip((p.name for p in found.parameters), combination, strict=True))
        try:
            found.walk(lambda parameter, values=values: values[parameter.name])  # type: ignore[misc]  # bound on purpose
        except ValueError as error:
            raise ValueError(f"space: {error}; say when: for what goes with some levels only") from None


def with_limits(
    search: Search,
    *,
    trials: int | None = None,
    timeout: float | None = None,
    sampler: str | None = None,
    seed: int | None = None,
) -> Search:
    """The search with what the command line says instead of the file.

    Raises:
        InputError: no such sampler.
    """
    if sampler is not None and sampler not in get_args(Sampler):
        raise InputError(f"--sampler: {unknown('sampler', sampler, get_args(Sampler))}")
    given: dict[str, Any] = {"trials": trials, "timeout": timeout, "sampler": sampler, "seed": seed}
    return replace(search, **{key: value for key, value in given.items() if value is not None})
