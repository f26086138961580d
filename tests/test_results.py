"""Records validate themselves; the parquet folder keeps each once."""

from __future__ import annotations

import datetime as dt
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
from harness.results import SCHEMAS, Job, Record, Step, Store, StoryLoss, spec_of
from harness.spec import TrialSpec

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


def test_foreign_and_newer_files_are_refused_by_name(small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "trials"
    folder.mkdir()
    pq.write_table(pa.table({"a": [1]}), folder / "foreign.parquet")
    with pytest.raises(InputError, match=r"foreign\.parquet.*not written by harness"):
        Store(tmp_path).read("trials")
    (folder / "foreign.parquet").unlink()
    pq.write_table(SCHEMAS["trials"].empty_table().replace_schema_metadata({"schema_version": "99"}),
                   folder / "newer.parquet")  # fmt: skip
    with pytest.raises(InputError, match="99 is newer"):
        Store(tmp_path).read("trials")
    (folder / "newer.parquet").write_bytes(b"junk")
    with pytest.raises(InputError, match="not a readable parquet"):
        Store(tmp_path).read("trials")


def test_an_older_schema_still_reads(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(record(small()))
    part = next((tmp_path / "trials").glob("*.parquet"))
    pq.write_table(pq.read_table(part).drop_columns(["peak_load_bytes"]), part)
    assert store.read("trials")["peak_load_bytes"].to_pylist() == [None]


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
