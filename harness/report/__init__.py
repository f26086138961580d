"""Renders analyses, predictions and searches for people: tables, plots, page, Markdown, CSV and LaTeX."""

__all__ = ["adapter_tables", "document", "fixes", "inference_tables", "predictions", "tables", "tuning", "writers"]
