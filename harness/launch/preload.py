"""What the fork server imports once, so that a trial starts quickly. Nothing here initialises CUDA."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import logging
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

# transformers imports its modules on first use; these are the ones that every trial uses.
_PARTS = (
    "harness.training.worker",
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


def _preload() -> None:
    import torch
    import tqdm

    # tqdm (4.67) makes a semaphore as its lock, which a worker that ends by os._exit would leave behind.
    tqdm.tqdm.set_lock(threading.RLock())

    # peft imports torchao and HQQ where they are installed. torchao (0.18) says of each of its kernels for cards that
    # it cannot be loaded, and torch (2.13) of torchao's enumerations that they need not be registered.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)

    # bitsandbytes 0.50 warns at import that a kernel for inference is missing, which would come from a hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

    with mock.patch("torch.compile", _compiled_at_first_call):
        for part in _PARTS:
            importlib.import_module(part)

        # A CUDA build of bitsandbytes initialises CUDA at import, and a process that has done so cannot fork.
        if torch.version.cuda is None:
            with contextlib.suppress(ImportError):
                importlib.import_module("bitsandbytes")


def _compiled_at_first_call(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """In place of `torch.compile` for functions that bitsandbytes (0.50) and HQQ (0.2.8) compile at import: torch would
    import its compiler, which takes longer than they do, and few trials call them.
    """
    if function is None:
        return functools.partial(_compiled_at_first_call, **options)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        import torch

        made: Callable[..., Any] = torch.compile(function, **options)
        return made

    return functools.wraps(function)(lambda *args, **named: compiled()(*args, **named))


# What is loaded now stays: neither here nor in a trial the garbage collector scans it, or copies its pages.
gc.disable()

# What cannot be imported ends no server: each trial imports it again, and its log says what is wrong.
with contextlib.suppress(Exception):
    _preload()

gc.freeze()
gc.enable()
