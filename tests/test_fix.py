"""`harness plan --fix`, `--json`, and the exit code that says that something does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import FEW, Answer
from rows import keep
from tiny_models import tiny_model

from harness.cli import plan_fix
from harness.grids import grid
from harness.predict import fixes, predictor
from harness.predict.prediction import Prediction, SpecPrediction
from harness.report.predictions import Line
from harness.results.store import Store
from harness.sources.models import ARCHITECTURES
from harness.spec.trial import TrialSpec
from harness.training import model

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
    for change in fixes.changes_of(spec, "cuda", ["q_proj", "v_proj"]):
        changed = TrialSpec.model_validate(spec.model_dump() | dict(change.keys))
        assert changed.id != spec.id, change.text
        assert changed.effective_batch_size == spec.effective_batch_size, change.text
    kinds = {change.kind for change in fixes.changes_of(spec, "cuda", ["q_proj", "v_proj"])}
    assert kinds == {"micro-batch", "checkpointing", "loss", "outputs", "optimizer", "precision", "rank", "targets",
                     "length"}  # fmt: skip
    sizes = [(change.keys["micro_batch_size"], change.keys["gradient_accumulation_steps"])
             for change in fixes.changes_of(spec, "cuda") if change.kind == "micro-batch"]  # fmt: skip
    assert sizes == [(3, 2), (2, 3), (1, 6)]
    half = spec.model_copy(update={"precision": "bf16"})
    assert "adapter type" in {change.kind for change in fixes.changes_of(half, "cuda")}
    full = spec.model_copy(update={"adapter": "none", "optimizer": "adamw_torch"})
    assert {"adapter", "cards"} <= {change.kind for change in fixes.changes_of(full, "cuda")}


@pytest.mark.parametrize(
    ("keys", "alters"),
    [
        ({"precision": "bf16"}, "nothing"),
        ({"precision": "bf16", "adapter_dtype": "bf16"}, "arithmetic"),
        ({"precision": "bf16", "adapter": "none"}, "arithmetic"),
        ({"precision": "bf16-mixed", "adapter": "none"}, "nothing"),
        ({"precision": "bf16", "adapter": "none", "optimizer": "adamw_bnb_8bit"}, "nothing"),
    ],
)
def test_paging_alters_what_torch_keeps_in_the_type_of_its_weights(keys: dict[str, Any], alters: str) -> None:
    """Bitsandbytes keeps it in fp32, or in 8 bit."""
    spec = TrialSpec.model_validate({"base_model": "random:tiny", "optimizer": "adamw_torch"} | keys)
    paged = [
        each for each in fixes.changes_of(spec, "cuda") if str(dict(each.keys).get("optimizer")).startswith("paged")
    ]
    assert paged[0].alters == alters


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


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [{"loss": "chunked", **size} for size in ({}, {"loss_chunk_size": 64}, {"loss_chunk_size": 16})]),
        ({"loss": "chunked"}, [{"loss_chunk_size": 64}, {"loss_chunk_size": 16}]),
        ({"loss": "chunked", "loss_chunk_size": 64}, [{"loss_chunk_size": 16}]),
        ({"loss": "chunked", "loss_chunk_size": 8}, []),
    ],
)  # fmt: skip
def test_smaller_parts_of_a_loss_alter_nothing(keys: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    spec = TrialSpec(base_model="random:tiny", **keys)
    of_loss = [change for change in fixes.changes_of(spec, "cpu") if change.kind == "loss"]
    assert [dict(change.keys) for change in of_loss] == expected
    assert {change.alters for change in of_loss} <= {"nothing"}


LAYERS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "attn.c_proj"],  # its other c_proj is not of the attention
    "gpt_neox": ["query_key_value", "dense"],
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_the_attention_have_the_models_names(kind: str, tmp_path: Path) -> None:
    spec = TrialSpec(base_model=tiny_model(tmp_path / kind, kind))
    assert predictor._attention_layers(spec.model_dump_json(), False) == LAYERS[kind]
    (change,) = [each for each in fixes.changes_of(spec, "cpu", LAYERS[kind]) if each.kind == "targets"]
    model.skeleton(TrialSpec.model_validate(spec.model_dump() | dict(change.keys)))  # all of them are there


def test_a_model_that_cannot_be_made_has_no_layers_of_attention() -> None:
    assert predictor._attention_layers(TrialSpec(base_model="random:none.json").model_dump_json(), False) == []


def test_changes_that_cannot_be_predicted_are_named(
    small: Callable[..., TrialSpec], capsys: pytest.CaptureFixture
) -> None:
    """And where the peak is, if not in training."""
    spec = small(loss="chunked", gradient_checkpointing=True)
    now = Prediction(
        device_type="cpu", peak_memory_bytes=10, peak_load_bytes=30, peak_evaluate_bytes=20, breakdown={}, phases={},
        work=(), positions=1, seconds=0.0,
    )  # fmt: skip

    def predict(specs: Sequence[TrialSpec]) -> dict[str, SpecPrediction]:
        short = {each.id for each in specs if each.sequence_length < spec.sequence_length}
        return {s.id: SpecPrediction(s, None if s.id in short else now, "too short." if s.id in short else None)
                for s in specs}  # fmt: skip

    made, unpredicted = fixes.proposals(
        spec, now, predict, lambda spec, prediction: "does not fit", lambda spec, prediction: 1.0, 5
    )
    halved = [f"sequence_length={spec.sequence_length // part}" for part in (2, 4)]
    assert unpredicted == dict.fromkeys(halved, "too short.")
    line = Line("x", spec, now, None)
    plan_fix.show(plan_fix.Proposals(line, "5B", 5, 1.0, made, unpredicted), None)
    output = " ".join(capsys.readouterr().out.split())
    assert f"not predicted: {'; '.join(halved)} (the first: too short)" in output
    assert "its peak is where the model is loaded, not in training" in output
    evaluated = now.model_copy(update={"peak_load_bytes": 1})
    assert "held-out examples are evaluated" in plan_fix._where(evaluated)
    assert plan_fix._where(evaluated.model_copy(update={"peak_evaluate_bytes": None})) == ""
