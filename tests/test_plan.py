"""Predictions against measurements: the same step on fake tensors holds the same bytes."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formula
import optuna
import pytest
import torch
from conftest import FEW, Answer
from test_launch import Watch
from tiny_models import tiny_model
from trials import run

from harness import environment
from harness._util.units import GIB, MIB
from harness.errors import InputError
from harness.grids import grid
from harness.launch.local import LocalLauncher
from harness.metrics import COMPONENTS
from harness.predict import calibration, cards, cuda_kernels, peak, predictor, replay
from harness.predict.calibration import Calibration, Pair
from harness.predict.cards import AMPERE, CARDS, RATES, TURING, Capability, capacity
from harness.predict.largest import Largest, largest
from harness.predict.prediction import LOCAL_MACHINE, MARGIN, Prediction, capacity_for, capacity_of, fits
from harness.predict.predictor import Predictor
from harness.predict.roofline import Rates, Work, predicted_seconds, roofline_seconds
from harness.report import predictions
from harness.results.store import Store
from harness.spec.trial import TrialSpec
from harness.tuning.study import Options, tune

Small = Callable[..., TrialSpec]

CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "nf4": {"precision": "nf4"},
    "fp4, double": {"precision": "fp4", "double_quantization": True},
    "full": {"adapter": "none"},
    "full, 8-bit": {"adapter": "none", "optimizer": "adamw_bnb_8bit"},
    "paged 8-bit, nf4, checkpointing": {
        "precision": "nf4", "optimizer": "paged_adamw_8bit", "gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "reentrant_checkpointing": True},
    "nf4 in fp16": {"precision": "nf4", "compute_dtype": "fp16"},
    "a whole head": {"precision": "bf16", "lora_modules_to_save": ["lm_head"]},
    "dropout": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "DoRA, nf4": {"use_dora": True, "precision": "nf4"},
    "Adagrad": {"optimizer": "adagrad"},
    "four": {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
    "padded": {"sequence_length": 2048, "excess_length": "drop"},
    "eager": {"attention": "eager"},
    "lion": {"optimizer": "lion_8bit"},
    "a single step": {"adapter": "none", "train_samples": None, "max_steps": 1, "sequence_length": 128},
    "a short last micro-batch": {"micro_batch_size": 4, "train_samples": 6, "sequence_length": 128},
}  # fmt: skip


GRID = (
    "name: g\nbase: {base_model: random:tiny, precision: fp32, sequence_length: 256, train_samples: 8, "
    f"val_set_size: 2, device: cuda, datasets: [{{path: {FEW}}}]}}\n"
    "vary: {lora_r: [64], lora_alpha: [64], adapter: [none]}\n"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    (tmp_path / "g.yml").write_text(GRID)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_predicted_is_measured(case: str, small: Small) -> None:
    spec = small(**CASES[case])
    record = run(spec)
    assert record.status == "ok", record.error
    predicted = peak.predict(spec, "cpu")
    measured = record.metrics["peak_memory_bytes"]
    assert measured is not None
    assert predicted.peak_memory_bytes == pytest.approx(measured, rel=0.005)
    for_a_moment = 3 * 4 * 64 * 128 if spec.use_dora else 4096  # DoRA's norms are of merged weights
    assert predicted.peak_load_bytes == pytest.approx(record.metrics["peak_load_bytes"], rel=0.005, abs=for_a_moment)
    assert predicted.peak_evaluate_bytes == pytest.approx(record.metrics["peak_evaluate_bytes"], rel=0.005)
    assert sum(predicted.breakdown.values()) == predicted.peak_memory_bytes
    for name, size in predicted.breakdown.items():
        if name != "memory_activations_bytes":
            assert size == pytest.approx(record.metrics[name], rel=0.005, abs=2048), name


def test_an_operation_that_cannot_be_replayed_is_named(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    library = torch.library.Library("harness_test", "DEF")
    library.define("opaque(Tensor x) -> Tensor")
    library.impl("opaque", lambda x: x.clone(), "CPU")
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: torch.ops.harness_test.opaque(forward(self, x)))
    with pytest.raises(peak.Unpredictable, match=r"harness_test.opaque"):
        peak.predict(small(), "cpu")


def test_other_specs_are_predicted_where_one_cannot_be(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x)[x.sum() > 0])
    options = {"full_length": False, "trust_remote_code": False}
    answer = predictor._predict(small().model_dump_json(), "cpu", cards.AMPERE, options)
    assert re.search(r"aten\.\w+\S* cannot be replayed on fake tensors", answer["error"])
    monkeypatch.undo()
    lines = (
        predictions.Line("opaque", small(), None, answer["error"]),
        predictions.Line("plain", small(), peak.predict(small(), "cpu"), None),
    )
    made = predictions.Plan("t", "cpu", lines, {})
    assert made.footnotes()[0] == f"opaque: not predicted, {answer['error']}."
    assert [row["predicted_peak_memory_bytes"] is None for row in predictions.rows(made)] == [True, False]


def test_which_8b_trials_of_the_lesson_fit_24_gib() -> None:
    trials = {t.label: t.spec for t in grid.load(Path(__file__).parent.parent / "grids/llama3-8b.yml").trials}
    verdicts = {"full fine-tuning": "does not fit", "gradient_checkpointing=false": "does not fit", "baseline": "tight"}
    for label, verdict in verdicts.items():
        predicted = peak.predict(trials[label], "cuda")
        assert fits(predicted, 24 * 2**30, MARGIN["cuda"]) == verdict, label


def test_the_config_alone_is_enough(small: Small, tmp_path: Path, ask: Callable[..., Answer]) -> None:
    from harness.sources.models import ARCHITECTURES

    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(ARCHITECTURES["tiny"]))
    alone = peak.predict(small(base_model=str(tmp_path / "model")), "cpu")
    assert alone.peak_memory_bytes == peak.predict(small(), "cpu", full_length=True).peak_memory_bytes
    (tmp_path / "g.yml").write_text(GRID.replace("random:tiny", "model"))
    code, output, errors = ask("plan", "g.yml", "--gpu", "t4")
    assert code == 0, errors
    assert "fits" in output
    assert "no .safetensors" in ask("run", "g.yml", "--device", "cpu")[2]


def test_what_takes_no_memory_is_predicted_once(small: Small) -> None:
    assert small(lora_alpha=64, learning_rate=1.0).memory_key == small().memory_key
    assert small(lora_r=8).memory_key != small().memory_key


def test_plan_says_what_fits(folder: Path, ask: Callable[..., Answer]) -> None:
    import pandas

    code, output, errors = ask("plan", "g.yml", "--memory", "1MiB", "--gpu", "T4,h100", "-o", "plan")
    assert code == 4, errors
    rows = {row["label"]: row for row in json.loads((folder / "plan/plan.json").read_text())}
    assert next(iter(rows)) == "baseline"
    peaks = {label: row["predicted_peak_memory_bytes"] for label, row in rows.items()}
    assert peaks["lora_alpha=64"] == peaks["baseline"] < peaks["lora_r=64"]
    assert rows["baseline"]["fits 1MiB"] == "does not fit"
    assert rows["baseline"]["fits t4"] == rows["baseline"]["fits h100"] == "fits"
    for row in rows.values():
        assert sum(row[f"memory_{name}_bytes"] for name in COMPONENTS) == row["predicted_peak_memory_bytes"]
        assert max(row["peak_forward_bytes"], row["peak_backward_bytes"], row["peak_optimizer_bytes"]) == max(
            peaks[row["label"]], row["peak_optimizer_bytes"]
        )
    assert pandas.read_parquet(folder / "plan/plan.parquet")["label"].tolist() == list(rows)
    assert (folder / "plan/plan.svg").read_text().startswith("<svg")
    assert "does not fit (" in " ".join(output.split())
    assert "6.0%" in output  # the margin is stated


@pytest.mark.parametrize("columns", [80, 130])
def test_no_column_of_a_plan_is_cut(
    columns: int, folder: Path, ask: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, output, errors = ask("plan", "g.yml", "--memory", "1MiB", "--memory", "2MiB", "--gpu", "t4,h100")
    assert output.count("does not fit (") == 2 * 4, errors
    assert output.count("fits (0%)") == 2 * 4
    assert all("┓" in line for line in output.splitlines() if "┏" in line), "its right edge"


def test_a_run_keeps_what_was_predicted_and_a_calibration_learns_from_it(
    folder: Path, ask: Callable[..., Answer], quiet: object
) -> None:
    import pandas

    (folder / "g.yml").write_text(
        GRID.replace(
            "vary: {", "repeats: 2\nvisits: 1\nvisit_seconds: 0.05\nvary: {micro_batch_size: [2], lora_dropout: [0.1], "
        )
    )
    code, _, errors = ask("run", "g.yml", "--device", "cpu")
    assert code == 0, errors
    trials = pandas.read_parquet(folder / "results/g/trials")
    error = trials["predicted_peak_memory_bytes"] / trials["peak_memory_bytes"] - 1
    assert error.abs().max() <= 0.005
    timed = trials[trials["repeat"] == 0]
    assert timed["roofline_share"].between(0, 1.5).all()
    assert (timed["predicted_step_seconds"] > 0).all()

    code, output, errors = ask("plan", "g.yml", "--calibrate", "results", "--device", "cpu", "--memory", "1GiB")
    assert code == 0, errors
    kept = Calibration.model_validate_json(next((folder / "results/calibration").glob("*.json")).read_bytes())
    assert kept.rows == 5  # without repeats, and alpha takes no memory
    assert kept.kind == "none"  # there is nothing to correct
    assert kept.error <= 0.001
    assert "5 configurations of" in output
    ratio = trials["step_seconds_median"] / trials["predicted_step_seconds"]
    assert ratio.min() <= (kept.step_factor or 0) <= ratio.max()


def test_what_cannot_fit_is_not_started_but_recorded(folder: Path, ask: Callable[..., Answer]) -> None:
    import pandas

    asked = ("run", "g.yml", "--device", "cpu", "--memory", "1MiB")
    code, _, errors = ask(*asked, "--skip-infeasible")
    assert (code, "none of " in errors) == (3, True)
    skipped = pandas.read_parquet(folder / "results/g/trials")
    assert set(skipped["status"]) == {"skipped"}
    assert (skipped["predicted_peak_memory_bytes"] > 2**20).all()
    assert skipped["peak_memory_bytes"].isna().all()
    assert "over the 1.00 MiB" in skipped["error"].iloc[0]
    assert "nothing to run" in ask(*asked, "--skip-infeasible")[1]
    assert ask("report", "results/g")[0] == 0
    # Without --skip-infeasible they run: here into the budget.
    assert ask(*asked, "--no-predict", "--allow-failures")[0] == 0
    assert set(pandas.read_parquet(folder / "results/g/trials")["status"]) == {"oom"}


def test_a_search_skips_what_is_predicted_over_the_budget_and_tells_the_sampler(tmp_path: Path) -> None:
    store = Store(tmp_path / "t")
    limit = 1_000_000
    search = formula.search(
        {"base_model": "random:tiny", "sequence_length": 256, "lora_r": 64, "datasets": [{"path": FEW}]},
        objectives=["peak_memory_bytes"], constraints=["peak_memory_bytes <= 1MB"], sampler="random", trials=30,
    )  # fmt: skip
    unstarted = LocalLauncher(child=formula.child)  # not entered: it could start nothing
    with Predictor("cpu") as pool, pytest.raises(InputError, match="none of 12 trials keeps within"):
        tune(search, store, unstarted, Watch(), Options(predictor=pool))
    rows = store.read("trials").to_pandas().query("~twin")
    assert set(rows["status"]) == {"skipped"}
    study = optuna.load_study(study_name=rows["study"].iloc[0], storage=f"sqlite:///{store.folder / 'study.db'}")
    for _, row in rows.query("status == 'skipped'").iterrows():
        reported = study.trials[int(row["study_trial"])]
        assert reported.state.name == "COMPLETE"
        assert reported.constraints == {"memory": pytest.approx(row["predicted_peak_memory_bytes"] / limit - 1)}
        assert reported.constraints["memory"] > 0


def test_what_several_processes_add(small: Small) -> None:
    """With equally many examples each, state and its traffic shrink with their number, and products do not."""
    at = {"precision": "bf16", "adapter": "none", "gradient_accumulation_steps": 1, "micro_batch_size": 1}
    two, eight = (
        peak.predict(small(num_processes=n, sharding="full_shard", **at), "cuda", full_length=True) for n in (2, 8)
    )
    assert eight.breakdown["memory_weights_bytes"] == pytest.approx(two.breakdown["memory_weights_bytes"] / 4, rel=0.1)
    assert (two.flops, two.positions) == (eight.flops, eight.positions // 4), "each has a card"
    moved = [sum(w.moved_bytes * w.calls for w in p.work if w.dtype is None) for p in (two, eight)]
    assert moved[1] < moved[0]
    alone, whole = (peak.predict(small(num_processes=n, **at), "cpu", full_length=True) for n in (1, 2))
    assert (whole.flops, whole.positions) == (2 * alone.flops, 2 * alone.positions), "the cores compute for both"


def test_storages_are_rounded_as_cuda_rounds_them(small: Small) -> None:
    predicted = peak.predict(small(lora_r=1), "cuda")
    assert (
        predicted.breakdown["memory_adapters_bytes"] % 512 == predicted.breakdown["memory_optimizer_bytes"] % 512 == 0
    )
    assert (
        predicted.breakdown["memory_adapters_bytes"]
        > 1.5 * peak.predict(small(lora_r=1), "cpu").breakdown["memory_adapters_bytes"]
    )


def test_processes_divide_this_machine_and_nothing_else(small: Small) -> None:
    two = small(num_processes=2)
    line = predictions.Line("two", two, peak.predict(two, "cpu"), None)
    capacities = {LOCAL_MACHINE: 10 * 2**20, "10MiB": 10 * 2**20}
    (row,) = predictions.rows(predictions.Plan("g", "cpu", (line,), capacities))
    assert line.prediction is not None
    assert 5 * 2**20 < line.prediction.peak_memory_bytes < 9 * 2**20
    assert (row[f"fits {LOCAL_MACHINE}"], row["fits 10MiB"]) == ("does not fit", "fits")
    here = environment.current("cpu")
    assert capacity_for(two, here) == capacity_for(small(), here) // 2
    assert capacity_for(small(num_processes=2, memory_budget="1GiB"), here) == 2**30, "of each"


def _peak(predicted: Prediction) -> int:
    return predicted.peak_memory_bytes


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("NVIDIA GeForce RTX 2080", TURING),
        ("Quadro RTX 8000", TURING),
        ("NVIDIA GeForce GTX 1080 Ti", TURING),
        ("NVIDIA TITAN RTX", TURING),
        ("Tesla P4", TURING),
        ("NVIDIA RTX 4000 Ada Generation", cards.HOPPER),
        ("NVIDIA A30", cards.HOPPER),
    ],
)
def test_cards_that_are_not_listed_have_a_generation(name: str, capability: Capability) -> None:
    """That of the default one, whose workspaces are the larger ones, but where kernels are missing."""
    assert cards.of_device(name, 24 * GIB).capability == capability


def searched(pool: Predictor, spec: TrialSpec, key: str, capacity: int, capability: Capability = AMPERE) -> Largest:
    return largest(pool, [spec], key, {"given": capability}, lambda *_: capacity, _peak)[spec.id, "given"]


def test_the_largest_value_fits_and_the_next_does_not(ask: Callable[..., Answer], small: Small) -> None:
    spec = small(gradient_accumulation_steps=1)
    capacities = {"sequence_length": 16 * 2**20, "micro_batch_size": 20 * 2**20, "lora_r": 13 * 2**20}
    with Predictor("cpu", full_length=True) as pool:
        for key, capacity in capacities.items():
            answer = searched(pool, spec, key, capacity)
            assert answer.value is not None
            for value, fitting in ((answer.value, True), (answer.value + 1, False)):
                changed = small(**{"gradient_accumulation_steps": 1, "train_samples": None, "max_steps": 2, key: value})
                predicted = peak.predict(changed, "cpu", full_length=True).peak_memory_bytes
                assert (predicted <= capacity) == fitting, (key, value)
        assert searched(pool, spec, "lora_r", 2**20) == Largest(None, None)
        even = small(init_lora_weights="orthogonal")
        answer = searched(pool, even, "lora_r", 13 * 2**20)
        assert answer.value is not None
        assert answer.value % 2 == 0, "no other rank is taken"

    with Predictor("cuda", full_length=True) as pool:
        long = small(gradient_accumulation_steps=1, precision="bf16", sequence_length=1024, gradient_checkpointing=True)
        turing, ampere = (searched(pool, long, "micro_batch_size", 2**28, each) for each in (TURING, AMPERE))
        assert turing.value is not None
        assert ampere.value is not None
        assert turing.value < ampere.value / 2, "on a T4, attention in bf16 holds its scores"

    asked = ("plan", "g.yml", "--largest", "micro_batch_size", "--memory", "20MiB", "--device", "cpu")
    code, output, errors = ask(*asked)
    assert code == 0, errors
    assert re.search(r"lora_r=64 .* \d+ \(1\d\.\d\d MiB\)", output)
    amounts = ("--memory", "20MiB", "--memory", "1kB", "--device", "cpu")
    code, output, errors = ask("plan", "g.yml", "--largest", "sequence_length", *amounts)
    assert code == 0, errors
    assert re.search(r"baseline .* [\d,]+ \(1\d\.\d\d MiB\) .* not even 8 ", output), "no sequence is shorter"


@pytest.mark.long
def test_the_largest_value_is_within_the_budget_and_the_positions(ask: Callable[..., Answer], tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", "gpt2", config={"n_positions": 96})
    base = {"base_model": model, "lora_r": 4, "val_set_size": 0, "memory_budget": "20MiB"}
    (tmp_path / "g.yml").write_text(json.dumps({"name": "g", "base": base}))
    refused = ask("plan", str(tmp_path / "g.yml"), "--device", "cpu")
    assert "sequence_length: 96 or less" in " ".join("".join(refused[1:]).split())
    (tmp_path / "g.yml").write_text(json.dumps({"name": "g", "base": base | {"sequence_length": 64}}))
    asked = ("plan", str(tmp_path / "g.yml"), "--memory", "1GiB", "--device", "cpu", "--largest")
    code, output, errors = ask(*asked, "micro_batch_size")
    assert code == 0, errors
    assert re.search(r"baseline .* \d+ \(1\d\.\d\d MiB\)", output), "1 GiB is there, and the budget is 20 MiB"
    code, output, errors = ask(*asked, "sequence_length")
    assert code == 0, errors
    assert re.search(r"baseline .* 96 \(", output)
    assert "has positions for 96" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("g.yml", "--gpu", "rtx4900"), "not listed; give its memory instead (--memory 8GiB --device cuda)"),
        (("g.yml", "--gpu", "a100,l4"), "did you mean a100-40 or a100-80?"),
        (("g.yml", "--gpu", ""), "--gpu is empty"),
        (("g.yml", "--memory", "24G"), "write 24GiB (powers of 2) or 24GB"),
        (("g.yml", "--memory", "much"), "--memory"),
        (("g.yml", "--largest", "micro_batch", "--memory", "1GiB"), "micro_batch_size"),
        (("g.yml", "--largest", "lora_r", "--device", "cuda"), "--memory"),
        (("g.yml", "--fix", "--device", "cuda"), "--fix needs an amount of memory"),
        ((), "grid file"),
        (("--calibrate", "nowhere"), "nowhere"),
    ],
)
def test_bad_questions_get_one_line(arguments: tuple[str, ...], message: str, ask: Callable[..., Answer]) -> None:
    code, _, errors = ask("plan", *arguments)
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *((key, key) for key in CARDS),
        ("NVIDIA GeForce RTX 4090", "rtx4090"), ("A100 80GB PCIe", "a100-80"), ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"), ("Tesla V100-SXM2-16GB", "v100-16"), ("h100-80gb", "h100"),
        ("NVIDIA RTX A6000", "a6000"), ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"), ("RTX 3090 Ti", "rtx3090ti"),
        ("L4 24GB", "l4"), ("L40S 48GB", "l40s"), ("H200 141GB", "h200"), ("T4 16GB", "t4"), ("B200 192GB", "b200"),
        ("NVIDIA GH200 480GB", "gh200"), ("NVIDIA H100 NVL 94GB", "h100-nvl"), ("RTX 4060 Ti 16GB", "rtx4060ti-16"),
    ],
)  # fmt: skip
def test_cards_go_by_the_drivers_names_too(name: str, key: str) -> None:
    assert cards.key_of(name) == key


@pytest.mark.parametrize(
    "name", ["rtx4060", "rtx4090-laptop", "rtx3070", "rtx4070ti", "NVIDIA GeForce RTX 4090 Laptop GPU"]
)
def test_no_other_model_of_a_card_is_suggested(name: str) -> None:
    with pytest.raises(ValueError, match="is not listed; give its memory instead") as raised:
        cards.key_of(name)
    assert "did you mean" not in str(raised.value)


def test_the_beginning_of_names_suggests_all_of_them() -> None:
    with pytest.raises(ValueError, match=re.escape("did you mean v100-16 or v100-32?")):
        cards.key_of("NVIDIA V100")
    with pytest.raises(ValueError, match=re.escape("did you mean rtx4060ti-16?")):
        cards.key_of("NVIDIA GeForce RTX 4060 Ti")  # one of 8 GB has the same name


def test_one_reason_for_many_trials_is_one_note(small: Small) -> None:
    lines = tuple(predictions.Line(f"t{n}", small(), None, "it has no shapes." if n else "another") for n in range(9))
    notes = predictions.Plan("t", "cpu", lines, {}).footnotes()
    assert notes[:2] == ["t0: not predicted, another.", "t1, t2, t3 and 5 others: not predicted, it has no shapes."]
    assert "not predicted" not in "".join(notes[2:])


def test_whose_figures_they_are_is_noted(ask: Callable[..., Answer], folder: Path) -> None:
    (folder / "g.yml").write_text(GRID.replace("precision: fp32", "precision: bf16"))
    for named, first, other in (("h100,t4", "h100", "t4"), ("t4,h100", "t4", "h100")):
        notes = " ".join(ask("plan", "g.yml", "--gpu", named)[1].split())
        assert f"The figures are those on {first}; the columns of {other} go by their own." in notes
    assert "The figures are those on" not in ask("plan", "g.yml", "--gpu", "a10,rtx4090")[1]


def test_a_plan_without_a_prediction_does_not_succeed(folder: Path, ask: Callable[..., Answer]) -> None:
    (folder / "g.yml").write_text(GRID.replace("precision: fp32", "precision: fp32, torch_compile: true"))
    code, output, errors = ask("plan", "g.yml", "--memory", "1GiB")
    assert code == 4, errors
    assert output.count("torch_compile: what compiled layers keep") == 1


# ------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize("case", ["bf16", "nf4", "full, 8-bit", "padded", "DoRA"])
def test_cached_operations_change_nothing(case: str, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small(**CASES[case])
    peak.predict(spec, "cpu")
    cached = peak.predict(spec, "cpu")
    monkeypatch.setattr(replay, "_key", lambda *given: None)
    uncached = peak.predict(spec, "cpu")
    assert cached.peak_memory_bytes == uncached.peak_memory_bytes
    assert cached.phases == uncached.phases
    assert sorted(map(repr, cached.work)) == sorted(map(repr, uncached.work))


def test_work_is_what_a_trial_counts(small: Small) -> None:
    two_steps = {"max_steps": 2, "train_samples": None, "excess_length": "truncate", "sequence_length": 128}
    for case in ("fp32", "nf4", "full", "a short last micro-batch"):
        spec = small(**({} if "short" in case else two_steps) | CASES[case])
        record = run(spec)
        counted = record.metrics["flops_per_token"]
        assert counted is not None
        predicted = peak.predict(spec, "cpu")
        tokens, positions = (sum(getattr(s, name) for s in record.steps) for name in ("tokens", "padded_tokens"))
        of_position = predicted.flops / predicted.positions
        assert of_position == pytest.approx(counted * tokens / positions, rel=0.02 if "short" in case else 0.01), case
        if "short" not in case:
            assert predicted.flops == pytest.approx(counted * tokens / len(record.steps), rel=0.01), case


def test_cuda_keeps_masks_of_bytes_and_pages_outside(small: Small) -> None:
    wide = {"sequence_length": 1024, "micro_batch_size": 4, "gradient_accumulation_steps": 1}
    dropout, plain = (small(**wide, lora_dropout=p) for p in (0.1, 0.0))
    added = [peak.predict(dropout, d).peak_memory_bytes - peak.predict(plain, d).peak_memory_bytes for d in DEVICES]
    # Output and mask in fp32 on a CPU; the mask is a byte on CUDA.
    assert added[1] < 0.7 * added[0]
    paged = small(adapter="none", optimizer="paged_adamw_32bit", base_model="random:smollm2-135m")
    cpu, cuda = (peak.predict(paged, d).breakdown["memory_optimizer_bytes"] for d in DEVICES)
    assert cpu > 8 * 134e6 > 100 * cuda


DEVICES: tuple[Any, ...] = ("cpu", "cuda")


def test_time_is_bound_by_the_slower_of_arithmetic_and_bandwidth() -> None:
    rates = Rates(flops_per_second={"float32": 100.0, "bfloat16": 400.0}, bytes_per_second=10.0, call_seconds=0.5,
                  concurrent=False)  # fmt: skip
    product = Work(dtype="bfloat16", flops=800, moved_bytes=10, calls=3)  # 2 s of arithmetic, 1 s of traffic
    addition = Work(dtype=None, flops=0, moved_bytes=40, calls=1)  # 4 s of traffic
    assert roofline_seconds([product, addition], rates) == 3 * 2 + 4
    assert predicted_seconds([product, addition], rates) == 10 + 4 * 0.5
    queued = rates.model_copy(update={"concurrent": True, "call_seconds": 3.0})
    assert predicted_seconds([product, addition], queued) == 12


def test_types_multiply_at_rates_of_their_own(small: Callable[..., TrialSpec]) -> None:
    def seconds(card: str, **keys: Any) -> float:
        spec = small(base_model="random:llama-3.2-1b", sequence_length=256, train_samples=4, **keys)
        work = peak.predict(spec, "cuda", capability=CARDS[card].capability, full_length=True).work
        return roofline_seconds(work, RATES[card])

    assert seconds("a100-80", tf32=True) < 0.4 * seconds("a100-80")
    assert seconds("t4", tf32=True) == seconds("t4"), "which has none"
    assert seconds("t4", precision="bf16") > 2 * seconds("t4", precision="fp16"), "nor products of bf16"


def test_a_card_keeps_a_part_for_its_context() -> None:
    for name, card in CARDS.items():
        assert 0.88 * card.driver_bytes < capacity(name) == card.torch_bytes - card.context_bytes
        assert 0.96 * card.driver_bytes < card.torch_bytes < card.driver_bytes
    assert capacity("t4") == (14912 - 141) * MIB


def test_a_card_of_this_machine_is_known_by_its_name() -> None:
    here = environment.current("cpu").model_copy(update={"device_type": "cuda"})
    names = {
        "Tesla T4": (15360, "t4"),
        "NVIDIA A100-SXM4-80GB": (81920, "a100-80"),
        "NVIDIA A100-PCIE-40GB": (40960, "a100-40"),
        "NVIDIA A10G": (23028, "a10g"),
        "NVIDIA H100 NVL": (95830, "h100-nvl"),
        "NVIDIA GeForce RTX 4070 Ti SUPER": (16376, "rtx4070ti-super"),
        "NVIDIA GeForce RTX 3080 Ti": (12288, "rtx3080ti"),
        "NVIDIA RTX 6000 Ada Generation": (49140, "rtx6000-ada"),
    }
    for device, (mebibytes, card) in names.items():
        there = here.model_copy(update={"device_name": device, "device_memory_bytes": mebibytes * MIB})
        assert capacity_of(there) == capacity(card), device
    for device, mebibytes in {
        "NVIDIA GeForce RTX 4090 Laptop GPU": 16376,
        "NVIDIA A100 1g.10gb": 9856,
        "X": 8192,
    }.items():
        there = here.model_copy(update={"device_name": device, "device_memory_bytes": mebibytes * MIB})
        assert capacity_of(there) == (mebibytes - 1024) * MIB, "what the driver keeps, and the context"


def test_workspaces_of_cublas_are_larger_from_hopper_on() -> None:
    of = {name: cuda_kernels.workspace_bytes(CARDS[name].capability) for name in ("t4", "rtx4090", "h100", "rtx5090")}
    assert of["t4"] == of["rtx4090"] == 8_519_680
    assert of["h100"] == of["rtx5090"] == 33_554_432


def test_a_spec_that_kills_its_process_leaves_the_others_predicted(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [small(lora_r=r) for r in (2, 4, 6, 8)]
    monkeypatch.setattr(predictor, "_predict", _killing_at_six)
    with Predictor("cpu") as pool:
        predicted = {p.spec.lora_r: p for p in pool.predict(specs)}
    assert [predicted[r].prediction is None for r in (2, 4, 6, 8)] == [False, False, True, False]
    assert predicted[6].error == "the process that predicted it was killed"


def _killing_at_six(text: str, *others: Any) -> Any:
    if json.loads(text)["lora_r"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return predictor._predict(text, *others)


def test_step_times_are_corrected_by_measured_ones(small: Small) -> None:
    rates = Rates(flops_per_second={"float32": 1e11}, bytes_per_second=1e10, call_seconds=1e-6, concurrent=False)
    pairs = [Pair(dict.fromkeys([f"memory_{c}_bytes" for c in COMPONENTS], 100), 500)] * 5
    kept = calibration.fit(pairs, environment.current("cpu"), [2.0, 2.5, 9.0])
    prediction = peak.predict(small(), "cpu")
    bare, corrected = (predictions.Plan("t", "cpu", (), {}, c, rates).step_seconds(prediction) for c in (None, kept))
    assert (
        corrected == pytest.approx(2.5 * predicted_seconds(prediction.work, rates)) == pytest.approx(2.5 * (bare or 0))
    )
    assert predictions.Plan("t", "cpu", (), {}, kept).step_seconds(prediction) is None


def test_calibration_chooses_a_correction_and_its_error() -> None:
    import numpy

    rng = numpy.random.default_rng(0)
    here = environment.current("cpu")

    def pairs(n: int, factors: dict[str, float], noise: float) -> list[Pair]:
        made = []
        for _ in range(n):
            shares = {f"memory_{c}_bytes": int(rng.uniform(1, 9) * 1e8) for c in COMPONENTS}
            total = sum(factors[c] * shares[f"memory_{c}_bytes"] for c in COMPONENTS)
            made.append(Pair(shares, int(total * (1 + noise * rng.standard_normal()))))
        return made

    one = dict.fromkeys(COMPONENTS, 1.0)
    assert calibration.fit(pairs(20, one, 0.001), here).kind == "none"
    overall = calibration.fit(pairs(20, dict.fromkeys(COMPONENTS, 1.05), 0.001), here)
    assert overall.kind == "overall"
    assert overall.factors["weights"] == pytest.approx(1.05, rel=0.002)
    assert overall.error_before == pytest.approx(0.05, rel=0.05)
    assert overall.error < 0.002
    assert 0 < overall.margin < 0.005
    uneven = calibration.fit(pairs(20, one | {"activations": 1.3}, 0.001), here)
    assert uneven.kind == "components"
    assert uneven.factors["activations"] == pytest.approx(1.3, rel=0.02)
    assert uneven.factors["weights"] == pytest.approx(1.0, abs=0.02)
    with pytest.raises(ValueError, match="too few"):
        calibration.fit(pairs(3, one, 0.0), here)
    # Leave-one-out: what is in one row alone is not learnt from itself.
    equal = pairs(8, one | {"optimizer": 1.0}, 0.0)
    quiet = [
        Pair(p.predicted | {"memory_optimizer_bytes": 0}, p.measured - p.predicted["memory_optimizer_bytes"])
        for p in equal
    ]
    odd = Pair(equal[0].predicted, int(equal[0].measured + 0.5 * equal[0].predicted["memory_optimizer_bytes"]))
    assert calibration._leave_one_out([*quiet, odd], "components")[-1] > 0.02


def test_the_shape_of_8b_without_its_weights() -> None:
    """Bytes per parameter as they are published: 2 in bf16; in nf4 9/16 of a byte for what is in linear layers."""
    base = {
        "base_model": "random:llama-3.1-8b", "sequence_length": 512, "lora_r": 32, "gradient_checkpointing": True,
        "train_samples": 1, "datasets": [{"path": FEW}],
    }  # fmt: skip
    bf16 = peak.predict(TrialSpec.model_validate(base), "cpu")
    assert bf16.breakdown["memory_weights_bytes"] == pytest.approx(2 * 8_030_261_248, rel=1e-4)
    assert bf16.breakdown["memory_adapters_bytes"] == 4 * 83_886_080
    nf4 = peak.predict(TrialSpec.model_validate(base | {"precision": "nf4"}), "cpu")
    expected = 0.5625 * 6_979_321_856 + 2 * 1_050_673_152
    assert nf4.breakdown["memory_weights_bytes"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("keys", [{}, {"gradient_accumulation_steps": 4}, {"adapter": "none"}], ids=str)
def test_a_step_replayed_once_stands_for_two(
    keys: dict[str, Any], small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step, which finds no optimizer state, is not replayed where a later one has its micro-batches."""
    spec = small(sequence_length=512, micro_batch_size=4, **keys)
    once = peak.predict(spec, "cuda")
    monkeypatch.setattr(peak._StepReplay, "_is_covered", lambda *_: False)
    twice = peak.predict(spec, "cuda")
    unmeasured = {"seconds": 0.0, "work": (), "positions": 0}
    assert once.model_copy(update=unmeasured) == twice.model_copy(update=unmeasured)
    assert once.peak_reserved_bytes is not None
