"""What reaching a loss takes, against arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rows import keep

from harness.analysis import comparison, cost, loading
from harness.grids.grid import load
from harness.report import document
from harness.results.store import Store
from harness.spec.trial import TrialSpec

Small = Callable[..., TrialSpec]


def recorded(folder: Path, small: Small, price: object = None, **joules: float) -> Path:
    """Thirty steps of 100 tokens, each 0.1 nats lower; the baseline at 100 tokens a second, others at other speeds."""
    store = Store(folder)
    for label, spec, speed, steps in (
        ("baseline", small(), 100.0, 30),
        ("fast", small(lora_r=8), 200.0, 30),
        ("slow", small(lora_r=16), 50.0, 30),
        ("short", small(lora_r=32), 400.0, 10),
    ):
        keep(store, spec, label, [2.0, 2.0], rates=[speed] * steps, tokens_per_second=speed, eval_loss=2.0,
             peak_memory_bytes=1000, **joules)  # fmt: skip
    store.describe({"title": "g", "price_per_hour": price})
    return folder


def of(folder: Path) -> tuple[cost.Costs, dict[str, cost.Cost]]:
    m = loading.load(folder)
    costs = cost.costs(comparison.compare(m), document._steps(m, folder))
    assert costs is not None
    labels = m.configs["label"]
    return costs, {labels[each.config]: each for each in costs.rows}


def test_time_and_money_until_the_loss_of_the_baseline(small: Small, tmp_path: Path) -> None:
    costs, by_label = of(recorded(tmp_path / "g", small, price=3.6))
    assert set(by_label) == {"baseline", "fast", "slow"}, "ten steps have no course"
    assert costs.window == 5
    assert costs.target == pytest.approx(sum(3.0 - i / 10 for i in range(26, 31)) / 5)
    # 3,000 tokens in all: the loss is that of the last five steps.
    seconds = {label: each.seconds for label, each in by_label.items()}
    assert seconds == {"baseline": pytest.approx(30), "fast": pytest.approx(15), "slow": pytest.approx(60)}
    assert {label: each.money for label, each in by_label.items()} == {
        "baseline": pytest.approx(0.03), "fast": pytest.approx(0.015), "slow": pytest.approx(0.06),
    }  # fmt: skip
    assert costs.equal_seconds == pytest.approx(15)
    # After 15 s: 30 steps of the fast one, 15 of the baseline, 7 of the slow one.
    means = {"fast": range(26, 31), "baseline": range(11, 16), "slow": range(3, 8)}
    for label, steps in means.items():
        assert by_label[label].loss == pytest.approx(sum(3.0 - i / 10 for i in steps) / 5), label
    assert by_label["fast"].joules is None


def test_speeds_of_other_hours_do_not_meet(small: Small, tmp_path: Path) -> None:
    """The machine was half as fast in the second repeat, which alone has the other configuration."""
    store = Store(tmp_path / "g")
    for label, spec, speed in (
        ("baseline", small(seed=0), 100.0),
        ("baseline", small(seed=1), 50.0),
        ("fast", small(seed=1, lora_r=8), 75.0),
    ):
        keep(store, spec, label, [2.0, 2.0], rates=[speed] * 30, tokens_per_second=speed, eval_loss=2.0,
             peak_memory_bytes=1000)  # fmt: skip
    _, by_label = of(tmp_path / "g")
    baseline, fast = (by_label[label].seconds for label in ("baseline", "fast"))
    assert baseline == pytest.approx(3000 / 75)
    assert fast == pytest.approx(baseline / 1.5), "as it is compared; both have 75 tokens a second on average"


def test_energy_of_a_card(small: Small, tmp_path: Path) -> None:
    _, by_label = of(recorded(tmp_path / "g", small, joules_per_token=0.5))
    assert by_label["fast"].joules == pytest.approx(15 * 200 * 0.5)
    assert by_label["fast"].money is None


def test_the_table_of_the_report(small: Small, tmp_path: Path) -> None:
    folder = recorded(tmp_path / "g", small, price=3.6)
    (table,) = [t for t in document.document(loading.load(folder), folder).tables if t.id == "costs"]
    assert table.headings[0] == "Technique"
    assert "Money" in table.headings
    assert [row[0].text for row in table.rows] == ["fast", "baseline", "slow"]
    assert [row[2].text for row in table.rows] == ["×0.50", "×1.00", "×2.00"]
    assert "at 3.6 an hour" in table.note


@pytest.mark.parametrize("price", ["much", True, 0, -1, float("nan")])
def test_a_price_that_cannot_be(small: Small, tmp_path: Path, price: object) -> None:
    """In a grid it is refused; in a file that was edited by hand it is none."""
    text = {"much": "much", True: "true"}.get(price, str(price).replace("nan", ".nan"))  # type: ignore[call-overload]
    (tmp_path / "g.yml").write_text(f"base: {{base_model: random:tiny}}\nprice_per_hour: {text}\n")
    with pytest.raises(ValueError, match=r"price_per_hour is .*must be a number above 0"):
        load(tmp_path / "g.yml")
    if price == price:  # JSON has no NaN
        assert loading.load(recorded(tmp_path / "r", small, price=price)).price_per_hour is None


def test_a_price_comes_from_the_grid(tmp_path: Path) -> None:
    (tmp_path / "g.yml").write_text("base: {base_model: random:tiny}\nprice_per_hour: 2\n")
    assert load(tmp_path / "g.yml").about["price_per_hour"] == 2.0
