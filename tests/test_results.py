"""Records validate themselves; the parquet folder keeps each once."""

from __future__ import annotations

import datetime as dt
import re
import resource
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from harness.environment import current
from harness.errors import InputError
from harness.metrics import METRICS
from harness.record import InferenceRecord, Job, ModelFootprint, Record, Step, StoryLoss
from harness.results.join import Joined, join
from harness.results.parts import DamagedPart
from harness.results.schema import SCHEMAS, Table, spec_of
from harness.results.store import Store, looks_of
from harness.results.versions import Version, versions_of
from harness.spec.trial import TrialSpec

Small = Callable[..., TrialSpec]


def record(spec: TrialSpec, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "environment": current("cpu"),
        "status": "ok",
        "started_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        "metrics": {"peak_memory_bytes": 1000, "eval_loss": 2.5},
        "steps": (
            Step(step=1, tracked=True, seconds=1.0, loss=3.0, grad_norm=1.0, learning_rate=1e-3, samples=4,
                 tokens=100, supervised_tokens=50, padded_tokens=120, peak_memory_bytes=1000),
        ),
        "stories": (StoryLoss(story_id="a", when="after", loss=2.5, tokens=10),),
    }  # fmt: skip
    return Record.of(Job(grid="g", spec=spec, label="x"), **(values | changes))


def test_what_is_written_is_read_with_declared_types(small: Small, tmp_path: Path) -> None:
    Store(tmp_path).write(record(small(lora_target_modules=["q_proj"], lora_target_linear=False)))
    frame = pandas.read_parquet(tmp_path / "trials")
    assert list(frame.columns) == SCHEMAS["trials"].names
    row = frame.iloc[0]
    assert (row["lora_r"], row["peak_memory_bytes"], row["eval_loss"]) == (4, 1000, 2.5)
    assert list(row["lora_target_modules"]) == ["q_proj"]
    assert pandas.isna(row["tokens_per_second"]), "what was not measured is null"
    assert pandas.read_parquet(tmp_path / "steps")["loss"].tolist() == [3.0]
    assert pandas.read_parquet(tmp_path / "stories")["story_id"].tolist() == ["a"]


def test_a_row_gives_its_spec_back(small: Small, tmp_path: Path) -> None:
    for spec in (small(), small(adapter="none", memory_budget=10**9, seed=3)):
        Store(tmp_path / spec.id).write(record(spec))
        frame = pandas.read_parquet(tmp_path / spec.id / "trials")
        assert spec_of(frame.iloc[0].to_dict()).id == spec.id
        assert spec_of(Store(tmp_path / spec.id).read("trials").to_pylist()[0]) == spec


def test_a_trial_is_kept_once(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(record(small()))
    store.write(record(small(), metrics={"peak_memory_bytes": 2000}))
    assert store.read("trials")["peak_memory_bytes"].to_pylist() == [2000]
    assert len(store.read("steps")) == 1


def test_compaction_loses_and_doubles_nothing(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed in range(5):
        store.write(record(small(seed=seed)))
    before = store.read("trials").sort_by("trial_id")
    store.compact(above=2)
    assert len(list((tmp_path / "trials").glob("*.parquet"))) == 1
    assert store.read("trials").sort_by("trial_id").equals(before)
    # A trial that is run again replaces its compacted row.
    store.write(record(small(seed=3), metrics={"peak_memory_bytes": 7}))
    assert sorted(store.read("trials")["peak_memory_bytes"].to_pylist()) == [7, 1000, 1000, 1000, 1000]
    store.compact(above=1)
    assert sorted(store.read("trials")["peak_memory_bytes"].to_pylist()) == [7, 1000, 1000, 1000, 1000]


def test_a_part_that_is_being_written_is_not_read(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(record(small()))
    (tmp_path / "trials" / ".half.123.aside").write_bytes(b"PAR1 and then nothing")
    assert len(pandas.read_parquet(tmp_path / "trials")) == 1
    assert len(store.read("trials")) == 1


def test_a_record_that_does_not_fit_on_the_disk_replaces_nothing(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(record(small()))
    before = {table: store.read(table) for table in SCHEMAS}
    texts = tuple(StoryLoss(story_id=uuid.uuid4().hex, when="after", loss=i / 7, tokens=i + 1) for i in range(9000))
    later = record(small(), metrics={"peak_memory_bytes": 2000}, stories=texts)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # bytes: enough for the steps, not for the texts
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/stories/{later.trial_id}\.parquet'"):
            store.write(later)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {table: store.read(table) for table in SCHEMAS} == before
    assert not list(tmp_path.rglob("*.aside"))
    store.write(later)
    assert (len(store.read("steps")), len(store.read("stories"))) == (1, 9000)


def spoil(folder: Path) -> list[str]:
    """Put what is no part of ours, or no longer, among the parts; returns their names."""
    whole = next(folder.glob("*.parquet")).read_bytes()
    (folder / "junk.parquet").write_bytes(b"PAR1 and junk")
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    broken = bytearray(whole)
    broken[100:400] = bytes(300)
    (folder / "broken.parquet").write_bytes(broken)
    pq.write_table(pa.table({"a": [1]}), folder / "foreign.parquet")
    ours = {"schema_version": "1"}
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata(ours), folder / "nameless.parquet")
    wrong = pa.table({"trial_id": ["t"], "status": ["ok"], "lora_r": ["many"]}).replace_schema_metadata(ours)
    pq.write_table(wrong, folder / "wrong.parquet")
    binary = pa.table({"trial_id": pa.array([b"\xff\xfe"]).cast(pa.string(), safe=False)})
    pq.write_table(binary.replace_schema_metadata(ours), folder / "binary.parquet")
    return ["binary", "broken", "cut", "empty", "foreign", "junk", "nameless", "wrong"]


def test_damaged_and_foreign_parts_are_left_out_and_set_aside(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(record(small()))
    spoilt = spoil(tmp_path / "trials")
    with pytest.warns(DamagedPart) as warned:
        assert len(store.read("trials")) == 1
    assert sorted(re.findall(r"/(\w+)\.parquet: ", " ".join(str(w.message) for w in warned))) == spoilt
    with pytest.warns(DamagedPart):
        store.compact(above=1)
    assert sorted(part.stem for part in store.damage()) == spoilt, "compaction removes nothing that it cannot read"
    with pytest.warns(DamagedPart, match="set aside as trials-"):
        store.set_aside()
    assert len(list((tmp_path / "set-aside").iterdir())) == len(spoilt)
    with warnings.catch_warnings(action="error"):
        assert len(store.read("trials")) == 1
        assert len(pandas.read_parquet(tmp_path / "trials")) == 1
        store.set_aside()


def test_a_part_without_rows_records_nothing(small: Small, tmp_path: Path) -> None:
    store, measured = Store(tmp_path), record(small())
    store.write(measured)
    part = tmp_path / f"trials/{measured.trial_id}.parquet"
    pq.write_table(pq.read_table(part)[:0], part)
    assert store.row(measured.trial_id, ["status"]) is None
    assert len(store.read("trials")) == 0
    store.write(measured)
    assert (store.row(measured.trial_id, ["status"]) or {})["status"] == "ok"


def test_a_record_without_steps_replaces_one_that_had_some(small: Small, tmp_path: Path) -> None:
    """Recorded again, it ran out of memory; its former steps come back neither before nor after compaction."""
    store = Store(tmp_path)
    for seed in range(2):
        store.write(record(small(seed=seed)))
    store.compact(above=1)
    failed = record(small(seed=0), status="oom", phase="forward", error="no", error_type="X", metrics={}, steps=(),
                    stories=())  # fmt: skip
    store.write(failed)
    tables: tuple[Table, ...] = ("steps", "stories")
    for _ in range(2):
        for table in tables:
            assert failed.trial_id not in store.read(table)["trial_id"].to_pylist()
            assert len(store.read(table)) > 0
        store.compact(above=1)


def test_a_newer_part_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    pq.write_table(SCHEMAS["trials"].empty_table().replace_schema_metadata({"schema_version": "99"}),
                   tmp_path / "trials/newer.parquet")  # fmt: skip
    for look in (lambda: Store(tmp_path).read("trials"), Store(tmp_path).set_aside):
        with pytest.raises(InputError, match=r"newer\.parquet: schema_version 99 is newer"):
            look()
    assert (tmp_path / "trials/newer.parquet").exists()


def test_a_trial_without_its_steps_is_not_complete(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed in range(3):
        store.write(record(small(seed=seed), metrics={"optimizer_steps": 1, "evaluated_stories": 1}))
    ids = [record(small(seed=seed)).trial_id for seed in range(3)]
    (tmp_path / f"steps/{ids[0]}.parquet").write_bytes(b"junk")
    (tmp_path / f"stories/{ids[1]}.parquet").unlink()
    with pytest.warns(DamagedPart):
        assert store.completed().keys() == {ids[2]}
    assert len(store.start_times()) == 3


def test_two_folders_become_one_without_doubling(small: Small, tmp_path: Path) -> None:
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    later = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    here.write(record(small(), metrics={"peak_memory_bytes": 1}))
    here.write(record(small(seed=1), metrics={"peak_memory_bytes": 2}, started_at=later))
    here.compact(above=1)
    there.write(record(small(), metrics={"peak_memory_bytes": 3}, started_at=later))
    there.write(record(small(seed=1), metrics={"peak_memory_bytes": 4}))
    failed = {"status": "failed", "phase": "load", "error": "x", "error_type": "X", "metrics": {}, "log": "logs/a.log"}
    there.write(record(small(seed=2), **failed))
    there.write(record(small(seed=3), adapter_id="0123456789abcdef"))
    there.describe({"title": "T"})
    for file in ("adapters/0123456789abcdef/adapter_model.safetensors", "logs/a.log", "logs/other.log"):
        (there.folder / file).parent.mkdir(parents=True, exist_ok=True)
        (there.folder / file).write_text(file)

    assert join(here, there) == Joined(added=2, replaced=1, kept=1)
    rows = {row["seed"]: row for row in here.read("trials").to_pylist()}
    assert {seed: row["peak_memory_bytes"] for seed, row in rows.items()} == {0: 3, 1: 2, 2: None, 3: 1000}
    assert sorted(here.read("steps")["trial_id"].to_pylist()) == sorted(row["trial_id"] for row in rows.values())
    assert (here.folder / "logs/a.log").read_text() == "logs/a.log"
    assert not (here.folder / "logs/other.log").exists()
    assert (here.folder / "adapters/0123456789abcdef/adapter_model.safetensors").is_file()
    assert here.description() == {"title": "T"}
    everything = here.read("trials").sort_by("trial_id")
    assert join(here, there) == Joined(added=0, replaced=0, kept=4)
    here.compact(above=1)
    assert here.read("trials").sort_by("trial_id").equals(everything)


def test_joined_folders_have_the_levels_of_both(small: Small, tmp_path: Path) -> None:
    here, there, unknown = (Store(tmp_path / name) for name in ("here", "there", "unknown"))
    environment_id = current("cpu").id
    for store, labels in ((here, ("a", "b")), (there, ("a", "c"))):
        store.write(record(small(seed=len(labels))))
        ids = {label: (f"{label} {store.folder.name}",) for label in labels}
        store.describe({"title": "T"}, {environment_id}, Version(baselines=("0",), specs=ids))
    join(here, there)
    both = Version(baselines=("0",), specs={"a": ("a here", "a there"), "b": ("b here",), "c": ("c there",)})
    assert versions_of(here.description()) == {environment_id: both}
    watched = Store(tmp_path / "watched")
    loop = Job(grid="g", spec=small(seed=8), label="mine (watched)", watched=True)
    watched.write(Record.of(loop, environment=current("cpu"), status="ok", started_at=dt.datetime.now(dt.UTC)))
    watched.describe({"title": "trainings that were watched"})
    join(here, watched)
    assert versions_of(here.description()) == {environment_id: both}, "a loop is of no version"
    unknown.write(record(small(seed=9)))  # by an earlier harness, which kept none; its grid.json is lost
    join(here, unknown)
    assert here.description() == {"title": "T"}
    join(Store(tmp_path / "new"), there)
    assert Store(tmp_path / "new").description() == there.description()


def test_joining_keeps_what_is_whole_and_ended_well(small: Small, tmp_path: Path) -> None:
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    later = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    failed = {"status": "failed", "phase": "load", "error": "x", "error_type": "X", "metrics": {}, "log": "logs/a.log"}
    whole = {"metrics": {"optimizer_steps": 1}}
    ids = [record(small(seed=seed)).trial_id for seed in range(4)]
    here.write(record(small(), **whole))
    there.write(record(small(), started_at=later, **whole))  # later, and without its steps
    here.write(record(small(seed=1), started_at=later, **whole))  # without its steps
    there.write(record(small(seed=1), **whole))
    here.write(record(small(seed=2), **whole))
    there.write(record(small(seed=2), started_at=later, **failed))
    here.write(record(small(seed=3), started_at=later, **failed))
    there.write(record(small(seed=3), **whole))
    (there.folder / f"steps/{ids[0]}.parquet").unlink()
    (here.folder / f"steps/{ids[1]}.parquet").unlink()
    join(here, there)
    assert here.completed() == dict.fromkeys(ids, "ok")
    assert len(here.read("steps")) == 4


def timed(spec: TrialSpec, *blocks: int) -> Record:
    """Visits of a recorded trial."""
    step = record(spec).steps[0].model_copy(update={"tracked": False})
    return record(spec, steps=tuple(step.model_copy(update={"step": n, "block": b}) for n, b in enumerate(blocks)))


def test_visits_of_a_record_that_is_there_are_joined_too(small: Small, tmp_path: Path) -> None:
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    there.write(record(small()))
    there.describe({"title": "T"})
    join(here, there)
    there.add_visit(timed(small(), 7), lambda row, steps: {"timed_visits": 1})
    there.describe({"title": "T", "looks": 5})
    assert join(here, there) == Joined(added=0, replaced=1, kept=0)
    assert here.read("trials")["timed_visits"].to_pylist() == [1]
    assert here.read("steps")["block"].to_pylist() == [None, 7]
    assert looks_of(here.description(), current("cpu").id) == 5
    assert join(here, there) == Joined(added=0, replaced=0, kept=1)


def test_a_visit_does_not_replace_steps_that_cannot_be_read(small: Small, tmp_path: Path) -> None:
    """Two runners may have given two visits one block: the training's steps are in that part too."""
    store = Store(tmp_path)
    store.write(record(small()))
    assert store.add_visit(timed(small(), 7, 7), lambda row, steps: {}) is not None
    twice = tmp_path / f"steps/{record(small()).trial_id}.parquet"
    pq.write_table(pa.concat_tables([pq.read_table(twice)] * 2), twice)
    content = twice.read_bytes()
    assert store.add_visit(timed(small(), 8), lambda row, steps: {}) is None
    assert twice.read_bytes() == content


def test_a_replaced_record_brings_its_log_and_inference_results(small: Small, tmp_path: Path) -> None:
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    failed = {"status": "failed", "phase": "load", "error": "x", "error_type": "X", "metrics": {}, "log": "logs/a.log"}
    footprint = ModelFootprint(model="base", precision="fp32", model_bytes=1, peak_inference_bytes=2)
    inference = InferenceRecord(environment=current("cpu"), models=(footprint,), requests=(), answers=())
    for store, day in ((here, 1), (there, 2)):
        (store.folder / "logs").mkdir(parents=True)
        (store.folder / "logs/a.log").write_text(f"day {day}")
        store.write(record(small(seed=1), started_at=dt.datetime(2026, 1, day, tzinfo=dt.UTC), **failed))
        store.write(record(small(), adapter_id="0123456789abcdef"))
    there.write_inference(there.recent_row(record(small()).trial_id) or {}, inference)
    join(here, there)
    assert (here.folder / "logs/a.log").read_text() == "day 2"
    assert here.read("models")["model_bytes"].to_pylist() == [1]


def test_a_disk_that_cannot_be_read_damages_no_part(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.write(record(small()))

    def out_of_files(*arguments: Any, **options: Any) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(pq, "ParquetFile", out_of_files)
    with pytest.raises(OSError, match="Too many open files"):
        store.set_aside()
    assert not (tmp_path / "set-aside").exists()


def test_a_name_that_leaves_the_folder_is_refused(small: Small, tmp_path: Path) -> None:
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    there.write(record(small()))
    part = next((there.folder / "trials").iterdir())
    content = pq.read_table(part)
    for column, value in (("trial_id", "../../evil"), ("adapter_id", ".."), ("log", "../../evil")):
        hostile = content.set_column(content.schema.get_field_index(column), column, pa.array([value]))
        pq.write_table(hostile.cast(content.schema), part)
        with pytest.warns(DamagedPart, match=f"{column} is not a valid name"):
            join(here, there)
        assert not list(tmp_path.rglob("evil*"))
    assert {p.name for p in tmp_path.iterdir()} == {"there"}


def test_an_older_schema_still_reads(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(record(small()))
    part = next((tmp_path / "trials").glob("*.parquet"))
    pq.write_table(pq.read_table(part).drop_columns(["peak_load_bytes", "attempt", "log"]), part)
    row = store.read("trials").to_pylist()[0]
    assert (row["peak_load_bytes"], row["attempt"], row["log"]) == (None, 1, None)


def test_records_refuse_what_is_no_measurement(small: Small) -> None:
    with pytest.raises(ValidationError, match="not finite"):
        record(small(), metrics={"eval_loss": float("nan")})
    with pytest.raises(ValidationError, match="unknown metric"):
        record(small(), metrics={"evil_loss": 1.0})
    with pytest.raises(ValidationError, match="carries no scores"):
        record(small(), status="did_not_train", metrics={"tokens_per_second": 5.0})
    with pytest.raises(ValidationError, match="no error"):
        record(small(), error="but ok")


def test_metrics_show_pretty_units() -> None:
    shown = {n: METRICS[n].show(v) for n, v in {"peak_memory_bytes": 3 * 2**29, "eval_loss": 2.5}.items()}
    assert shown == {"peak_memory_bytes": "1.50 GiB", "eval_loss": "2.5000"}
