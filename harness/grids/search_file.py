"""The `tune:` section of a grid file, validated."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from harness._util.messages import as_written, kind_of, one_line, unknown
from harness._util.units import parse_bytes
from harness.dialects.training_file import OWN
from harness.errors import InputError
from harness.grids.document import base_of, header, located, timing_of
from harness.grids.levels import ACCUMULATION, HOLDING, SPEC_KEYS, condition_of, levels_of, make_spec
from harness.grids.search import BUDGETS, Constraint, Objective, Parameter, Pruner, Sampler, Scalar, Search, budget_key
from harness.grids.spellings import FLOAT_KEYS, merge, one_of_each
from harness.grids.yaml_file import read_yaml
from harness.metrics import METRICS
from harness.record import TIMED_FIGURES
from harness.sources import models
from harness.spec.trial import FACTS, TrialSpec

KEYS = ("space", "objectives", "constraints", "sampler", "trials", "timeout", "pruner", "confirm", "seed")
_RANGE_KEYS = ("low", "high", "log", "step", "when")
_MOST_COMBINATIONS = 5_000
_MOST_TRIALS = 100_000
_NUMBERS = tuple(
    key
    for key, facts in FACTS.items()
    if facts.given and re.search(r"\b(int|float)\b", str(TrialSpec.model_fields[key].annotation))
)
"""Keys that can have a range."""
_CONSTRAINT = re.compile(r"\s*(?P<metric>\w+)\s*(?P<sign><=|>=)\s*(?P<bound>.+?)\s*")


def load(path: Path, overrides: Mapping[str, Any] | None = None, *, without_unsupported: bool = False) -> Search:
    """Read the `tune:` section of a grid file.

    Args:
        path: the YAML file.
        overrides: spec keys that apply to every trial (`memory_budget`, `device`).
        without_unsupported: leave out keys of another tool's training file that are not supported.

    Raises:
        InputError: it is not a valid search.
    """
    document = read_yaml(path)
    try:
        name, title = header(document, path)
        for key in ("match", "tune_first", "price_per_hour"):
            if key in document:
                raise ValueError(f"{key} is of a grid that harness run compares; leave it out of a search")
        if "repeats" in document and "vary" not in document and "trials" not in document:
            raise ValueError(
                "repeats is of a grid that harness run compares; tune: confirm repeats the best of a search"
            )
        if not isinstance(document.get("tune"), dict):
            given = kind_of(document["tune"]) if "tune" in document else "missing"
            raise ValueError(f"tune is {given}; it must be a mapping with at least space, as in grids/tune.yml")
        values, meant = base_of(document, path, without_unsupported=without_unsupported)
        changed = dict(overrides or {})
        bounded = any(c.metric == "peak_memory_bytes" for c in _constraints(document["tune"].get("constraints", [])))
        if bounded and values.get("memory_budget") is not None and "memory_budget" not in changed:
            raise ValueError("base has a memory_budget and tune a bound on peak_memory_bytes; keep one of them")
        search = parse(name, title + meant.suffix, values | changed, document["tune"])
        _refuse_contradictions(search)
        timing = timing_of(document)
        asked = [each.metric for each in search.objectives] + [each.metric for each in search.constraints]
        timed = [metric for metric in asked if metric in TIMED_FIGURES]
        if timed and not timing.visits:
            raise ValueError(f"visits is 0, and tune needs {timed[0]}, which visits time; leave visits out")
        base_spec = located(search.base, path, search.reading)
        about = {**search.given, "base": base_spec.model_dump(mode="json")}
        file = None if meant.tool == OWN else meant
        return replace(search, base=base_spec, given=about, timing=timing, training_file=file)
    except InputError:  # of a training file, with all its reasons
        raise
    except ValueError as error:
        raise InputError(one_line(f"{path.name}: {error}")) from None


def parse(name: str, title: str, base: Mapping[str, Any], given: Mapping[str, Any]) -> Search:
    """A search from the values of its base and its `tune:` section.

    Raises:
        ValueError: it is not a valid search.
    """
    for key in given:
        if key not in KEYS:
            raise ValueError(f"tune: {unknown('key', key, KEYS)}")
    objectives = _objectives(given.get("objectives", ["eval_loss"]))
    constraints = _constraints(given.get("constraints", []))
    limits = [c for c in constraints if c.metric == "peak_memory_bytes"]
    values = dict(base)
    if limits:
        # A bound on the peak is enforced, not only checked afterwards; `--memory` takes precedence.
        values.setdefault("memory_budget", min(int(c.bound) for c in limits))
    spec = make_spec(values, "base")
    sampler = given.get("sampler", "tpe")
    if sampler not in get_args(Sampler):
        raise ValueError(f"tune: {unknown('sampler', sampler, get_args(Sampler))}")
    pruner = _pruner(given.get("pruner"), spec, objectives)
    search = Search(
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
    _refuse_losses_of_random_weights(search)
    _refuse_impossible(search)
    return search


def _parameters(given: Any, base: TrialSpec) -> tuple[Parameter, ...]:
    if not isinstance(given, dict) or not given:
        shown = "missing" if given is None else kind_of(given)
        raise ValueError(
            f"tune: space is {shown}; it must be a mapping like lora_r: [8, 16] or lora_r: {{low: 4, high: 64}}"
        )
    parameters: list[Parameter] = []
    for name, values in given.items():
        if not isinstance(name, str):
            raise ValueError(f"space: {kind_of(name)} is not a parameter name")
        parameter = _parameter(name, values, base)
        parameters.append(parameter)
    if any(p.hold for p in parameters):
        _check_hold(parameters)
    return tuple(parameters)


def _refuse_contradictions(search: Search) -> None:
    """Refuse what would measure something else than it says. A search that was recorded is read all the same."""
    for number, parameter in enumerate(search.parameters):
        for label in parameter.equal:
            raise ValueError(
                f"space: {parameter.name}: two levels are called {label}; give each a label of its own, as in "
                "{one: {…}, other: {…}}"
            )
        for key in sorted(parameter.keys & {"seed", "memory_budget", "device"}):
            raise ValueError(
                f"space: {parameter.name} sets {key}, which is equal in all trials of a search; give it in base"
            )
        for key in sorted(parameter.keys & {*BUDGETS}) if search.pruner is not None else ():
            raise ValueError(f"space: {parameter.name} sets {key}, which the pruner shortens; leave one of them out")
        for other in search.parameters[:number]:
            twice = sorted(one_of_each(parameter.keys) & one_of_each(other.keys))
            if twice and not parameter.excludes(other):
                what = f"both set {twice[0]}" if twice[0] in parameter.keys & other.keys else "exclude each other"
                raise ValueError(
                    f"space: {parameter.name} and {other.name} {what}; keep one, or give each a when: "
                    "with other values of one key"
                )
    _check_conditions(search.parameters, search.base)


def _check_conditions(parameters: Sequence[Parameter], base: TrialSpec) -> None:
    """Conditions are of the base's values and of what was chosen before, and each can be fulfilled."""
    for number, parameter in enumerate(parameters):
        for key, allowed in (parameter.when or {}).items():
            later = [other.name for other in parameters[number:] if key in other.keys]
            if later:
                raise ValueError(
                    f"space: {parameter.name}: when: {key} is chosen after it; write {later[0]} before {parameter.name}"
                )
            if not any(getattr(base, key) == v or any(p.can_set(key, v) for p in parameters[:number]) for v in allowed):
                shown = " or ".join(map(as_written, allowed)) or "anything"
                raise ValueError(f"space: {parameter.name}: when: {key} is never {shown}; the parameter would not vary")


def _check_hold(parameters: Sequence[Parameter]) -> None:
    """Where the accumulation is derived, nothing else sets it and nothing depends on it."""
    always = [p for p in parameters if p.when is None]
    given = [p.name for p in always if ACCUMULATION in p.keys]
    if given and any(p.hold for p in always):
        raise ValueError(
            f"space: {given[0]}: hold: effective_batch_size derives the accumulation; drop one of them, or say when:"
        )
    for parameter in parameters:
        if ACCUMULATION in (parameter.when or {}):
            raise ValueError(
                f"space: {parameter.name}: when: {ACCUMULATION} is derived by hold: effective_batch_size; "
                f"use {' or '.join(HOLDING)}"
            )


def _parameter(name: str, given: Any, base: TrialSpec) -> Parameter:
    where = f"space: {name}"
    if isinstance(given, dict) and given.keys() & {"low", "high"}:
        return _range(name, given, base)
    if isinstance(given, dict) and "when" in given and "levels" not in given:
        raise ValueError(f"{where}: when: goes beside levels: or low: and high:, as in {{levels: …, when: …}}")
    when = None
    if isinstance(given, dict) and "levels" in given:
        when = condition_of(given.get("when"), where)
        given = {key: value for key, value in given.items() if key != "when"}
    levels = levels_of(name, given, "space")
    # A key that only some choices set has the base's value in the others, so that a spec identifies its choice.
    keys = dict.fromkeys(key for level in levels for key in level.changes)
    choices: dict[Scalar, dict[str, Any]] = {}
    equal: list[str] = []
    for level in levels:
        spec = make_spec(merge(base.model_dump(), level.changes), f"space: {level.label}", keys_alone=True)
        value = level.changes.get(name)
        # Scalars can be stored as they are; a list of layers, or what stands for several keys, is stored as its text.
        scalar = isinstance(value, bool | int | float | str | None) and one_line(as_written(value)) == level.text
        choice = value if name in level.changes and scalar else level.text
        changes = {key: getattr(spec, key) for key in keys}
        if choices.get(choice, changes) != changes:
            equal.append(level.text)
        choices[choice] = changes
    return Parameter(name, choices, when=when, hold=levels[0].hold, equal=tuple(equal))


def _range(name: str, given: Mapping[str, Any], base: TrialSpec) -> Parameter:
    where = f"space: {name}"
    for key in given:
        if key not in _RANGE_KEYS:
            raise ValueError(f"{where}: {unknown('key', key, _RANGE_KEYS)}")
    if name == "sequence_len":  # as tools' files spell it
        name = "sequence_length"
    if name not in _NUMBERS:
        isnt = f"{name} is not a number; give a list of levels"
        raise ValueError(f"space: {isnt if name in SPEC_KEYS else unknown('parameter', name, _NUMBERS)}")
    bounds = {key: _number(given.get(key), f"{where}: {key}") for key in ("low", "high")}
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"{where}: log is {kind_of(log)}; it must be true or false")
    step = None if given.get("step") is None else _number(given["step"], f"{where}: step")
    whole = name not in FLOAT_KEYS
    for key, value in bounds.items():
        make_spec(
            merge(base.model_dump(), {name: int(value) if whole and value == int(value) else value}),
            f"{where}: {key}",
            keys_alone=True,
        )
    if not bounds["low"] < bounds["high"]:
        raise ValueError(f"{where}: low {bounds['low']:g} is not below high {bounds['high']:g}")
    if log and (bounds["low"] <= 0 or step is not None):
        raise ValueError(f"{where}: log goes with a low above 0 and without step")
    if step is not None and (step <= 0 or (whole and step != int(step))):
        raise ValueError(f"{where}: step is {step:g}; it must be {'a whole number' if whole else 'a number'} above 0")
    if step is not None and step > bounds["high"] - bounds["low"]:
        raise ValueError(f"{where}: step {step:g} leads from low {bounds['low']:g} beyond high {bounds['high']:g}")
    as_type: Callable[[float], float] = int if whole else float
    return Parameter(
        name,
        choices={},
        low=as_type(bounds["low"]),
        high=as_type(bounds["high"]),
        log=log,
        step=None if step is None else as_type(step),
        whole=whole,
        when=condition_of(given.get("when"), where),
    )


def _number(value: Any, where: str) -> float:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 1e-4 as text
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} is {'missing' if value is None else kind_of(value)}; it must be a number")
    return float(value)


def _objectives(given: Any) -> tuple[Objective, ...]:
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list | dict) or not 1 <= len(given) <= 3:
        raise ValueError(f"tune: objectives is {kind_of(given)}; name one to three figures, like [eval_loss]")
    objectives = []
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
        objectives.append(Objective(name, direction))  # type: ignore[arg-type]  # one of the two
    if len({o.metric for o in objectives}) < len(objectives):
        raise ValueError("tune: an objective is named twice")
    return tuple(objectives)


def _constraints(given: Any) -> tuple[Constraint, ...]:
    if not isinstance(given, list):
        raise ValueError(
            f"tune: constraints is {kind_of(given)}; it must be a list like ['peak_memory_bytes <= 12GiB']"
        )
    constraints = []
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
            raise ValueError(
                f"constraints: {text!r}: {match['bound']!r} is not a bound; write it like {like}"
            ) from None
        if not math.isfinite(bound):
            raise ValueError(f"constraints: {text!r}: a bound is a finite number")
        constraints.append(Constraint(metric.name, "<=" if match["sign"] == "<=" else ">=", bound))
    return tuple(constraints)


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
    pruner = Pruner(_whole(given, "factor", 3, least=2, most=10), _whole(given, "rungs", 3, least=2, most=6))
    key = budget_key(base)
    if not key:
        raise ValueError("tune: pruner shortens trials; give base a train_samples or max_steps")
    # Two steps track memory; a third is needed to measure speed.
    shortest = 3 * (base.effective_batch_size if key == "train_samples" else 1)
    if getattr(base, key) / pruner.factor ** (pruner.rungs - 1) < shortest:
        raise ValueError(
            f"tune: pruner: {key} {getattr(base, key)} is too short for {pruner.rungs} rungs of factor "
            f"{pruner.factor}: the first has to be {shortest} at least; train longer, or use fewer rungs"
        )
    return pruner


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


def _refuse_losses_of_random_weights(search: Search) -> None:
    named = [x.metric for x in search.objectives] + [x.metric for x in search.constraints]
    wanted = [name for name in named if METRICS[name].group == "loss"]
    general = [name for name in wanted if name in ("forgetting", "general_loss_before")]
    if not wanted:
        return
    levels = {str(c["base_model"]) for p in search.parameters for c in p.choices.values() if "base_model" in c}
    if not all(models.pretrained(model) for model in levels | {search.base.base_model}):
        raise ValueError(f"tune: {wanted[0]} of random weights means nothing; tune tokens_per_second, or real weights")
    if general and not search.base.measure_forgetting:
        raise ValueError(f"tune: {general[0]} needs the general text; give base measure_forgetting: true")
    if len(general) < len(wanted) and not search.base.val_set_size:
        raise ValueError(f"tune: {wanted[0]} needs held-out stories; give base a val_set_size")


def _refuse_impossible(search: Search) -> None:
    """Every combination of choices must be one that can be trained: a sampler learns nothing from others."""
    held = any(p.hold for p in search.parameters)
    choices = [_tried(p, held) for p in search.parameters]
    if held and _are_too_many(choices):  # at least those of the batch, with the first of the others
        pairs = zip(search.parameters, choices, strict=True)
        choices = [values if p.keys & {*HOLDING} else values[:1] for p, values in pairs]
    if _are_too_many(choices):
        return
    for combination in itertools.product(*choices):
        values = dict(zip((p.name for p in search.parameters), combination, strict=True))
        try:
            search.walk(lambda parameter, values=values: values[parameter.name])  # type: ignore[misc]  # bound on purpose
        except ValueError as error:
            raise ValueError(f"space: {error}; say when: for what goes with some levels only") from None


def _tried(parameter: Parameter, held: bool) -> Sequence[Any]:
    """The values of a parameter that are tried: all choices; of a range the lowest, or all where they must divide
    a held batch.
    """
    if parameter.choices:
        return list(parameter.choices)
    if held and parameter.name in HOLDING:
        return range(int(parameter.low), int(parameter.high) + 1, int(parameter.step or 1))
    return [parameter.low]


def _are_too_many(choices: Sequence[Sequence[Any]]) -> bool:
    return math.prod(map(len, choices)) > _MOST_COMBINATIONS


def with_limits(
    search: Search,
    *,
    trials: int | None = None,
    timeout: float | None = None,
    sampler: str | None = None,
    seed: int | None = None,
) -> Search:
    """The search with limits from the command line instead of the file's.

    Raises:
        InputError: no such sampler.
    """
    if sampler is not None and sampler not in get_args(Sampler):
        raise InputError(f"--sampler: {unknown('sampler', sampler, get_args(Sampler))}")
    given: dict[str, Any] = {"trials": trials, "timeout": timeout, "sampler": sampler, "seed": seed}
    return replace(search, **{key: value for key, value in given.items() if value is not None})
