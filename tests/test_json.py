"""What commands print with `--json` and do not print with `--quiet`; the schema of grid files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from jsonschema import Draft202012Validator
from test_cli import ROOT, Ask

from harness.grids import document, json_schema, search_file
from harness.grids.levels import SPEC_KEYS
from harness.grids.yaml_file import read_yaml
from harness.results.store import Store
from harness.spec.trial import FACTS, TrialSpec

RESULTS = str(ROOT / "results")


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture
def printed(ask: Ask) -> Callable[..., Any]:
    """What a command prints: JSON and nothing else, without numbers that JSON does not have."""

    def run(*arguments: str) -> Any:
        code, out, err = ask(*arguments, "--json")
        assert code == 0, err
        return json.loads(out, parse_constant=refuse)

    return run


def test_recorded_grids_and_trials(printed: Callable[..., Any]) -> None:
    grids = {each["grid"]: each for each in printed("ls", "--results", RESULTS)}
    rows = Store(ROOT / "results/techniques").read("trials").to_pylist()
    assert grids["techniques"]["trials"] == len(rows) == sum(grids["techniques"]["status"].values())
    trials = printed("ls", "techniques", "--results", RESULTS)
    assert {each["trial_id"] for each in trials} == {row["trial_id"] for row in rows}
    by_id = {row["trial_id"]: row for row in rows}
    for each in trials:
        row = by_id[each["trial_id"]]
        assert each["figures"]["peak_memory_bytes"] == row["peak_memory_bytes"]
        assert each["configuration"].get("lora_r", row["lora_r"]) == row["lora_r"]
        assert each["started_at"] == row["started_at"].isoformat()
    (shown,) = printed("show", trials[0]["spec_id"], "--results", RESULTS)[:1]
    assert shown["grid"] == "techniques"
    assert shown["environment"]["device_type"] == "cpu"
    assert shown["figures"] == trials[0]["figures"]


def test_what_is_recommended_and_compared(printed: Callable[..., Any], tmp_path: Path) -> None:
    folder = str(ROOT / "results/techniques")
    best = printed("recommend", folder, "--memory", "1GiB")
    assert best["front"][0]["label"] == best["configuration"]
    assert best["front"][0]["memory"] <= 2**30
    assert (tmp_path / best["file"]).read_text() == best["yaml"]
    compared = printed("compare", folder, folder)
    assert compared["environments"] == []
    (baseline,) = [pair for pair in compared["pairs"] if pair["label"] == "baseline"]
    assert baseline["estimates"]["peak_memory_bytes"]["value"] == 1
    assert baseline["first"] == baseline["second"]


def test_this_machine(ask: Ask) -> None:
    code, out, _ = ask("doctor", "--json")
    checks = json.loads(out)
    assert {"what", "detail", "works", "remedy"} == set(checks[0])
    assert code == any(each["works"] is False for each in checks)


def test_a_run_prints_its_trials(ask: Ask, tmp_path: Path) -> None:
    grid = {
        "name": "two",
        "base": SMALL | {"device": "cpu", "train_samples": 4, "memory_budget": "1GiB"},
        "visits": 0,
        "vary": {"lora_r": [8], "memory_budget": ["1MiB"]},
    }
    (tmp_path / "two.yml").write_text(json.dumps(grid))
    _, out, err = ask("run", "two.yml", "--dry-run", "--json")
    assert "4 to run" in err
    planned = json.loads(out)
    assert [each["recorded"] for each in planned["trials"]] == [False] * 4
    code, out, err = ask("run", "two.yml", "--no-predict", "--engine", "inline", "--json", "--quiet")
    assert code == 0, err
    made = json.loads(out)
    assert " to run" not in err
    assert made["left"] == 0
    assert {each["label"]: each["status"] for each in made["trials"]} == {
        "baseline": "ok", "baseline again": "ok", "lora_r=8": "ok", "memory_budget=1MiB": "oom",
    }  # fmt: skip
    assert {each["spec_id"] for each in made["trials"]} == {each["spec_id"] for each in planned["trials"]}


def test_quiet_says_what_is_wrong(ask: Ask) -> None:
    code, out, err = ask("run", "none.yml", "--quiet")
    assert (code, out) == (2, "")
    assert "none.yml: no such file" in err


# ------------------------------------------------------------------------------------ the schema of grid files


def test_the_schema_takes_what_is_taken_and_knows_every_key(ask: Ask) -> None:
    _, out, _ = ask("schema")
    schema = json.loads(out)
    assert len(out) < 200_000, "editors read it with every grid file"
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert set(schema["properties"]) == {*document.GRID_KEYS}
    assert set(schema["properties"]["tune"]["properties"]) == {*search_file.KEYS}
    described = schema["$defs"]["Bundle"]["properties"]
    assert set(described) == set(schema["properties"]["base"]["anyOf"][1]["properties"]) == {*SPEC_KEYS}
    for key, field in TrialSpec.model_fields.items():
        assert not FACTS[key].given or described[key].get("description") == field.description
    for file in sorted((ROOT / "grids").glob("*.yml")):
        errors = [each.message for each in validator.iter_errors(read_yaml(file))]
        assert not errors, f"{file.name}: {errors}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"vari": {}},
        {"design": "all"},
        {"repeats": 0},
        {"vary": {"lora_r": 4}},
        {"vary": {"lora_r": ["four"]}},
        {"vary": {"precision": ["bf8"]}},
        {"vary": {"kind": {"low rank": {"lora_rank": 4}}}},
        {"base": {"base_model": "random:tiny", "gradient_checkpointing": "sometimes"}},
        {"claims": [{"id": "one"}]},
        {"tune": {"objectives": ["eval_loss"]}},
    ],
)
def test_the_schema_finds_what_is_refused(wrong: dict[str, Any]) -> None:
    validator = Draft202012Validator(json_schema.grid_schema())
    grid = {"base": {"base_model": "random:tiny"}, "vary": {"lora_r": [4]}}
    assert not list(validator.iter_errors(grid))
    assert list(validator.iter_errors(grid | wrong))
