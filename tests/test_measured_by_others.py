"""Predictions against what others measured on their cards: `benchmarks/predict_elsewhere.py` has all rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from predict_elsewhere import RIGHT, Row, rows

CHOSEN = ("0.5B-Instruct bf16, 1 x 1024", "0.5B-Instruct nf4, 1 x 1024", "no checkpointing", "nf4, 1 x 512")
"""Rows of each kind that are predicted soonest."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return list(rows(tmp_path_factory.mktemp("configs")))


@pytest.mark.parametrize("name", CHOSEN)
def test_predictions_are_what_others_measured(measured: list[Row], name: str) -> None:
    (row,) = (each for each in measured if each.name.endswith(name))
    predicted = row.predict()
    assert predicted.peak_memory_bytes == pytest.approx(row.allocated, rel=0.01)
    assert predicted.peak_reserved_bytes == pytest.approx(row.reserved, rel=0.05)
    assert row.verdicts(predicted) == RIGHT
