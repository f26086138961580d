"""Searches for the best configuration: Optuna proposes, the runner measures; from rows back to search results."""

__all__ = ["samplers", "search_results", "study"]
