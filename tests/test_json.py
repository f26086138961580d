"""What commands print with `--json` and do not print with `--quiet`; the schema of grid files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from jsonschema import Draft202012Validator
from test_cli import ROOT, harness

from harness.grids import document, json_schema, search_file
from harness.grids.levels import SPEC_KEYS
from harness.grids.yaml_file import read_yaml
from harness.results.store import Store
from harness.spec.trial import FACTS, TrialSpec

RESULTS = str(ROOT / "results")


def printed(*arguments: str, cwd: Path, code: int = 0) -> Any:
    """What a command prints: JSON and nothing else, without numbers that JSON does not have."""
    done = harness(*arguments, "--json", cwd=cwd)
    assert done.returncode == code, done.stderr

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(done.stdout, parse_constant=refuse)


def test_recorded_grids_and_trials(tmp_path: Path) -> None:
    grids = {each["grid"]: each for each in printed("ls", "--results", RESULTS, cwd=tmp_path)}
    rows = Store(ROOT / "results/techniques").read("trials").to_pylist()
    assert grids["techniques"]["trials"] == len(rows) == sum(grids["techniques"]["status"].values())
    trials = printed("ls", "techniques", "--results", RESULTS, cwd=tmp_path)
    assert {each["trial_id"] for each in trials} == {row["trial_id"] for row in rows}
    by_id = {row["trial_id"]: row for row in rows}
    for each in trials:
        row = by_id[each["trial_id"]]
        assert each["figures"]["peak_memory_bytes"] == row["peak_memory_bytes"]
        assert each["configuration"].get("lora_r", row["lora_r"]) == row["lora_r"]
        assert each["started_at"] == row["started_at"].isoformat()
    (shown,) = printed("show", trials[0]["spec_id"], "--results", RESULTS, cwd=tmp_path)[:1]
    assert shown["grid"] == "techniques"
    assert shown["environment"]["device_type"] == "cpu"
    assert shown["figures"] == trials[0]["figures"]


def test_what_is_recommended_and_compared(tmp_path: Path) -> None:
    folder = str(ROOT / "results/techniques")
    best = printed("recommend", folder, "--memory", "1GiB", cwd=tmp_path)
    assert best["front"][0]["label"] == best["configuration"]
    assert best["front"][0]["memory"] <= 2**30
    assert (tmp_path / best["file"]).read_text() == best["yaml"]
    compared = printed("compare", folder, folder, cwd=tmp_path)
    assert compared["environments"] == []
    (baseline,) = [pair for pair in compared["pairs"] if pair["label"] == "baseline"]
    assert baseline["estimates"]["peak_memory_bytes"]["value"] == 1
    assert baseline["first"] == baseline["second"]


def test_this_machine(tmp_path: Path) -> None:
    done = harness("doctor", "--json", cwd=tmp_path)
    checks = json.loads(done.stdout)
    assert {"what", "detail", "works", "remedy"} == set(checks[0])
    assert done.returncode == any(each["works"] is False for each in checks)


def test_a_run_prints_its_trials(tmp_path: Path) -> None:
    grid = {
        "name": "two",
        "base": SMALL | {"device": "cpu", "train_samples": 4, "memory_budget": "1GiB"},
        "visits": 0,
        "vary": {"lora_r": [8], "memory_budget": ["1MiB"]},
    }
    (tmp_path / "two.yml").write_text(json.dumps(grid))
    before = harness("run", "two.yml", "--dry-run", "--json", cwd=tmp_path)
    assert "4 to run" in before.stderr
    planned = json.loads(before.stdout)
    assert [each["recorded"] for each in planned["trials"]] == [False] * 4
    done = harness("run", "two.yml", "--no-predict", "--engine", "inline", "--json", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert "trials to run" not in done.stderr
    assert made["left"] == 0
    assert {each["label"]: each["status"] for each in made["trials"]} == {
        "baseline": "ok", "baseline again": "ok", "lora_r=8": "ok", "memory_budget=1MiB": "oom",
    }  # fmt: skip
    assert {each["spec_id"] for each in made["trials"]} == {each["spec_id"] for each in planned["trials"]}


def test_quiet_says_what_is_wrong(tmp_path: Path) -> None:
    done = harness("run", "none.yml", "--quiet", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "none.yml: no such file" in done.stderr


# ------------------------------------------------------------------------------------ the schema of grid files


def test_the_schema_takes_what_is_taken_and_knows_every_key(tmp_path: Path) -> None:
    done = harness("schema", cwd=tmp_path)
    schema = json.loads(done.stdout)
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert set(schema["properties"]) == {*document.GRID_KEYS}
    assert set(schema["properties"]["tune"]["properties"]) == {*search_file.KEYS}
    described = schema["properties"]["base"]["anyOf"][1]["properties"]
    assert set(described) == {*SPEC_KEYS}
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
