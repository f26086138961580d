"""Hostile input is refused in one line, left out or escaped, and private data stays private."""

from __future__ import annotations

import datetime as dt
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import SMALL
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rows import keep

from harness._util.redact import redact
from harness.analysis import comparison, loading
from harness.cli.console import out
from harness.environment import current
from harness.errors import InputError
from harness.grids import document, grid, levels
from harness.record import Job
from harness.report import tables, writers
from harness.report.document import document as report_document
from harness.results.parts import DamagedPart
from harness.results.store import Store
from harness.sources import files, stories
from harness.spec.datasets import DatasetSpec
from harness.spec.trial import TrialSpec
from harness.training import trial

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import fuzz  # noqa: E402 - not a package

Small = Callable[..., TrialSpec]
ONE_FOLDER = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Everything that people and their editors put into files, half characters and what steers a terminal included.
anything = st.text(st.characters(codec=None), max_size=40)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | anything
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(anything, inner, max_size=3))


# ------------------------------------------------------------------------------------ grids, datasets


@given(text=st.text(max_size=300) | st.binary(max_size=300))
@example(text="base: {base_model: random:tiny, !!map [a]}")
@example(text="- !!map x")
@example(text=f"0x{'f' * 5000}")
@example(text='base: "a\\0b"')
@example(text="base: /dev/zero")
@ONE_FOLDER
def test_any_text_is_a_grid_or_refused_in_a_line(text: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "any.yml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    _is_grid_or_line(file)


def test_a_base_that_cannot_be_a_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.yml").write_text('base: "a\\0b"')
    with pytest.raises(InputError, match=r"base is 'a\\x00b'; it must be a mapping"):
        grid.load(tmp_path / "g.yml")


@given(
    base=st.dictionaries(st.sampled_from(levels.SPEC_KEYS), values, max_size=3),
    rest=st.dictionaries(st.sampled_from(document.GRID_KEYS), values, max_size=3),
)
@example(base={}, rest={"claims": [{"id": "a", "says": "b", "compare": {"lora_r": [1]}, "metric": "eval_loss"}]})
@ONE_FOLDER
def test_any_value_of_any_key_is_taken_or_refused_in_a_line(
    base: dict[str, Any], rest: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "any.yml"
    file.write_text(yaml.safe_dump({"base": {"base_model": "random:tiny"} | base} | rest), encoding="utf-8")
    _is_grid_or_line(file)


def _is_grid_or_line(file: Path) -> None:
    message = ""
    try:
        assert all(trial.label.isprintable() for trial in grid.load(file).trials)
    except InputError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 1000


@given(
    suffix=st.sampled_from(files.SUFFIXES),
    content=st.binary(max_size=200) | st.lists(values, max_size=3).map(lambda rows: json.dumps(rows).encode()),
)
@example(suffix=".json", content=b'[{"synopsis": ' + b"[" * 990 + b"]" * 990 + b', "short_story": "x"}]')
@example(suffix=".csv", content=("c" * 100_000 + "\n1\n").encode())
@ONE_FOLDER
def test_any_dataset_is_read_or_refused_in_a_line(suffix: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"any{suffix}"
    file.write_bytes(content)
    message = ""
    try:
        assert stories.read(DatasetSpec(path=str(file))).stories
    except InputError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 1000


def test_a_time_that_python_cannot_count_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "late.parquet"
    pq.write_table(pa.table({"synopsis": pa.array([2**62], pa.timestamp("us"))}), file)
    with pytest.raises(InputError, match=r"late\.parquet cannot be read as \.parquet"):
        stories.read(DatasetSpec(path=str(file)))


# ------------------------------------------------------------------------------------ labels in every face

SCRIPT, COMMAND = "<script>alert(7041)</script>", r"\input{secret7041}"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "g"
    store = Store(folder)
    figures = {"peak_memory_bytes": 1000, "tokens_per_second": 10.0, "eval_loss": 2.0, "total_parameters": 10}
    figures |= {f"memory_{c}_bytes": 200 for c in ("weights", "adapters", "gradients", "optimizer", "activations")}
    for label, rank in (("baseline", 4), ("LABEL", 8)):
        keep(store, TrialSpec.model_validate(SMALL | {"lora_r": rank}), label, [2.0, 2.1], rates=[1, 2], **figures)
    return folder


def _with_label(measured: Path, folder: Path, label: str) -> Path:
    shutil.copytree(measured, folder, dirs_exist_ok=True)
    for part in (folder / "trials").glob("*.parquet"):
        content = pq.read_table(part)
        if content["label"][0].as_py() == "LABEL":
            at = content.schema.get_field_index("label")
            pq.write_table(content.set_column(at, "label", pa.array([label])), part)
    return folder


def _outputs(folder: Path) -> dict[str, str]:
    """The comparison in each output format."""
    comparison_ = comparison.compare(loading.load(folder))
    table = tables.techniques(comparison_)
    with out.capture() as shown:
        out.print(writers.terminal(comparison_))
    return {
        ".md": writers._md_table(table), ".tex": writers.latex(table), ".csv": writers._csv(table.headings, table.rows),
        "terminal": shown.get(),
    }  # fmt: skip


@given(label=st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from(fuzz._HOSTILE_TEXTS))
@example(label=SCRIPT)
@example(label=COMMAND)
@example(label="[/red] :boom: [bold")
@example(label="a | b\n\n# c `d` \x1b[31m \x9b31m \u202e")
@settings(ONE_FOLDER, max_examples=10)
def test_any_label_is_text_in_every_output(label: str, measured: Path, tmp_path: Path) -> None:
    outputs = _outputs(_with_label(measured, tmp_path / "g", label))
    columns = 9
    for suffix, text in outputs.items():
        assert not fuzz.unprintable(text), suffix
        assert fuzz.wrong_with_page(suffix, text) is None, suffix
    for line in outputs[".md"].splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == columns + 1, "a label opens no further cell"
    assert not re.search(r"(?<!\\)[`\[<]", outputs[".md"].split("\n\n")[1])
    rows = [line for line in outputs[".tex"].splitlines() if line.endswith(r" \\")]
    assert all(len(re.findall(r"(?<!\\)&", line)) == columns - 1 for line in rows)
    assert not any(line.startswith(("=", "@", '"=', '"@')) for line in outputs[".csv"].splitlines())


def test_a_whole_report_of_hostile_texts(measured: Path, tmp_path: Path) -> None:
    folder = _with_label(measured, tmp_path / "g", f"{SCRIPT}\x1b[31m\x00{COMMAND}|`")
    claim = {
        "id": "a",
        "says": SCRIPT,
        "compare": {"lora_r": [4, 8]},
        "metric": "eval_loss",
        "expect": "difference < 0",
    }
    Store(folder).describe({"title": f"{SCRIPT}\x1b]0;x\x07", "claims": [claim]})
    with fuzz._a_part_of_the_lesson():
        written = writers.write(report_document(loading.load(folder), folder), tmp_path / "out")
    for file in written:
        if file.suffix != ".png":
            assert fuzz.wrong_with_page(file.suffix, file.read_text()) is None, file


@pytest.mark.parametrize(
    "message", ['{"title": "\\ud800"}', "9" * 5000, "[" * 9000, '{"title": ["x"], "claims": []}', "null"]
)
def test_a_description_that_is_none_leaves_the_rows(message: str, measured: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(measured, tmp_path / "g")
    (folder / "grid.json").write_text(message)
    assert loading.load(folder).title.encode()


@pytest.mark.parametrize("claims", [3, [3], [{"id": "a"}], None, ["\x1b[31m"]])
def test_claims_that_are_none_are_refused_by_the_file(claims: Any, measured: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(measured, tmp_path / "g")
    (folder / "grid.json").write_text(json.dumps({"claims": claims}))
    with pytest.raises(InputError, match=r"grid\.json: its claims are not readable") as refused:
        loading.load(folder)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("table", "column", "value", "says"),
    [
        ("trials", "trial_id", "../../evil", "trial_id is not a valid name"),
        ("trials", "spec_id", "``` evil", "spec_id is not a valid name"),
        ("trials", "log", "../../evil", "log is not a valid name"),
        ("trials", "status", "[/red]", "status is none of its values"),
        ("trials", "phase", "evil", "phase is none of its values"),
        ("trials", "label", None, "label is missing"),
        ("trials", "started_at", dt.datetime(9999, 6, 1, tzinfo=dt.UTC), "started_at is out of range"),
        ("trials", "eval_loss", float("nan"), "eval_loss is not finite"),
        ("trials", "tokens_per_second", float("inf"), "tokens_per_second is not finite"),
        ("trials", "peak_memory_bytes", -1, "peak_memory_bytes is negative"),
        ("trials", "lora_r", 0, "lora_r is 0; it must be 1 or more"),
        ("trials", "seed", 2**40, "seed is .* it must be"),
        ("trials", "precision", "nf3", "precision is none of its values"),
        ("trials", "environment", "[]", "not rows of harness"),
        ("trials", "environment", '{"versions": 1}', "not rows of harness"),
        ("trials", "environment", "[" * 9000, "not rows of harness"),
        ("trials", "datasets", "nonsense", "datasets is not JSON"),
        ("trials", "datasets", "[1]", "not rows of harness"),
        ("steps", "step", 1, "the same trial_id and block and step twice"),
        ("steps", "seconds", None, "seconds is missing"),
        ("stories", "when", "later", "when is none of its values"),
    ],
)
def test_rows_of_others_are_damage(
    table: Any, column: str, value: Any, says: str, measured: Path, tmp_path: Path
) -> None:
    store = Store(shutil.copytree(measured, tmp_path / "g"))
    part = sorted((store.folder / table).glob("*.parquet"))[0]
    content = pq.read_table(part)
    field = content.schema.field(column)
    changed = content.set_column(
        content.schema.get_field_index(column), field, pa.array([value] * len(content), field.type)
    )
    pq.write_table(changed, part)
    with pytest.warns(DamagedPart, match=says):
        store.read(table)
    assert re.search(says, store.damage()[part])


# ------------------------------------------------------------------------------------ what is private

TOKEN = "hf_" + "a1B2" * 8
PRIVATE = (TOKEN, "Bearer abcdef0123456789", "someone:hunter22@hub.example", "value-of-a-secret-variable")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "somebody"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("MY_API_KEY", "value-of-a-secret-variable")
    return folder


def test_redact_knows_tokens_passwords_and_the_home_folder(home: Path) -> None:
    message = redact(f"{home}/x {TOKEN} Authorization: {PRIVATE[1]} https://{PRIVATE[2]}/a {PRIVATE[3]}, {home}andmore")
    assert message == (
        f"~/x [hidden] Authorization: Bearer [hidden] https://[hidden]@hub.example/a [hidden], {home}andmore"
    )


def test_redact_knows_a_home_within_options_and_urls(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("g++ -I{}/include -L{}/lib", "file://{}/a", "sqlite:///{}/b", "-I{}/c", "cd:{}/d", "'{}'"):
        assert redact(text.format(home, home)) == text.format("~", "~")
    assert redact(f"/mnt{home}/x") == f"/mnt{home}/x", "another folder"
    monkeypatch.setenv("A_TOKEN", "abcdefgh-1")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-1-rest")
    assert redact("abcdefgh-1-rest abcdefgh-1") == "[hidden] [hidden]"
    assert redact("https://hub.example/a?token=x1y2&page=3") == "https://hub.example/a?token=[hidden]&page=3"
    assert redact("ghs_0123456789abcdefghij, Authorization: Basic YTpi") == "[hidden], Authorization: Basic [hidden]"
    assert redact("Basic configuration, a key=value") == "Basic configuration, a key=value"


def test_the_record_of_a_failing_trial_keeps_nothing_private(
    small: Small, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(f"cannot open {home}/models/x with {' '.join(PRIVATE[:2])} at https://{PRIVATE[2]}/ {PRIVATE[3]}")

    monkeypatch.setattr(trial.model, "load", fail)
    spec = small(base_model="random:tiny", datasets=[{"path": str(home / "stories.jsonl")}])
    (home / "stories.jsonl").write_text('{"synopsis": "A fox.", "short_story": "It ran."}\n' * 2)
    record = trial.run(
        Job(grid="g", spec=spec.model_copy(update={"val_set_size": 0.0}), label="x"), environment=current("cpu")
    )
    assert record.status == "failed"
    assert "cannot open ~/models/x with" in (record.error or "")
    _is_free_of_secrets(record.model_dump_json(), home)
    assert record.spec.datasets[0].path == "~/stories.jsonl"


def _is_free_of_secrets(text: str, home: Path) -> None:
    assert str(home) not in text
    assert not [secret for secret in (TOKEN, "abcdef0123456789", "hunter22", PRIVATE[3]) if secret in text]


def test_paths_under_the_home_folder_are_everybodys(home: Path) -> None:
    spec = TrialSpec(
        base_model=f"{home}/models/m", datasets=(DatasetSpec(path=f"{home}/d.csv"),), output_dir=f"{home}/o"
    )
    assert (spec.base_model, spec.datasets[0].path, spec.output_dir) == ("~/models/m", "~/d.csv", "~/o")
    assert TrialSpec(base_model=f"random:{home}/c.json").base_model == "random:~/c.json"


def test_a_saved_adapter_and_a_merged_model_name_no_path(
    small: Small, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.adapters import merged_model
    from harness.training import checkpoints

    base = home / "models" / "tiny"
    shutil.copytree(checkpoints.checkpoint_folder("random:tiny"), base)
    checkpoints.byte_tokenizer().save_pretrained(base)
    spec = small(base_model=str(base), train_samples=4, save_adapter=True)
    record = trial.run(Job(grid="g", spec=spec, label="x"), environment=current("cpu"), folder=home / "adapters")
    assert record.adapter_id
    merged_model.merge(spec, home / "adapters" / record.adapter_id, home / "merged", {})
    for file in (*(home / "adapters").rglob("*"), *(home / "merged").rglob("*")):
        if file.is_file():
            assert str(home).encode() not in file.read_bytes(), file
    assert "~/models/tiny" in (home / "adapters" / record.adapter_id / "README.md").read_text()


def test_a_report_under_the_home_folder_does_not_name_it(measured: Path, home: Path) -> None:
    folder = shutil.copytree(measured, home / "results" / "g")
    with fuzz._a_part_of_the_lesson():
        text = writers.markdown(report_document(loading.load(folder), folder))
    assert str(home) not in text
    assert "pandas.read_parquet('~/results/g/trials')" in text


def test_a_prediction_that_fails_keeps_nothing_private(
    small: Small, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.predict import peak, predictor

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError(f"{home}/x {TOKEN}")

    monkeypatch.setattr(peak, "predict", fail)
    message = predictor._predict(small().model_dump_json(), "cpu", (8, 0), {})
    assert message == {"error": "ValueError: ~/x [hidden]"}


# ------------------------------------------------------------------------------------ code and weights of others


def test_no_remote_code_and_nothing_but_safetensors(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers

    from harness.sources import models
    from harness.training import checkpoints, model

    asked: list[dict[str, Any]] = []

    class Asked(Exception):
        """Far enough."""

    def note(*_: Any, **options: Any) -> None:
        asked.append(options)
        raise Asked

    def note_and_configure(*_: Any, **options: Any) -> Any:
        asked.append(options)
        return transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)

    for loader in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", note)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", note_and_configure)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"no \.safetensors weights"):
        models.check(str(folder))
    spec = small(base_model=str(folder))
    with pytest.raises(Asked):
        model.load(spec, torch.device("cpu"))
    assert asked[-1]["use_safetensors"] is True
    with pytest.raises(Asked):
        checkpoints.load_tokenizer(spec)
    model.skeleton(spec)
    assert [options["trust_remote_code"] for options in asked] == [False] * 4


# ------------------------------------------------------------------------------------ the benchmark, in short


@pytest.mark.long
@pytest.mark.parametrize(("look", "count"), [(fuzz.fuzz_grids, 150), (fuzz.fuzz_datasets, 100), (fuzz.fuzz_results, 3)])
def test_a_short_run_of_the_benchmark_finds_nothing(
    look: Callable[..., fuzz.Tally], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SLOW_SECONDS", fuzz.HANG_SECONDS)  # how fast it is, the benchmark says
    tally = look(count, 7, tmp_path / "kept")
    assert not tally.failures
    assert sum(tally.ends.values()) >= count
