"""From rows to what people read: tables, claims, plots, page, recommendation, comparison of runs."""
