"""Which comparisons are of one training that is computed in two ways: they differ by rounding alone."""

from __future__ import annotations

import pandas

from harness.spec.datasets import Part
from harness.spec.trial import PARTS

HOW = frozenset({
    *(key for key, part in PARTS.items() if part is Part.ACTIVATIONS),
    "micro_batch_size", "gradient_accumulation_steps", "num_processes", "sharding", "optimizer_in_backward",
})  # fmt: skip
"""Keys that say how a step is computed, and not what it does to the weights: what a pass keeps or computes again, and
how an effective batch is divided."""


def comparisons(pairs: pandas.DataFrame, conditions: pandas.DataFrame) -> pandas.Index:
    """Those whose pairs all agree in everything but `HOW`, the effective batch among it.

    Noise between seeds is pooled over configurations, which overstates by far what it is for these.

    Args:
        pairs: columns comparison, reference, config.
        conditions: by configuration, a value of each key of the spec and of what is derived from them;
            configurations that it lacks equal none.
    """
    what = conditions[[key for key in conditions.columns if key not in HOW]]
    ours, theirs = (what.reindex(pairs[side]).to_numpy() for side in ("config", "reference"))
    equal = pandas.Series((ours == theirs).all(axis=1), pairs.index).groupby(pairs["comparison"]).all()
    return equal.index[equal]
