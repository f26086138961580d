"""A grid file to trials, validated before the first process starts."""

from __future__ import annotations

import fnmatch
import itertools
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from harness._util.messages import as_written, explain, kind_of, one_line, unknown
from harness.dialects.training_file import OWN, TrainingFile, is_training_file
from harness.environment import DeviceType, resolve_device
from harness.errors import InputError
from harness.grids.claims import Claim, unique
from harness.grids.document import (
    GRID_KEYS,
    NO_TIMING,
    Match,
    Rates,
    Timing,
    base_of,
    header,
    located,
    match_of,
    price_of,
    rates_of,
    timing_of,
)
from harness.grids.levels import (
    ACCUMULATION,
    Level,
    changes_of,
    hold_effective_batch,
    levels_of,
    list_levels,
    make_spec,
)
from harness.grids.presets import LIKE
from harness.grids.spellings import merge
from harness.grids.yaml_file import read_yaml
from harness.record import NO_CONTENTS, Contents, Tuned
from harness.spec.trial import TrialSpec

Design = Literal["ablation", "ladder", "grid", "list"]
MAX_TRIALS = 500
"""More than this many trials (repeats included) need `--max-trials`."""


@dataclass(frozen=True)
class Trial:
    """A spec to be executed once, and its place in the grid."""

    spec: TrialSpec
    label: str
    """Its name: `lora_r=4`, `full fine-tuning`, `baseline`."""
    factor: str | None
    """The factor in which it differs from the baseline; null for the baseline, and for several."""
    level: str | None
    """That factor's level, as text."""
    repeat: int = 0
    """Repeat k of every trial has the same seed."""
    baseline_id: str | None = None
    """Id of the baseline of its repeat, with which it is compared; its own if it is that baseline. Null where the grid
    has none."""
    twin: bool = False
    """Whether it is the second run of the baseline: what the two differ by is noise (A/A)."""
    contents: Contents = NO_CONTENTS
    """Fingerprints of what it reads."""

    @property
    def baseline(self) -> bool:
        """Whether the others are compared with it."""
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
    """The search that its trials come from, as `Search.given`."""
    timing: Timing = NO_TIMING
    """How much is timed."""
    looks: int = 1
    """How often its rows are looked at, at most, to see whether more are needed."""
    match: Match | None = None
    """At which figure its adapters are as large as the baseline's; null: they are as their options say."""
    price_per_hour: float | None = None
    """Of the machine, in whatever currency; null: not given."""
    rates: Rates | None = None
    """Learning rates that each configuration is tried at before the comparison; null: each has its own."""
    tuned: Tuned | None = None
    """What was found by that; null: nothing yet."""
    training_file: TrainingFile | None = None
    """What the training file that its base comes from means; null: the base is harness's own."""
    merged: Mapping[str, str] = field(default_factory=dict)
    """Labels of levels that are one configuration with another, and the label that it has."""
    whole: bool = True
    """Whether all trials of the file are among these."""

    @property
    def about(self) -> dict[str, Any]:
        """What a report needs besides the rows, as plain JSON values."""
        about: dict[str, Any] = {
            "title": self.title,
            "claims": [claim.model_dump(mode="json") for claim in self.claims],
        }
        if self.match is not None:
            about["match"] = self.match
        if self.price_per_hour is not None:
            about["price_per_hour"] = self.price_per_hour
        if self.tuned is not None:
            about["tuned"] = self.tuned.model_dump(mode="json")
        if self.looks > 1:
            about["looks"] = self.looks
        if self.training_file is not None:
            about["training_file"] = self.training_file.about
        known = [trial for trial in self.trials if trial.contents != NO_CONTENTS]
        if known:
            about["contents"] = {
                "data": {trial.spec.datasets_json + trial.spec.tasks_json: trial.contents.data for trial in known},
                "base": {trial.spec.base_model: trial.contents.base for trial in known},
            }
        return about if self.tune is None else about | {"tune": dict(self.tune)}

    @property
    def repeats(self) -> int:
        """Number of repeats of each trial; the baseline alone may have more."""
        return 1 + max((trial.repeat for trial in self.trials if not trial.baseline), default=0)

    @property
    def device_types(self) -> tuple[DeviceType, ...]:
        """Kinds of device that its trials run on."""
        return tuple(dict.fromkeys(resolve_device(trial.spec.device) for trial in self.trials))

    def with_contents(self, contents_of: Callable[[TrialSpec], Contents]) -> Grid:
        """The grid with the fingerprints of what each trial reads."""
        return replace(self, trials=tuple(replace(t, contents=contents_of(t.spec)) for t in self.trials))

    def with_specs(self, specs: Mapping[str, TrialSpec]) -> Grid:
        """The grid with other specs in place of those with these ids.

        Raises:
            InputError: two of its configurations are one then.
        """
        ids = {old: new.id for old, new in specs.items()}
        trials = tuple(
            replace(t, spec=specs.get(t.spec.id, t.spec), baseline_id=ids.get(t.baseline_id or "", t.baseline_id))
            for t in self.trials
        )
        labels: dict[str, str] = {}
        for trial in (each for each in trials if not each.twin):
            if labels.setdefault(trial.spec.id, trial.label) != trial.label:
                raise InputError(
                    f"{self.name}: {labels[trial.spec.id]} and {trial.label} are one configuration at the size and the "
                    "learning rate that match and tune_first give them; drop one of them"
                )
        return replace(self, trials=trials)

    def only(self, labels: Collection[str]) -> Grid:
        """The grid with these trials only, and the baseline that they are compared with."""
        kept = tuple(t for t in self.trials if t.baseline or t.twin or t.label in labels)
        return replace(self, trials=kept, whole=False)


def load(
    path: Path,
    *,
    repeats: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    max_trials: int = MAX_TRIALS,
    without_unsupported: bool = False,
) -> Grid:
    """Read a grid file, or a training configuration as a grid of one trial.

    Args:
        path: the YAML file.
        repeats: replaces the file's own.
        overrides: spec keys that replace those of every trial (`memory_budget`).
        max_trials: largest number of trials that is accepted.
        without_unsupported: leave out keys of another tool's training file that are not supported.

    Raises:
        InputError: the file is not a valid grid.
    """
    document = read_yaml(path)
    try:
        if is_training_file(document, GRID_KEYS):
            document = {"base": str(path.absolute()), "design": "list"}
        return _build(document, path, repeats, dict(overrides or {}), max_trials, without_unsupported)
    except InputError:  # of a training file, with all its reasons
        raise
    except ValueError as error:
        raise InputError(one_line(f"{path.name}: {error}")) from None


def labels_like(grid: Grid, patterns: Sequence[str]) -> set[str]:
    """Labels of a grid that equal or match one of the patterns (`*`, `?`, `[…]`).

    Raises:
        InputError: a pattern matches no trial.
    """
    labels = list(dict.fromkeys(trial.label for trial in grid.trials if not trial.twin))
    matching = set()
    for pattern in patterns:
        matched = {label for label in labels if label == pattern or fnmatch.fnmatchcase(label, pattern)}
        if not matched:
            raise InputError(one_line(f"{grid.name}: {unknown('trial', pattern, labels)}"))
        matching |= matched
    return matching


def _build(
    document: dict[str, Any],
    path: Path,
    repeats: int | None,
    overrides: dict[str, Any],
    max_trials: int,
    without_unsupported: bool,
) -> Grid:
    name, title = header(document, path)
    if "tune" in document and not document.keys() & {"vary", "trials"}:
        raise ValueError(f"it has tune: and no vary: or trials:; run it with harness tune {path}")
    design = document.get("design", "list" if "trials" in document else "ablation")
    if design not in get_args(Design):
        raise ValueError(unknown("design", design, get_args(Design)))
    times = _count(document, "repeats", repeats)
    of_baseline = max(times, _count(document, "baseline_repeats"))

    base, meant = base_of(document, path, without_unsupported=without_unsupported)
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
    trials, merged = _merge_duplicates(trials)
    trials = [replace(trial, spec=located(trial.spec, path)) for trial in trials]
    _refuse_equal_labels(trials, base_spec)
    rates = rates_of(document, base_spec)
    if rates and any(trial.factor == "learning_rate" for trial in trials):
        raise ValueError("tune_first chooses the learning rate of each configuration, and vary gives it; keep one")
    timing = timing_of(document)
    repeated = [trial for k in range(times) for trial in repeat(trials, base_spec, k)]
    # Alone, it has no second run: it shows how much a seed changes a loss.
    baseline = [trial for trial in trials if trial.spec.id == base_spec.id]
    repeated += [trial for k in range(times, of_baseline) for trial in repeat(baseline, base_spec, k)]
    claims = _claims(document.get("claims", []))
    return Grid(
        name,
        title + meant.suffix,
        design,
        tuple(interleave(repeated, name)),
        claims,
        timing=timing,
        match=match_of(document, design),
        price_per_hour=price_of(document),
        rates=rates,
        training_file=None if meant.tool == OWN else meant,
        merged=merged,
    )


def _count(document: Mapping[str, Any], key: str, instead: int | None = None) -> int:
    count = document.get(key, 1) if instead is None else instead
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{key} is {kind_of(count)}; it must be a whole number of 1 or more")
    return count


def repeat(trials: Sequence[Trial], base: TrialSpec, number: int) -> list[Trial]:
    """The trials with the seed of one repeat and the id of its baseline, which is run twice in the first.

    Speeds are those of the first repeat, and so is their noise.
    """

    def seeded(spec: TrialSpec) -> TrialSpec:
        return spec.model_copy(update={"seed": spec.seed + number})

    has_baseline = any(t.spec.id == base.id for t in trials)
    baseline_id = seeded(base).id if has_baseline else None
    repeated = [replace(t, repeat=number, spec=seeded(t.spec), baseline_id=baseline_id) for t in trials]
    if number == 0 and len(trials) > 1:  # alone, it is compared with nothing
        repeated += [replace(t, label=f"{t.label} again", twin=True) for t in repeated if t.baseline]
    return repeated


def _factors(document: dict[str, Any], design: Design) -> list[list[Level]]:
    """The levels of each factor, in file order."""
    if design == "list":
        if "vary" in document:
            raise ValueError("design list takes trials:, not vary:")
        return [list_levels(document.get("trials", []))]
    if "trials" in document:
        raise ValueError(f"trials: is for design list; design {design} takes vary:")
    vary = document.get("vary", {})
    if not isinstance(vary, dict):
        raise ValueError(f"vary is {kind_of(vary)}; it must be a mapping of factors to levels")
    return [levels_of(factor, given) for factor, given in vary.items()]


def _refuse_too_many(design: Design, factors: list[list[Level]], repeats: int, limit: int) -> None:
    """Counted before anything is expanded: a product of ten factors would fill the memory."""
    sizes = [len(levels) for levels in factors]
    count = (math.prod(sizes) if design == "grid" else sum(sizes) + 1) * repeats
    if count > limit:
        raise ValueError(f"{count} trials; the limit is {limit} (raise it with --max-trials {count})")


def _design(
    design: Design, base: dict[str, Any], base_spec: TrialSpec, factors: list[list[Level]], overrides: dict[str, Any]
) -> list[Trial]:
    baseline = Trial(base_spec, "baseline", None, None)

    def apply(levels: Sequence[Level]) -> TrialSpec:
        where = ", ".join(level.label for level in levels)
        values, held = base, False
        for number, level in enumerate(levels):
            values = merge(values, level.changes)
            if design == "grid":
                _refuse_replacing(level, levels[:number], values)
            # A later rung of a ladder may set the accumulation itself.
            held = (held or level.hold) and ACCUMULATION not in level.changes
        values = merge(values, overrides)
        if held:
            values = hold_effective_batch(values, base_spec, where)
        return make_spec(values, where, keys_alone=True)

    trials = [baseline]
    if design == "grid":
        if not factors:
            return trials
        every = [level for levels in factors for level in levels]
        given = [level for level in every if ACCUMULATION in level.changes]
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


def _refuse_replacing(level: Level, before: Sequence[Level], values: Mapping[str, Any]) -> None:
    """A product's label names each of its levels; one that a later factor replaces would not be what was trained."""
    for other in before:
        # Of a preset, keys that are given next to it win.
        if other.factor != LIKE and any(values.get(key) != value for key, value in other.changes.items()):
            raise ValueError(
                f"vary: {level.label} replaces {other.label} where design grid has both; keep one of these factors, "
                "or make them one of labelled levels"
            )


def _exclude(trials: list[Trial], rules: Any) -> list[Trial]:
    """Drop the trials that match every key of a rule, the baseline included."""
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
            shown = ", ".join(f"{key}={as_written(value)}" for key, value in rule.items())
            raise ValueError(f"exclude: no trial has {shown}; drop the rule")
    if not kept:
        raise ValueError("exclude leaves no trial; drop a rule")
    return kept


def _merge_duplicates(trials: list[Trial]) -> tuple[list[Trial], dict[str, str]]:
    """The trials with a spec that occurs twice (a level equal to the baseline) once, under its first label; and by each
    other label, that one.
    """
    first: dict[str, Trial] = {}
    merged: dict[str, str] = {}
    for trial in trials:
        kept = first.setdefault(trial.spec.id, trial)
        if kept is not trial:
            merged[trial.label] = kept.label
    return list(first.values()), merged


def _refuse_equal_labels(trials: Sequence[Trial], base: TrialSpec) -> None:
    """A report knows a configuration by its label."""
    taken: dict[str, str | None] = {}
    for trial in trials:
        if trial.label in taken:
            of = " and ".join(factor or "the baseline" for factor in (taken[trial.label], trial.factor))
            hint = "; YAML reads on and yes as true, off and no as false" if trial.label in ("true", "false") else ""
            raise ValueError(f"two trials are called {trial.label}: of {of}; give each a label of its own{hint}")
        taken[trial.label] = trial.factor
        if trial.spec.id == base.id:
            taken[f"{trial.label} again"] = "its second run"


def interleave(trials: list[Trial], name: str) -> list[Trial]:
    """Shuffle each repeat separately, so that no trial takes all of a drift of the machine, its baselines first: what
    ends after them can be compared, also where a run stops halfway.
    """
    ordered: list[Trial] = []
    for repeat, group in itertools.groupby(trials, key=lambda t: t.repeat):
        block = list(group)
        random.Random(f"{name}/{repeat}").shuffle(block)
        ordered += sorted(block, key=lambda t: not t.baseline)
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
