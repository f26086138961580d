"""From recorded rows to effects, verdicts, claims and recommendations; without torch."""

__all__ = [
    "compare_runs",
    "comparison",
    "inference",
    "loading",
    "measurements",
    "pareto",
    "recommend",
    "sequential",
    "verdicts",
    "words",
]
