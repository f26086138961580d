"""Renders analyses, predictions and searches for people: tables, plots, page, Markdown, CSV, LaTeX, dataset cards."""

__all__ = [
    "adapter_tables",
    "document",
    "fixes",
    "inference_tables",
    "notebook",
    "predictions",
    "publishing",
    "tables",
    "trackers",
    "tuning",
    "writers",
]
