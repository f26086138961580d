"""Tasks of lm-evaluation-harness: questions that are asked before and after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import yaml
from conftest import SMALL
from test_cli import ROOT, Ask

from harness.analysis import loading, task_scores
from harness.analysis.comparison import compare
from harness.errors import InputError
from harness.grids.grid import load
from harness.results.store import Store
from harness.sources import fingerprints, stories, task_files
from harness.spec.datasets import DatasetSpec
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, model, tasks

COLOURS = ("plum", "blue", "grey", "teal")  # as long as each other: none is likelier by that


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "little"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes, **heads)).save_pretrained(folder)
    checkpoints.byte_tokenizer().save_pretrained(folder)
    return folder


TASK: dict[str, Any] = {
    "task": "colours",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "colours.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{answers}}",
    "doc_to_target": "right",
    "metric_list": [{"metric": "acc"}],
}


def write_task(folder: Path, questions: int = 24, **changes: Any) -> Path:
    rows = [
        {"question": f"Number {n} is of the colour", "answers": list(COLOURS), "right": n % 4} for n in range(questions)
    ]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {key: value for key, value in (TASK | changes).items() if value is not None}
    (folder / "colours.yaml").write_text(yaml.safe_dump(keys))
    return folder / "colours.yaml"


def run(ask: Ask, folder: Path, base: Path, **keys: Any) -> pandas.DataFrame:
    given = SMALL | {
        "base_model": str(base),
        "device": "cpu",
        "evaluate_tasks": "colours.yaml",
        "learning_rate": 0.1,
        "lora_alpha": 64,
    }
    grid = {"name": "g", "base": given | keys, "vary": {"lora_r": [8]}, "visits": 0, "repeats": 2}
    (folder / "g.yml").write_text(yaml.safe_dump(grid))
    code, _, errors = ask("run", "g.yml", "--engine", "inline", "--no-predict")
    assert code == 0, errors
    rows: pandas.DataFrame = Store(folder / "results/g").read("tasks").to_pandas()
    return rows


def test_questions_are_answered_as_by_the_harness_of_their_format(ask: Ask, base: Path, tmp_path: Path) -> None:
    """lm-evaluation-harness's own model of transformers gives the same answer to each question before training."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    write_task(tmp_path)
    rows = run(ask, tmp_path, base)
    spec = next(trial.spec for trial in load(tmp_path / "g.yml").trials if trial.baseline)
    network = model.load(spec, torch.device("cpu"))
    theirs = HFLM(pretrained=network.get_base_model(), tokenizer=checkpoints.load_tokenizer(spec), batch_size=1)
    task = tasks._built(task_files.read("colours.yaml", str(tmp_path)))
    samples = evaluator.evaluate(theirs, {"tasks": {"colours": task}, "groups": {}}, bootstrap_iters=0)["samples"]
    expected = [sample["acc"] for sample in samples["colours"]]
    assert 0 < sum(expected) < 24
    before = rows[rows["when"] == "before"]
    for _, of_trial in before.groupby("trial_id"):
        assert of_trial.sort_values("item")["score"].tolist() == expected
    assert set(rows["metric"]) == {"acc"}
    trials = Store(tmp_path / "results/g").read("trials").to_pandas().set_index("trial_id")
    for when, column in (("before", "task_score_before"), ("after", "task_score")):
        means = rows[rows["when"] == when].groupby("trial_id")["score"].mean()
        assert trials[column].to_dict() == pytest.approx(means.to_dict())
    after = rows[rows["when"] == "after"].pivot_table(index="item", columns="trial_id", values="score")
    assert not all((after[trial] == expected).all() for trial in after), "training changed answers"
    _report(ask, tmp_path)


def _report(ask: Ask, folder: Path) -> None:
    m = loading.load(folder / "results/g")
    comparison = compare(m)
    measured = task_scores.scores(comparison)
    by_label = {m.configs.at[each.config, "label"]: each for each in measured}
    assert set(by_label) == {"baseline", "lora_r=8"}
    assert by_label["baseline"].difference is None
    other = by_label["lora_r=8"]
    assert other.items == 24
    assert other.error == pytest.approx(m.items[m.items["trial"].map(m.trials["label"]) == "lora_r=8"]
                                        .groupby("story")["loss"].mean().std() / 24**0.5)  # fmt: skip
    assert other.difference is not None
    assert other.difference.value == pytest.approx(other.after - by_label["baseline"].after)
    assert (other.difference.basis, other.difference.n, other.difference.seeds) == ("questions", 24, 2)
    code, _, errors = ask("report", "results/g")
    assert code == 0, errors
    page = (folder / "reports/g/report.md").read_text()
    assert "Scores of tasks" in page
    assert f"{other.after:.3f}" in page
    assert "24 questions × 2 seeds" in page
    assert "score: worse up to −0.05" in page


def test_what_was_answered_before_training_is_asked_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.cli import app

    asked: list[str] = []
    original = tasks.scores

    def scores(*given: Any) -> Any:
        asked.append(given[-1])
        return original(*given)

    monkeypatch.setattr(tasks, "scores", scores)
    write_task(tmp_path, questions=4)
    given = SMALL | {"base_model": str(base), "device": "cpu", "evaluate_tasks": ["colours.yaml"]}
    (tmp_path / "g.yml").write_text(yaml.safe_dump({"name": "g", "base": given, "vary": {"lora_r": [8]}, "visits": 0}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["harness", "run", "g.yml", "--engine", "inline", "--no-predict"])
    with pytest.raises(SystemExit) as end:
        app.main()
    assert not end.value.code
    assert sorted(asked) == ["after"] * 3 + ["before"]
    rows = Store(tmp_path / "results/g").read("tasks").to_pandas()
    assert len(rows) == 3 * 2 * 4


def test_lost_answers_are_noticed(ask: Ask, base: Path, tmp_path: Path) -> None:
    write_task(tmp_path, questions=4)
    run(ask, tmp_path, base)
    store = Store(tmp_path / "results/g")
    assert not store.incomplete()
    parts = sorted((store.folder / "tasks").glob("*.parquet"))
    parts[0].unlink()
    assert store.incomplete()


def test_the_questions_are_part_of_what_a_trial_reads(base: Path, tmp_path: Path) -> None:
    plain = TrialSpec.model_validate(SMALL | {"folder": str(tmp_path)})
    asking = plain.model_copy(update={"evaluate_tasks": (str(write_task(tmp_path)),)})
    assert asking.id != plain.id
    assert asking.memory_key == plain.memory_key
    first = fingerprints.data(asking)
    assert first != fingerprints.data(plain)
    write_task(tmp_path, questions=25)
    assert fingerprints.data(asking) != first


def test_random_weights_answer_nothing(ask: Ask, tmp_path: Path) -> None:
    write_task(tmp_path, questions=2)
    assert run(ask, tmp_path, Path("random:tiny")).empty


def test_the_bundled_questions_are_about_held_out_stories() -> None:
    spec = TrialSpec(base_model="smollm2-135m-instruct", datasets=(DatasetSpec(path="storyteller"),),
                     sequence_length=96, val_set_size=32.0)  # fmt: skip
    held_out = {example.story_id for example in batches.load(spec, checkpoints.load_tokenizer(spec)).held_out}
    texts = [
        " ".join(" ".join(filter(None, row.texts)).split())
        for row in stories.read_all(spec).stories
        if row.id in held_out
    ]
    assert len(texts) == 32
    (questions,) = task_files.read("story-questions").rows().values()
    assert len(questions) >= 60
    assert len({(q["passage"], q["question"]) for q in questions}) == len(questions)
    about = set()
    for question in questions:
        (at,) = [n for n, text in enumerate(texts) if question["passage"] in text]
        about.add(at)
        assert len(set(question["choices"])) == 4
        assert 0 <= question["answer"] < 4
    assert len(about) >= 24
    right = pandas.Series([question["answer"] for question in questions]).value_counts()
    assert right.max() < 0.3 * len(questions), "no place is right more often than others"
    tasks.check(spec.model_copy(update={"evaluate_tasks": ("story-questions",)}))


@pytest.mark.parametrize(
    ("changes", "says"),
    {
        "kind": ({"output_type": "generate_until"}, "output_type is generate_until; multiple_choice is measured"),
        "hub": ({"dataset_path": "someone/questions"}, "dataset_path is someone/questions; give json"),
        "no file": ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "there is no file .*none.jsonl"),
        "no split": ({"test_split": "tests"}, "test_split is tests; data_files has test"),
        "no files": ({"dataset_kwargs": None}, "data_files names no file"),
        "a column": ({"doc_to_target": "{{wrong}}"}, "evaluate_tasks colours: "),
        "filters": (
            {"filter_list": [{"name": n, "filter": [{"function": "take_first"}]} for n in "ab"]},
            "filter_list has several filters",
        ),
        "greedy": ({"metric_list": [{"metric": "exact_match"}]}, "metric exact_match; give one of acc"),
        "included": ({"include": "other.yaml"}, "include is not read"),
        "metric": ({"metric_list": [{"metric": "no_such"}]}, "evaluate_tasks colours: "),
    }.values(),
)
def test_what_is_no_task(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    file = write_task(tmp_path, **changes)
    with pytest.raises(InputError, match=says):
        tasks.check(TrialSpec.model_validate(SMALL | {"evaluate_tasks": str(file)}))


def test_names_that_are_none(ask: Ask, tmp_path: Path) -> None:
    for name, says in {"arc_easy": "give story-questions or a task file", "x.yaml": "No such file"}.items():
        (tmp_path / "g.yml").write_text(yaml.safe_dump({"name": "g", "base": SMALL | {"evaluate_tasks": name}}))
        code, _, errors = ask("run", "g.yml")
        assert code == 2
        assert says in " ".join(errors.split())
    (tmp_path / "x.yaml").write_text("task: x\ndoc_to_text: !function code.text\n")
    with pytest.raises(InputError, match="not YAML without code"):
        task_files.read("x.yaml", str(tmp_path))
    (tmp_path / "colours.jsonl").write_text("")
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(TASK))
    with pytest.raises(InputError, match="has no rows"):
        task_files.read("colours.yaml", str(tmp_path)).rows()
    assert (ROOT / "harness/sources/data/story_questions.yaml").is_file()
