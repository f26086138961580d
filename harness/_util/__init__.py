"""Helpers without knowledge of fine-tuning: files, processes, messages, redaction, text for terminals, units.

files (atomic writes, locks), processes (identity and liveness), messages (one line each), redact (secrets and the home
folder), terminal (text that can be printed), units (of figures).
"""

__all__ = ["files", "messages", "processes", "redact", "terminal", "units"]
