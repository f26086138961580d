"""The allocations of loading a model on a CUDA device, as transformers (5.23) makes them.

It allocates once what all weights will take, and releases it, so that the allocator has one segment for them. Weights
come in the order of their names; one that is quantised is in 16 bit on the device before it is packed. Then what is not
quantised is made fp32, if the spec asks for it, and the adapters are made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from harness.predict import fake_weights
from harness.predict.allocator import Event

_WARM_UP, _UNPACKED, _IN_16_BIT = -2, -3, -4
"""Keys in the trace of what is held for a while: the last one, and those below it, of one weight each."""


def events(
    network: torch.nn.Module,
    adapters: Collection[torch.Tensor],
    key: Callable[[torch.Tensor], int],
    size: Callable[[torch.Tensor], int],
    *,
    upcast: bool,
) -> list[Event]:
    """The trace of loading a model.

    Args:
        network: with fake weights, and adapters.
        adapters: weights of the adapters.
        key: of a tensor's storage in the trace.
        size: bytes that a tensor's storage takes on the device.
        upcast: whether what is not quantised is loaded in 16 bit and made fp32 then.
    """
    last = {key(tensor) for tensor in adapters}
    groups, unpacked = list[list[torch.Tensor]](), dict[int, int]()
    weights = [group for group in _by_name(network) if key(group[0]) not in last]
    warm_up = sum(size(tensor) // (2 if upcast and _is_upcast(tensor, scales) else 1) for tensor, *scales in weights)
    trace, upcasts = [(_WARM_UP, warm_up), (_WARM_UP, 0)], list[Event]()
    for number, (tensor, *scales) in enumerate(weights):
        made = [(key(each), size(each)) for each in (tensor, *scales)]
        if scales:
            trace += [(_UNPACKED, unpacked[key(tensor)]), *made, (_UNPACKED, 0)]
        elif upcast and _is_upcast(tensor, scales):
            trace.append((_IN_16_BIT - number, size(tensor) // 2))
            upcasts += [*made, (_IN_16_BIT - number, 0)]
        else:
            trace += made
    buffers = [(key(buffer), size(buffer)) for buffer in network.buffers()]
    return [*trace, *buffers, *upcasts, *((key(tensor), size(tensor)) for tensor in adapters)]


def _by_name(network: torch.nn.Module) -> list[list[torch.Tensor]]:
    """Each weight once, in the order of names, with the scales of a quantised one."""
    groups: dict[int, list[torch.Tensor]] = {}
    modules = dict(network.named_modules())
    for name, parameter in sorted(network.named_parameters(), key=lambda pair: fake_weights.natural(pair[0])):
        owner, _, own = name.rpartition(".")
        scales = fake_weights.scales(modules[owner]) if own == "weight" else []
        groups.setdefault(_key(parameter), [parameter, *scales])
    return list(groups.values())


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_upcast(tensor: torch.Tensor, scales: Collection[torch.Tensor]) -> bool:
    return not scales and tensor.dtype is torch.float32


def _elements(packed: Any) -> int:
    """Of a quantised weight: two to a byte in 4 bit."""
    return int(packed.numel() * (2 if packed.dtype is torch.uint8 else 1))
