"""From recorded rows to effects, verdicts, claims and recommendations; without torch."""

__all__ = [
    "compare_runs",
    "comparison",
    "cost",
    "estimate",
    "forecast",
    "inference",
    "loading",
    "measurements",
    "pareto",
    "pilot",
    "power",
    "recommend",
    "sequential",
    "sizing",
    "stats",
    "task_scores",
    "verdicts",
    "words",
]
