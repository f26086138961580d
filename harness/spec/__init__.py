"""What one fine-tuning is: every parameter of a trial, declared once, frozen and validated.

Modules: trial (the keys, their checks, ids), keys (types of their values), datasets (the keys under `datasets:`).
"""

__all__ = ["datasets", "keys", "trial"]
