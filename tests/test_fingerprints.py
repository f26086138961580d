"""Trials are known by the content of their data and base model: edited in place, they are other trials."""

from __future__ import annotations

import csv
import datetime as dt
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import SMALL, Answer
from rows import keep
from test_launch import Watch, go, grid_of

from harness.adapters import trained
from harness.adapters.trained import RecordedAdapter
from harness.analysis import loading
from harness.analysis.compare_runs import compare_runs
from harness.environment import Environment, current
from harness.errors import InputError
from harness.grids import grid, preflight, search_file
from harness.grids.yaml_file import spec_to_yaml
from harness.launch.inline import InlineLauncher
from harness.record import NO_CONTENTS, Contents, Job, Visit, trial_id
from harness.results.schema import spec_of
from harness.results.store import Store
from harness.runner import grid_run
from harness.sources import fingerprints, models, stories
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, trial
from harness.tuning.study import study_name
from harness.tuning.warm_start import WarmStart

ROOT = Path(__file__).parent.parent
Ask = Callable[..., Answer]
Row = dict[str, str]
A, B = "a" * 12, "b" * 12
ROWS: list[Row] = [
    {"synopsis": f"number {i}", "short_story": f"Once there was a {i}, who was never a {i + 1}.", "mood": "gay"}
    for i in range(8)
]
GRID = """
name: g
visits: 0
base: {{base_model: {base}, datasets: [{{path: {data}}}], precision: fp32, lora_r: 4, train_samples: 2,
       sequence_length: 128, val_set_size: 2}}
"""


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def edited(rows: list[Row]) -> list[Row]:
    return [row | {"short_story": row["short_story"].replace("never", "always")} for row in rows]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are kept apart from those of other tests; weights are not made anew."""
    models.bundled_file()
    kept = models.cache_folder()
    cache = tmp_path_factory.mktemp("cache")
    for folder in kept.glob("random-tiny-*/"):
        (cache / folder.name).symlink_to(folder)
    monkeypatch.setenv("HARNESS_CACHE", str(cache))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model in a folder."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints.checkpoint_folder("random:tiny"), folder)
    checkpoints.byte_tokenizer().save_pretrained(folder)
    return folder


def spec_with(**changes: Any) -> TrialSpec:
    return TrialSpec.model_validate(SMALL | {"train_samples": 2, "sequence_length": 128} | changes)


def data_of(file: Path, **prompt: Any) -> str:
    return fingerprints.data(spec_with(datasets=[{"path": str(file), "type": prompt}]))


def base_of(folder: Path) -> str:
    return fingerprints.base(spec_with(base_model=str(folder)))


def replace_in(file: Path, before: bytes, after: bytes) -> None:
    """Same size, same time of the last change: only the kernel's own record of it differs."""
    times, content = file.stat(), file.read_bytes()
    assert before in content
    file.write_bytes(content.replace(before, after, 1))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


# ------------------------------------------------------------------------------------ what they are of


def test_rows_under_their_keys_count_and_nothing_else(tmp_path: Path) -> None:
    before = data_of(write(tmp_path / "d.jsonl", ROWS))
    (tmp_path / "other").mkdir()
    copy = write(tmp_path / "other" / "e.jsonl", [{"mood": "sad", **row} for row in reversed(ROWS)])
    os.utime(copy, (1e9, 1e9))
    assert data_of(copy) == before, "another path, time and order; a column that is not read"
    with (tmp_path / "d.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["short_story", "synopsis", "mood"])
        table.writeheader()
        table.writerows(ROWS)
    assert data_of(tmp_path / "d.csv") == before
    sad = [row | {"mood": "sad"} for row in ROWS]
    assert data_of(write(tmp_path / "sad.jsonl", sad)) == before
    others = {
        before, data_of(write(tmp_path / "1.jsonl", edited(ROWS))), data_of(write(tmp_path / "2.jsonl", ROWS[:-1])),
        data_of(write(tmp_path / "3.jsonl", [*ROWS, ROWS[0]])), data_of(tmp_path / "d.csv", field_system="mood"),
        data_of(tmp_path / "sad.jsonl", field_system="mood"), data_of(tmp_path / "d.csv", field_input="mood"),
    }  # fmt: skip
    assert len(others) == 7
    both = [[{"path": str(tmp_path / f"{name}.jsonl")} for name in names] for names in ("12", "21")]
    one, other = (fingerprints.data(spec_with(datasets=each)) for each in both)
    assert one != other


def test_configuration_weights_and_tokenizer_count_and_nothing_else(base: Path, tmp_path: Path) -> None:
    before = base_of(base)
    copy = tmp_path / "copy"
    shutil.copytree(base, copy, copy_function=shutil.copy)
    (copy / "generation_config.json").write_text("{}")
    (copy / "README.md").write_text("new")
    assert base_of(copy) == before
    kinds = {
        "config.json": (b'"rms_norm_eps": 1e-05', b'"rms_norm_eps": 1e-06'),
        "tokenizer.json": (b"<|begin|>", b"<|start|>"),
        "model-00001.safetensors": (b"format", b"FORMAT"),
    }
    for name, (old, new) in kinds.items():
        replace_in(copy / name, old, new)
        assert base_of(copy) != before, name
        replace_in(copy / name, new, old)
        assert base_of(copy) == before, name
    (copy / "modeling_own.py").write_text("x = 1")
    assert base_of(copy) != before
    (tmp_path / "config.json").write_text(json.dumps(models.random_config("tiny")))
    named, by_file = "random:tiny", f"random:{tmp_path}/config.json"
    assert fingerprints.base(spec_with(base_model=named)) == fingerprints.base(spec_with(base_model=by_file))
    assert fingerprints.base(spec_with(base_model=models.BUNDLED)) != before


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    prints = []
    for commit in ("1" * 40, "2" * 40, "1" * 40):
        (refs / "main").write_text(commit)
        prints.append(fingerprints.base(spec_with(base_model="owner/name")))
    assert prints[0] == prints[2] != prints[1]


def test_digests_are_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "d.jsonl", ROWS)
    before = data_of(file)
    cache = models.cache_folder()
    assert not list(cache.glob("fingerprint-*")), "it has only just been written: another write may have the same time"
    monkeypatch.setattr(fingerprints, "_SETTLED_SECONDS", 0.0)
    assert data_of(file) == before
    (kept,) = cache.glob("fingerprint-*")
    known = json.loads(kept.read_bytes())
    kept.write_text(json.dumps(known | {"digest": "kept"}))
    assert data_of(file) == fingerprints._short(fingerprints._digest(["kept"])), "nothing was read again"
    replace_in(file, b"never", b"NEVER")
    assert data_of(file) not in (before, fingerprints._short(fingerprints._digest(["kept"])))
    replace_in(file, b"NEVER", b"never")
    assert data_of(file) == before
    kept.write_text("damaged")
    assert data_of(file) == before
    monkeypatch.setenv("HARNESS_CACHE", str(file))  # no folder, so nothing can be kept
    assert data_of(file) == before


def test_data_keep_the_fingerprints_that_records_have(tmp_path: Path) -> None:
    assert data_of(write(tmp_path / "d.jsonl", ROWS)) == "05e095d15945"
    assert fingerprints.data(spec_with(datasets=[{"path": "storyteller"}])) == "0faff91d43d3"


def test_rows_of_a_chat_and_of_a_text_count(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    tool = {"type": "function", "function": {"name": "rain"}}
    other = [turns[0], turns[1] | {"reasoning_content": "Hm."}]
    rows: list[list[dict[str, Any]]] = [
        [{"messages": turns}], [{"messages": other}], [{"messages": turns, "tools": [tool]}],
        [{"prompt": turns[:1], "completion": turns[1:]}], [{"text": "So."}], [{"text": "No."}],
    ]  # fmt: skip
    assert len({data_of(write(tmp_path / "d.jsonl", each)) for each in rows}) == len(rows)
    lines = write(tmp_path / "d.jsonl", [{"messages": turns}, {"messages": other}])
    before = data_of(lines)
    (tmp_path / "d.json").write_text(json.dumps([{"messages": json.dumps(each)} for each in (other, turns)]))
    assert data_of(tmp_path / "d.json") == before, "another order, and another way to write the turns"


def test_a_folder_counts_by_its_rows_and_which_of_them_are_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(fingerprints, "_SETTLED_SECONDS", 0.0)
    folder = tmp_path / "d"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS[:6])
    without = data_of(folder)
    assert without == data_of(write(tmp_path / "d.jsonl", ROWS[:6])), "whether a file or a folder of one"
    write(folder / "test.jsonl", ROWS[6:])
    before = data_of(folder)
    assert before != without
    assert before != data_of(write(tmp_path / "d.jsonl", ROWS)), "held out by the data is not held out by the split"
    parts = {name: datasets.Dataset.from_list(rows) for name, rows in (("train", ROWS[:6]), ("test", ROWS[6:]))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    assert data_of(tmp_path / "saved") == before
    replace_in(folder / "test.jsonl", b"never", b"NEVER")
    assert data_of(folder) != before
    replace_in(folder / "test.jsonl", b"NEVER", b"never")
    assert data_of(folder) == before
    (folder / "test.jsonl").rename(folder / "notes.jsonl")
    assert data_of(folder) == without, "no state of a file has changed, and yet it is another part"


def test_digests_of_patterns_and_folders_are_never_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_SETTLED_SECONDS", 0.0)
    write(tmp_path / "a.jsonl", ROWS[:2])
    write(tmp_path / "b.jsonl", ROWS[2:4])
    (tmp_path / "aside").mkdir()
    write(tmp_path / "aside" / "c.jsonl", ROWS[4:])
    pattern = tmp_path / "*.jsonl"
    before = data_of(pattern)
    (kept,) = models.cache_folder().glob("fingerprint-*")
    known = json.loads(kept.read_bytes())
    kept.write_text(json.dumps(known | {"digest": "kept"}))
    assert data_of(pattern) == fingerprints._short(fingerprints._digest(["kept"])), "nothing was read again"
    (tmp_path / "aside" / "c.jsonl").rename(tmp_path / "c.jsonl")
    assert data_of(pattern) == data_of(write(tmp_path / "aside" / "all.jsonl", ROWS))
    (tmp_path / "c.jsonl").unlink()
    kept.unlink()
    assert data_of(pattern) == before
    replace_in(tmp_path / "b.jsonl", b"never", b"NEVER")
    assert data_of(pattern) != before
    replace_in(tmp_path / "b.jsonl", b"NEVER", b"never")
    (tmp_path / "b.jsonl").rename(tmp_path / "b.txt")
    assert data_of(pattern) == data_of(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="no file matches"):
        data_of(tmp_path / "*.csv")


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_SETTLED_SECONDS", 0.0)
    file, read = write(tmp_path / "d.jsonl", ROWS), stories.read

    def read_and_edit(*given: Any, **options: Any) -> stories.Rows:
        rows = read(*given, **options)
        replace_in(file, b"never", b"NEVER")
        return rows

    with monkeypatch.context() as patched:
        patched.setattr(stories, "read", read_and_edit)
        before = data_of(file)
    assert not list(models.cache_folder().glob("fingerprint-*"))
    assert data_of(file) != before


def test_keys_that_choose_rows_have_their_own_fingerprints(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", ROWS)
    chosen: list[dict[str, Any]] = [{}, {"split": "train[:4]"}, {"split": "train[4:]"}, {"shards": 2}]
    prints = [fingerprints.data(spec_with(datasets=[{"path": str(file)} | keys])) for keys in chosen]
    assert len({*prints}) == len(chosen)
    assert prints[1] == data_of(write(tmp_path / "e.jsonl", ROWS[:4]))


# ------------------------------------------------------------------------------------ runs


def test_edited_data_are_other_trials_until_they_are_put_back(tmp_path: Path, ask: Ask) -> None:
    (tmp_path / "g.yml").write_text(GRID.format(base="random:tiny", data="d.jsonl"))
    data = write(tmp_path / "d.jsonl", ROWS)

    def run(*options: str) -> str:
        code, output, errors = ask("run", "g.yml", "--no-predict", *options)
        assert code == 0, errors
        return output

    def contents() -> set[str]:
        return set(loading.load(tmp_path / "results" / "g").trials["data_fingerprint"])

    assert "recorded with other" not in run()
    first = contents()
    write(data, edited(ROWS))
    output = run()
    assert "1 trials are recorded with other content of d.jsonl (changed since); they are kept apart and" in output
    assert "left out: 1 trial with other content of d.jsonl" in " ".join(output.split())
    assert contents().isdisjoint(first)
    assert "recorded with other" not in run("--repeats", "2"), "the second repeat is not recorded with any"
    m = loading.load(tmp_path / "results" / "g")
    assert (len(m.trials), m.left_out) == (2, ("1 trial with other content of d.jsonl",))
    write(data, list(reversed(ROWS)))
    assert "recorded already" in run()
    assert contents() == first, "the report is of what the latest run read"
    assert "fingerprints: data" in ask("show", "baseline")[1]


def test_an_edited_base_is_another_trial(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", ROWS)
    spec = spec_with(base_model=str(base), datasets=[{"path": str(tmp_path / "d.jsonl")}])
    store, launcher = Store(tmp_path / "results"), InlineLauncher()

    def read() -> grid.Grid:
        return grid_of(x=spec).with_contents(fingerprints.Snapshot().of)

    (first,) = go(read(), store, launcher).records
    assert first.trial_id == trial_id(spec, current("cpu"), fingerprints.of(spec))
    assert not grid_run.pending(read(), store, launcher)
    replace_in(base / "model-00001.safetensors", b"format", b"FORMAT")
    assert grid_run.kept_apart(read().trials, store, launcher) == [
        f"1 trials are recorded with other content of {base} (changed since); they are kept apart and measured anew"
    ]
    (second,) = go(read(), store, launcher).records
    assert second.status == "ok"
    assert second.data_fingerprint == first.data_fingerprint
    assert len(store.read("trials")) == 2
    assert len(loading.load(store.folder).trials) == 1


def test_what_changes_during_a_run_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "d.jsonl", ROWS)
    spec = spec_with(datasets=[{"path": str(data)}], val_set_size=0.0)
    begun = grid_of(x=spec).with_contents(fingerprints.Snapshot().of)
    job = Job(grid="g", spec=spec, label="x", **begun.trials[0].contents.columns)
    write(data, edited(ROWS))
    for visit in (None, Visit(block=1, seconds=0.01)):
        record = trial.run(job.model_copy(update={"visit": visit}), environment=current("cpu"))
        assert record.status == "failed"
        assert record.error == f"{data} changed since the run began; running again measures the new content"
        assert not record.steps
    store, launcher = Store(tmp_path / "results"), InlineLauncher()
    assert [record.status for record in go(begun, store, launcher, Watch()).records] == ["failed"]
    again = grid_of(x=spec).with_contents(fingerprints.Snapshot().of)
    assert [record.status for record in go(again, store, launcher).records] == ["ok"]
    read = batches.load

    def slow(*arguments: Any) -> batches.Data:
        examples = read(*arguments)
        write(data, ROWS)
        return examples

    monkeypatch.setattr(batches, "load", slow)
    job = job.model_copy(update=again.trials[0].contents.columns)
    assert trial.run(job, environment=current("cpu")).error_type == "ContentsChanged", "it changed while it was read"


# ------------------------------------------------------------------------------------ rows from before


def test_committed_rows_keep_their_ids_and_are_reported() -> None:
    for folder in sorted(path.parent for path in (ROOT / "results").glob("*/trials")):
        rows = Store(folder).read("trials").to_pylist()
        for row in rows:
            environment = Environment.model_validate_json(row["environment"])
            contents = Contents.of_row(row)
            assert row["trial_id"] == trial_id(spec_of(row), environment, contents, twin=row["twin"])
            assert (contents == NO_CONTENTS) == (folder.name == "tune"), "these are from before there were any"
    assert not [what for what in loading.load(ROOT / "results/tune").left_out if "content" in what]


def recorded(folder: Path, fingerprint: str | None, day: int, **more: Any) -> Store:
    """A store with a baseline and another trial of one content."""
    store = Store(folder)
    prints = {"data_fingerprint": fingerprint, "base_fingerprint": fingerprint} | more
    for label, changes in (("baseline", {}), ("lora_r=8", {"lora_r": 8})):
        spec = TrialSpec.model_validate(SMALL | changes)
        when = dt.datetime(2026, 1, day, tzinfo=dt.UTC)
        keep(store, spec, label, [3.0, 3.1], started_at=when, peak_memory_bytes=2**20, **prints)
    return store


def test_rows_without_fingerprints_are_not_mixed_with_others(tmp_path: Path) -> None:
    store = recorded(tmp_path / "g", None, 1)
    assert len(loading.load(store.folder).trials) == 2, "alone, they are reported"
    recorded(store.folder, A, 2)
    m = loading.load(store.folder)
    assert set(m.trials["data_fingerprint"]) == {A}
    assert m.left_out == ("2 trials from before contents were fingerprinted",)
    recorded(store.folder, A, 3, base_fingerprint=B)
    m = loading.load(store.folder)
    assert set(m.trials["base_fingerprint"]) == {B}
    assert m.left_out == (
        "2 trials with other content of random:tiny",
        "2 trials from before contents were fingerprinted",
    )
    spec = TrialSpec.model_validate(SMALL)
    latest = grid_of(x=spec).with_contents(lambda _: Contents(A, A))
    store.describe(latest.about)
    assert set(loading.load(store.folder).trials["base_fingerprint"]) == {A}, "the latest run decides"
    for odd in ([], {"data": 3}, {"data": {"[]": [1]}}, {"base": {"random:tiny": "unknown"}}):
        store.describe(latest.about | {"contents": odd})
        assert len(loading.load(store.folder).trials) == 2

    old = recorded(tmp_path / "old", None, 1)
    (line,) = grid_run.kept_apart(latest.trials, old, InlineLauncher())
    assert line.startswith("1 trials were recorded before contents were fingerprinted; they are kept apart")
    assert not grid_run.kept_apart(grid_of(x=spec).trials, old, InlineLauncher())


def test_runs_of_different_contents_are_not_paired(tmp_path: Path) -> None:
    runs = {
        name: loading.load(recorded(tmp_path / name, given, 1).folder)
        for name, given in {"a": A, "again": A, "b": B, "old": None, "older": None}.items()
    }
    for one, other in (("a", "again"), ("old", "older")):
        compared = compare_runs(runs[one], runs[other])
        assert (len(compared.pairs), compared.unpaired) == (2, None)
    for one, other in (("a", "b"), ("old", "a"), ("a", "old")):
        with pytest.raises(InputError, match=r"2 configurations are not compared: .* different contents"):
            compare_runs(runs[one], runs[other])


SEARCH = """
name: g
base: {base_model: random:tiny, datasets: [{path: storyteller-openings}], precision: fp32, sequence_length: 256,
       micro_batch_size: 2, gradient_accumulation_steps: 2, train_samples: 16, val_set_size: 2, lora_r: 4}
tune: {space: {lora_r: [4, 8]}, objectives: [peak_memory_bytes]}
"""


def test_a_search_takes_and_goes_on_with_trials_of_its_contents_alone(tmp_path: Path) -> None:
    (tmp_path / "g.yml").write_text(SEARCH)
    search = search_file.load(tmp_path / "g.yml")
    here = current("cpu")
    names = {study_name(search, here.id, [Contents(A, each)]) for each in (A, B)}
    assert len({*names, study_name(search, here.id)}) == 3
    source = recorded(tmp_path / "source", None, 1)
    recorded(source.folder, A, 2)
    recorded(source.folder, B, 3)
    target = Store(tmp_path / "target")
    warm_start = WarmStart(optuna.create_study(), search, target, here, lambda spec: Contents(A, A))
    assert warm_start.add(source.folder).endswith(
        "2 used, 2 with other content of their data or base model, 2 from before contents were fingerprinted"
    )
    assert {Contents.of_row(row) for row in target.read("trials").to_pylist()} == {Contents(A, A)}
    assert set(target.read("trials")["trial_id"].to_pylist()) == {
        trial_id(TrialSpec.model_validate(SMALL | {"lora_r": r}), here, Contents(A, A)) for r in (4, 8)
    }


def test_an_adapter_goes_with_what_it_was_trained_on(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", ROWS)
    spec = spec_with(base_model=str(base), datasets=[{"path": str(data)}])
    row = fingerprints.of(spec).columns
    adapter = RecordedAdapter(spec, tmp_path, "x", {}, row, tmp_path)
    trained.refuse_changed_base(adapter)
    trained.refuse_changed_data(adapter)
    write(data, edited(ROWS))
    with pytest.raises(InputError, match="not the stories that its trial held out; put it back, or run"):
        trained.refuse_changed_data(adapter)
    trained.refuse_changed_base(adapter)
    replace_in(base / "config.json", b'"rms_norm_eps": 1e-05', b'"rms_norm_eps": 1e-06')
    with pytest.raises(InputError, match="model changed since this trial ran"):
        trained.refuse_changed_base(adapter)
    unknown = RecordedAdapter(spec, tmp_path, "x", {}, NO_CONTENTS.columns, tmp_path)
    trained.refuse_changed_base(unknown)
    trained.refuse_changed_data(unknown)


def test_of_a_label_that_was_trained_twice_the_latest_adapter_is_taken(tmp_path: Path) -> None:
    for day, fingerprint in ((2, B), (1, A)):
        recorded(tmp_path / "g", fingerprint, day, adapter_id=f"adapter{fingerprint}")
    taken = trained.find_adapter(tmp_path, "baseline")
    assert taken.row["data_fingerprint"] == B
    before = trial_id(taken.spec, current("cpu"), Contents(A, A))
    assert trained.find_adapter(tmp_path, before).row["data_fingerprint"] == A


# ------------------------------------------------------------------------------------ relative paths


def test_relative_paths_begin_at_the_grid_file(
    base: Path, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "grids"
    folder.mkdir()
    write(tmp_path / "d.jsonl", ROWS)
    file = folder / "g.yml"
    file.write_text(GRID.format(base="../model", data="../d.jsonl") + "vary: {base_model: [random:../config.json]}\n")
    (tmp_path / "config.json").write_text(json.dumps(models.random_config("tiny")))
    loaded = []
    for here, name in ((tmp_path, "grids/g.yml"), (folder, "g.yml"), (Path("/"), str(file))):
        monkeypatch.chdir(here)
        loaded.append(grid.load(Path(name)))
        preflight.preflight(loaded[-1])
        fingerprints.of(loaded[-1].trials[0].spec)
    assert loaded[0].trials == loaded[1].trials == loaded[2].trials
    spec = loaded[0].trials[0].spec
    assert spec.folder == str(folder)
    assert spec.id == spec.model_copy(update={"folder": "/another/checkout"}).id

    file.write_text(GRID.format(base="random:tiny", data="../d.jsonl"))
    results = str(tmp_path / "results")
    monkeypatch.chdir(folder)
    code, output, errors = ask("run", "g.yml", "--no-predict", "--results", results)
    assert "1 ok" in output, errors
    monkeypatch.chdir(tmp_path)
    assert "recorded already" in ask("run", "grids/g.yml", "--no-predict", "--results", results)[1]
    assert code == ask("plan", "grids/g.yml", "--gpu", "l4")[0] == 0
    assert f"relative paths begin at {folder}" in ask("show", "baseline", "--results", results)[1]
    assert ask("recommend", "results/g", "--output", "elsewhere.yml")[0] == 0
    (exported,) = grid.load(tmp_path / "elsewhere.yml").trials
    assert exported.spec.datasets[0].path == str(tmp_path / "d.jsonl")


def test_only_relative_files_and_folders_need_a_folder(base: Path, tmp_path: Path) -> None:
    def folder_of(model: str, data: str) -> str | None:
        (tmp_path / "g.yml").write_text(GRID.format(base=model, data=data))
        return grid.load(tmp_path / "g.yml").trials[0].spec.folder

    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "model").mkdir()
    assert folder_of("random:tiny", "storyteller") is None
    assert folder_of("owner/name", "owner/name") is None
    assert folder_of(str(base), str(tmp_path / "d.jsonl")) is None
    for model, data in (("model", "storyteller"), ("own/model", "storyteller"), ("random:tiny", "d.jsonl"),
                        ("random:./config.json", "storyteller")):  # fmt: skip
        assert folder_of(model, data) == str(tmp_path)
    assert "folder" not in spec_to_yaml(grid.load(tmp_path / "g.yml").trials[0].spec)


def test_a_path_that_begins_at_the_current_folder_is_refused_with_what_to_write(
    base: Path, tmp_path: Path, ask: Ask
) -> None:
    (tmp_path / "grids").mkdir()
    write(tmp_path / "d.jsonl", ROWS)
    for model, data, hint in (
        ("random:tiny", "d.jsonl", r"../d.jsonl"),
        ("./model", "storyteller", "../model"),
        ("random:model/config.json", "storyteller", "../model/config.json"),
    ):
        (tmp_path / "grids" / "g.yml").write_text(GRID.format(base=model, data=data))
        code, _, errors = ask("run", "grids/g.yml", "--no-predict")
        assert code == 2
        assert f"it is in the current folder, so write {hint}" in errors
        assert len(errors.splitlines()) == 1
    (tmp_path / "grids" / "g.yml").write_text(GRID.format(base="random:tiny, folder: .", data="storyteller"))
    assert "unknown key 'folder'" in ask("run", "grids/g.yml")[2]
    (tmp_path / "grids" / "g.yml").write_text(GRID.format(base="random:tiny", data="storyteller"))
    _, output, errors = ask("run", "grids/g.yml", "--model", "model", "--dry-run")
    assert "1 to run" in output, errors
