"""Records on disk: parquet folders, their schema, and joining them.

schema (columns, rows to specs), validation (are rows such as we write?), parts (one file), store (one grid's folder),
join (trials of other folders), timing (speeds from timed steps), versions (the trials that a grid has).
"""

__all__ = ["join", "parts", "schema", "store", "timing", "versions"]
