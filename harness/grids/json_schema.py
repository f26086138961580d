"""The JSON schema of grid files, by which editors complete and check YAML (`harness schema`).

It says of what kind each value is, and which keys there are; what goes with what, `harness run --dry-run` says.
"""

from __future__ import annotations

from typing import Any, get_args

from harness.grids import presets
from harness.grids.claims import Claim
from harness.grids.document import Match
from harness.grids.grid import Design
from harness.grids.levels import SPEC_KEYS
from harness.grids.search import Sampler
from harness.spec.keys import ADAPTERS, FULL, INITIALISATIONS
from harness.spec.trial import TrialSpec

_NUMBER = {"type": "string", "pattern": r"^[-+]?([0-9][0-9_.]*|\.[0-9]+)[eE][-+]?[0-9]+$"}
"""A number as text: YAML 1.1 reads 1e-4 so."""
_SEVERAL_SPELLINGS: dict[str, dict[str, Any]] = {
    "adapter": {"enum": [*ADAPTERS, FULL, "qlora", None]},
    "init_lora_weights": {"anyOf": [{"enum": [*INITIALISATIONS]}, {"type": ["string", "boolean"]}]},
    "tf32": {"enum": [True, False, "auto"]},
    "datasets": {"type": "array", "items": {"type": ["string", "object"]}},
    "test_datasets": {"type": ["array", "null"], "items": {"type": ["string", "object"]}},
    "adapter_options": {"type": ["object", "array", "null"]},
    "memory_budget": {"type": ["string", "integer", "null"]},
    "lora_target_modules": {"type": ["array", "string", "null"]},
    "special_tokens": {"type": ["object", "array", "null"]},
    "evaluate_tasks": {"type": ["string", "array", "null"]},
}
"""Keys that take other kinds of values than a spec holds."""
_BUNDLE = {"$ref": "#/$defs/Bundle"}
"""Some keys with their values."""
_LABELLED = {"$ref": "#/$defs/Bundles"}
"""Bundles of keys by their labels."""
_INTERVAL, _CONDITIONAL = {"$ref": "#/$defs/Interval"}, {"$ref": "#/$defs/Conditional"}
"""Of a search space: a range, and levels under a condition."""


def grid_schema() -> dict[str, Any]:
    """The schema, in the draft of 2020-12."""
    keys = _keys()
    # Each key is written once: copies of all keys in the levels of each would be megabytes, too many for an editor.
    bundle = {"type": "object", "properties": keys, "additionalProperties": False, "minProperties": 1}
    refs = {key: {"$ref": f"#/$defs/Bundle/properties/{key}"} for key in keys}
    claim = Claim.model_json_schema()
    count = {"type": "integer", "minimum": 1}
    positive = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, _NUMBER]}
    properties: dict[str, Any] = {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"} | _says("Folder of its results."),
        "title": {"type": "string"} | _says("Heading of its report."),
        "base": {"anyOf": [{"type": "string"}, {"type": "object", "properties": refs}]}
        | _says("Keys of every trial, or the path of a training file. Keys of other tools may stand here too."),
        "design": {"enum": [*get_args(Design)]}
        | _says("One thing at a time (ablation), one after another (ladder), all combinations (grid), or a list."),
        "vary": {
            "type": "object",
            "properties": {key: {"anyOf": [*_levels(ref), _LABELLED]} for key, ref in refs.items()},
            "additionalProperties": _LABELLED,
        }
        | _says("Factors: levels of a key, or labelled bundles of keys."),
        "trials": {"anyOf": [{"type": "array", "items": _BUNDLE}, _LABELLED]} | _says("Of design list."),
        "exclude": {"type": "array", "items": _BUNDLE} | _says("Trials that are left out: all that have these values."),
        "repeats": count | _says("Of each trial, with paired seeds."),
        "baseline_repeats": count | _says("Of the baseline alone."),
        "visits": {"type": "integer", "minimum": 0} | _says("Timing visits of each trial; 0: nothing is timed."),
        "visit_seconds": positive | _says("Least seconds of each visit."),
        "claims": {"type": "array", "items": {"$ref": "#/$defs/Claim"}} | _says("What the report judges."),
        "tune": _tune(refs) | _says("A search space, for harness tune."),
        "price_per_hour": positive | _says("Of the machine, for the cost of a loss."),
        "match": {"enum": [*get_args(Match)]} | _says("Make adapters as large as the baseline's by this figure."),
        "tune_first": _tune_first() | _says("Give each configuration its learning rate before the comparison."),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Grid file of harness",
        "type": "object",
        "properties": properties,
        "required": ["base"],
        "additionalProperties": False,
        "$defs": {
            **claim.pop("$defs", {}),
            "Claim": claim,
            "Bundle": bundle,
            "Bundles": {"type": "object", "additionalProperties": _BUNDLE, "minProperties": 1},
            **_of_spaces(),
        },
    }


def _tune_first() -> dict[str, Any]:
    numbers = {"type": "array", "items": {"anyOf": [{"type": "number"}, _NUMBER]}, "minItems": 2}
    relative = _mapping({"multiples": numbers}, required=["multiples"])
    rates = {"anyOf": [{"const": "learning_rate"}, numbers, relative]}
    return {"anyOf": [{"const": "learning_rate"}, _mapping({"learning_rate": rates}, required=["learning_rate"])]}


def _mapping(properties: dict[str, Any], *, required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _says(text: str) -> dict[str, str]:
    return {"description": text}


def _keys() -> dict[str, Any]:
    """The schema of each key that a configuration may have."""
    own = TrialSpec.model_json_schema()["properties"]
    keys: dict[str, Any] = {}
    for name in SPEC_KEYS:
        field = own.get(name)
        if field is None:  # another spelling of some
            keys[name] = {"enum": [*presets.PRESETS]} if name == presets.LIKE else {}
            continue
        about = {key: field[key] for key in ("description", "default") if key in field}
        keys[name] = (_SEVERAL_SPELLINGS[name] if name in _SEVERAL_SPELLINGS else _value(name, field)) | about
    return keys


def _value(name: str, field: dict[str, Any]) -> dict[str, Any]:
    kinds = field.get(
        "anyOf", [{key: of for key, of in field.items() if key not in ("description", "default", "title")}]
    )
    if any(kind.get("type") == "number" for kind in kinds):
        kinds = [*kinds, _NUMBER]
    if name == "optimizer":  # null is torch's AdamW
        kinds = [*kinds, {"type": "null"}]
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _levels(of: dict[str, Any]) -> list[dict[str, Any]]:
    listed = {"type": "array", "items": of, "minItems": 1}
    held = {"levels": listed, "hold": {"const": "effective_batch_size"}}
    return [listed, _mapping(held, required=["levels"])]


def _of_spaces() -> dict[str, Any]:
    number = {"anyOf": [{"type": "number"}, _NUMBER]}
    when = {"type": "object"}
    ends = {"low": number, "high": number, "log": {"type": "boolean"}, "step": number, "when": when}
    levels = {"levels": {}, "hold": {"const": "effective_batch_size"}, "when": when}
    return {
        "Interval": _mapping(ends, required=["low", "high"]),
        "Conditional": _mapping(levels, required=["levels"]),
    }


def _tune(refs: dict[str, Any]) -> dict[str, Any]:
    space = {key: {"anyOf": [_INTERVAL, _CONDITIONAL, *_levels(ref), _LABELLED]} for key, ref in refs.items()}
    bundles = {"anyOf": [_LABELLED, _CONDITIONAL]}
    properties = {
        "space": {"type": "object", "properties": space, "additionalProperties": bundles},
        "objectives": {"type": ["string", "array", "object"]},
        "constraints": {"type": "array", "items": {"type": "string"}},
        "sampler": {"enum": [*get_args(Sampler)]},
        "trials": {"type": "integer", "minimum": 1},
        "timeout": {"anyOf": [{"type": ["number", "null"]}, _NUMBER]},
        "pruner": {"type": ["string", "object", "null"]},
        "confirm": {"type": "integer", "minimum": 0},
        "seed": {"type": "integer", "minimum": 0},
    }
    return _mapping(properties, required=["space"])
