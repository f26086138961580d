"""YAML to trials: everything is validated here, before the first process starts."""

from __future__ import annotations

import difflib
import itertools
import math
import os
import random
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError

from harness import stories
from harness.claims import Claim, unique
from harness.environment import resolve_device
from harness.errors import InputError
from harness.spec import PRECISION_FLAGS, DatasetSpec, PromptSpec, TrialSpec, merge, normalise

Design = Literal["ablation", "ladder", "grid", "list"]

GRID_KEYS = ("name", "title", "base", "design", "vary", "trials", "exclude", "repeats", "claims")
SPEC_KEYS = (*TrialSpec.model_fields, "sequence_len", *PRECISION_FLAGS)

MAX_TRIALS = 500
"""More than this many trials (repeats included) need `--max-trials`."""
_MAX_FILE_BYTES = 2**20
_MAX_VALUES = 100_000
"""A file of this size holds no more; aliases of aliases would."""


@dataclass(frozen=True)
class Trial:
    """One spec to be executed once, and its place in the grid."""

    spec: TrialSpec
    label: str
    """What people call it: `lora_r=4`, `full fine-tuning`, `baseline`."""
    factor: str | None
    """The factor that sets it apart from the baseline; null for the baseline and where several do."""
    level: str | None
    """That factor's level, as text."""
    repeat: int = 0
    """Repeat k of every trial has the same seed."""
    baseline_id: str | None = None
    """Id of the spec that this one is compared with: the baseline of its repeat, itself if it is that one. Null
    where the grid has no baseline."""
    twin: bool = False
    """Whether this is the baseline run a second time: what the two differ by is noise (A/A)."""

    @property
    def baseline(self) -> bool:
        """Whether the others are compared with this one."""
        return self.spec.id == self.baseline_id and not self.twin


@dataclass(frozen=True)
class Grid:
    """A validated grid: its trials in the order in which they run."""

    name: str
    title: str
    design: Design
    trials: tuple[Trial, ...]
    claims: tuple[Claim, ...] = ()

    @property
    def repeats(self) -> int:
        """How many times each trial is in it."""
        return 1 + max(trial.repeat for trial in self.trials)

    def only(self, labels: Collection[str]) -> Grid:
        """The grid with no more than these trials, and the baseline that they are compared with."""
        kept = tuple(t for t in self.trials if t.baseline or t.twin or t.label in labels)
        return replace(self, trials=kept)


@dataclass(frozen=True)
class _Level:
    factor: str
    text: str
    changes: dict[str, Any]
    hold: bool = False
    """Derive the accumulation so that the effective batch is the base's."""

    @property
    def label(self) -> str:
        return self.text if self.factor not in self.changes else f"{self.factor}={self.text}"


def load(
    path: Path, *, repeats: int | None = None, overrides: Mapping[str, Any] | None = None, max_trials: int = MAX_TRIALS
) -> Grid:
    """Read a grid file, or a training configuration as a grid of one trial.

    Args:
        path: the YAML file.
        repeats: instead of the file's own.
        overrides: spec keys that apply to every trial, whatever the grid says (`memory_budget`).
        max_trials: the most trials that are accepted.

    Raises:
        InputError: with one line that says what is wrong and what would do.
    """
    document = _read_yaml(path)
    try:
        if "base_model" in document and not document.keys() & set(GRID_KEYS):
            document = {"base": document, "design": "list"}
        return _build(document, path, repeats, dict(overrides or {}), max_trials)
    except ValueError as error:
        raise InputError(_one_line(f"{path.name}: {error}")) from None


def preflight(grid: Grid) -> None:
    """Look at what the trials need from outside: a card, datasets with their columns and enough rows, models.

    Raises:
        InputError: something is not there.
    """
    from harness import model_source

    if any(t.spec.device == "cuda" for t in grid.trials) and resolve_device("auto") != "cuda":
        raise InputError(
            f"{grid.name}: device is cuda, and there is no card that torch could use; "
            "give --device cpu, or look at harness doctor"
        )
    ids = {d: {s.id for s in stories.read(d)} for d in dict.fromkeys(d for t in grid.trials for d in t.spec.datasets)}
    for datasets, wanted in dict.fromkeys((t.spec.datasets, t.spec.val_set_size) for t in grid.trials):
        stories.held_out(wanted, len(set().union(*(ids[d] for d in datasets))))
    for name in dict.fromkeys(t.spec.base_model for t in grid.trials):
        model_source.check(name)


# ------------------------------------------------------------------------------------ reading


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice: the first would be lost in silence."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    own = {id(key_node) for key_node, _ in node.value}
    loader.flatten_mapping(node)  # puts what `<<` merges before the own keys, which may replace it
    if len(node.value) > _MAX_VALUES:
        raise yaml.constructor.ConstructorError(None, None, _too_much("<<"), node.start_mark)
    seen: dict[Any, Any] = {}
    given = set()
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool) and key is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{_kind(key)} is no key", key_node.start_mark)
        if key in given:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        if id(key_node) in own:
            given.add(key)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes; a grid file has at most {_MAX_FILE_BYTES}")
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - derived from SafeLoader
        count = _count(document, {})
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], n=1)
        hint = f"did you mean {near[0]}?" if near else f"looked in {path.parent.absolute()}"
        raise InputError(_one_line(f"{path}: no such file; {hint}")) from None
    except IsADirectoryError:
        raise InputError(_one_line(f"{path} is a folder; give a grid file like grids/techniques.yml")) from None
    except OSError as error:
        raise InputError(_one_line(f"{path}: cannot be read ({error.strerror})")) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise InputError(_one_line(f"{path.name}: not valid YAML{line}: {problem}")) from None
    except RecursionError:
        raise InputError(f"{path.name}: not valid YAML: nested too deeply") from None
    except InputError:
        raise
    except (ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # PyYAML's answers to `!!int ""`, `!!bool maybe`, `!!timestamp today` and 2025-13-01.
        detail = f" ({error})" if isinstance(error, ValueError | KeyError) else ""
        raise InputError(_one_line(f"{path.name}: not valid YAML: no such number, date or flag{detail}")) from None
    if count > _MAX_VALUES:
        raise InputError(_too_much(path.name))
    if not isinstance(document, dict):
        raise InputError(
            _one_line(f"{path.name}: holds {_kind(document)}; a grid file is a mapping with name, base and vary")
        )
    return document


def _too_much(what: str) -> str:
    return f"{what}: its aliases stand for more than {_MAX_VALUES} values; write fewer"


def _count(value: Any, known: dict[int, int]) -> int:
    """Values in a document with its aliases written out, without writing them out."""
    if isinstance(value, dict | list | tuple | set) and id(value) not in known:
        inside = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(item, known) for item in inside)
    return known.get(id(value), 1)


# ------------------------------------------------------------------------------------ building


def _build(
    document: dict[str, Any], path: Path, repeats: int | None, overrides: dict[str, Any], max_trials: int
) -> Grid:
    for key in document:
        if key not in GRID_KEYS:
            raise ValueError(_unknown("key", key, GRID_KEYS + tuple(SPEC_KEYS), hint=_belongs_in_base(key)))
    name = document.get("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("._-")[:64] or "grid")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"name is {_kind(name)}, no folder name; use letters, digits, '.', '_' and '-'")
    title = document.get("title", name)
    if not isinstance(title, str):
        raise ValueError(f"title is {_kind(title)}; it must be text")
    title = _one_line(title)
    design = document.get("design", "list" if "trials" in document else "ablation")
    if design not in get_args(Design):
        raise ValueError(_unknown("design", design, get_args(Design)))
    times = document.get("repeats", 1) if repeats is None else repeats
    if not isinstance(times, int) or isinstance(times, bool) or times < 1:
        raise ValueError(f"repeats is {_kind(times)}; it must be a whole number of 1 or more")

    base = _normalised(_base(document, path), "base")
    base_spec = _spec(merge(base, overrides), "base")
    factors = _factors(document, design)
    _refuse_too_many(design, factors, times, max_trials)
    trials = _design(design, base, base_spec, factors, overrides)
    trials = _exclude(trials, document.get("exclude", []))
    for trial in trials:
        try:
            trial.spec.refuse_impossible()
        except ValueError as error:
            raise ValueError(f"{trial.label}: {error}") from None
    trials = _merge_duplicates(trials)
    repeated = [trial for k in range(times) for trial in _repeat(trials, base_spec, k)]
    return Grid(name, title, design, tuple(_interleave(repeated, name)), _claims(document.get("claims", [])))


def _repeat(trials: list[Trial], base: TrialSpec, number: int) -> list[Trial]:
    """The trials under the seed of that repeat, each with the id of its baseline, which is run twice."""

    def seeded(spec: TrialSpec) -> TrialSpec:
        return spec.model_copy(update={"seed": spec.seed + number})

    has_baseline = any(t.spec.id == base.id for t in trials)
    baseline_id = seeded(base).id if has_baseline else None
    found = [replace(t, repeat=number, spec=seeded(t.spec), baseline_id=baseline_id) for t in trials]
    if len(trials) > 1:  # alone, it is compared with nothing
        found += [replace(t, label=f"{t.label} again", twin=True) for t in found if t.baseline]
    return found


def _belongs_in_base(key: Any) -> str:
    return f" (did you mean to put {key} under base:?)" if key in SPEC_KEYS else ""


def _base(document: dict[str, Any], path: Path) -> dict[str, Any]:
    base = document.get("base")
    if isinstance(base, str):
        base = _read_yaml(path.parent / os.path.expanduser(base))  # Path's raises for ~nobody
    if not isinstance(base, dict):
        raise ValueError(f"base is {_kind(base)}; it must be a mapping of spec keys, or the path of a training file")
    return base


def _normalised(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in values:
        if key not in SPEC_KEYS:
            raise ValueError(f"{where}: {_unknown('key', key, SPEC_KEYS)}")
    try:
        return normalise(values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _changes(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """As `_normalised`, for keys that replace the base's: a flag that is off replaces no precision by none."""
    changes = _normalised(values, where)
    off = [key for key in values if key in PRECISION_FLAGS]
    if off and "precision" not in changes:
        raise ValueError(f"{where}: {off[0]}: {_text(values[off[0]])} names no precision; say precision: bf16 or fp32")
    return changes


def _spec(values: Mapping[str, Any], where: str, *, keys_alone: bool = False) -> TrialSpec:
    try:
        return TrialSpec.model_validate(values, context="keys alone" if keys_alone else None)
    except ValidationError as error:
        raise ValueError(f"{where}: {_explain(error)}") from None


def _factors(document: dict[str, Any], design: Design) -> list[list[_Level]]:
    """The levels of each factor, in file order."""
    if design == "list":
        if "vary" in document:
            raise ValueError("design list takes trials:, not vary:")
        return [_list_levels(document.get("trials", []))]
    if "trials" in document:
        raise ValueError(f"trials: is for design list; design {design} takes vary:")
    vary = document.get("vary", {})
    if not isinstance(vary, dict):
        raise ValueError(f"vary is {_kind(vary)}; it must be a mapping of factors to levels")
    return [_levels(factor, given) for factor, given in vary.items()]


def _levels(factor: Any, given: Any) -> list[_Level]:
    hold = False
    if isinstance(given, dict) and ("levels" in given or "hold" in given):
        extra = [key for key in given if key not in ("levels", "hold")]
        if extra:
            raise ValueError(f"vary: {factor}: {_unknown('key', extra[0], ('levels', 'hold'))}")
        if given.get("hold", "effective_batch_size") != "effective_batch_size":
            raise ValueError(f"vary: {factor}: hold is {_kind(given['hold'])}; use effective_batch_size")
        hold = "hold" in given
        given = given.get("levels")
        if hold and isinstance(given, dict):
            raise ValueError(f"vary: {factor}: hold goes with a list of levels, not with labelled ones")
    if hold and factor != "micro_batch_size":
        raise ValueError(f"vary: {factor}: hold: effective_batch_size goes with micro_batch_size")
    if isinstance(given, dict):
        if not given:
            raise ValueError(f"vary: {factor} has no levels; give at least one")
        return [_bundle(_text(factor), label, changes) for label, changes in given.items()]
    if factor not in SPEC_KEYS:
        raise ValueError(f"vary: {_unknown('factor', factor, SPEC_KEYS)}")
    if given is None or given == []:
        raise ValueError(f"vary: {factor} has no levels; give at least one")
    if not isinstance(given, list):
        raise ValueError(f"vary: {factor} is {_kind(given)}; its levels must be a list like [{_text(given)}]")
    levels = []
    for value in given:
        changes = _changes({factor: value}, f"vary: {factor}")
        name = factor if factor in changes else next(iter(changes))
        # `adapter: qlora` sets two keys: what was written names both.
        text = value if name == factor and isinstance(value, str) and len(changes) > 1 else changes[name]
        levels.append(_Level(name, _one_line(_text(text)), changes, hold))
    return levels


def _bundle(factor: str, label: Any, changes: Any) -> _Level:
    label = _one_line(_text(label))
    where = f"{factor}: {label}"
    if not isinstance(changes, dict) or not changes:
        raise ValueError(f"{where} is {_kind(changes)}; a labelled level is a mapping of spec keys")
    return _Level(factor, label, _changes(changes, where))


def _list_levels(given: Any) -> list[_Level]:
    if isinstance(given, dict):
        return [_bundle("trials", label, changes) for label, changes in given.items()]
    if not isinstance(given, list):
        raise ValueError(f"trials is {_kind(given)}; it must be a list of mappings, or a mapping of labels to mappings")
    levels = []
    for changes in given:
        if not isinstance(changes, dict) or not changes:
            raise ValueError(f"trials: {_kind(changes)} is not a mapping of spec keys")
        label = ", ".join(f"{key}={_text(value)}" for key, value in changes.items())
        levels.append(_bundle("trials", label, changes))
    return levels


def _refuse_too_many(design: Design, factors: list[list[_Level]], repeats: int, limit: int) -> None:
    """Counted before anything is expanded: a product of ten factors must not fill the memory first."""
    sizes = [len(levels) for levels in factors]
    count = (math.prod(sizes) if design == "grid" else sum(sizes) + 1) * repeats
    if count > limit:
        raise ValueError(f"{count} trials; the limit is {limit} (raise it with --max-trials {count})")


def _design(
    design: Design, base: dict[str, Any], base_spec: TrialSpec, factors: list[list[_Level]], overrides: dict[str, Any]
) -> list[Trial]:
    baseline = Trial(base_spec, "baseline", None, None)

    def apply(levels: Iterable[_Level]) -> TrialSpec:
        values = base
        where = []
        for level in levels:
            values = merge(values, level.changes)
            where.append(level.label)
            if level.hold:
                values = _hold_effective_batch(values, base_spec, level)
        return _spec(merge(values, overrides), ", ".join(where), keys_alone=True)

    trials = [baseline]
    if design == "grid":
        if not factors:
            return trials
        every = [level for levels in factors for level in levels]
        given = [level for level in every if "gradient_accumulation_steps" in level.changes]
        if given and any(level.hold for level in every):
            raise ValueError(f"{given[0].label}: hold: effective_batch_size derives the accumulation; drop one of them")
        trials = []
        for levels in itertools.product(*factors):
            spec = apply(levels)
            label = ", ".join(level.label for level in levels)
            one = levels[0] if len(levels) == 1 else None
            trials.append(Trial(spec, label, one.factor if one else None, one.text if one else None))
    elif design == "ladder":
        rungs = [level for levels in factors for level in levels]
        for height, level in enumerate(rungs, start=1):
            trials.append(Trial(apply(rungs[:height]), f"+ {level.label}", level.factor, level.text))
    else:
        for level in (level for levels in factors for level in levels):
            trials.append(Trial(apply([level]), level.label, level.factor, level.text))
    return trials


def _hold_effective_batch(values: dict[str, Any], base: TrialSpec, level: _Level) -> dict[str, Any]:
    micro = values.get("micro_batch_size")
    if not isinstance(micro, int) or isinstance(micro, bool) or micro < 1 or base.effective_batch_size % micro:
        raise ValueError(
            f"{level.label}: micro_batch_size {_kind(micro)} does not divide the effective batch of "
            f"{base.effective_batch_size} that is held"
        )
    return values | {"gradient_accumulation_steps": base.effective_batch_size // micro}


def _exclude(trials: list[Trial], rules: Any) -> list[Trial]:
    """Drop the trials that agree with every key of a rule. The baseline may be dropped too."""
    if not isinstance(rules, list):
        raise ValueError(f"exclude is {_kind(rules)}; it must be a list of mappings of spec keys")
    kept = trials
    for rule in rules:
        if not isinstance(rule, dict) or not rule:
            raise ValueError(f"exclude: {_kind(rule)} is not a mapping of spec keys")
        wanted = _changes(rule, "exclude")
        example = _spec({"base_model": "any"} | wanted, "exclude", keys_alone=True)
        before = len(kept)
        kept = [t for t in kept if any(getattr(t.spec, key) != getattr(example, key) for key in wanted)]
        if len(kept) == before:
            said = ", ".join(f"{key}={_text(value)}" for key, value in rule.items())
            raise ValueError(f"exclude: no trial has {said}; drop the rule")
    if not kept:
        raise ValueError("exclude leaves no trial; drop a rule")
    return kept


def _merge_duplicates(trials: list[Trial]) -> list[Trial]:
    """A spec that occurs twice (a level equal to the baseline) is one trial, under its first label."""
    first: dict[str, Trial] = {}
    for trial in trials:
        first.setdefault(trial.spec.id, trial)
    return list(first.values())


def _interleave(trials: list[Trial], name: str) -> list[Trial]:
    """Each repeat in a random order of its own, so that a drift of the machine falls on no one trial."""
    ordered: list[Trial] = []
    for repeat, group in itertools.groupby(trials, key=lambda t: t.repeat):
        block = list(group)
        random.Random(f"{name}/{repeat}").shuffle(block)
        ordered += block
    return ordered


def _claims(given: Any) -> tuple[Claim, ...]:
    if not isinstance(given, list):
        raise ValueError(f"claims is {_kind(given)}; it must be a list")
    claims = []
    for number, claim in enumerate(given, start=1):
        if not isinstance(claim, dict):
            keys = ", ".join(key for key, field in Claim.model_fields.items() if field.is_required())
            raise ValueError(f"claims: {_kind(claim)} is not a mapping with {keys} and compare or where")
        try:
            claims.append(Claim.model_validate(claim))
        except ValidationError as error:
            raise ValueError(f"claims: {_text(claim.get('id', number))}: {_explain(error, Claim)}") from None
    return unique(claims)


# ------------------------------------------------------------------------------------ words


def _kind(value: Any) -> str:
    """What a YAML value is, in a user's words."""
    if isinstance(value, dict | list):
        name = "mapping" if isinstance(value, dict) else "list"
        return f"a {name}" if value else f"an empty {name}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "empty"}[value]
    return repr(value) if isinstance(value, str | int | float) else f"{type(value).__name__} {value}"


def _text(value: Any) -> str:
    """A level as people write it in YAML."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return "+".join(map(_text, value))
    if isinstance(value, dict):
        return str(value.get("path", value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _one_line(text: str) -> str:
    """Whatever a user's text holds, an error is one line that a terminal can show."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 600 else f"{line[:300]} … {line[-250:]}"


_FEW = 8
"""So many choices are all named, beside the nearest."""


def _unknown(what: str, given: Any, known: Collection[str], hint: str = "") -> str:
    near = difflib.get_close_matches(str(given), list(known), n=1, cutoff=0.6)
    if not hint:
        everything = f"use {', '.join(known)}" if len(known) < 40 else "`harness keys` lists what there is"
        hint = f"; did you mean {near[0]}?" if near else f"; {everything}"
        if near and len(known) <= _FEW:
            hint += f" ({', '.join(known)})"
    return f"unknown {what} {given!r}{hint}"


# What pydantic calls a broken rule, in a user's words.
_RULES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "tuple_type": "must be a list",
    "too_short": "must have at least one entry",
    "model_type": "must be a mapping",
    "greater_than_equal": "must be {ge:.15g} or more",
    "greater_than": "must be more than {gt:.15g}",
    "less_than_equal": "must be {le:.15g} or less",
    "less_than": "must be less than {lt:.15g}",
}


def _explain(error: ValidationError, model: type[BaseModel] = TrialSpec) -> str:
    """The first of pydantic's errors, in one line; a misspelt key before what is missing without it."""
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    kind, context, given = first["type"], first.get("ctx", {}), first["input"]
    place = ".".join(str(part) for part in first["loc"])
    owner = PromptSpec if "type" in first["loc"] else DatasetSpec if "datasets" in first["loc"] else model
    if kind == "extra_forbidden":
        inside = place.rpartition(".")[0]
        return f"{inside}: " * bool(inside) + _unknown("key", first["loc"][-1], owner.model_fields)
    if kind == "missing":
        return f"{place} is missing; give one: {owner.model_fields[str(first['loc'][-1])].description}"
    if kind == "literal_error":
        return _unknown(place, given, re.findall(r"'([^']*)'", context["expected"]))
    if kind == "value_error":
        return ": ".join(filter(None, (place, str(context["error"]))))
    rule = _RULES[kind].format(**context) if kind in _RULES else first["msg"]
    return f"{place} is {_kind(given)}; it {rule}"
