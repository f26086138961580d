"""What people say of techniques, in a form that measurements can judge.

A claim names two conditions (`compare`) or one (`where`), a metric and what is expected of it.
Grids bring their own; the lesson's are in ``data/lesson.yml`` beside its tables.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterable
from importlib import resources
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr, field_validator, model_validator

from harness.metrics import FIGURES, INFERENCE
from harness.results import Model, Status
from harness.spec import TrialSpec

DERIVED = ("effective_batch_size", "system_prompt", "own_format")
"""Conditions beside the keys of a spec: the effective batch, whether there is a system prompt, and whether the prompt
is a format string of one's own instead of the model's chat template."""

MODEL = "model"
"""Condition of a trained model at work: base, unmerged or merged."""

CONDITIONS: tuple[str, ...] = (*(k for k in TrialSpec.model_fields if k not in TrialSpec.WITHOUT_EFFECT), *DERIVED)

WORDS = ("lowest", "highest", "any")
"""Levels by what they are: the extremes of those measured, and everything but null."""

_EXPECT = re.compile(
    r"(?P<quantity>ratio|difference|value)\s+"
    r"(?:(?P<sign><=|>=|<|>|=)\s*(?P<bound>-?\d+(?:\.\d+)?)"
    r"|between\s+(?P<low>-?\d+(?:\.\d+)?)\s+and\s+(?P<high>-?\d+(?:\.\d+)?))"
)


class Expectation(BaseModel):
    """A region that a figure should lie in, or the status that a trial should end with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantity: Literal["ratio", "difference", "value", "status"]
    low: float = -math.inf
    high: float = math.inf
    same: bool = False
    """The region is whatever counts as no effect."""
    status: str | None = None

    @classmethod
    def parse(cls, text: str) -> Expectation:
        """`ratio <= 0.75`, `difference < 0`, `value between 8 and 12`, `ratio = 1`, `status oom`.

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
                f"{text!r} is no expectation; write it like 'ratio <= 0.75' or 'difference between 0 and 1'"
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
        if sign in "<>":  # the bound itself is outside: memory that is equal is not less
            bound = math.nextafter(bound, -math.inf if sign == "<" else math.inf)
        return cls(quantity=quantity, **{"high" if "<" in sign else "low": bound})


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of printable text")
    return text


Line = Annotated[StrictStr, Field(min_length=1, max_length=500), AfterValidator(_one_line)]


class Contrast(BaseModel):
    """Two conditions that differ in the named keys, and in what follows from them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    compare: dict[str, tuple[Any, Any]] = {}
    """By key, the level that is compared with and the level that is looked at; a list is any of its members."""
    free: tuple[str, ...] = ()
    """Further keys in which the two may differ; the pair that differs least is taken."""
    hold: tuple[str, ...] = ()
    """Keys that must agree although what makes them up is free: effective_batch_size."""
    where: dict[str, Any] = {}
    """Levels that both have."""

    @field_validator("compare", "where", "free", "hold")
    @classmethod
    def _known_keys(cls, keys: Any) -> Any:
        for key in keys:
            known = (*CONDITIONS, MODEL) if isinstance(keys, dict) else CONDITIONS
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                raise ValueError(f"unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        return keys


class Claim(Contrast):
    """A sentence about techniques, and what would have to be measured for it to hold."""

    id: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Short name."""
    says: Line
    """The claim in words."""
    section: Line = "of this grid"
    """Where it is made."""
    metric: StrictStr
    """Figure that decides it."""
    per: StrictStr | None = None
    """Figure by which the first is divided; for `where` alone."""
    expect: Line
    """See `Expectation.parse`."""

    @field_validator("metric", "per")
    @classmethod
    def _known_metric(cls, name: str | None) -> str | None:
        if name is not None and name not in FIGURES:
            near = difflib.get_close_matches(name, list(FIGURES), n=1)
            hint = f"; did you mean {near[0]}?" if near else "; `harness keys` lists them"
            raise ValueError(f"unknown metric {name!r}{hint}")
        return name

    @model_validator(mode="after")
    def _agrees(self) -> Claim:
        expected = self.expectation
        if bool(self.compare) == (expected.quantity in ("value", "status")):
            wanted = "ratio or difference" if self.compare else "value or status"
            given = "compare" if self.compare else "where alone"
            raise ValueError(f"expect {self.expect!r} with {given}; it takes {wanted}")
        if MODEL in self.compare or MODEL in self.where or self.is_of_models:
            self._refuse_unless_of_models()
        scale = FIGURES[self.metric].scale
        if self.compare and expected.quantity != scale:
            raise ValueError(f"{self.metric} is compared by {scale}, not by {expected.quantity}")
        if not self.compare and not self.where:
            raise ValueError("it names no condition; give compare or where")
        return self

    @property
    def is_of_models(self) -> bool:
        """Whether it is about a trained model at work, not about its training."""
        return self.metric in INFERENCE

    def _refuse_unless_of_models(self) -> None:
        if not self.is_of_models:
            raise ValueError(f"models at work have no {self.metric}; they have {', '.join(INFERENCE)}")
        if {*self.compare} != {MODEL} or self.where or self.free or self.hold or self.per:
            raise ValueError(
                f"{self.metric} is a figure of models at work; compare {{model: [unmerged, merged]}} alone"
            )
        for name in self.compare[MODEL]:
            if name not in get_args(Model):
                raise ValueError(f"no model {name!r}; use {', '.join(get_args(Model))}")

    @functools.cached_property
    def expectation(self) -> Expectation:
        """`expect`, understood."""
        return Expectation.parse(self.expect)


class Row(Contrast):
    """A technique in a table of the lesson, and the words that the lesson has for it."""

    name: Line
    """The technique."""
    memory: StrictStr = ""
    """What the lesson says of memory."""
    speed: StrictStr = ""
    """Of speed."""
    loss: StrictStr = ""
    """Of accuracy."""


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
    """The lesson's tables and claims, as shipped."""
    text = resources.files("harness").joinpath("data/lesson.yml").read_text(encoding="utf-8")
    return Lesson.model_validate(yaml.safe_load(text))


def unique(claims: Iterable[Claim]) -> tuple[Claim, ...]:
    """The claims, refused where two have one id.

    Raises:
        ValueError: naming it.
    """
    seen: dict[str, Claim] = {}
    for claim in claims:
        if claim.id in seen:
            raise ValueError(f"two claims are called {claim.id!r}; rename one")
        seen[claim.id] = claim
    return tuple(seen.values())
