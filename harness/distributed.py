"""One trial over several processes: which of them this is, and what they have together. Alone, one has it all."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def join(device_type: str, number: int, count: int, meeting: Path) -> None:
    """Become one of so many processes on this machine.

    Args:
        device_type: `cuda`: the process takes the card of its number, and NCCL; else its share of the cores, and gloo.
        number: from 0.
        count: how many there are.
        meeting: a file that none of them has made yet.
    """
    if device_type == "cuda":
        torch.cuda.set_device(number)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    backend = "nccl" if device_type == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{meeting}", rank=number, world_size=count)


def count() -> int:
    """Processes of this trial."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def number() -> int:
    """This one, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place; each of them must ask for it."""
    if count() > 1:
        distributed.all_reduce(value)
    return value


def share(parts: Sequence[T]) -> Sequence[T]:
    """Every so manieth of the parts: those of this process, which are nobody else's."""
    return parts[number() :: count()]


def wrapped(model: Any, device: torch.device) -> Any:
    """The model as torch's DistributedDataParallel, where there are several processes: gradients are averaged while the
    last backward pass runs.
    """
    if count() == 1:
        return model
    cards = [torch.cuda.current_device()] if device.type == "cuda" else None
    # As views of what is sent, gradients are not there twice.
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=cards, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def accumulating(model: Any, *, last: bool) -> AbstractContextManager[Any]:
    """Around a forward and backward pass: gradients stay here until the last one of a step."""
    return model.no_sync() if count() > 1 and not last else contextlib.nullcontext()
