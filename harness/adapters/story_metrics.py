"""Figures of generated stories, as a module of `evaluate` that needs no hub."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_RUN = 4
"""Words of a run that counts as repeated."""


class StoryMetrics(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
    """`rouge_l`, `distinct_2`, `repetition` and `words` of each story; `metrics.INFERENCE` says what they mean."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="C.-Y. Lin, ROUGE, 2004 (rouge_l); J. Li et al., A Diversity-Promoting Objective, 2016.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[Any]]:
        pairs = [(words(p), words(r)) for p, r in zip(predictions, references, strict=True)]
        return {
            "rouge_l": [rouge_l(story, held_out) for story, held_out in pairs],
            "distinct_2": [distinct(story, 2) for story, _ in pairs],
            "repetition": [repetition(story) for story, _ in pairs],
            "words": [float(len(story)) for story, _ in pairs],
        }


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def rouge_l(story: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words (Lin, 2004, with equal weights); 0 without words."""
    if not story or not reference:
        return 0.0
    codes = {word: number for number, word in enumerate({*story, *reference})}
    ours, theirs = (numpy.array([codes[word] for word in text]) for text in (story, reference))
    lengths = numpy.zeros(len(theirs) + 1, dtype=numpy.int64)
    for word in ours:
        # Row by row of the usual table: a match lengthens the diagonal's, else the longest so far stays.
        longer = numpy.where(theirs == word, lengths[:-1] + 1, lengths[1:])
        lengths[1:] = numpy.maximum.accumulate(longer)
    return 2 * int(lengths[-1]) / (len(story) + len(reference))


def distinct(story: Sequence[str], n: int) -> float | None:
    """Distinct runs of n words divided by all of them (Li et al., 2016); null where there is none."""
    runs = _runs(story, n)
    return len({*runs}) / len(runs) if runs else None


def repetition(story: Sequence[str]) -> float | None:
    """Share of runs of four words that stood there before; null where there is none."""
    runs = _runs(story, _RUN)
    return sum(count - 1 for count in Counter(runs).values()) / len(runs) if runs else None


def _runs(story: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(story[start:] for start in range(n)), strict=False))
