"""The allocations of loading a model on a CUDA device, as transformers (5.23) makes them.

It allocates once what all weights will take, and releases it, so that the allocator has one segment for them. Weights
come in the order of their names; one that is quantised is in 16 bit on the device before it is packed. Then what is not
quantised is made fp32, if the spec asks for it, and the adapters are made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from harness.predict import fake_weights
from harness.predict.allocator import Event
from harness.training.live_tensors import parts

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
    weights = [weight for weight in _by_name(network) if key(weight.tensor) not in last]
    warm_up = sum(size(weight.tensor) // (2 if upcast and weight.is_upcast else 1) for weight in weights)
    trace, upcasts = [(_WARM_UP, warm_up), (_WARM_UP, 0)], list[Event]()
    for number, weight in enumerate(weights):
        made = [(key(each), size(each)) for each in (weight.tensor, *weight.scales)]
        if weight.scales:
            trace += [(_UNPACKED, weight.unpacked), *made, (_UNPACKED, 0)]
        elif upcast and weight.is_upcast:
            trace.append((_IN_16_BIT - number, size(weight.tensor) // 2))
            upcasts += [*made, (_IN_16_BIT - number, 0)]
        else:
            trace += made
    buffers = [(key(buffer), size(buffer)) for buffer in network.buffers()]
    return [*trace, *buffers, *upcasts, *((key(tensor), size(tensor)) for tensor in adapters)]


@dataclass(frozen=True)
class _Weight:
    """A weight, with the scales of a quantised one."""

    tensor: torch.Tensor
    scales: list[torch.Tensor]
    unpacked: int
    """Bytes that are held while it is quantised."""

    @property
    def is_upcast(self) -> bool:
        return not self.scales and self.tensor.dtype is torch.float32


def _by_name(network: torch.nn.Module) -> list[_Weight]:
    """Each weight once, in the order of names."""
    weights: dict[int, _Weight] = {}
    modules = dict(network.named_modules())
    for name, parameter in sorted(network.named_parameters(), key=lambda pair: fake_weights.natural(pair[0])):
        owner, _, own = name.rpartition(".")
        tensor, *inner = parts(parameter)
        scales = [*inner, *(fake_weights.scales(modules[owner]) if own in ("weight", "W_q") else ())]
        unpacked = fake_weights.unpacked_bytes(modules[owner]) if scales else 0
        weights.setdefault(int(tensor.untyped_storage()._cdata), _Weight(tensor, scales, unpacked))
    return list(weights.values())
