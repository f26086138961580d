"""What one fine-tuning is: every parameter of a trial, declared once, frozen and validated.

Modules: parameters (the keys), keys (types of their values), datasets (the keys under `datasets:`), trial (which of
them go together, and ids), length (its optimizer steps), capabilities (what methods of peft were seen to do).
"""

__all__ = ["capabilities", "datasets", "keys", "length", "parameters", "trial"]
