"""A folder to publish: the rows of a grid as parquet, its report, and a dataset card, as the hub shows them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from harness._util.files import write_whole
from harness.report import writers
from harness.report.document import Document
from harness.results.schema import SCHEMAS
from harness.results.store import Store

_ABOUT = {
    "trials": "a row for each trial: its configuration, environment and figures",
    "steps": "a row for each optimizer step",
    "stories": "the loss of each held-out story before and after training",
    "tasks": "the score of each question of a task before and after training",
    "models": "size and format of each model of an inference benchmark",
    "requests": "a row for each timed request of it",
    "answers": "the loss of each story in it, and what was generated",
}
"""What each table holds."""


def write(
    document: Document, store: Store, folder: Path, *, licence: str | None = None, environment: str | None = None
) -> list[Path]:
    """Write `README.md` (the card), `data/<table>.parquet`, `grid.json` and the report into a folder.

    Args:
        document: the report of the results.
        store: of the results.
        folder: created if missing; files of the same names are replaced.
        licence: its identifier on the hub, like apache-2.0; null: the card names none, as nobody gave one.
        environment: id of the environment whose rows are written; null: those of all.

    Returns:
        The files.

    Raises:
        OSError: the folder cannot be written.
    """
    written: list[Path] = []

    def keep(name: str, content: bytes) -> None:
        write_whole(folder / name, content)
        written.append(folder / name)

    counts: dict[str, int] = {}
    trials = store.read("trials", columns=["trial_id", "environment_id"])
    chosen = trials if environment is None else trials.filter(pc.field("environment_id") == environment)
    for table in SCHEMAS:
        rows = store.read(table)
        rows = rows.filter(pc.field("trial_id").isin(chosen["trial_id"].combine_chunks()))
        (folder / f"data/{table}.parquet").unlink(missing_ok=True)
        if rows.num_rows:
            file = io.BytesIO()
            pq.write_table(rows, file)
            keep(f"data/{table}.parquet", file.getvalue())
            counts[table] = rows.num_rows
    keep("grid.json", json.dumps(store.description(), indent=1).encode())
    written += writers.write(document, folder / "report")
    keep("README.md", card(document, counts, licence).encode())
    return written


def card(document: Document, rows: Mapping[str, int], licence: str | None = None) -> str:
    """The dataset card: what was measured, on what, and how the rows are loaded.

    Args:
        document: the report.
        rows: their number, by table.
        licence: its identifier on the hub; null: none is named.
    """
    about: dict[str, Any] = {
        "pretty_name": document.title,
        **({} if licence is None else {"license": licence}),
        "tags": ["fine-tuning", "benchmark", "memory", "harness"],
        "configs": [{"config_name": name, "data_files": f"data/{name}.parquet"} for name in rows],
    }
    about["configs"][[*rows].index("trials")]["default"] = True
    listed = "\n".join(f"- `{name}` ({count:,} rows): {_ABOUT[name]}" for name, count in rows.items())
    environment = json.dumps(document.environment, indent=1, ensure_ascii=False).replace("```", "` ` `")
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---",
        writers.headline(document, "report/"),
        "The whole report is in `report/report.md`, and as a page in `report/report.html`.",
        f"## Rows\n\n{listed}",
        _LOADING,
        f"## Environment\n\n```json\n{environment}\n```",
    ]
    return "\n\n".join(parts) + "\n"


_LOADING = """```python
import pandas
trials = pandas.read_parquet("data/trials.parquet")
```

`datasets.load_dataset(PATH, "steps")` loads a table by its name. What a column means, `harness keys` says; a figure
that was not measured is null."""
