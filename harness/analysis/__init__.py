"""From recorded rows to effects, verdicts, claims and recommendations; without torch."""

__all__ = [
    "compare_runs",
    "comparison",
    "cost",
    "estimate",
    "forecast",
    "inference",
    "loading",
    "longer",
    "measurements",
    "pareto",
    "pilot",
    "power",
    "recommend",
    "sequential",
    "sizing",
    "stats",
    "task_scores",
    "timed",
    "verdicts",
    "words",
]
