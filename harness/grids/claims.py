"""Claims about techniques, in a form that measurements can test.

A claim names two conditions (`compare`) or one (`where`), a metric, and the expected result.
Grids have their own; the claims and tables of the lesson (docs/lesson.md) are in ``lesson.yml``.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictStr, field_validator, model_validator

from harness.grids.levels import make_spec
from harness.grids.spellings import FLOAT_KEYS, as_number
from harness.metrics import FIGURES, INFERENCE
from harness.record import Model, Status
from harness.spec.datasets import Line
from harness.spec.keys import ALL_LINEAR
from harness.spec.trial import FACTS

DERIVED = ("effective_batch_size", "system_prompt", "own_format")
"""Conditions that are not keys of a spec: the effective batch, whether there is a system prompt, and whether a format
string replaces the model's chat template."""
MODEL = "model"
"""Condition of the inference benchmark: base, unmerged or merged."""
CONDITIONS: tuple[str, ...] = (*(key for key, facts in FACTS.items() if facts.measured), *DERIVED)
WORDS = ("lowest", "highest", "any")
"""Levels by their rank: the extremes of those measured, and all but null."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_EXPECT = re.compile(
    rf"(?P<quantity>ratio|difference|value)\s+"
    rf"(?:(?P<sign><=|>=|<|>|=)\s*(?P<bound>{_NUMBER})"
    rf"|between\s+(?P<low>{_NUMBER})\s+and\s+(?P<high>{_NUMBER}))"
)


def recorded_level(key: str, level: Any) -> Any:
    """A level of a condition as rows hold it: options and layers that get an adapter are JSON, `all-linear` is null.

    Args:
        key: the condition.
        level: as a claim writes it; of layers one name, a list of names, or a list of such lists (any of them).
    """
    if key == "adapter_options" and isinstance(level, Mapping):
        return json.dumps(sorted([name, value] for name, value in level.items()))
    if key != "lora_target_modules" or level in (None, "any"):
        return level
    if isinstance(level, str):
        return None if level == ALL_LINEAR else json.dumps([level])
    return json.dumps(level) if all(isinstance(each, str) for each in level) else [json.dumps(each) for each in level]


class Expectation(BaseModel):
    """A region that a figure should lie in, or the status that a trial should end with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantity: Literal["ratio", "difference", "value", "status"]
    low: float = -math.inf
    high: float = math.inf
    same: bool = False
    """The region is that of no effect."""
    status: str | None = None

    def is_direction(self, no_effect: float) -> bool:
        """Whether it says that there is an effect, and on which side, but not how large: `ratio < 1`."""
        below = self.low == -math.inf and self.high == math.nextafter(no_effect, -math.inf)
        above = self.high == math.inf and self.low == math.nextafter(no_effect, math.inf)
        return below or above

    @classmethod
    def parse(cls, text: str) -> Expectation:
        """Parse `ratio <= 0.75`, `difference < 0`, `value between 8 and 12`, `ratio = 1` or `status oom`.

        Raises:
            ValueError: it is none of these.
        """
        words = text.split()
        if words[:1] == ["status"] and len(words) == 2:
            if words[1] not in get_args(Status):
                raise ValueError(f"no status {words[1]!r}; use {', '.join(get_args(Status))}")
            return cls(quantity="status", status=words[1])
        match = _EXPECT.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not an expectation; write it like 'ratio <= 0.75' or 'difference between 0 and 1'"
            )
        quantity, sign = match["quantity"], match["sign"]
        if sign is None:
            low, high = float(match["low"]), float(match["high"])
            if low > high:
                raise ValueError(f"{text!r}: {low:g} is more than {high:g}; swap them")
            return cls(quantity=quantity, low=low, high=high)
        bound = float(match["bound"])
        if sign == "=":
            if quantity == "value" or bound != (1 if quantity == "ratio" else 0):
                raise ValueError(f"{text!r}: '=' is for no effect (ratio = 1, difference = 0); else give a range")
            return cls(quantity=quantity, low=bound, high=bound, same=True)
        if sign in "<>":  # the bound itself is excluded: equal memory is not less
            bound = math.nextafter(bound, -math.inf if sign == "<" else math.inf)
        return cls(quantity=quantity, **{"high" if "<" in sign else "low": bound})


def _as_recorded(key: str, level: Any) -> Any:
    if isinstance(level, list | tuple):
        return [_as_recorded(key, each) for each in level]
    by_rank = isinstance(level, str) and level in WORDS
    facts = FACTS.get(key)
    if by_rank or facts is None or not facts.given or not isinstance(level, bool | int | float | str):
        return level
    spec = make_spec({"base_model": "any", key: as_number(level) if key in FLOAT_KEYS else level}, key, keys_alone=True)
    value = getattr(spec, key)
    return value if isinstance(value, bool | int | float | str) else level


class Contrast(BaseModel):
    """Two conditions to be compared, by the keys in which they differ."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    compare: dict[str, tuple[Any, Any]] = {}
    """By key, the reference level and the level that is compared with it; a list is any of its members."""
    free: tuple[str, ...] = ()
    """Further keys in which the two may differ; the pair that differs least is taken."""
    hold: tuple[str, ...] = ()
    """Derived conditions that must agree although their parts are free: effective_batch_size."""
    where: dict[str, Any] = {}
    """Levels of both."""

    @field_validator("compare", "where", "free", "hold")
    @classmethod
    def _known_keys(cls, keys: Any) -> Any:
        for key in keys:
            known = (*CONDITIONS, MODEL) if isinstance(keys, dict) else CONDITIONS
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                raise ValueError(f"unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        return keys

    @field_validator("compare", "where", mode="before")
    @classmethod
    def _known_levels(cls, levels: Any) -> Any:
        """Levels as rows hold them: as `vary` reads them, so that 1e-4 is a number and nf5 is refused."""
        return {key: _as_recorded(key, level) for key, level in levels.items()} if isinstance(levels, dict) else levels


class Claim(Contrast):
    """A statement about techniques, and the measurement that would support it."""

    id: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Short name."""
    says: Line
    """The claim in words."""
    section: Line = "of this grid"
    """Where it is made."""
    metric: StrictStr = ""
    """Metric that decides it; with `expect: status …` none is needed."""
    per: StrictStr | None = None
    """Metric by which the first is divided; with `where` only."""
    expect: Line
    """See `Expectation.parse`."""

    @field_validator("metric", "per")
    @classmethod
    def _known_metric(cls, name: str | None) -> str | None:
        if name and name not in FIGURES:
            near = difflib.get_close_matches(name, list(FIGURES), n=1)
            hint = f"; did you mean {near[0]}?" if near else "; `harness keys` lists them"
            raise ValueError(f"unknown metric {name!r}{hint}")
        return name

    @model_validator(mode="after")
    def _agrees(self) -> Claim:
        expected = self.expectation
        if not self.metric and expected.quantity != "status":
            description = type(self).model_fields["metric"].description
            raise ValueError(f"metric is missing; give one: {description}")
        if bool(self.compare) == (expected.quantity in ("value", "status")):
            wanted = "ratio or difference" if self.compare else "value or status"
            given = "compare" if self.compare else "where alone"
            raise ValueError(f"expect {self.expect!r} with {given}; it takes {wanted}")
        if MODEL in self.compare or MODEL in self.where or self.is_about_inference:
            self._check_inference()
        if self.compare and expected.quantity != (scale := FIGURES[self.metric].scale):
            raise ValueError(f"{self.metric} is compared by {scale}, not by {expected.quantity}")
        if not self.compare and not self.where:
            raise ValueError("it names no condition; give compare or where")
        if self.compare and self.per:
            raise ValueError(f"per {self.per} with compare; a figure is divided by another one with where alone")
        return self

    @property
    def is_about_inference(self) -> bool:
        """Whether its metric is one of the inference benchmark, not of training."""
        return self.metric in INFERENCE

    def _check_inference(self) -> None:
        if not self.is_about_inference:
            raise ValueError(f"the inference benchmark has no {self.metric}; it has {', '.join(INFERENCE)}")
        if {*self.compare} != {MODEL} or self.where or self.free or self.hold or self.per:
            raise ValueError(
                f"{self.metric} is a metric of the inference benchmark; compare {{model: [unmerged, merged]}} alone"
            )
        for name in self.compare[MODEL]:
            if name not in get_args(Model):
                raise ValueError(f"no model {name!r}; use {', '.join(get_args(Model))}")

    @functools.cached_property
    def expectation(self) -> Expectation:
        """`expect`, parsed."""
        return Expectation.parse(self.expect)


class Row(Contrast):
    """A technique in a table of the lesson, and what the lesson says about it."""

    name: Line
    """The technique."""
    memory: StrictStr = ""
    """What the lesson says about memory."""
    speed: StrictStr = ""
    """About speed."""
    loss: StrictStr = ""
    """About accuracy."""


class LessonTable(BaseModel):
    """A table of the lesson, to be filled with measurements."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    title: Line
    rows: tuple[Row, ...]


class Lesson(BaseModel):
    """The lesson's tables and claims."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tables: tuple[LessonTable, ...]
    claims: tuple[Claim, ...]


@functools.cache
def lesson() -> Lesson:
    """The bundled tables and claims of the lesson."""
    text = resources.files("harness").joinpath("grids/lesson.yml").read_text(encoding="utf-8")
    return Lesson.model_validate(yaml.safe_load(text))


def unique(claims: Iterable[Claim]) -> tuple[Claim, ...]:
    """The claims, each with an id of its own.

    Raises:
        ValueError: two have the same id.
    """
    seen: dict[str, Claim] = {}
    for claim in claims:
        if claim.id in seen:
            raise ValueError(f"two claims are called {claim.id!r}; rename one")
        seen[claim.id] = claim
    return tuple(seen.values())
