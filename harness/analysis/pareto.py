"""Pareto fronts."""

from __future__ import annotations

import numpy
import pandas


def pareto_front(figures: pandas.DataFrame) -> pandas.Series:
    """Which rows no other row dominates: at least as good in every column and better in one. Lower is better.

    Rows with a null are on no front. In the order of the first column, only earlier rows can dominate a row.
    """
    known = figures.dropna()
    order = known.sort_values(list(known.columns), kind="stable")
    values = order.to_numpy(float)
    front: list[int] = []
    kept = numpy.empty((0, values.shape[1]))
    for position, row in enumerate(values):
        dominated = ((kept <= row).all(axis=1) & (kept < row).any(axis=1)).any()
        if not dominated:
            front.append(position)
            kept = values[front]
    return pandas.Series(figures.index.isin(order.index[front]), figures.index)
