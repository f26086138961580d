"""Keys that make a step as other trainers make theirs: what each does in a real run, and that it is predicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FEW
from trials import run

from harness.errors import InputError
from harness.grids import grid, imported, presets
from harness.predict import peak
from harness.record import Record
from harness.spec.trial import TrialSpec
from harness.training import model

Small = Callable[..., TrialSpec]

CPU = torch.device("cpu")
NF4: dict[str, Any] = {"precision": "nf4", "double_quantization": True}
CHECKPOINTING = {"gradient_checkpointing": True}
CASES: dict[str, dict[str, Any]] = {
    "peft": {**presets.PRESETS["peft"], "precision": "bf16"},
    "peft, nf4, checkpointing": {**presets.PRESETS["peft"], **NF4, **CHECKPOINTING},
    "trl, nf4, checkpointing": {**presets.PRESETS["trl"], **NF4, **CHECKPOINTING},
    "axolotl, int8, checkpointing": {**presets.PRESETS["axolotl"], "precision": "int8", **CHECKPOINTING},
    "axolotl, full": {**presets.PRESETS["axolotl"], "precision": "bf16", "adapter": "none"},
    "canifinetune, nf4, checkpointing": {**presets.PRESETS["canifinetune"], **NF4, **CHECKPOINTING},
    "canifinetune, without adapters": {**presets.PRESETS["canifinetune"], "precision": "bf16", "adapter": "none"},
    "int8 in fp32": {"precision": "int8", "upcast_unquantized": True},
    "nf4 in fp32 under autocast": {**NF4, "upcast_unquantized": True, "autocast": True},
    "nf4 in fp16 without autocast": {"precision": "nf4", "compute_dtype": "fp16", "autocast": False},
    "dropout without autocast": {"precision": "bf16", "autocast": False, "lora_dropout": 0.1},
    "outputs are kept, one at a time": {
        "precision": "bf16", "keep_outputs": True, "micro_batch_size": 1, "gradient_accumulation_steps": 4},
    "padded to the length": {"precision": "bf16", "pad_to_sequence_len": True, "sequence_length": 192},
}  # fmt: skip


def ok(spec: TrialSpec) -> Record:
    record = run(spec)
    assert record.status == "ok", record.error
    return record


def measured(spec: TrialSpec) -> int:
    return int(ok(spec).metrics["peak_memory_bytes"] or 0)


@pytest.mark.parametrize("case", CASES)
def test_their_steps_hold_what_was_predicted(case: str, small: Small) -> None:
    spec = small(**CASES[case])
    assert peak.predict(spec, "cpu").peak_memory_bytes == pytest.approx(measured(spec), rel=0.001)


# ------------------------------------------------------------------------------------ each key


def test_what_is_not_quantised_is_fp32_after_the_preparation(small: Small) -> None:
    def kinds(**keys: Any) -> dict[str, torch.dtype]:
        network = model.load(small(precision="nf4", **keys), CPU)
        return {name.rpartition("model.")[2]: weight.dtype for name, weight in network.named_parameters()}

    plain, prepared = kinds(), kinds(upcast_unquantized=True)
    for name in ("embed_tokens.weight", "layers.0.input_layernorm.weight", "norm.weight"):
        assert plain[name] == torch.bfloat16
        assert prepared[name] == torch.float32
    four_bit = {name for name, kind in plain.items() if kind == torch.uint8}
    assert four_bit
    assert {name for name, kind in prepared.items() if kind == torch.uint8} == four_bit
    assert {kind for name, kind in prepared.items() if "lora_" in name} == {torch.float32}
    meant = model.skeleton(small(precision="nf4", upcast_unquantized=True))
    assert meant.get_input_embeddings().weight.dtype == torch.float32, "and so in a prediction"


def test_what_is_not_quantised_holds_two_more_bytes_a_weight(small: Small) -> None:
    plain, prepared = (ok(small(precision="nf4", upcast_unquantized=on)).metrics for on in (False, True))
    network = model.skeleton(small(precision="nf4"))
    sizes = {name: p.numel() for name, p in network.named_parameters() if "_proj." not in name and "lora_" not in name}
    grown = int(prepared["memory_weights_bytes"] or 0) - int(plain["memory_weights_bytes"] or 0)
    assert grown == 2 * sum(sizes.values())


def test_adapters_compute_in_fp32_without_autocast(small: Small) -> None:
    def first_hidden(spec: TrialSpec) -> torch.dtype:
        network = model.load(spec, CPU)
        kinds: list[torch.dtype] = []
        adapter = network.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
        adapter.register_forward_hook(lambda module, given, out: kinds.append(out.dtype))
        with model.autocast(spec, CPU):
            network(input_ids=torch.ones(1, 4, dtype=torch.int64))
        return kinds[0]

    with_it, without = small(precision="bf16"), small(precision="bf16", autocast=False)
    assert (first_hidden(with_it), first_hidden(without)) == (torch.bfloat16, torch.float32)
    records = [ok(spec) for spec in (with_it, without)]
    losses = [[step.loss for step in record.steps] for record in records]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    peaks = [record.metrics["peak_memory_bytes"] for record in records]
    assert peaks[0] != peaks[1]


def test_autocast_changes_nothing_where_arithmetic_is_fp32(small: Small) -> None:
    assert small(precision="fp32", autocast=True).id == small(precision="fp32").id
    assert small(precision="bf16", autocast=True).id == small(precision="bf16").id
    assert small(precision="bf16", adapter="none", autocast=True).id != small(precision="bf16", adapter="none").id
    with pytest.raises(ValueError, match=r"scaler cannot unscale gradients of fp16 weights; use precision: fp16-mixed"):
        small(precision="fp16", adapter="none", autocast=True)


def test_kept_outputs_are_the_logits(small: Small) -> None:
    plain, kept = (small(precision="bf16", pad_to_sequence_len=True, keep_outputs=on) for on in (False, True))
    positions, vocabulary = plain.micro_batch_size * plain.sequence_length, model.skeleton(plain).config.vocab_size
    assert measured(kept) - measured(plain) == pytest.approx(2 * positions * vocabulary, rel=0.02)


def test_padding_to_the_length_changes_no_loss(small: Small) -> None:
    spec = small(precision="fp32", sequence_length=256)
    records = [ok(spec.model_copy(update={"pad_to_sequence_len": on})) for on in (None, True)]
    losses = [[step.loss for step in record.steps] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    step = records[1].steps[0]
    of_step = spec.effective_batch_size
    assert step.padded_tokens == of_step * spec.sequence_length
    assert step.tokens == records[0].steps[0].tokens


# ------------------------------------------------------------------------------------ presets


BASE = (
    "base_model: random:tiny, precision: bf16, gradient_checkpointing: true, train_samples: 8, val_set_size: 2, "
    f"datasets: [{{path: {FEW}}}]"
)


def load(folder: Path, text: str) -> grid.Grid:
    file = folder / "g.yml"
    file.write_text(text, encoding="utf-8")
    return grid.load(file)


def specs(folder: Path, text: str) -> dict[str, TrialSpec]:
    return {trial.label: trial.spec for trial in load(folder, text).trials}


def steps_like(spec: TrialSpec) -> dict[str, Any]:
    return spec.model_dump(include=set(presets.PRESETS["trl"]))


def test_a_preset_stands_for_its_keys_wherever_keys_are_given(tmp_path: Path) -> None:
    assert steps_like(specs(tmp_path, f"base: {{{BASE}, like: peft}}\n")["baseline"]) == presets.PRESETS["peft"]
    vary = "vary: {like: [trl, canifinetune], technique: {as there: {like: axolotl, lora_r: 8}}}\n"
    trials = specs(tmp_path, f"base: {{{BASE}, like: peft}}\n{vary}")
    assert {label: steps_like(spec) for label, spec in trials.items()} == {
        "baseline": presets.PRESETS["peft"],
        "like=trl": presets.PRESETS["trl"],
        "like=canifinetune": presets.PRESETS["canifinetune"],
        "as there": presets.PRESETS["axolotl"],
        "baseline again": presets.PRESETS["peft"],
    }
    levels = {trial.level for trial in load(tmp_path, f"base: {{{BASE}, like: peft}}\n{vary}").trials}
    assert levels == {None, "trl", "canifinetune", "as there"}
    vary = "design: grid\nvary: {like: [trl, peft]}\nexclude: [{like: peft}]\n"
    excluded = specs(tmp_path, f"base: {{{BASE}}}\n{vary}")
    assert [*excluded] == ["like=trl"]


def test_keys_that_are_given_win_over_a_preset(tmp_path: Path) -> None:
    given = specs(tmp_path, f"base: {{{BASE}, autocast: true, like: peft, train_on_inputs: false}}\n")["baseline"]
    assert (given.autocast, given.train_on_inputs, given.keep_outputs) == (True, False, True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "axolotle",
            r"base: like: unknown trainer 'axolotle'; did you mean axolotl\? \(peft, trl, axolotl, canifinetune",
        ),
        ("[trl]", r"like: unknown trainer \['trl'\]; did you mean trl\?"),
        ("null", r"like: unknown trainer None; use peft, trl, axolotl, canifinetune"),
    ],
)
def test_an_unknown_trainer_is_refused_with_the_nearest(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, f"base: {{{BASE}, like: {name}}}\n")


def test_every_preset_has_the_same_keys_and_is_valid_for_every_precision(small: Small) -> None:
    assert {frozenset(keys) for keys in presets.PRESETS.values()} == {frozenset(presets.PRESETS["peft"])}
    for keys in presets.PRESETS.values():
        for precision in ("fp32", "bf16", "fp16", "int8", "nf4"):
            small(precision=precision, **keys)
    assert small(**presets.PRESETS["trl"]).id == small().id, "in fp32 it is harness's own step"


def test_a_training_file_may_name_one_too(tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    file.write_text("base_model: random:tiny\nadapter: lora\nlike: canifinetune\nmicro_batch_size: 1\n")
    assert grid.load(file).trials[0].spec.keep_outputs
    text = imported.grid_file(imported.read(file), file, tmp_path)
    assert "like: canifinetune" in text


def test_the_docs_show_the_presets() -> None:
    text = (Path(__file__).parent.parent / "docs/grids.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    names = [*presets.PRESETS]
    first = rows.index(["key", *names, "its own step"])
    own = TrialSpec(base_model="random:tiny")
    for key in presets.PRESETS["peft"]:
        values = [*(presets.PRESETS[name][key] for name in names), getattr(own, key)]
        assert [key, *(json.dumps(value) for value in values)] in rows[first:], key
