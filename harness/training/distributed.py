"""Ranks of one trial, by torch.distributed. Without a process group, the world size is 1."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from harness.environment import DeviceType
from harness.errors import InputError

T = TypeVar("T")


def init_process_group(device_type: DeviceType, rank: int, world_size: int, store: Path) -> None:
    """Become a rank of a process group on this machine.

    Args:
        device_type: `cuda`: NCCL, and the card with the rank's number; `cpu`: gloo, and an equal part of the threads.
        rank: from 0.
        world_size: number of ranks.
        store: file for the rendezvous, which must not exist yet.
    """
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    backend = "nccl" if device_type == "cuda" else "gloo"
    _hide_launch_advice()
    distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)


def _hide_launch_advice() -> None:
    """Hide the advice of transformers to launch ranks its own way."""
    logging.getLogger("transformers.training_args").setLevel(logging.ERROR)


def world_size() -> int:
    """Number of ranks."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Rank of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place. A collective: every rank must call it."""
    if world_size() > 1:
        distributed.all_reduce(value)
    return value


def rank_slice(items: Sequence[T]) -> Sequence[T]:
    """This rank's items: every `world_size`-th."""
    return items[rank() :: world_size()]


@contextlib.contextmanager
def fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    """Within, be one rank of a process group whose collectives do nothing."""
    if world_size == 1:
        yield
        return
    # Private API of torch (2.13); a public fake backend would replace it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _hide_launch_advice()
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def device_mesh(device: torch.device) -> Any:
    """All ranks in one dimension, for `shard`."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (world_size(),))


def shard(model: Any, sharding: str, mesh: Any) -> None:
    """Shard a model's weights over the ranks by torch's `fully_shard` (FSDP2).

    A layer moves to its device when it is sharded, so that no card ever holds the whole model.

    Args:
        model: on a CPU, or on the mesh's device.
        sharding: `full_shard`: layers are gathered for each pass; `shard_grad_op`: for both together.
        mesh: from `device_mesh`.

    Raises:
        InputError: the model does not name its layers.
    """
    from torch.distributed.fsdp import fully_shard

    reshard_after_forward = sharding == "full_shard"
    # transformers (5.23) names the layers of a model in this attribute alone.
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise InputError(f"{type(model).__name__} does not name its layers; use sharding: none")
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embeddings.weight is not head.weight:
        fully_shard(embeddings, mesh=mesh, reshard_after_forward=reshard_after_forward)
    # What the forward pass needs last, the backward pass needs first.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def reshard(model: Any) -> None:
    """Free gathered weights: without a backward pass, some stay gathered."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor; the tensor itself where it is not sharded."""
    # Private attribute of torch's DTensor (2.13): the public `to_local` is an operation, which the tracker would see.
    return getattr(tensor, "_local_tensor", tensor)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor. A collective: every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wrap_ddp(model: Any, device: torch.device) -> Any:
    """The model in torch's DistributedDataParallel; the model itself if it is sharded, or with one rank."""
    if world_size() == 1 or hasattr(model, "unshard"):
        return model
    cards = [torch.cuda.current_device()] if device.type == "cuda" else None
    # As views of the buckets, gradients need no memory of their own.
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=cards, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def gradient_sync(model: Any, *, last: bool) -> AbstractContextManager[Any]:
    """Around a forward and backward pass: DDP synchronises gradients in the last one of a step alone.

    Sharded models synchronise in each one: each rank would hold unsharded gradients otherwise.
    """
    return model.no_sync() if hasattr(model, "no_sync") and not last else contextlib.nullcontext()
