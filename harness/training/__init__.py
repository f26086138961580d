"""Runs one trial: a measured fine-tuning in this process, or over several.

worker (entry point of a process), trial (its phases in order), inspection (what trials meet, before a run) with limits
(of a model) and device_limits, processes and distributed (several processes), step (the training step) with optimizers,
muon and recomputation, order (which examples a step has), schedule and timed_steps (of a timing visit), compilation (of
layers), waiting (for a processor), model with adapter_methods (of peft), adapter_targets (where they are),
lora_variants, initialisations (by data), quantisers, adapter_inputs and packing, reach (what text reaches), formats and
sizes (of weights), loss with without_logits, chunked_loss and fused_loss, checkpoints, saved_adapters, prompts, chat
(of several turns) with chat_templates, batches, evaluation, evaluator (before and after training) with tasks; memory
with live_tensors and out_of_memory, clock, card_watch, flops, half_matmul.
"""

__all__ = [
    "adapter_methods",
    "adapter_targets",
    "batches",
    "chat",
    "checkpoints",
    "clock",
    "compilation",
    "device_limits",
    "distributed",
    "evaluation",
    "formats",
    "fused_loss",
    "half_matmul",
    "initialisations",
    "inspection",
    "limits",
    "live_tensors",
    "memory",
    "model",
    "order",
    "out_of_memory",
    "packing",
    "processes",
    "prompts",
    "quantisers",
    "saved_adapters",
    "sizes",
    "step",
    "trial",
    "waiting",
    "worker",
]
