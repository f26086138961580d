"""Claims: what is accepted, and how measurements judge them."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from harness.grids.claims import CONDITIONS, MODEL, Claim, Expectation, lesson
from harness.grids.json_schema import grid_schema
from harness.metrics import FIGURES
from harness.report.claim_cards import expects

GOOD = {
    "id": "checkpointing",
    "says": "Checkpointing saves memory",
    "compare": {"gradient_checkpointing": [False, True]},
    "metric": "peak_memory_bytes",
    "expect": "ratio <= 0.75",
}


def test_expectations_are_regions() -> None:
    assert Expectation.parse("ratio <= 0.75") == Expectation(quantity="ratio", high=0.75)
    assert Expectation.parse("difference between -0.01 and 0.05") == Expectation(
        quantity="difference", low=-0.01, high=0.05
    )
    assert Expectation.parse("ratio = 1").same
    assert Expectation.parse("ratio < 1").high < 1, "what is equal is not less"
    assert Expectation.parse("value > 8").low > 8
    assert Expectation.parse("status oom").status == "oom"
    assert Expectation.parse("difference >= -0.5").high == math.inf
    assert Expectation.parse("difference between -1e-3 and .05") == Expectation(
        quantity="difference", low=-0.001, high=0.05
    )


def test_levels_are_numbers_where_those_of_a_grid_are() -> None:
    """YAML 1.1 reads 1e-4 as text."""
    claim = Claim.model_validate(GOOD | {"compare": {"learning_rate": ["1e-4", ["1e-3", "highest"]]}})
    assert claim.compare == {"learning_rate": (1e-4, [1e-3, "highest"])}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"expect": "less"}, "is not an expectation"),
        ({"per": "trainable_parameters"}, "divided by another one with where alone"),
        ({"expect": "status broken"}, "no status"),
        ({"expect": "ratio between 2 and 1"}, "swap"),
        ({"expect": "ratio = 2"}, "no effect"),
        ({"expect": "difference < 0"}, "compared by ratio"),
        ({"expect": "value < 3"}, "takes ratio or difference"),
        ({"compare": {"gradient_checkpoint": [False, True]}}, "did you mean gradient_checkpointing"),
        ({"compare": {"lora_r": [1, 2, 3]}}, "too_long|at most 2"),
        ({"compare": {}}, "takes value or status"),
        ({"compare": {"precision": ["bf16", "nf5"]}}, "unknown precision 'nf5'; did you mean nf4"),
        ({"compare": {"lora_r": [4, "8"]}}, "lora_r is '8'; it must be a whole number"),
        ({"where": {"precision": ["bf16", "nf5"]}}, "unknown precision 'nf5'; did you mean nf4"),
        ({"free": ["learningrate"]}, "did you mean learning_rate"),
        ({"metric": "peak_memory"}, "did you mean"),
        ({"metric": ""}, "metric is missing; give one: Metric that decides it"),
        ({"hold": ["model"]}, "unknown key 'model'"),
        ({"compare": {"model": ["unmerged", "merged"]}}, "the inference benchmark has no peak_memory_bytes"),
        ({"metric": "model_bytes"}, "compare {model: .unmerged, merged.} alone"),
        ({"metric": "model_bytes", "compare": {"model": ["unmerged", "both"]}}, "no model 'both'"),
        ({"says": "two\nlines"}, "one line"),
        ({"id": "a b"}, "pattern"),
        ({"unheard": 1}, "extra"),
    ],
)
def test_what_cannot_be_judged_is_refused(changes: dict[str, object], says: str) -> None:
    Claim.model_validate(GOOD)
    with pytest.raises(ValidationError, match=says):
        Claim.model_validate(GOOD | changes)


def test_how_a_trial_ends_is_of_no_metric() -> None:
    fails = {"id": "fails", "says": "Rank 8 trains", "where": {"lora_r": 8}, "expect": "status ok"}
    assert expects(Claim.model_validate(fails)) == "status ok"
    assert "metric" not in grid_schema()["$defs"]["Claim"]["required"]
    with pytest.raises(ValidationError, match="metric is missing"):
        Claim.model_validate(fails | {"expect": "value < 3"})


def test_the_lessons_claims_are_whole() -> None:
    claims = lesson().claims
    assert len(claims) >= 20
    assert len({claim.id for claim in claims}) == len(claims)
    keys = {key for claim in claims for key in (*claim.compare, *claim.where)}
    assert keys <= {*CONDITIONS, MODEL}
    # What the lesson speaks of.
    assert keys >= {"adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_target_modules", "precision",
                    "micro_batch_size", "sequence_length", "gradient_accumulation_steps", "gradient_checkpointing",
                    "memory_budget", "system_prompt", "optimizer"}  # fmt: skip
    assert {claim.metric for claim in claims} <= set(FIGURES)
