"""What the fork server imports once, so that a trial starts in a moment. Nothing here touches CUDA."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import threading

import torch
import tqdm

from harness import worker

# transformers imports its parts on first use; these are the parts that every trial uses.
_PARTS = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "transformers.optimization",
    "transformers.quantizers.quantizer_bnb_8bit",
    "transformers.quantizers.quantizer_bnb_4bit",
    "peft",
    "peft.tuners.lora",
    "numpy",
    "pandas",
)

# tqdm's own lock is a semaphore that a worker's quick end would leave behind.
tqdm.tqdm.set_lock(threading.RLock())

# It says at import that a kernel for inference is missing, which would come from a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

for part in _PARTS:
    importlib.import_module(part)

# bitsandbytes looks at the card when it is imported, and a process that has seen it cannot fork.
if torch.version.cuda is None:
    with contextlib.suppress(ImportError):
        importlib.import_module("bitsandbytes")

# What is here now stays for good: a trial's collector need not look at it, nor copy its pages.
gc.collect()
gc.freeze()

__all__ = ["worker"]
