"""The tune: section of a grid: what is accepted, what is refused, and what a spec's place in a space is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.errors import InputError
from harness.grids import search_file
from harness.grids.search import Search

BASE: dict[str, Any] = {"base_model": "smollm2-135m-instruct", "train_samples": 36, "lora_r": 16}


def made(tmp_path: Path, base: dict[str, Any] | None = None, **tune: Any) -> Search:
    tune.setdefault("space", {"lora_r": [4, 16]})
    file = tmp_path / "t.yml"
    file.write_text(yaml.safe_dump({"base": BASE | (base or {}), "tune": tune, "visits": 1}))
    return search_file.load(file)


def test_the_bundled_search_loads() -> None:
    search = search_file.load(Path(__file__).parent.parent / "grids" / "tune.yml")
    assert search.place(search.base), "the configuration of the lesson is a point of its space"
    assert search.memory == 640 * 2**20
    assert [o.direction for o in search.objectives] == ["minimize", "minimize"]


def test_numbers_of_processes_are_known_beforehand(tmp_path: Path) -> None:
    assert made(tmp_path).processes == {1}
    assert made(tmp_path, base={"num_processes": 3}).processes == {3}
    assert made(tmp_path, space={"num_processes": {"low": 2, "high": 4}}).processes == {1, 2, 3, 4}
    assert made(tmp_path, space={"how": {"one": {"lora_r": 4}, "four": {"num_processes": 4}}}).processes == {1, 4}


def test_walk_and_place_are_each_others_inverse(tmp_path: Path) -> None:
    search = made(
        tmp_path,
        space={
            "adapter": ["lora", "none"],
            "lora_r": {"low": 2, "high": 64, "log": True, "when": {"adapter": "lora"}},
            "lora_target_modules": {"levels": [["q_proj", "v_proj"], ["q_proj"]], "when": {"adapter": "lora"}},
            "learning_rate": {"low": "1e-5", "high": 1e-2, "log": True},
            "lora_dropout": {"low": 0.0, "high": 0.2, "step": 0.05, "when": {"adapter": ["lora"]}},
            "batch": {"2 x 2": {"micro_batch_size": 2, "gradient_accumulation_steps": 2}, "1 x 1": {"bf16": True}},
        },
    )
    values = {
        "adapter": "lora", "lora_r": 23, "lora_target_modules": "q_proj", "learning_rate": 3e-4,
        "lora_dropout": 0.15, "batch": "2 x 2",
    }  # fmt: skip
    chosen, spec = search.walk(lambda parameter: values[parameter.name])
    assert chosen == values
    assert (spec.lora_r, spec.lora_target_modules, spec.micro_batch_size) == (23, ("q_proj",), 2)
    assert search.place(spec) == values

    chosen, full = search.walk(lambda parameter: (values | {"adapter": "none"})[parameter.name])
    assert chosen == {"adapter": "none", "learning_rate": 3e-4, "batch": "2 x 2"}, "what has no meaning is not asked"
    assert search.place(full) == chosen

    outside = {"lora_r": 65, "lora_dropout": 0.11, "seed": 9, "learning_rate": 1.0, "sequence_length": 64}
    for key, value in outside.items():
        assert search.place(spec.model_copy(update={key: value})) is None, key


def test_held_batches_and_rungs(tmp_path: Path) -> None:
    search = made(
        tmp_path,
        {"micro_batch_size": 4, "gradient_accumulation_steps": 1},
        space={"micro_batch_size": {"levels": [1, 2, 4], "hold": "effective_batch_size"}},
        pruner={"factor": 3, "rungs": 2},
    )
    _, spec = search.walk(lambda parameter: 1)
    assert (spec.micro_batch_size, spec.gradient_accumulation_steps) == (1, 4)
    assert search.rungs == (1, 3)
    assert [search.at_rung(spec, rung).train_samples for rung in search.rungs] == [12, 36]
    assert search.at_rung(spec, 3).id == spec.id


HOLD = "hold: effective_batch_size derives the accumulation"
BATCH = {"micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_processes": 2}
"""An effective batch of 16."""


def held(*levels: int) -> dict[str, Any]:
    return {"levels": list(levels), "hold": "effective_batch_size"}


@pytest.mark.parametrize(
    ("space", "chosen", "accumulation"),
    [
        ({"micro_batch_size": held(1, 2, 8)}, {"micro_batch_size": 1}, 8),
        ({"micro_batch_size": held(1, 2, 8)}, {"micro_batch_size": 8}, 1),
        ({"num_processes": held(1, 2)}, {"num_processes": 1}, 8),
        # Held parameters act together, in either order.
        (
            {"micro_batch_size": held(1, 2), "num_processes": held(1, 4)},
            {"micro_batch_size": 1, "num_processes": 4},
            4,
        ),
        (
            {"num_processes": held(1, 4), "micro_batch_size": held(1, 2)},
            {"num_processes": 1, "micro_batch_size": 1},
            16,
        ),
        # So do those without hold.
        ({"micro_batch_size": held(1, 2), "num_processes": [2, 4]}, {"micro_batch_size": 2, "num_processes": 4}, 2),
        ({"num_processes": [2, 4], "micro_batch_size": held(1, 2)}, {"num_processes": 4, "micro_batch_size": 2}, 2),
        (
            {"num_processes": {"low": 1, "high": 2}, "micro_batch_size": held(1, 2)},
            {"num_processes": 1, "micro_batch_size": 1},
            16,
        ),
        (
            {"how": {"two": {"num_processes": 2}, "four": {"num_processes": 4}}, "micro_batch_size": held(1, 2)},
            {"how": "four", "micro_batch_size": 1},
            4,
        ),
    ],
)
def test_what_is_held_is_the_effective_batch_of_the_base(
    space: dict[str, Any], chosen: dict[str, Any], accumulation: int, tmp_path: Path
) -> None:
    search = made(tmp_path, BATCH, space=space)
    _, spec = search.walk(lambda parameter: chosen[parameter.name])
    assert (spec.effective_batch_size, spec.gradient_accumulation_steps) == (16, accumulation)
    assert search.place(spec) == chosen
    grown = spec.model_copy(update={"gradient_accumulation_steps": 2 * accumulation})
    assert search.place(grown) is None


def test_hold_with_a_condition_holds_where_it_is_met(tmp_path: Path) -> None:
    space = {
        "adapter": ["lora", "none"],
        "micro_batch_size": held(1, 2) | {"when": {"adapter": "lora"}},
        "gradient_accumulation_steps": {"levels": [2, 3], "when": {"adapter": "none"}},
    }
    search = made(tmp_path, BATCH, space=space)
    values = {"adapter": "lora", "micro_batch_size": 1, "gradient_accumulation_steps": 3}
    _, lora = search.walk(lambda parameter: values[parameter.name])
    _, full = search.walk(lambda parameter: (values | {"adapter": "none"})[parameter.name])
    assert (lora.effective_batch_size, full.effective_batch_size) == (16, 12)
    assert search.place(full) == {"adapter": "none", "gradient_accumulation_steps": 3}


def test_a_bound_on_the_peak_is_the_enforced_budget(tmp_path: Path) -> None:
    search = made(tmp_path, constraints=["peak_memory_bytes <= 1GiB", "tokens_per_second >= 50"])
    assert search.base.memory_budget == 2**30
    ok = {"peak_memory_bytes": 2**29, "peak_evaluate_bytes": 3 * 2**28, "eval_loss": 3.0, "tokens_per_second": 40.0}
    score = search.score("ok", ok)
    assert score is not None
    assert score.violations["memory"] == pytest.approx(-0.25), "what fits is decided by the highest peak"
    assert score.violations["tokens_per_second >= 50"] == pytest.approx(0.2)
    assert not score.feasible
    oom = search.score("oom", {"oom_reached_bytes": 2**30, "oom_requested_bytes": 2**29})
    assert oom is not None
    assert oom.values == (None,)
    assert oom.violations == {"memory": pytest.approx(0.5), "tokens_per_second >= 50": 0}
    assert [*oom.violations] == [*score.violations], "samplers want the same bounds of all trials, in one order"
    assert search.score("diverged", ok) is None
    assert search.score("ok", ok | {"eval_loss": None}) is None, "a missing figure is no score"


def test_what_a_report_needs_is_plain_json(tmp_path: Path) -> None:
    search = made(tmp_path, constraints=["peak_memory_bytes <= 1GiB"])
    given = json.loads(json.dumps(search.given))
    again = search_file.parse(search.name, search.title, given["base"], given["tune"])
    assert again.base.id == search.base.id
    assert again.parameters == search.parameters


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "held level that does not divide": (
        {"space": {"micro_batch_size": held(1, 3)}}, "micro_batch_size 3 does not divide the effective batch of 1"),
    "held processes that do not divide": (
        {"space": {"num_processes": held(1, 2)}}, "num_processes 2 does not divide the effective batch of 1 that"),
    "held levels that do not divide together": (
        {"base": BATCH, "space": {"micro_batch_size": held(2, 8), "num_processes": held(1, 4)}},
        "micro_batch_size 8 x num_processes 4 does not divide the effective batch of 16"),
    "range that does not divide": (
        {"base": BATCH, "space": {"micro_batch_size": held(1, 2), "num_processes": {"low": 1, "high": 3}}},
        "num_processes 3 does not divide the effective batch of 16"),
    "held level of a large space that does not divide": (
        {"space": {"micro_batch_size": held(1, 3)} | {name: [*range(1, 100)] for name in ("lora_r", "lora_alpha")}},
        "micro_batch_size 3 does not divide the effective batch of 1"),
    "hold and accumulation": (
        {"space": {"micro_batch_size": held(1), "gradient_accumulation_steps": [1, 2]}}, HOLD),
    "hold and accumulation in a bundle": (
        {"space": {"size": {"big": {"gradient_accumulation_steps": 4}}, "num_processes": held(1)}}, HOLD),
    "hold and accumulation with a condition": (
        {"space": {
            "adapter": ["lora", "none"], "micro_batch_size": held(1),
            "gradient_accumulation_steps": {"levels": [1, 2], "when": {"adapter": "none"}}}}, HOLD),
    "condition on what is derived": (
        {"space": {
            "micro_batch_size": held(1),
            "lora_r": {"low": 4, "high": 8, "when": {"gradient_accumulation_steps": 1}}}},
        "lora_r: when: gradient_accumulation_steps is derived by hold: effective_batch_size; use micro_batch_size or"),
    "no space": ({"space": None}, "space is missing"),
    "unknown key": ({"trails": 3}, "unknown key 'trails'; did you mean trials"),
    "unknown parameter": ({"space": {"lora_rank": [1, 2]}}, "unknown factor 'lora_rank'; did you mean lora_"),
    "unknown range": ({"space": {"lora_rr": {"low": 1, "high": 2}}}, "'lora_rr'; did you mean lora_r"),
    "bad level": ({"space": {"lora_r": [0, 4]}}, "lora_r is 0; it must be 1 or more"),
    "bad bound of a range": ({"space": {"lora_r": {"low": 0, "high": 4}}}, "lora_r is 0; it must be 1 or more"),
    "half a rank": ({"space": {"lora_r": {"low": 1.5, "high": 4}}}, "lora_r is 1.5"),
    "range of words": ({"space": {"precision": {"low": 1, "high": 4}}}, "precision"),
    "range upside down": ({"space": {"lora_r": {"low": 8, "high": 4}}}, "low 8 is not below high 4"),
    "range with half a key": ({"space": {"lora_r": {"low": 8, "hi": 4}}}, "unknown key 'hi'"),
    "range without high": ({"space": {"lora_r": {"low": 8}}}, "high is missing"),
    "log with step": ({"space": {"lora_r": {"low": 1, "high": 8, "log": True, "step": 2}}}, "log goes with"),
    "log of zero": ({"space": {"lora_dropout": {"low": 0, "high": 0.5, "log": True}}}, "log goes with a low above 0"),
    "same key twice": ({"space": {"lora_r": [4, 8], "size": {"big": {"lora_r": 64}}}}, "both set lora_r"),
    "same key under a condition and without": (
        {"space": {
            "gradient_checkpointing": [False, True], "lora_r": {"low": 2, "high": 8},
            "rank": {"levels": {"large": {"lora_r": 16}}, "when": {"gradient_checkpointing": True}}}},
        "both set lora_r; keep one, or give each a when: with other values of one key"),
    "condition beside bundles": (
        {"space": {"size": {"big": {"lora_r": 64}, "when": {"adapter": "lora"}}}},
        "size: when: goes beside levels: or low: and high:"),
    "condition on what is chosen later": (
        {"space": {"lora_r": {"levels": [4, 8], "when": {"precision": "bf16"}}, "precision": ["bf16", "fp32"]}},
        "when: precision is chosen after it; write precision before lora_r"),
    "condition that is never met": (
        {"space": {"adapter": ["lora", "none"], "lora_r": {"levels": [4, 8], "when": {"adapter": "loha"}}}},
        "lora_r: when: adapter is never loha; the parameter would not vary"),
    "condition on nothing": (
        {"space": {"lora_r": {"low": 4, "high": 8, "when": {"adapter": []}}}}, "when: adapter is never anything"),
    "keys that exclude each other": (
        {"space": {"warmup_steps": [0, 3], "warmup_ratio": [0.1, 0.2]}},
        "warmup_steps and warmup_ratio exclude each other; keep one, or give each a when:"),
    "layers in two ways": (
        {"space": {"lora_target_linear": [True], "targets": {"q": {"lora_target_modules": ["q_proj"]}}}},
        "targets and lora_target_linear both set lora_target_linear"),
    "levels of one text": (
        {"space": {"datasets": [
            [{"path": "storyteller", "type": {"system_prompt": text}}] for text in ("Be brief.", "Be long.")]}},
        "datasets: two levels are called storyteller; give each a label of its own"),
    "labels of one text": (
        {"space": {"size": {1: {"lora_r": 4}, "1": {"lora_r": 8}}}}, "size: two levels are called 1; give each"),
    "range of another key than a number": (
        {"space": {"precisoin": {"low": 1, "high": 2}}}, "unknown parameter 'precisoin'; use sequence_length, "),
    "condition on several keys at once": (
        {"space": {
            "adapter": ["lora", "qlora", "none"],
            "lora_r": {"levels": [4, 8], "when": {"adapter": ["lora", "qlora"]}}}},
        "when: adapter: lora and qlora differ in adapter and precision; give one of those keys"),
    "conditions that contradict each other": (
        {"space": {"lora_r": {"levels": [4, 8], "when": {"bf16": True, "precision": "nf4"}}}},
        "when: precision is never anything; the parameter would not vary"),
    "seed": ({"space": {"seed": [1, 2]}}, "seed sets seed, which is equal in all trials of a search; give it in base"),
    "budget": ({"space": {"memory_budget": {"low": 10**9, "high": 2 * 10**9}}}, "memory_budget, which is equal in"),
    "pruner of a length that is searched": (
        {"base": {"train_samples": 9}, "pruner": {"factor": 3, "rungs": 2}, "space": {"train_samples": [3, 9]}},
        "train_samples sets train_samples, which the pruner shortens"),
    "step beyond": ({"space": {"lora_r": {"low": 2, "high": 4, "step": 40}}}, "step 40 leads from low 2 beyond high 4"),
    "impossible": (
        {"space": {"adapter": ["lora", "none"], "precision": ["bf16", "nf4"]}},
        "quantised weights cannot be trained.*say when:",
    ),
    "when of nothing": ({"space": {"lora_r": {"low": 1, "high": 4, "when": {"adaptor": "lora"}}}}, "mean adapter"),
    "when never": ({"space": {"lora_r": {"low": 1, "high": 4, "when": {"adapter": "lore"}}}}, "unknown adapter 'lore'"),
    "objective": ({"objectives": ["eval_los"]}, "unknown figure 'eval_los'; did you mean eval_loss"),
    "objective without a better": ({"objectives": ["trainable_parameters"]}, "unknown figure 'trainable_parameters'"),
    "direction": ({"objectives": {"eval_loss": "minimise"}}, "did you mean minimize"),
    "four objectives": (
        {"objectives": ["eval_loss", "peak_memory_bytes", "tokens_per_second", "samples_per_second"]}, "one to three"),
    "constraint": ({"constraints": ["peak_memory_bytes < 3GiB"]}, "write it like"),
    "constraint figure": ({"constraints": ["peak_memory <= 3GiB"]}, "did you mean peak_memory_bytes"),
    "constraint bound": ({"constraints": ["peak_memory_bytes <= much"]}, "'much' is not a bound; write it like 12GiB"),
    "constraint the wrong way": ({"constraints": ["peak_memory_bytes >= 3GiB"]}, "has an upper bound"),
    "sampler": ({"sampler": "tpa"}, "unknown sampler 'tpa'; did you mean tpe"),
    "trials": ({"trials": 0}, "trials is 0; it must be a whole number from 1"),
    "timeout": ({"timeout": -1}, "timeout is -1"),
    "pruner": ({"pruner": "hyperbandit"}, "use none, halving"),
    "pruner for two": ({"pruner": "halving", "objectives": ["eval_loss", "load_seconds"]}, "goes with one objective"),
    "pruner too deep": ({"pruner": {"factor": 4, "rungs": 4}}, "too short for 4 rungs of factor 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, tmp_path: Path) -> None:
    given, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as error:
        made(tmp_path, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("when", "met", "unmet"),
    [
        ({"learning_rate": "1e-4"}, {"learning_rate": 1e-4}, {"learning_rate": 2e-4}),
        ({"learning_rate": ["1e-4", 1e-3]}, {"learning_rate": 1e-3}, {"learning_rate": 2e-4}),
        ({"bf16": True}, {"precision": "bf16"}, {"precision": "fp32"}),
        ({"adapter": "qlora"}, {"precision": "nf4"}, {"precision": "bf16"}),
        ({"sequence_len": 64}, {"sequence_length": 64}, {"sequence_length": 96}),
        (
            {"lora_target_modules": [["q_proj", "v_proj"]]},
            {"lora_target_modules": ["q_proj", "v_proj"]},
            {"lora_target_modules": ["q_proj"]},
        ),
    ],
)
def test_a_condition_is_spelt_as_levels_are(
    when: dict[str, Any], met: dict[str, Any], unmet: dict[str, Any], tmp_path: Path
) -> None:
    space = {"how": {"met": met, "unmet": unmet}, "lora_dropout": {"levels": [0.0, 0.1], "when": when}}
    search = made(tmp_path, space=space)
    asked = {how: search.walk(lambda p, how=how: how if p.name == "how" else 0.1)[0] for how in ("met", "unmet")}  # type: ignore[misc]  # bound on purpose
    assert [how for how, chosen in asked.items() if "lora_dropout" in chosen] == ["met"]


def test_a_range_is_spelt_as_levels_are(tmp_path: Path) -> None:
    search = made(tmp_path, space={"sequence_len": {"low": 64, "high": 128, "step": 32}})
    chosen, spec = search.walk(lambda parameter: 96)
    assert (chosen, spec.sequence_length) == ({"sequence_length": 96}, 96)


def test_a_recorded_search_is_read_though_two_levels_have_one_label(tmp_path: Path) -> None:
    """Searches of before it was refused have rows, which a report shows."""
    space = {"size": {1: {"lora_r": 4}, "1": {"lora_r": 8}}}
    (parameter,) = search_file.parse("t", "T", BASE, {"space": space}).parameters
    assert parameter.choices == {"1": {"lora_r": 8}}


def test_two_parameters_may_set_a_key_that_no_trial_gives_twice(tmp_path: Path) -> None:
    bundles = {"low": {"lora_r": 8}, "high": {"lora_r": 16}}
    space = {
        "gradient_checkpointing": [False, True],
        "lora_r": {"levels": [4, 64], "when": {"gradient_checkpointing": False}},
        "rank": {"levels": bundles, "when": {"gradient_checkpointing": True}},
    }
    search = made(tmp_path, space=space)
    for choice in (False, True):
        chosen, spec = search.walk(lambda p, c=choice: c if p.name == "gradient_checkpointing" else min(p.choices))
        assert ("rank" in chosen, search.place(spec)) == (choice, chosen)


def test_a_loss_of_random_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="eval_loss of random weights means nothing"):
        made(tmp_path, {"base_model": "random:tiny"})
    search = made(tmp_path, {"base_model": "random:tiny"}, objectives=["tokens_per_second"])
    assert search.objectives[0].direction == "maximize"


def test_two_budgets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="base has a memory_budget and tune a bound on peak_memory_bytes; keep one"):
        made(tmp_path, {"memory_budget": "2GiB"}, constraints=["peak_memory_bytes <= 1GiB"])
    assert made(tmp_path, {"memory_budget": "2GiB"}).memory == 2 * 2**30


def test_repeats_of_a_search_are_those_of_its_best(tmp_path: Path) -> None:
    file = tmp_path / "t.yml"
    document = {"base": BASE, "tune": {"space": {"lora_r": [4, 16]}}, "repeats": 3}
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(InputError, match="repeats is of a grid that harness run compares; tune: confirm repeats"):
        search_file.load(file)
    file.write_text(yaml.safe_dump(document | {"vary": {"lora_r": [4]}}))
    assert search_file.load(file).confirm == 3, "a file may be both a grid and a search"


def test_a_file_without_a_search_says_so(tmp_path: Path) -> None:
    file = tmp_path / "t.yml"
    file.write_text("base: {base_model: random:tiny}\n")
    with pytest.raises(InputError, match="tune is missing"):
        search_file.load(file)


def test_forgetting_is_searched_where_it_is_measured(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give base measure_forgetting: true"):
        made(tmp_path, objectives=["forgetting"])
    search = made(tmp_path, {"measure_forgetting": True, "val_set_size": 0}, objectives=["forgetting"])
    assert [o.direction for o in search.objectives] == ["minimize"]
