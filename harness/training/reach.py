"""Parameters that text does not reach: the vision tower of a model of text and images, for one."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator
from typing import Any
from unittest import mock

import torch

from harness.training import quantisers

_REACHED: dict[tuple[type, str], frozenset[str]] = {}
"""Names of reached parameters by class and configuration of a model: many predictions are of one base."""


def unreached(network: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters of a base model that get no gradient from text, by name; none where that cannot be known.

    The graph of a forward pass on the device `meta` shows it: nothing is computed there, so that no expert is left out
    for want of a token. Code whose path depends on values cannot run there.
    """
    key = type(network), network.config.to_json_string(use_diff=False)
    if key not in _REACHED:
        try:
            _REACHED[key] = _reached(on_meta(network))
        except Exception:  # a model's own code may need values
            _REACHED[key] = frozenset()
    reached = _REACHED[key]
    return {name: each for name, each in network.named_parameters() if reached and _of_plain(name) not in reached}


def _of_plain(name: str) -> str:
    """Name of a parameter where no layer is HQQ's, which call their weight `W_q`."""
    owner, _, own = name.rpartition(".")
    return f"{owner}.weight" if own == "W_q" else name


def on_meta(network: Any) -> Any:
    """A copy in bf16, the one format in which every kernel has shapes on `meta`; quantised layers are plain ones."""
    # What stands in the memo takes the place of the original in the copy.
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=torch.bfloat16, device="meta"))
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for module in network.modules():
        if quantisers.of_bitsandbytes(module) or quantisers.of_hqq(module):
            memo[id(module)] = torch.nn.Linear(
                module.in_features, module.out_features, module.bias is not None, device="meta", dtype=torch.bfloat16
            )
    return copy.deepcopy(network, memo).eval()  # some models ask for the places of images while they train


def _reached(network: Any) -> frozenset[str]:
    """Names of the parameters of a model on `meta` that the logits of a text depend on, by its graph."""
    # Transformers (5.23) reads a mask's values unless it is traced. A public way to say that nothing is padded would
    # replace the patch.
    from transformers import masking_utils

    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with mock.patch.object(masking_utils, "is_tracing", return_value=True), torch.enable_grad():
        output = network(input_ids=tokens)
    results = [result for result in (output.logits, getattr(output, "aux_loss", None)) if result is not None]
    leaves = {id(leaf) for leaf in _leaves(*results)}
    return frozenset(name for name, parameter in network.named_parameters() if id(parameter) in leaves)


def _leaves(*results: torch.Tensor) -> Iterator[torch.Tensor]:
    """The parameters in the graph of some results."""
    seen: set[Any] = set()
    nodes: list[Any] = [result.grad_fn for result in results]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):  # where a gradient ends
                yield node.variable
            nodes += [next_node for next_node, _ in node.next_functions]


def parts(names: Iterable[str], others: Collection[str]) -> list[str]:
    """The largest modules that hold some of the names and none of the others; names that no such module holds."""
    return list(dict.fromkeys(_largest(name, others) for name in names))


def _largest(name: str, others: Collection[str]) -> str:
    ancestors = [name[:end] for end, character in enumerate(name) if character == "."]
    return next((each for each in ancestors if not any(other.startswith(f"{each}.") for other in others)), name)
