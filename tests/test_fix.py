"""`harness plan --fix`, `--json`, and the exit code that says that something does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FEW, Answer
from rows import keep

from harness.cli import plan_fix
from harness.grids import grid
from harness.predict import fixes
from harness.results.store import Store
from harness.sources.models import ARCHITECTURES
from harness.spec.trial import TrialSpec

GRID = (
    "name: g\nbase: {base_model: 'random:few.json', precision: bf16, sequence_length: 512, max_steps: 2, "
    f"val_set_size: 0, micro_batch_size: 4, device: cuda, pad_to_sequence_len: true, datasets: [{{path: {FEW}}}]}}\n"
    "trials: [{seed: 0}]\n"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    (tmp_path / "g.yml").write_text(GRID)
    (tmp_path / "few.json").write_text(json.dumps(ARCHITECTURES["smollm2-135m"] | {"num_hidden_layers": 5}))
    return tmp_path


@pytest.mark.long
def test_what_is_proposed_first_fits_when_it_is_planned(folder: Path, ask: Callable[..., Answer]) -> None:
    code, output, errors = ask("plan", "g.yml", "--memory", "1300MiB", "--fix", "--json", "-o", "out")
    assert code == 4, errors
    document = json.loads(output)
    (trial,) = document["trials"]
    assert trial["fits 1300MiB"] == "does not fit"
    ranked = [each["alters"] for each in document["fixes"] if each["fits"] == "fits"]
    assert ranked == sorted(ranked, key=["nothing", "arithmetic", "hardware", "model"].index)
    best = document["fixes"][0]
    assert best["fits"] == "fits"
    assert best["alters"] == "nothing"
    assert best["time_ratio"] > 0.9, "what alters nothing saves little time"
    (file,) = (folder / "out").glob("*.fixed.yml")
    code, output, errors = ask("plan", str(file), "--memory", "1300MiB", "--device", "cuda", "--json")
    assert code == 0, errors
    (again,) = json.loads(output)["trials"]
    assert again["fits 1300MiB"] == "fits"
    assert again["predicted_reserved_bytes"] == best["predicted_reserved_bytes"]
    for key, value in best["keys"].items():
        assert f"{key}: {str(value).lower()}" in file.read_text()


@pytest.mark.long
def test_where_nothing_makes_it_fit_the_least_is_named(folder: Path, ask: Callable[..., Answer]) -> None:
    (folder / "g.yml").write_text(GRID.replace("few.json", "tiny"))
    code, output, _ = ask("plan", "g.yml", "--memory", "5MiB", "--fix")
    assert code == 4
    assert "nothing here makes it fit; the least is" in " ".join(output.split())


def test_the_exit_code_says_whether_all_fits(ask: Callable[..., Answer]) -> None:
    assert ask("plan", "g.yml", "--gpu", "rtx4090")[0] == 0
    code, output, errors = ask("plan", "g.yml", "--memory", "1300MiB", "--gpu", "rtx4090", "--json")
    assert code == 4
    assert "predicted memory" in errors
    assert json.loads(output)["trials"][0]["fits rtx4090"] == "fits"
    code, _, errors = ask("plan", "g.yml", "--memory", "1300MiB", "--gpu", "rtx4090", "--fix")
    assert (code, "give one" in errors) == (2, True)


def test_changes_hold_the_effective_batch_and_can_be_trained() -> None:
    spec = TrialSpec(
        base_model="random:tiny", micro_batch_size=6, keep_outputs=True, precision="fp32", optimizer="lion_32bit"
    )
    for change in fixes.changes_of(spec, "cuda"):
        changed = TrialSpec.model_validate(spec.model_dump() | dict(change.keys))
        assert changed.id != spec.id, change.text
        assert changed.effective_batch_size == spec.effective_batch_size, change.text
    kinds = {change.kind for change in fixes.changes_of(spec, "cuda")}
    assert kinds == {"micro-batch", "checkpointing", "loss", "outputs", "optimizer", "precision", "rank", "targets",
                     "length"}  # fmt: skip
    half = spec.model_copy(update={"precision": "bf16"})
    assert "adapter type" in {change.kind for change in fixes.changes_of(half, "cuda")}
    full = spec.model_copy(update={"adapter": "none", "optimizer": "adamw_torch"})
    assert {"adapter", "cards"} <= {change.kind for change in fixes.changes_of(full, "cuda")}


def test_measured_times_are_compared_with_measured_ones(folder: Path, ask: Callable[..., Answer]) -> None:
    (folder / "g.yml").write_text(GRID.replace("few.json", "tiny").replace("device: cuda", "device: cpu"))
    (trial,) = grid.load(folder / "g.yml").trials
    slower = TrialSpec.model_validate(trial.spec.model_dump() | {"gradient_checkpointing": True})
    store = Store(folder / "results/g")
    for spec, rate in ((trial.spec, 600.0), (slower, 200.0)):
        keep(store, spec, "baseline", [], padded_tokens_per_second=rate)
    _, output, errors = ask("plan", "g.yml", "--memory", "20MiB", "--fix", "--json")
    ratios = {each["changes"]: each["time_ratio"] for each in json.loads(output)["fixes"]}
    assert ratios["gradient_checkpointing=true"] == pytest.approx(3), errors
    # Predicted, times the error of this trial's own prediction: not of another scale than what is measured.
    assert 0.5 < ratios["lora_r=8, lora_alpha=8"] < 2


def test_each_proposal_has_a_file_of_its_own() -> None:
    names: list[str] = []
    for label in ("2 × 2", "2 2", "甲", "乙", "..", "lora_r=4", "**"):
        names.append(plan_fix.file_name(label, names))
    assert names == [
        "2-2.fixed.yml", "2-2-2.fixed.yml", "甲.fixed.yml", "乙.fixed.yml", "trial.fixed.yml", "lora_r=4.fixed.yml",
        "trial-2.fixed.yml",
    ]  # fmt: skip
