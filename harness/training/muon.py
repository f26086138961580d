"""Muon for a model's matrices, AdamW for what it is not made for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for matrices within layers, and its AdamW for embeddings, the head, norms and biases, and for all
    that is no matrix, such as experts in 3-D parameters.

    Muon's updates are scaled by 0.2 · sqrt(max(rows, columns)), so that they are as large as AdamW's, and both have one
    learning rate and weight decay (Liu et al., Muon is Scalable for LLM Training, arXiv:2502.16982).

    Args:
        groups: of parameters, each with its `weight_decay`.
        others: ids of matrices that are AdamW's: those of embeddings and the head.
        lr: learning rate of both.
        betas: AdamW's decay rates of the two moments.
        eps: what AdamW adds to the denominator.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        others: Collection[int],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        of_muon, of_adamw = list[dict[str, Any]](), list[dict[str, Any]]()
        for group in groups:
            matrices = [p for p in group["params"] if p.ndim == 2 and id(p) not in others]
            rest = [p for p in group["params"] if p.ndim != 2 or id(p) in others]
            of_muon += [{**group, "params": matrices}] if matrices else []
            of_adamw += [{**group, "params": rest}] if rest else []
        self._parts: list[torch.optim.Optimizer] = []
        if of_muon:
            self._parts.append(torch.optim.Muon(of_muon, lr=lr, adjust_lr_fn="match_rms_adamw"))
        if of_adamw:
            self._parts.append(torch.optim.AdamW(of_adamw, lr=lr, betas=betas, eps=eps))
        # Schedules set the rates of these groups, and each part reads them: they are the same objects.
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # overloads
        """Update all parameters that have gradients; returns the loss of the closure, if there is one."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss


def unsuitable(model: Any) -> set[int]:
    """Ids of the parameters of embeddings and of the head, which Muon is not made for (as torch's docs say)."""
    head = model.get_output_embeddings()
    modules = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)] + ([head] if head is not None else [])
    return {id(parameter) for module in modules for parameter in module.parameters()}
