"""Each pair is judged once: what a page says of it in one place it says in all, and pairs that disagree say so."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
from rows import keep

from harness.analysis import comparison, loading, recommend, stats, verdicts, words
from harness.analysis.estimate import Estimate, Member
from harness.analysis.measurements import Measurements
from harness.analysis.pilot import PILOT
from harness.grids.claims import Claim
from harness.metrics import HEADLINE, METRICS
from harness.report import document, front, tables
from harness.report.document import Document
from harness.results.store import Store
from harness.spec.trial import TrialSpec
from harness.tuning import search_results

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import verdicts as simulated

Small = Callable[..., TrialSpec]
CONFIGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "lora_r=64": {"lora_r": 64},
    "precision=bf16": {"precision": "bf16"},
    "full": {"adapter": "none", "learning_rate": 1e-5},
    "full in bf16": {"adapter": "none", "learning_rate": 1e-5, "precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True},
}


def measured(
    small: Small, folder: Path, effects: dict[str, tuple[float, float, float]], *, noise: float = 0.002, seed: int = 0
) -> Measurements:
    """Three repeats of CONFIGS, the baseline twice, with effects on memory, speed (both factors) and loss."""
    generator = numpy.random.default_rng(seed)
    store = Store(folder)
    of_story = generator.normal(3.0, 0.3, 12)
    for repeat in range(3):
        drift = generator.normal(0, 0.1)
        for label, changes in CONFIGS.items():
            memory, speed, loss = effects.get(label, (1.0, 1.0, 0.0))
            stories = of_story + loss + generator.normal(0, noise, 12)
            for twin in (False, True) if label == "baseline" else (False,):
                keep(
                    store, small(seed=repeat, **changes), f"{label} again" if twin else label, stories.tolist(),
                    twin=twin, peak_memory_bytes=int(1000 * memory), eval_loss=float(stories.mean()),
                    tokens_per_second=100 * speed * math.exp(drift + generator.normal(0, noise)),
                    **({"factor": None} if twin else {}),
                )  # fmt: skip
    return loading.load(folder)


def test_one_training_computed_in_two_ways_has_its_own_noise(small: Small, tmp_path: Path) -> None:
    """Seeds that move every other configuration by 0.1 nats leave what differs by rounding where it was."""
    generator, store = numpy.random.default_rng(1), Store(tmp_path)
    of_story = generator.normal(3.0, 0.3, 12)
    one = {"micro_batch_size": 4, "gradient_accumulation_steps": 1}
    equal = {
        "checkpointing": {**one, "gradient_checkpointing": True, "loss": "chunked"},
        "2 x 2": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
    }
    others = {
        "lora_r=64": {**one, "lora_r": 64},
        "lora_r=32": {**one, "lora_r": 32},
        "2 x 1": {"micro_batch_size": 2, "gradient_accumulation_steps": 1},
    }
    for repeat in range(3):
        baseline = of_story + generator.normal(0, 0.1)
        ids = {"baseline_id": small(seed=repeat, **one).id}
        keep(store, small(seed=repeat, **one), "baseline", baseline.tolist(), **ids)
        for label, changes in (equal | others).items():
            seed = generator.normal(0, 1e-4 if label in equal else 0.1)
            keep(store, small(seed=repeat, **changes), label, (baseline + seed).tolist(), **ids)
    m = loading.load(tmp_path)
    judgement = comparison.compare(m).judgement
    estimates = {c: judgement.pair("eval_loss", m.baseline or 0, c) for c in m.configs.index if c != m.baseline}
    words_of = {m.labels([config])[0]: estimate.verdict for config, estimate in estimates.items() if estimate}
    assert {label for label, verdict in words_of.items() if verdict == "same"} == equal.keys(), words_of


def of_row(m: Measurements, table: str, name: str) -> list[Estimate | None]:
    """Memory, speed and loss of a row of the lesson's tables."""
    judgement = comparison.compare(m).judgement
    return [judgement.contrast(metric, f"{table}: {name}") for metric in HEADLINE]


def cells(m: Measurements, table: str, name: str) -> list[str]:
    (of_id,) = [t for t in tables.all_tables(comparison.compare(m)) if t.id == table]
    (row,) = [[cell.text for cell in row] for row in of_id.rows if row[0].text == name]
    return row


# ------------------------------------------------------------------------------------ several pairs


def test_pairs_that_disagree_make_it_depend_and_have_no_average(small: Small, tmp_path: Path) -> None:
    effects = {"full": (2.0, 0.8, 0.1), "precision=bf16": (0.5, 1.5, 0.0), "full in bf16": (1.5, 2.0, -0.1)}
    m = measured(small, tmp_path, effects)
    memory, speed, loss = of_row(m, "methods", "LoRA")
    assert speed is not None
    assert (speed.verdict, loss.verdict if loss else None) == ("depends", "depends")
    shown = cells(m, "methods", "LoRA")
    assert re.fullmatch(
        r"depends: ×1\.25 \(.*\) faster \(precision=fp32\); ×0\.75 \(.*\) slower \(precision=bf16\)", shown[4]
    )
    assert "−0.100" in shown[6]
    assert "moderate loss (precision=bf16)" in shown[6]
    assert memory is not None
    assert memory.verdict == "depends", "less in both, but not by the same"
    claim = {"id": "c", "says": "so", "compare": {"adapter": ["none", "lora"]}, "free": ["learning_rate"],
             "metric": "tokens_per_second"}  # fmt: skip
    judged = verdicts.judge(comparison.compare(m, [Claim.model_validate(claim | {"expect": "ratio > 1"})]))[0]
    assert judged.word == "depends"
    assert judged.size.count("precision=") == 2
    both = Claim.model_validate(claim | {"expect": "ratio > 0.5"})
    assert verdicts.judge(comparison.compare(m, [both]))[0].word == "supported", "true of all its pairs"


def test_many_pairs_are_each_held_against_their_mean(small: Small, tmp_path: Path) -> None:
    """Eighteen pairs, of which all are slower and one by more."""
    generator, store = numpy.random.default_rng(1), Store(tmp_path)
    keys = [(rank, alpha, dropout) for rank in (4, 8, 16) for alpha in (16, 32, 64) for dropout in (0.0, 0.1)]
    for repeat in range(2):
        for key in keys:
            for checkpointing in (False, True):
                names = ("lora_r", "lora_alpha", "lora_dropout")
                spec = small(seed=repeat, gradient_checkpointing=checkpointing, **dict(zip(names, key, strict=True)))
                factor = 1.0 if not checkpointing else 0.5 if key == keys[0] else 0.9
                speed = 100 * factor * math.exp(generator.normal(0, 0.002))
                base = small(seed=repeat, lora_r=4, lora_alpha=16, lora_dropout=0.0).id
                label = "baseline" if spec.id == base else f"{key} {checkpointing}"
                keep(store, spec, label, [], tokens_per_second=speed, baseline_id=base)
    judgement = comparison.compare(loading.load(tmp_path), []).judgement
    estimate = judgement.contrast("tokens_per_second", "methods: Gradient checkpointing")
    assert estimate is not None
    assert len(estimate.members) == 18
    assert estimate.verdict == "depends"


def test_one_seed_varies_as_the_pilots_do_and_the_page_says_so(small: Small, tmp_path: Path) -> None:
    """Stories alone would show any seed's effect as one of the configuration."""
    generator, store = numpy.random.default_rng(2), Store(tmp_path)
    stories = generator.normal(3.0, 0.3, 32)
    for label, changes, loss in (("baseline", {}, 0.0), ("lora_r=64", {"lora_r": 64}, 0.008)):
        of_trial = stories + loss + generator.normal(0.0, 0.001, 32)
        keep(store, small(**changes), label, of_trial.tolist(), eval_loss=float(of_trial.mean()))
    m = loading.load(tmp_path)
    (estimate,) = comparison.compare(m, []).estimates["eval_loss"].values()
    assert estimate.verdict == "not distinguishable"
    assert estimate.low is not None
    assert estimate.value - estimate.low > 2 * math.sqrt(2) * PILOT.seeds.sigma
    effects = m.effects(m.against_baseline(), "eval_loss")
    assert (effects.errors**2).groupby("comparison").sum().tolist() == pytest.approx([*effects.table["se"] ** 2])
    assert any("pilot measurements of SmolLM2-135M" in line for line in document.document(m, tmp_path).caveats)


def test_the_finalists_of_a_search_are_one_family() -> None:
    """The winner was picked by the figures that it is compared in, among all of them."""
    folder = Path(__file__).parent.parent / "results/tune"
    m = loading.load(folder)
    results = search_results.read(m, folder)
    assert results is not None
    assert len(results.confirmed) > 2
    rivals = list(dict.fromkeys(results.rivals.values()))
    pairs = pandas.DataFrame({"comparison": rivals, "reference": rivals, "config": results.winner}, dtype="int64")
    of = m.unselected
    for rival, alone in of.estimates(of.effects(pairs, "eval_loss"), "eval_loss").items():
        judged = results.estimate("eval_loss", rival)
        assert judged is not None
        assert judged.value == pytest.approx(alone.value)
        assert judged.low < alone.low, "wider, as all pairs of finalists are judged"


def test_pairs_that_agree_count_the_same_whatever_runs_twice(small: Small, tmp_path: Path) -> None:
    """The baseline runs twice: the pair that it is in must not count twice."""
    effects = {"precision=bf16": (0.5, 1.5, 0.0), "full": (1.0, 1.0, 0.02), "full in bf16": (0.5, 1.506, 0.024)}
    m = measured(small, tmp_path, effects)
    _, speed, loss = of_row(m, "methods", "16-bit precision")
    assert speed is not None
    assert loss is not None
    assert speed.value == pytest.approx(math.sqrt(1.5 * 1.506), rel=0.003)
    assert loss.value == pytest.approx(0.002, abs=0.0015)
    assert ["adapter=lora" in member.context for member in speed.members] == [True, False]
    assert "(mean of ×1.5" in cells(m, "methods", "16-bit precision")[4]


def test_both_runs_of_the_baseline_are_shown_as_they_were(small: Small, tmp_path: Path) -> None:
    m = measured(small, tmp_path, {}, noise=0.02)
    rows = {row[0].text: row for row in tables.techniques(comparison.compare(m)).rows}
    for label in ("baseline", "baseline again"):
        mean = m.trials.loc[m.trials["label"] == label, "tokens_per_second"].mean()
        assert rows[label][4].text == METRICS["tokens_per_second"].show(mean)
    assert rows["baseline"][4].value != rows["baseline again"][4].value


# ------------------------------------------------------------------------------------ one page


@pytest.mark.long
def test_no_page_contradicts_itself(small: Small, tmp_path: Path) -> None:
    """Over random measurements: the same pair, the same interval and word everywhere; and both agree."""
    generator = numpy.random.default_rng(5)
    negligible = False
    for number in range(4):
        size, noise = ((0.05, 0.03), 0.04) if number < 2 else ((0.015, 0.008), 0.004)
        effects = {label: (1.0, *map(generator.normal, (1, 0), size)) for label in [*CONFIGS][1:]}
        folder = tmp_path / str(number)
        m = measured(small, folder, effects, noise=noise, seed=number)
        report = document.document(m, folder)
        techniques = {row[0].text: row for row in report.tables[0].rows}
        of_table = {"checkpointing": cells(m, "methods", "Gradient checkpointing")}
        for label, row in of_table.items():
            assert [row[i] for i in (2, 4, 6)] == [techniques[label][i].text for i in (3, 5, 7)]
        slower = next(v for v in report.verdicts if v.claim.id == "checkpointing-slower")
        assert techniques["checkpointing"][5].text.startswith(slower.size)
        for interval, word in intervals(report):
            no_effect = interval[0] <= 0 <= interval[1]
            assert no_effect == (word == "not distinguishable") or word.startswith("same"), (interval, word)
            negligible |= word.startswith("negligibly")
        for verdict in report.verdicts:
            assert_word_agrees_with_interval(verdict)
        for sentence in report.summary:
            if best := re.match(r"(Fastest|Lowest loss): (.*), [×−+]", sentence):
                cell = techniques[best[2]][5 if best[1] == "Fastest" else 7].text
                assert re.search(r"faster|better", cell), cell
                assert "negligibly" not in cell, "what is negligible is no best"
    assert negligible, "some were significant, and negligible"


def assert_word_agrees_with_interval(verdict: verdicts.ClaimVerdict) -> None:
    """Of a claim about one effect: what its word says of no effect and of the expected region."""
    number = r"[+−]?[\d.]+"
    ends = re.fullmatch(rf"[×+−][\d.]+ \(({number})(?:–| to )({number})\)", verdict.size)
    if ends is None or not verdict.claim.compare:
        return
    low, high = (float(end.replace("−", "-")) for end in ends.groups())
    expected, no_effect = verdict.claim.expectation, 1.0 if verdict.size.startswith("×") else 0.0
    if verdict.word == "not distinguishable":
        assert low <= no_effect <= high, verdict
    if verdict.word == "not decided":
        assert not low < no_effect < high, verdict
    if not expected.same and not expected.is_direction(no_effect):
        inside = expected.low <= low and high <= expected.high
        outside = high < expected.low or low > expected.high
        assert inside == (verdict.word == "supported") or not inside, verdict
        assert outside == (verdict.word == "contradicted") or not outside, verdict


def intervals(report: Document) -> list[tuple[tuple[float, float], str]]:
    """Each interval of speed or loss in the tables, as logarithms of ratios and in nats, with its word."""
    shown = []
    number = r"[+−]?\d+\.\d+"
    text = " | ".join(cell.text for table in report.tables for row in table.rows for cell in row)
    for low, between, high, word in re.findall(rf"\(({number})(–| to )({number})\) ([a-z][^;(|]*)", text):
        ends = [float(end.replace("−", "-")) for end in (low, high)]
        if between == "–":
            # Rounded to two digits, an end that is 1.00 may lie on either side.
            ends = [math.log(end) if end != 1.0 else 0.0 for end in ends]
        if 0.0 not in ends:
            shown.append(((ends[0], ends[1]), word.strip()))
    assert shown
    return shown


@pytest.mark.long
def test_whole_reports_of_nothing_rarely_claim_a_difference() -> None:
    """`benchmarks/verdicts.py` is the long version: 1,000 reports."""
    false = [simulated.null_report(seed) for seed in range(4)]
    assert sum(map(bool, false)) <= 1
    assert simulated.seen(100)[0], "a tenth of the speed is noticed"


def test_the_pages_promise_what_the_benchmark_holds() -> None:
    figures = (Path(__file__).parent.parent / "docs/figures.md").read_text()
    assert simulated.MOST_FALSE == stats.ALPHA
    assert re.search(
        rf"is\s+claimed\s+in\s+at\s+most {100 * stats.ALPHA:g} % of\s+reports, for speed and for loss", figures
    )
    assert re.search(rf"worse by\s+no more than {METRICS['eval_loss'].negligible:g} nats, or 2 % of the speed", figures)


# ------------------------------------------------------------------------------------ claims


@pytest.mark.parametrize(
    ("loss", "expect", "word"),
    [
        (-0.0005, "difference < 0", "contradicted"),
        (-0.1, "difference < 0", "supported"),
        (-0.1, "difference > 0", "contradicted"),
        (0.0, "difference = 0", "supported"),
        (0.1, "difference = 0", "contradicted"),
        (0.1, "difference between 0.05 and 0.15", "supported"),
        (0.1, "difference >= 0.2", "contradicted"),
    ],
)
def test_a_claim_of_an_effect_needs_more_than_a_negligible_one(
    small: Small, tmp_path: Path, loss: float, expect: str, word: str
) -> None:
    m = measured(small, tmp_path, {"checkpointing": (1.0, 1.0, loss)}, noise=0.0005)
    compare = {"gradient_checkpointing": [False, True]}
    claim = {"id": "c", "says": "so", "compare": compare, "metric": "eval_loss", "expect": expect}
    assert verdicts.judge(comparison.compare(m, [Claim.model_validate(claim)]))[0].word == word


def shown(
    metric: str,
    value: float,
    low: float | None,
    high: float | None,
    verdict: Any = "not distinguishable",
    *of: Estimate,
) -> Estimate:
    members = tuple(Member(str(number), member) for number, member in enumerate(of))
    return Estimate(metric, value, low, high, 3, "stories", 0.01, verdict, members=members)


def judged(expect: str, estimate: Estimate) -> str:
    claim = {"id": "c", "says": "so", "compare": {"lora_r": [4, 8]}, "metric": estimate.metric, "expect": expect}
    return verdicts._word(Claim.model_validate(claim), estimate)


@pytest.mark.parametrize(
    ("expect", "low", "high", "word"),
    [
        ("difference between -0.01 and 0.05", -0.064, -0.005, "not decided"),
        ("difference between -0.01 and 0.05", -0.064, 0.005, "not distinguishable"),
        ("difference between -0.01 and 0.05", -0.064, -0.011, "contradicted"),
        ("difference = 0", -0.064, -0.005, "not decided"),
        ("difference <= -0.03", -0.064, -0.005, "not decided"),
        ("difference < 0", -0.064, -0.005, "supported"),
    ],
)
def test_an_interval_without_no_effect_is_never_called_not_distinguishable(
    expect: str, low: float, high: float, word: str
) -> None:
    verdict = "better" if high < 0 else "not distinguishable"
    assert judged(expect, shown("eval_loss", (low + high) / 2, low, high, verdict)) == word


def test_what_is_false_of_some_pairs_and_true_of_none_is_contradicted() -> None:
    def speed(value: float, low: float, high: float) -> Estimate:
        return shown("tokens_per_second", value, low, high, "better")

    twice, more, once = speed(2.29, 1.89, 2.76), speed(1.29, 1.04, 1.52), speed(1.02, 1.01, 1.04)
    depends = functools.partial(shown, "tokens_per_second", 1.9, None, None, "depends")
    as_fast = "ratio between 0.9 and 1.1"
    assert judged(as_fast, depends(twice, more)) == "contradicted"
    assert judged(as_fast, depends(twice, once)) == "depends"
    assert judged(as_fast, depends(more, once)) == "not decided"
    assert judged(as_fast, shown("tokens_per_second", 1.9, 1.05, 3.0, "better", twice, more)) == "contradicted"


def test_a_significant_effect_is_never_called_none() -> None:
    slightly = shown("eval_loss", -0.008, -0.014, -0.001, "better")
    assert words.effect_and_word(slightly) == "−0.008 (−0.014 to −0.001) negligibly better"
    assert words.word(shown("tokens_per_second", 1.015, 1.001, 1.03, "better")) == "negligibly faster"
    assert words.word(shown("tokens_per_second", 0.985, 0.97, 0.999, "worse")) == "negligibly slower"
    assert not any("no effect" in line for line in words.thresholds())


def test_an_end_that_is_not_no_effect_does_not_look_like_it() -> None:
    assert words.effect(shown("tokens_per_second", 0.985, 0.975, 0.998, "worse")) == "×0.98 (0.975–0.998)"
    assert words.effect(shown("tokens_per_second", 1.18, 1.0002, 1.39, "better")) == "×1.18 (1.0002–1.3900)"
    assert words.effect(shown("tokens_per_second", 1.18, 0.998, 1.39)) == "×1.18 (1.00–1.39)", "which holds it"
    assert words.effect(shown("eval_loss", 0.02, 0.0002, 0.04, "worse")) == "+0.020 (+0.0002 to +0.0400)"


def test_an_effect_on_nothing_can_be_turned_round() -> None:
    turned = shown("tokens_per_second", 0.5, 0.0, 2.0, "worse").reversed
    assert (turned.value, turned.low, turned.high, turned.verdict) == (2.0, 0.5, math.inf, "better")
    assert shown("tokens_per_second", 0.0, None, None).reversed.value == math.inf


def test_a_claim_about_forgetting_is_judged_by_the_interval_that_the_page_shows(small: Small, tmp_path: Path) -> None:
    compared = comparison.compare(measured(small, tmp_path, {}))
    figures = {"id": "c", "says": "so", "where": {"adapter": "lora"}, "metric": "forgetting", "expect": "value <= 0.05"}
    compared = dataclasses.replace(compared, claims=(Claim.model_validate(figures),))

    def with_intervals(*ends: tuple[float, float]) -> verdicts.ClaimVerdict:
        estimates = (shown("forgetting", (low + high) / 2, low, high) for low, high in ends)
        lora = compared.measurements.selected({"adapter": "lora"}).index
        compared.__dict__["learnt"] = {"forgetting": dict(zip(lora, estimates, strict=False))}
        return verdicts.judge(compared)[0]

    open_ = with_intervals((-0.015, 0.105))
    assert (open_.word, open_.size) == ("not decided", "+0.045 (−0.015 to +0.105)")
    assert with_intervals((0.0, 0.05)).word == "supported"
    assert with_intervals((0.0, 0.05), (0.0, 0.06)).word == "not decided"
    assert with_intervals((0.0, 0.06), (0.06, 0.07)).word == "contradicted"
    assert with_intervals((0.0, 0.05), (0.06, 0.07)).word == "depends"
    assert with_intervals().word == "not measured here"


# ------------------------------------------------------------------------------------ recommendations


def test_means_over_different_seeds_are_never_compared(small: Small, tmp_path: Path) -> None:
    """The baseline under five seeds, the others under the first, which is a hard one."""
    store, generator = Store(tmp_path), numpy.random.default_rng(0)
    stories = generator.normal(3, 0.3, 32)
    for repeat, of_seed in enumerate((0.05, -0.01, 0.0, -0.02, 0.01)):
        for label, changes, effect in (("baseline", {}, 0.0), ("lora_r=64", {"lora_r": 64}, -0.03)):
            if label == "baseline" or not repeat:
                losses = stories + effect + of_seed + generator.normal(0, 0.003, 32)
                keep(store, small(seed=repeat, **changes), label, losses.tolist(), eval_loss=float(losses.mean()),
                     peak_memory_bytes=1000, tokens_per_second=100.0)  # fmt: skip
    m = loading.load(tmp_path)
    means = m.trials.groupby("label")["eval_loss"].mean()
    assert means["lora_r=64"] > means["baseline"]
    assert recommend.recommend(m).label == "lora_r=64"


def test_one_seed_says_little_of_others(small: Small, tmp_path: Path) -> None:
    """Stories that agree to a hundredth do not make a choice sure: another seed may say something else."""
    store = Store(tmp_path)
    for label, changes, more in (("baseline", {}, 0.0), ("lora_r=64", {"lora_r": 64}, 0.004)):
        losses = [3 + more + (story + more) % 3 / 100 for story in range(8)]
        keep(store, small(**changes), label, losses, eval_loss=3 + more, peak_memory_bytes=1000)
    (sure,) = [each for each in recommend.recommend(loading.load(tmp_path)).sentences if each.startswith("How sure")]
    assert float(re.findall(r"by more than ([\d.]+) nats", sure)[0]) > PILOT.seeds.sigma


@pytest.mark.parametrize(("status", "how"), [("diverged", "diverged"), ("did_not_train", "did not train")])
def test_what_fails_under_some_seeds_is_no_answer(status: str, how: str, small: Small, tmp_path: Path) -> None:
    """Of the others' losses nothing is known but that they were lucky."""
    for seed in range(3):
        keep(Store(tmp_path), small(seed=seed), "baseline", [3.0] * 20, peak_memory_bytes=1000, eval_loss=3.0)
        keep(Store(tmp_path), small(seed=seed, lora_r=8), "steady", [2.9] * 20, peak_memory_bytes=1100, eval_loss=2.9)
        lucky = {"peak_memory_bytes": 1000, "eval_loss": 2.0} if seed else {"status": status}
        keep(Store(tmp_path), small(seed=seed, lora_r=16), "lucky", [2.0] * 20 if seed else [], **lucky)
    m = loading.load(tmp_path)
    best = recommend.recommend(m)
    assert best.label == "steady"
    assert f"lucky {how} under 1 of 3 seeds" in best.sentences[0]
    assert "lucky" not in best.choices["label"].to_list()
    assert {choice.label for choice in recommend.by_memory(m)} == {"baseline", "steady"}
    (card,) = [card for card in front.cards(comparison.compare(m)) if card.title == "Lowest loss"]
    assert card.technique == "steady"


def test_where_all_fail_under_some_seeds_the_answer_says_so(small: Small, tmp_path: Path) -> None:
    for seed in range(2):
        ends = {"peak_memory_bytes": 1000, "eval_loss": 3.0} if seed else {"status": "diverged"}
        keep(Store(tmp_path), small(seed=seed), "baseline", [3.0] * 20 if seed else [], **ends)
    m = loading.load(tmp_path)
    assert [choice.label for choice in recommend.by_memory(m)] == ["baseline (diverged under 1 of 2 seeds)"]
    assert "baseline diverged under 1 of 2 seeds" in recommend.recommend(m).sentences[0]


def test_without_a_baseline_what_fails_under_some_seeds_is_no_answer_either(small: Small, tmp_path: Path) -> None:
    for seed in range(2):
        steady = {"baseline_id": None, "peak_memory_bytes": 1100, "eval_loss": 2.9}
        keep(Store(tmp_path), small(seed=seed, lora_r=8), "steady", [2.9] * 20, **steady)
        ends = {"peak_memory_bytes": 1000, "eval_loss": 2.0} if seed else {"status": "diverged"}
        keep(Store(tmp_path), small(seed=seed, lora_r=16), "lucky", [2.0] * 20 * seed, baseline_id=None, **ends)
    cards = front.cards(comparison.compare(loading.load(tmp_path)))
    assert {card.title: card.technique for card in cards} == {
        "Least memory": "steady", "Lowest loss, not compared": "steady"
    }  # fmt: skip


def test_speeds_of_different_hours_are_never_recommended(small: Small, tmp_path: Path) -> None:
    """A search's trials from before there were visits ran hours apart."""
    store = Store(tmp_path)
    for label, changes, loss, speed in (("baseline", {}, 2.0, 100.0), ("#1", {"lora_r": 8}, 3.0, 300.0)):
        study = {} if label == "baseline" else {"study": "s", "study_trial": 1}
        keep(store, small(**changes), label, [loss, loss + 0.1], eval_loss=loss, peak_memory_bytes=1000,
             tokens_per_second=speed, **study)  # fmt: skip
    assert not any("more speed" in each for each in recommend.recommend(loading.load(tmp_path)).sentences)


@pytest.mark.long
def test_the_recommended_one_is_no_worse_than_the_best_by_more_than_the_stated_margin(
    small: Small, tmp_path: Path
) -> None:
    """Truth: losses a little apart, measured with as much noise. The stated margin holds but for one in twenty."""
    generator = numpy.random.default_rng(8)
    held, runs = 0, 8
    for number in range(runs):
        truth = {label: generator.normal(0, 0.01) for label in CONFIGS}
        effects = {label: (1.0, 1.0, loss) for label, loss in truth.items()}
        m = measured(small, tmp_path / str(number), effects, noise=0.04, seed=100 + number)
        best = recommend.recommend(m)
        (sentence,) = [s for s in best.sentences if s.startswith("How sure")]
        margin = float(re.findall(r"by more than (\S+) nats", sentence)[0])
        held += truth[best.label] - min(truth.values()) <= margin
    assert held >= runs - 1


def test_not_knowing_is_not_being_equal(small: Small, tmp_path: Path) -> None:
    """0.19 nats worse with an interval that holds no effect was once as good, and chosen for being smaller."""
    effects = dict.fromkeys(CONFIGS, (1.0, 1.0, 0.15)) | {
        "lora_r=64": (0.5, 1.0, 0.19),
        "checkpointing": (0.9, 0.9, 0.0),
    }
    m = measured(small, tmp_path, effects, noise=0.3)
    losses = m.trials.groupby("label")["eval_loss"].mean()
    best = recommend.recommend(m)
    assert best.label == losses.drop("baseline again").idxmin()
