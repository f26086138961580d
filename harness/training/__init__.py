"""Runs one trial: a measured fine-tuning in this process, or over several.

worker (entry point of a process), trial (its phases in order), processes and distributed (several processes), step (the
training step), order (which examples a step has), schedule (of a timing visit), waiting (for a processor), model
with lora (where adapters are) and reach (what text reaches), checkpoints, saved_adapters, batches, evaluation;
inspection (before a run); memory with live_tensors and out_of_memory, clock, card_watch, flops, half_matmul.
"""

__all__ = [
    "batches",
    "checkpoints",
    "distributed",
    "evaluation",
    "half_matmul",
    "inspection",
    "live_tensors",
    "memory",
    "model",
    "order",
    "saved_adapters",
    "step",
    "trial",
    "worker",
]
