"""The formats that a model's weights are held in: quantisers skip layers, whatever a label says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from harness.training import adapter_methods, quantisers
from harness.training.live_tensors import parts

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def byte_fractions(network: Any) -> dict[str, float]:
    """The part of the base weights' bytes in each format, largest first. Adapters do not count; tied weights once."""
    sizes: Counter[str] = Counter()
    for _, parameter, name, _ in _weights(network):
        sizes[name] += sum(part.numel() * part.element_size() for part in parts(parameter))
    total = sizes.total()
    return {name: size / total for name, size in sizes.most_common()}


def fraction_in(network: Any, name: str) -> float | None:
    """The part of the linear weights that is in a format, by count: matrices and stacks of them (experts), but for
    embeddings and the head, which no quantiser changes. Null where there is none.
    """
    head = network.get_output_embeddings()
    counts: Counter[bool] = Counter()
    for module, parameter, own, count in _weights(network):
        if parameter.dim() >= 2 and not isinstance(module, torch.nn.Embedding) and module is not head:
            counts[own == name] += count
    return counts[True] / counts.total() if counts else None


def _weights(network: Any) -> Iterator[tuple[Any, torch.Tensor, str, int]]:
    """Each base weight once: its module, itself, its format, and how many numbers it stands for."""
    seen = set()
    of_adapters = adapter_methods.own_names(network)
    for path, module in network.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if f"{path}.{key}" not in of_adapters and id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, parameter, *format_of(module, key, parameter)


def format_of(module: Any, key: str, parameter: torch.Tensor) -> tuple[str, int]:
    """Format of a module's parameter, and how many numbers it stands for."""
    if key == "weight" and quantisers.of_bitsandbytes(module):
        return getattr(parameter, "quant_type", "int8"), module.in_features * module.out_features
    if key == "W_q" and quantisers.of_hqq(module):
        return f"int{module.meta['nbits']}", module.in_features * module.out_features
    if quantisers.of_torchao(parameter):
        return "int8", parameter.numel()
    return _NAMES.get(parameter.dtype, str(parameter.dtype)), parameter.numel()
