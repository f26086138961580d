"""Renders analyses, predictions and searches for people: tables, plots, page, Markdown, CSV, LaTeX, dataset cards."""

__all__ = [
    "adapter_tables",
    "compare_page",
    "document",
    "fixes",
    "inference_tables",
    "joined",
    "notebook",
    "page",
    "predictions",
    "publishing",
    "tables",
    "trackers",
    "tuning",
    "writers",
]
