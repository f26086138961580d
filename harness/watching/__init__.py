"""Measures training loops that are not harness's own, and keeps them beside the trials of grids.

watch (the context manager, and the record that it ends in), trainer (the same as a callback of transformers' Trainer),
loop (steps, by hooks of model and optimizer), configuration (what can be seen of it).
"""

__all__ = ["trainer", "watch"]
