"""YAML to trials: everything is validated here, before the first process starts."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import math
import os
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import ValidationError

from harness import stories
from harness.claims import Claim, unique
from harness.environment import cards, current, resolve_device
from harness.errors import InputError
from harness.spec import PRECISION_FLAGS, TrialSpec, merge, normalise
from harness.wording import as_written, explain, kind_of, one_line, unknown

Design = Literal["ablation", "ladder", "grid", "list"]

GRID_KEYS = ("name", "title", "base", "design", "vary", "trials", "exclude", "repeats", "claims", "tune")
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
    tune: Mapping[str, Any] | None = None
    """The search that its trials come from, as `search.read` takes it."""

    @property
    def about(self) -> dict[str, Any]:
        """What a report needs to know beside the rows, as plain JSON values."""
        said = {"title": self.title, "claims": [claim.model_dump(mode="json") for claim in self.claims]}
        return said if self.tune is None else said | {"tune": dict(self.tune)}

    @property
    def repeats(self) -> int:
        """How many times each trial is in it."""
        return 1 + max(trial.repeat for trial in self.trials)

    def only(self, labels: Collection[str]) -> Grid:
        """The grid with no more than these trials, and the baseline that they are compared with."""
        kept = tuple(t for t in self.trials if t.baseline or t.twin or t.label in labels)
        return replace(self, trials=kept)


@dataclass(frozen=True)
class Level:
    """One value of a factor, and the spec keys that it sets."""

    factor: str
    text: str
    changes: dict[str, Any]
    hold: bool = False
    """Derive the accumulation so that the effective batch is the base's."""

    @property
    def label(self) -> str:
        """`lora_r=4`; of a labelled bundle its label alone."""
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
    document = read_yaml(path)
    try:
        if "base_model" in document and not document.keys() & set(GRID_KEYS):
            document = {"base": document, "design": "list"}
        return _build(document, path, repeats, dict(overrides or {}), max_trials)
    except ValueError as error:
        raise InputError(one_line(f"{path.name}: {error}")) from None


def labels_like(grid: Grid, patterns: Sequence[str]) -> set[str]:
    """Labels of a grid that are one of these, or like one of them where it has `*`, `?` or `[…]`.

    Raises:
        InputError: one means no trial.
    """
    labels = list(dict.fromkeys(trial.label for trial in grid.trials if not trial.twin))
    found = set()
    for pattern in patterns:
        meant = {label for label in labels if label == pattern or fnmatch.fnmatchcase(label, pattern)}
        if not meant:
            raise InputError(one_line(f"{grid.name}: {unknown('trial', pattern, labels)}"))
        found |= meant
    return found


def preflight(grid: Grid, *, to_plan: bool = False, elsewhere: bool = False) -> None:
    """Look at what the trials need from outside: a card, datasets with their columns and enough rows, models.

    Args:
        grid: what shall be run.
        to_plan: nothing shall be trained: no card has to be there, and of a model its config alone.
        elsewhere: trials run on other machines: no card has to be here.

    Raises:
        InputError: something is not there.
    """
    from harness import model_source

    here = not to_plan and not elsewhere
    if here and any(t.spec.device == "cuda" for t in grid.trials) and resolve_device("auto") != "cuda":
        raise InputError(
            f"{grid.name}: device is cuda, and there is no card that torch could use; "
            "give --device cpu, or look at harness doctor"
        )
    if here:
        for trial in grid.trials:
            _refuse_too_many_processes(trial)
    ids = {d: {s.id for s in stories.read(d)} for d in dict.fromkeys(d for t in grid.trials for d in t.spec.datasets)}
    for datasets, wanted in dict.fromkeys((t.spec.datasets, t.spec.val_set_size) for t in grid.trials):
        stories.held_out(wanted, len(set().union(*(ids[d] for d in datasets))))
    for name in dict.fromkeys(t.spec.base_model for t in grid.trials):
        model_source.check(name, weights=not to_plan)


def _refuse_too_many_processes(trial: Trial) -> None:
    on_cards = resolve_device(trial.spec.device) == "cuda"
    there, what = (len(cards()), "card") if on_cards else (current("cpu").cpu_cores, "core")
    if trial.spec.num_processes > max(1, there):
        raise InputError(
            f"{trial.label}: num_processes {trial.spec.num_processes}, and {there} {what}{'s' * (there != 1)} here; "
            f"each process takes a {what}"
        )


# ------------------------------------------------------------------------------------ reading


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice: the first would be lost in silence."""


def _mapping(loader: _Loader, node: yaml.Node) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):  # `!!map 3`
        raise yaml.constructor.ConstructorError(
            None, None, f"{node.tag} is given to what is no mapping", node.start_mark
        )
    own = {id(key_node) for key_node, _ in node.value}
    loader.flatten_mapping(node)  # puts what `<<` merges before the own keys, which may replace it
    if len(node.value) > _MAX_VALUES:
        raise yaml.constructor.ConstructorError(None, None, _too_much("<<"), node.start_mark)
    seen: dict[Any, Any] = {}
    given = set()
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool) and key is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{kind_of(key)} is no key", key_node.start_mark)
        if key in given:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        if id(key_node) in own:
            given.add(key)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    value: int = loader.construct_yaml_int(node)
    str(value)  # raises for one, written in another base, of more digits than Python writes
    return value


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: there is none, or it is too large, too deep or not plain YAML.
    """
    try:
        with path.open("rb") as file:  # a pipe or a device has no size, and perhaps no end
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            size = max(path.stat().st_size, len(content))
            raise InputError(one_line(f"{path}: {size} bytes; a grid file has at most {_MAX_FILE_BYTES}"))
        document = yaml.load(content.decode(), _Loader)  # noqa: S506 - derived from SafeLoader
        count = _count(document, {})
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], n=1)
        hint = f"did you mean {near[0]}?" if near else f"looked in {path.parent.absolute()}"
        raise InputError(one_line(f"{path}: no such file; {hint}")) from None
    except IsADirectoryError:
        raise InputError(one_line(f"{path} is a folder; give a grid file like grids/techniques.yml")) from None
    except OSError as error:
        raise InputError(one_line(f"{path}: cannot be read ({error.strerror})")) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise InputError(one_line(f"{path.name}: not valid YAML{line}: {problem}")) from None
    except RecursionError:
        raise InputError(f"{path.name}: not valid YAML: nested too deeply") from None
    except InputError:
        raise
    except (ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # PyYAML's answers to `!!int ""`, `!!bool maybe`, `!!timestamp today` and 2025-13-01.
        detail = f" ({error})" if isinstance(error, ValueError | KeyError) else ""
        raise InputError(one_line(f"{path.name}: not valid YAML: no such number, date or flag{detail}")) from None
    if count > _MAX_VALUES:
        raise InputError(_too_much(path.name))
    if not isinstance(document, dict):
        raise InputError(
            one_line(f"{path.name}: holds {kind_of(document)}; a grid file is a mapping with name, base and vary")
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
    name, title = header(document, path)
    if "tune" in document and not document.keys() & {"vary", "trials"}:
        raise ValueError(f"it says what to tune and nothing to vary; run it with harness tune {path}")
    design = document.get("design", "list" if "trials" in document else "ablation")
    if design not in get_args(Design):
        raise ValueError(unknown("design", design, get_args(Design)))
    times = document.get("repeats", 1) if repeats is None else repeats
    if not isinstance(times, int) or isinstance(times, bool) or times < 1:
        raise ValueError(f"repeats is {kind_of(times)}; it must be a whole number of 1 or more")

    base = base_of(document, path)
    base_spec = make_spec(merge(base, overrides), "base")
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
    repeated = [trial for k in range(times) for trial in repeat(trials, base_spec, k)]
    return Grid(name, title, design, tuple(interleave(repeated, name)), _claims(document.get("claims", [])))


def header(document: Mapping[str, Any], path: Path) -> tuple[str, str]:
    """Name and title of a grid file, whose keys are looked at on the way.

    Raises:
        ValueError: a key is unknown, the name is no folder's, the title no text.
    """
    for key in document:
        if key not in GRID_KEYS:
            raise ValueError(unknown("key", key, GRID_KEYS + tuple(SPEC_KEYS), hint=_belongs_in_base(key)))
    name = document.get("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("._-")[:64] or "grid")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"name is {kind_of(name)}, no folder name; use letters, digits, '.', '_' and '-'")
    title = document.get("title", name)
    if not isinstance(title, str):
        raise ValueError(f"title is {kind_of(title)}; it must be text")
    return name, one_line(title)


def repeat(trials: Sequence[Trial], base: TrialSpec, number: int) -> list[Trial]:
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


def base_of(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The values of `base`, or of the training file that it names, under the keys of a spec.

    Raises:
        ValueError: there are none, or one is unknown.
    """
    base = document.get("base")
    if isinstance(base, str) and base.isprintable():
        base = read_yaml(path.parent / os.path.expanduser(base))  # Path's raises for ~nobody
    if not isinstance(base, dict):
        raise ValueError(f"base is {kind_of(base)}; it must be a mapping of spec keys, or the path of a training file")
    return normalised(base, "base")


def normalised(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Spec keys under the names of a spec.

    Raises:
        ValueError: one is unknown, or two contradict each other.
    """
    for key in values:
        if key not in SPEC_KEYS:
            raise ValueError(f"{where}: {unknown('key', key, SPEC_KEYS)}")
    try:
        return normalise(values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def changes_of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """As `_normalised`, for keys that replace the base's: a flag that is off replaces no precision by none."""
    changes = normalised(values, where)
    off = [key for key in values if key in PRECISION_FLAGS]
    if off and "precision" not in changes:
        raise ValueError(
            f"{where}: {off[0]}: {as_written(values[off[0]])} names no precision; say precision: bf16 or fp32"
        )
    return changes


def make_spec(values: Mapping[str, Any], where: str, *, keys_alone: bool = False) -> TrialSpec:
    """A spec of these values; `keys_alone` leaves it open whether they go together.

    Raises:
        ValueError: with one line that says what is wrong, after `where`.
    """
    try:
        return TrialSpec.model_validate(values, context="keys alone" if keys_alone else None)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}") from None


def _factors(document: dict[str, Any], design: Design) -> list[list[Level]]:
    """The levels of each factor, in file order."""
    if design == "list":
        if "vary" in document:
            raise ValueError("design list takes trials:, not vary:")
        return [_list_levels(document.get("trials", []))]
    if "trials" in document:
        raise ValueError(f"trials: is for design list; design {design} takes vary:")
    vary = document.get("vary", {})
    if not isinstance(vary, dict):
        raise ValueError(f"vary is {kind_of(vary)}; it must be a mapping of factors to levels")
    return [levels_of(factor, given) for factor, given in vary.items()]


def levels_of(factor: Any, given: Any, where: str = "vary") -> list[Level]:
    """The levels that a factor is given: a list of values, labelled bundles, or either with `hold`.

    Raises:
        ValueError: they are none of these; `where` says in which part of the file.
    """
    hold = False
    if isinstance(given, dict) and ("levels" in given or "hold" in given):
        extra = [key for key in given if key not in ("levels", "hold")]
        if extra:
            raise ValueError(f"{where}: {factor}: {unknown('key', extra[0], ('levels', 'hold'))}")
        if given.get("hold", "effective_batch_size") != "effective_batch_size":
            raise ValueError(f"{where}: {factor}: hold is {kind_of(given['hold'])}; use effective_batch_size")
        hold = "hold" in given
        given = given.get("levels")
        if hold and isinstance(given, dict):
            raise ValueError(f"{where}: {factor}: hold goes with a list of levels, not with labelled ones")
    if hold and factor not in ("micro_batch_size", "num_processes"):
        raise ValueError(f"{where}: {factor}: hold: effective_batch_size goes with micro_batch_size and num_processes")
    if isinstance(given, dict):
        if not given:
            raise ValueError(f"{where}: {factor} has no levels; give at least one")
        return [_bundle(as_written(factor), label, changes) for label, changes in given.items()]
    if factor not in SPEC_KEYS:
        raise ValueError(f"{where}: {unknown('factor', factor, SPEC_KEYS)}")
    if given is None or given == []:
        raise ValueError(f"{where}: {factor} has no levels; give at least one")
    if not isinstance(given, list):
        raise ValueError(f"{where}: {factor} is {kind_of(given)}; its levels must be a list like [{as_written(given)}]")
    levels = []
    for value in given:
        changes = changes_of({factor: value}, f"{where}: {factor}")
        name = factor if factor in changes else next(iter(changes))
        # `adapter: qlora` sets two keys: what was written names both.
        text = value if name == factor and isinstance(value, str) and len(changes) > 1 else changes[name]
        levels.append(Level(name, one_line(as_written(text)), changes, hold))
    return levels


def _bundle(factor: str, label: Any, changes: Any) -> Level:
    label = one_line(as_written(label))
    where = f"{factor}: {label}"
    if not isinstance(changes, dict) or not changes:
        raise ValueError(f"{where} is {kind_of(changes)}; a labelled level is a mapping of spec keys")
    return Level(factor, label, changes_of(changes, where))


def _list_levels(given: Any) -> list[Level]:
    if isinstance(given, dict):
        return [_bundle("trials", label, changes) for label, changes in given.items()]
    if not isinstance(given, list):
        raise ValueError(
            f"trials is {kind_of(given)}; it must be a list of mappings, or a mapping of labels to mappings"
        )
    levels = []
    for changes in given:
        if not isinstance(changes, dict) or not changes:
            raise ValueError(f"trials: {kind_of(changes)} is not a mapping of spec keys")
        label = ", ".join(f"{key}={as_written(value)}" for key, value in changes.items())
        levels.append(_bundle("trials", label, changes))
    return levels


def _refuse_too_many(design: Design, factors: list[list[Level]], repeats: int, limit: int) -> None:
    """Counted before anything is expanded: a product of ten factors must not fill the memory first."""
    sizes = [len(levels) for levels in factors]
    count = (math.prod(sizes) if design == "grid" else sum(sizes) + 1) * repeats
    if count > limit:
        raise ValueError(f"{count} trials; the limit is {limit} (raise it with --max-trials {count})")


def _design(
    design: Design, base: dict[str, Any], base_spec: TrialSpec, factors: list[list[Level]], overrides: dict[str, Any]
) -> list[Trial]:
    baseline = Trial(base_spec, "baseline", None, None)

    def apply(levels: Iterable[Level]) -> TrialSpec:
        values = base
        where = []
        for level in levels:
            values = merge(values, level.changes)
            where.append(level.label)
            if level.hold:
                values = _hold_effective_batch(values, base_spec, level)
        return make_spec(merge(values, overrides), ", ".join(where), keys_alone=True)

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


def _hold_effective_batch(values: dict[str, Any], base: TrialSpec, level: Level) -> dict[str, Any]:
    sizes = [values.get(key, 1) for key in ("micro_batch_size", "num_processes")]
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            sizes = [base.effective_batch_size + 1]  # divides nothing
    at_once = math.prod(sizes)
    if base.effective_batch_size % at_once:
        raise ValueError(
            f"{level.label}: {level.factor} {kind_of(values.get(level.factor))} does not divide the effective batch of "
            f"{base.effective_batch_size} that is held"
        )
    return values | {"gradient_accumulation_steps": base.effective_batch_size // at_once}


def _exclude(trials: list[Trial], rules: Any) -> list[Trial]:
    """Drop the trials that agree with every key of a rule. The baseline may be dropped too."""
    if not isinstance(rules, list):
        raise ValueError(f"exclude is {kind_of(rules)}; it must be a list of mappings of spec keys")
    kept = trials
    for rule in rules:
        if not isinstance(rule, dict) or not rule:
            raise ValueError(f"exclude: {kind_of(rule)} is not a mapping of spec keys")
        wanted = changes_of(rule, "exclude")
        example = make_spec({"base_model": "any"} | wanted, "exclude", keys_alone=True)
        before = len(kept)
        kept = [t for t in kept if any(getattr(t.spec, key) != getattr(example, key) for key in wanted)]
        if len(kept) == before:
            said = ", ".join(f"{key}={as_written(value)}" for key, value in rule.items())
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


def interleave(trials: list[Trial], name: str) -> list[Trial]:
    """Each repeat in a random order of its own, so that a drift of the machine falls on no one trial."""
    ordered: list[Trial] = []
    for repeat, group in itertools.groupby(trials, key=lambda t: t.repeat):
        block = list(group)
        random.Random(f"{name}/{repeat}").shuffle(block)
        ordered += block
    return ordered


def _claims(given: Any) -> tuple[Claim, ...]:
    if not isinstance(given, list):
        raise ValueError(f"claims is {kind_of(given)}; it must be a list")
    claims = []
    for number, claim in enumerate(given, start=1):
        if not isinstance(claim, dict):
            keys = ", ".join(key for key, field in Claim.model_fields.items() if field.is_required())
            raise ValueError(f"claims: {kind_of(claim)} is not a mapping with {keys} and compare or where")
        try:
            claims.append(Claim.model_validate(claim))
        except ValidationError as error:
            raise ValueError(f"claims: {as_written(claim.get('id', number))}: {explain(error, Claim)}") from None
    return unique(claims)
