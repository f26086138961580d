"""After training: the merged model is the unmerged one, complete and never half of it; what models do at work."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from conftest import SMALL
from rich.console import Console
from rows import keep
from test_launch import Watch

import harness
from harness.adapters import benchmark, merge, story_metrics, trained
from harness.analysis import comparison, loading, verdicts
from harness.analysis.inference import merging_effect
from harness.cli.progress import story_display
from harness.environment import current
from harness.errors import InputError
from harness.grids.grid import Grid, Trial
from harness.launch.local import LocalLauncher
from harness.record import InferenceRecord, ModelFootprint, Request
from harness.report import document, inference_tables, plots, tables, writers
from harness.results.schema import spec_of
from harness.results.store import Store
from harness.runner.grid_run import run_grid
from harness.sources import stories
from harness.spec.datasets import DatasetSpec
from harness.spec.trial import TrialSpec

PRECISIONS = ("fp32", "bf16", "nf4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder, as one that was downloaded: its losses count, whatever they are worth."""
    from harness.training import checkpoints

    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(checkpoints.checkpoint_folder("random:tiny"), folder)
    checkpoints.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Trained adapters of it."""
    folder = tmp_path_factory.mktemp("results")
    given = SMALL | {
        "base_model": str(base), "val_set_size": 6, "save_adapter": True, "learning_rate": 1e-2, "train_samples": 32,
        "lora_r": 8,
    }  # fmt: skip
    specs = {name: TrialSpec.model_validate(given | {"precision": name}) for name in PRECISIONS}
    specs["fp32"] = specs["fp32"].model_copy(update={"measure_forgetting": True})
    grid = Grid("g", "G", "list", tuple(Trial(spec, name, None, None) for name, spec in specs.items()))
    with LocalLauncher() as launcher:
        run_grid(grid, Store(folder / "g"), launcher, Watch())
        yield folder


@pytest.mark.long
@pytest.mark.parametrize("precision", PRECISIONS)
def test_merged_is_unmerged(precision: str, results: Path, tmp_path: Path) -> None:
    source = trained.find_adapter(results, precision)
    result = merge.merge(source, tmp_path / "m")
    losses = result["losses"]
    stories = len(losses["base"])
    before, unmerged, merged = (sum(losses[n]) / stories for n in ("base", "unmerged", "merged"))
    assert unmerged < before, "the adapter is in it"
    if precision == "fp32":
        assert result["largest_logit_difference"] <= 1e-4
        assert abs(merged - unmerged) <= 1e-4
    else:  # rounding of 16 bit; of 4 bit also that the base is another
        assert result["largest_logit_difference"] > 1e-4
        assert abs(merged - unmerged) < (0.02 if precision == "bf16" else 0.5)
        assert merged < before
    assert f"over {stories} held-out stories" in merging_effect(losses, result["tokens"])
    assert {f.name for f in (tmp_path / "m").iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "README.md", "merge.json", "generation_config.json",
    }  # fmt: skip
    card = (tmp_path / "m/README.md").read_text()
    assert "base_model: " in card
    assert "lora_r: 8" in card
    assert "| eval_loss |" in card
    assert not list(tmp_path.glob(".*"))


def test_both_load_in_a_fresh_process_and_agree(base: Path, results: Path, tmp_path: Path) -> None:
    """In a process that has transformers and peft alone."""
    source = trained.find_adapter(results, "fp32")
    merge.merge(source, tmp_path / "m")
    code = (
        "import sys, torch\n"
        "sys.modules['harness'] = None\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "merged, base, adapter = sys.argv[1:]\n"
        "tokenizer = AutoTokenizer.from_pretrained(merged)\n"
        "ids = tokenizer('A lighthouse keeper finds a letter.', return_tensors='pt', return_token_type_ids=False)\n"
        "one = AutoModelForCausalLM.from_pretrained(merged)\n"
        "plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)\n"
        "other = PeftModel.from_pretrained(plain, adapter)\n"
        "for model in (one, other):\n"
        "    made = model.generate(**ids, max_new_tokens=24, do_sample=False)\n"
        "    print(repr(tokenizer.decode(made[0, ids['input_ids'].shape[1]:])))\n"
    )
    given = [str(tmp_path / "m"), str(base), str(source.folder)]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    merged, unmerged = done.stdout.strip().splitlines()
    assert merged == unmerged
    assert len(merged) > 20


def test_merge_lora_as_the_lesson_calls_it(results: Path, tmp_path: Path) -> None:
    row = next(r for r in Store(results / "g").read("trials").to_pylist() if r["label"] == "bf16")
    given = {k: v for k, v in spec_of(row).canonical().items() if v is not None}
    (tmp_path / "config.yaml").write_text(json.dumps(given | {"output_dir": str(tmp_path / "out")}))
    adapter = results / "g/adapters" / row["adapter_id"]
    made = harness.merge_lora(config_path=tmp_path / "config.yaml", adapter_path=adapter)
    assert made == tmp_path / "out/merged"
    assert (made / "model.safetensors").is_file()
    with pytest.raises(InputError, match="there already"):
        harness.merge_lora(config_path=tmp_path / "config.yaml", adapter_path=adapter)


def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(base: Path, results: Path, tmp_path: Path) -> None:
    source = trained.find_adapter(results, "fp32")
    out = tmp_path / "m"

    def refused(folder: Path, match: str, spec: TrialSpec = source.spec) -> None:
        with pytest.raises(InputError, match=match) as error:
            merge.merge(trained.TrainedAdapter(spec, folder, "x", {}), out)
        assert "\n" not in str(error.value)
        assert not list(tmp_path.glob("m*"))
        assert not list(tmp_path.glob(".*"))

    refused(tmp_path, "no adapter_config.json")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "wider.json").write_text(json.dumps(config | {"hidden_size": 128}))
    other = source.spec.model_copy(update={"base_model": f"random:{tmp_path / 'wider.json'}"})
    refused(source.folder, "does not fit the base LlamaForCausalLM", other)
    broken = tmp_path / "broken"
    shutil.copytree(source.folder, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"cut")
    refused(broken, r"SafetensorError|safetensors")
    (broken / "adapter_config.json").write_text("{}")
    refused(broken, "not a configuration of peft")
    for trial, match in (("nothing", "no trial"), ("g", "no trial")):
        with pytest.raises(InputError, match=match):
            trained.find_adapter(results, trial)


def test_a_full_disk_no_memory_and_a_kill_leave_nothing(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = trained.find_adapter(results, "fp32")
    out = tmp_path / "models/m"
    monkeypatch.setattr(merge, "_merge", _on_a_full_disk)
    with pytest.raises(InputError, match=r"No space left|File too large"):
        merge.merge(source, out)
    assert not list(out.parent.iterdir())

    monkeypatch.setattr(merge, "_merge", _without_memory)
    with pytest.raises(InputError, match=r"^out of memory: "):
        merge.merge(source, out)
    assert not list(out.parent.iterdir())

    monkeypatch.setattr(merge, "_merge", _killed)
    with pytest.raises(InputError, match=r"ended by SIGKILL; the machine may have run out of memory"):
        merge.merge(source, out)
    assert not list(out.parent.iterdir())

    # A merge that was killed together with its runner: the next one clears up, and leaves those that run.
    killed, running, other = (out.parent / f".{name}.aside" for name in ("m.0a1b2c3d", "m.1a1b2c3d", "m-2.0a1b2c3d"))
    for aside in (killed, running, other):
        aside.mkdir()
    os.utime(killed, (0, 0))
    os.utime(other, (0, 0))
    monkeypatch.undo()
    merge.merge(source, out)
    assert {*out.parent.iterdir()} == {out, running, other}


def _on_a_full_disk(*arguments: Any) -> Any:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    return merge._merge(*arguments)


def _without_memory(*arguments: Any) -> Any:
    import torch

    from harness.adapters import session

    make = session.AdapterSession.make

    def greedy(session: Any, name: Any) -> Any:
        if name == "merged":
            torch.empty(2**50, dtype=torch.uint8)  # more than any machine has
        return make(session, name)

    session.AdapterSession.make = greedy  # type: ignore[method-assign]  # of a process that ends with this
    return merge._merge(*arguments)


def _killed(text: str, adapter: str, folder: str, *others: Any) -> Any:
    (Path(folder) / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


# ------------------------------------------------------------------------------------ forgetting


def test_forgetting_is_what_the_loss_on_general_text_rose_by(results: Path) -> None:
    rows = {row["label"]: row for row in Store(results / "g").read("trials").to_pylist()}
    losses = Store(results / "g").read("stories").to_pandas()
    mine = losses[(losses["trial_id"] == rows["fp32"]["trial_id"]) & (losses["kind"] == "general")]
    before, after = (mine[mine["when"] == when].set_index("story_id") for when in ("before", "after"))
    assert len(before) == len(after) == 64
    weighted = ((after["loss"] - before["loss"]) * before["tokens"]).sum() / before["tokens"].sum()
    assert rows["fp32"]["forgetting"] == pytest.approx(weighted, abs=1e-9)
    assert rows["fp32"]["general_loss_before"] > 0
    assert rows["bf16"]["forgetting"] is None, "it was not asked for"
    assert rows["fp32"]["evaluated_stories"] == rows["bf16"]["evaluated_stories"] <= 6, "passages are no stories"


def test_what_was_learnt_and_forgotten_has_an_interval(results: Path) -> None:
    measurements = loading.load(results / "g")
    compared = comparison.compare(measurements)
    config = int(measurements.configs.index[measurements.configs["label"] == "fp32"][0])
    learnt, forgot = (measurements.learnt(metric, [config])[config] for metric in ("eval_loss", "forgetting"))
    evaluated = measurements.trials.loc[measurements.trials["config"] == config, "evaluated_stories"].item()
    assert (learnt.n, learnt.basis, learnt.verdict) == (evaluated, "stories", "better")
    assert learnt.high is not None
    assert learnt.high < 0, "the tuned model knows the stories better than its base"
    assert (forgot.n, forgot.basis) == (64, "passages")
    assert forgot.low is not None
    assert forgot.high is not None
    assert forgot.low < forgot.value < forgot.high
    cells = {row[0].text: [cell.text for cell in row[1:]] for row in tables.learnt(compared).rows}
    assert cells["fp32"][5] == "64 passages, one seed"
    assert cells["bf16"][4] == "not measured"
    assert cells["fp32"][7].endswith("%")
    chart = plots.forgetting(compared)
    assert chart is not None
    assert "Change on general text" in json.dumps(chart.spec())


# ------------------------------------------------------------------------------------ the inference benchmark


@pytest.fixture(scope="module")
def inference(results: Path) -> InferenceRecord:
    """The three models of the fp32 trial, measured and kept."""
    progress: list[tuple[int, int, str]] = []
    source = trained.find_adapter(results, "fp32")
    inference = benchmark.measure(source, rounds=2, generated_stories=1, most_tokens=12, on_progress=progress.append)
    assert [(done, of) for done, of, _ in progress] == [(i, 6) for i in range(6)]
    assert {what for _, _, what in progress[3:]} == {f"{model}, round 2" for model in ("base", "unmerged", "merged")}
    return inference


def test_three_models_are_measured(results: Path, inference: InferenceRecord) -> None:
    (row,) = [r for r in Store(results / "g").read("trials").to_pylist() if r["label"] == "fp32"]
    models = {each.model: each for each in inference.models}
    assert models["unmerged"].model_bytes - models["base"].model_bytes == row["adapter_bytes"]
    assert models["merged"].model_bytes == models["base"].model_bytes == row["memory_weights_bytes"]
    assert all(each.peak_inference_bytes > each.model_bytes for each in inference.models)
    assert models["merged"].logit_difference is not None
    assert 0 < models["merged"].logit_difference <= 1e-4
    assert models["base"].logit_difference is None
    asked = {(r.model, r.round, r.story_id) for r in inference.requests}
    assert len(asked) == len(inference.requests) == 3 * 2 * 2
    assert all(len(r.token_seconds) == 31 and min(r.token_seconds) > 0 for r in inference.requests)
    # The adapter that was kept is the model that was trained.
    losses = Store(results / "g").read("stories").to_pandas()
    mine = losses[(losses["trial_id"] == row["trial_id"]) & (losses["kind"] == "held-out")]
    for model, when in (("base", "before"), ("unmerged", "after"), ("merged", "after")):
        known = mine[mine["when"] == when].set_index("story_id")["loss"]
        answers = {a.story_id: a.loss for a in inference.answers if a.model == model}
        assert answers == pytest.approx(known.to_dict(), abs=1e-4)
    generated = [a for a in inference.answers if a.story is not None]
    assert [a.model for a in generated] == ["base", "merged"]
    assert generated[0].synopsis in {s.instruction for s in stories.read(DatasetSpec(path="storyteller")).stories}


def test_a_quantised_model_is_counted_with_its_scales_and_merged_in_16_bit(results: Path) -> None:
    (row,) = [r for r in Store(results / "g").read("trials").to_pylist() if r["label"] == "nf4"]
    inference = benchmark.measure(
        trained.find_adapter(results, "nf4"), rounds=1, generated_stories=0, most_tokens=1, on_progress=lambda at: None
    )  # fmt: skip
    models = {each.model: each for each in inference.models}
    assert models["base"].model_bytes == row["memory_weights_bytes"]
    assert [models[name].precision for name in ("base", "unmerged", "merged")] == ["nf4", "nf4", "bf16"]
    assert models["merged"].model_bytes > models["base"].model_bytes


def test_inference_results_are_reported_and_judged(results: Path, inference: InferenceRecord, tmp_path: Path) -> None:
    content = document.document(loading.load(results / "g"), results / "g")
    (table,) = [t for t in content.tables if t.id == "merged"]
    assert [row[1].text for row in table.rows if row[0].text == "fp32"] == ["base", "unmerged", "merged"]
    verdict = {v.claim.id: v for v in content.verdicts}
    assert verdict["merging-weights"].word == "supported"
    assert verdict["merging-same-model"].word == "supported"
    assert verdict["merging-same-model"].pairs == f"{len(inference.answers) // 3} stories"
    assert verdict["tuned-better"].word == "supported"
    assert verdict["merging-faster"].pairs == "2 rounds"
    writers.write(content, tmp_path)
    markdown, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    (generated,) = content.stories
    assert {*generated.stories} == {"base", "merged"}
    assert f"*{generated.synopsis}*" in markdown
    assert "<figcaption>merged</figcaption>" in page


def _inference(precision: str, merged: str, size: int, ratio: float) -> InferenceRecord:
    """Figures of a trial whose merged model decodes `ratio` times as fast as the unmerged one."""
    models = (("unmerged", precision, size + 10, 1.0), ("merged", merged, size, ratio))
    return InferenceRecord(
        environment=current("cpu"),
        models=tuple(
            ModelFootprint(model=name, precision=held, model_bytes=size, peak_inference_bytes=size + 1)  # type: ignore[arg-type]
            for name, held, size, _ in models
        ),
        requests=tuple(
            Request(model=name, round=i, story_id="a", prompt_tokens=8, prefill_seconds=1.0,  # type: ignore[arg-type]
                    token_seconds=((1 + i / 10) / speed,) * 4)
            for name, _, _, speed in models for i in range(3)
        ),
        answers=(),
    )  # fmt: skip


def test_models_are_judged_where_their_weights_are_held_alike(tmp_path: Path) -> None:
    store = Store(tmp_path)
    inferences = {
        "one": ("fp32", _inference("fp32", "fp32", 1000, 1.2)),
        "two": ("bf16", _inference("bf16", "bf16", 500, 1.25)),
        "quantised": ("nf4", _inference("nf4", "bf16", 900, 3.0)),
        "trained again": ("fp16", _inference("fp16", "fp16", 500, 9.0)),
    }
    for label, (precision, inference) in inferences.items():
        spec = TrialSpec.model_validate(SMALL | {"precision": precision})
        keep(store, spec, label, [2.0], adapter_id="new", eval_loss=2.0)
        row = store.read("trials").filter(pc.field("label") == label).to_pylist()[0]
        store.write_inference(row | {"adapter_id": "old" if label == "trained again" else "new"}, inference)
    loaded = loading.load(tmp_path)
    judged = {v.claim.id: v for v in verdicts.judge(comparison.compare(loaded))}
    assert judged["merging-weights"].word == "supported"
    assert judged["merging-weights"].pairs == "2 repeats, exact"
    assert judged["merging-faster"].pairs == "2 trials", "what rounds of a trial have in common counts once"
    assert judged["merging-faster"].size.startswith("×1.22")
    rests_on, _, labels = judged["merging-faster"].rests_on.rpartition(" of ")
    assert rests_on == "unmerged → merged"
    assert sorted(labels.split(", ")) == ["one", "two"], "in the order of their ids"
    shown = inference_tables.models(loaded, comparison.compare(loaded)).rows
    assert {row[0].text for row in shown} == {"one", "two", "quantised"}, "figures of a former adapter are nobody's"
    (merged,) = [row for row in shown if (row[0].text, row[1].text) == ("quantised", "merged")]
    assert merged[12].text.startswith("×3"), "in its own row the exchange is seen"


def test_trained_models_are_judged_once(tmp_path: Path) -> None:
    """The interval of a claim is that of the table, and all of a figure are one family."""
    store = Store(tmp_path)
    keep(store, TrialSpec.model_validate(SMALL), "one", [2.0], adapter_id="a", eval_loss=2.0)
    measured = _inference("fp32", "fp32", 1000, 1.2)
    of_base = [
        (each.model_copy(update={"model": "base"}) for each in rows if each.model == "unmerged")
        for rows in (measured.models, measured.requests)
    ]
    models, requests = (*measured.models, *of_base[0]), (*measured.requests, *of_base[1])
    row = store.read("trials").to_pylist()[0]
    store.write_inference(row, measured.model_copy(update={"models": models, "requests": requests}))
    content = document.document(loading.load(tmp_path), tmp_path)
    (table,) = [t for t in content.tables if t.id == "merged"]
    (decode,) = [row[12].text for row in table.rows if row[1].text == "merged"]
    (claim,) = [v for v in content.verdicts if v.claim.id == "merging-faster"]
    assert claim.size.startswith("×1.20")
    assert decode.startswith(f"{claim.size} ")


def test_generated_text_steers_neither_page_nor_terminal() -> None:
    evil = "\x1b[31mred | <script>alert(1)</script>\n\n![x](http://x) end"
    lines = writers._md_story(inference_tables.GeneratedStory("t", "s", "r", {"base": evil})).splitlines()
    assert lines[-1].count("|") - lines[-1].count("\\|") == 3, "no cell is broken"
    assert "<script" not in lines[-1]
    assert "![" not in lines[-1]
    shown = io.StringIO()
    with story_display(Console(file=shown), ["base"]) as show:
        show(None, "a [b]synopsis[/b]")
        show("base", evil)
    assert "\x1b" not in shown.getvalue() + lines[-1]
    assert "a [b]synopsis[/b]" in shown.getvalue()


def test_stories_are_shown_as_they_come(results: Path) -> None:
    source = trained.find_adapter(results, "fp32")
    pieces: list[tuple[Any, str]] = []

    def generate(models: list[Any], synopsis: str | None = "A fox learns to count.", temperature: float = 0.0) -> None:
        pieces.clear()
        benchmark.generate(
            source, synopsis, models, most_tokens=24, temperature=temperature, seed=3,
            on_text=lambda model, piece: pieces.append((model, piece)),
        )  # fmt: skip

    def story(model: str) -> str:
        return "".join(piece for name, piece in pieces if name == model)

    generate(["base", "merged"])
    assert pieces[0] == (None, "A fox learns to count.")
    assert len(pieces) > 6, "piece by piece"
    assert [name for name, _ in pieces[1:]] == sorted((name for name, _ in pieces[1:]), key=["base", "merged"].index)
    base, merged = story("base"), story("merged")
    assert base != merged, "training changed the story"
    generate(["unmerged"])
    assert story("unmerged") == merged
    generate(["merged"], temperature=1.5)
    warm = story("merged")
    assert warm != merged
    generate(["merged"], synopsis=None, temperature=1.5)
    assert pieces[0][1] in {s.instruction for s in stories.read(DatasetSpec(path="storyteller")).stories}


def test_side_by_side_in_a_terminal() -> None:
    shown = io.StringIO()
    with story_display(Console(file=shown, force_terminal=True, width=80), ["base", "merged"]) as show:
        show("base", "one")
        show("merged", "other")
    last = shown.getvalue()[shown.getvalue().rindex("base") :]
    (line,) = [line for line in last.splitlines() if "one" in line]
    assert "other" in line


# ------------------------------------------------------------------------------------ figures of stories


def test_figures_of_stories() -> None:
    # The example of Lin (2004): S2 shares a sequence of three words of four with S1, S3 of two.
    s1, s2, s3 = "police killed the gunman", "police kill the gunman", "the gunman kill police"
    assert story_metrics.rouge_l(s2.split(), s1.split()) == 0.75
    assert story_metrics.rouge_l(s3.split(), s1.split()) == 0.5
    assert story_metrics.rouge_l([], s1.split()) == 0
    figures = story_metrics.StoryMetrics().compute(
        predictions=["The cat sat. The cat sat. The cat sat!", ""], references=["A cat sat down.", "Nothing"]
    )
    assert figures["words"] == [9, 0]
    assert figures["rouge_l"] == [pytest.approx(2 * 2 / (9 + 4)), 0]
    assert figures["distinct_2"] == [3 / 8, None]
    assert figures["repetition"] == [3 / 6, None]  # of six runs of four words three stood there before
