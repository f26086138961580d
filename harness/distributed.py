"""One trial over several processes: which of them this is, and what they have together. Alone, one has it all."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from harness.errors import InputError

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
    _leave_advice_out()
    distributed.init_process_group(backend, init_method=f"file://{meeting}", rank=number, world_size=count)


def _leave_advice_out() -> None:
    """Transformers would tell to launch several processes in a way of its own."""
    logging.getLogger("transformers.training_args").setLevel(logging.ERROR)


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


@contextlib.contextmanager
def pretended(number: int, count: int) -> Iterator[None]:
    """Within, be one of so many processes of which the others are not there: what they send has no contents."""
    if count == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _leave_advice_out()
    distributed.init_process_group("fake", store=FakeStore(), rank=number, world_size=count)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def mesh(device: torch.device) -> Any:
    """The processes and their devices, as torch wants them named for `share_out`."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (count(),))


def share_out(model: Any, sharding: str, mesh: Any) -> None:
    """Leave each process its part of a model's weights, by torch's `fully_shard`.

    A layer is moved to its device when it is shared out, so that a card never holds the whole model.

    Args:
        model: on a CPU, or on the mesh's device.
        sharding: `full_shard`: layers are gathered for each pass; `shard_grad_op`: for both together.
        mesh: of the processes.

    Raises:
        InputError: the model does not name its layers.
    """
    from torch.distributed.fsdp import fully_shard

    gathered_again = sharding == "full_shard"  # for the backward pass, and not held until then
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise InputError(f"{type(model).__name__} does not say what its layers are; use sharding: none")
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=gathered_again)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embeddings.weight is not head.weight:
        fully_shard(embeddings, mesh=mesh, reshard_after_forward=gathered_again)
    # What the forward pass needs last, the backward pass needs first.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def let_go(model: Any) -> None:
    """Hold no more of a shared-out model than this process's part: a forward pass alone leaves some of it gathered."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: all of it, unless it is shared out."""
    return getattr(tensor, "_local_tensor", tensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece. If it is shared out, each process must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wrapped(model: Any, device: torch.device) -> Any:
    """The model as torch's DistributedDataParallel, where several processes hold all of it: gradients are averaged
    while the last backward pass runs.
    """
    if count() == 1 or hasattr(model, "unshard"):
        return model
    cards = [torch.cuda.current_device()] if device.type == "cuda" else None
    # As views of what is sent, gradients are not there twice.
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=cards, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def accumulating(model: Any, *, last: bool) -> AbstractContextManager[Any]:
    """Around a forward and backward pass: gradients stay here until the last one of a step. Not those of shared-out
    weights: each process would hold all of them.
    """
    return model.no_sync() if hasattr(model, "no_sync") and not last else contextlib.nullcontext()
