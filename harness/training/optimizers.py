"""The optimizer of a spec: transformers' names, with libraries that have them; and updates within the backward pass."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

from harness._util.messages import pip_install
from harness.errors import InputError
from harness.spec.keys import LORA, LOW_RANK_OPTIMIZERS, SCHEDULE_FREE_OPTIMIZERS, TORCHAO_OPTIMIZERS
from harness.spec.trial import TrialSpec
from harness.training import muon

Groups = Sequence[dict[str, Any]]

_LIBRARIES = {
    "stable_adamw": "optimi",
    "galore_adamw": "galore_torch",
    "apollo_adamw": "apollo_torch",
    **dict.fromkeys(SCHEDULE_FREE_OPTIMIZERS, "schedulefree"),
    **dict.fromkeys(TORCHAO_OPTIMIZERS, "torchao"),
}
"""Modules of optimizers that are neither torch's, transformers' nor bitsandbytes'."""


def refuse_missing(spec: TrialSpec) -> None:
    """Check that the library of a spec's optimizer is there.

    Raises:
        InputError: it is not installed.
    """
    library = _LIBRARIES.get(spec.optimizer)
    if library is not None and importlib.util.find_spec(library) is None:
        extra = library if spec.optimizer in TORCHAO_OPTIMIZERS else "optimizers"
        raise InputError(f"optimizer {spec.optimizer}: {library} is not installed; {pip_install(extra)}")


def make(model: Any, spec: TrialSpec, warm_up_steps: int) -> torch.optim.Optimizer:
    """As transformers' Trainer makes it, without weight decay on biases and norms; Muon, which it has no name for, is
    torch's.

    Args:
        model: whose parameters with gradients are trained.
        spec: which optimizer.
        warm_up_steps: for optimizers that warm up themselves.

    Raises:
        InputError: its library is not installed.
    """
    # Undocumented in transformers (5.23): the names that its Trainer decays. A public function would replace it.
    from transformers.trainer_pt_utils import get_parameter_names

    refuse_missing(spec)
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], patterns))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if spec.optimizer == "lora_fa":
        return _lora_fa(model, spec)
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": spec.weight_decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    if spec.adapter == LORA and spec.loraplus_lr_ratio is not None:
        # Vectors go with B, as in peft's `create_loraplus_optimizer`, which makes no groups alone, for any optimizer.
        groups = _with_rates(groups, {id(p) for n, p in named if ".lora_B." in n or p.ndim == 1}, spec)
    groups = [group for group in groups if group["params"]]
    factory = _factory(model, spec, warm_up_steps)
    return UpdatesInBackward(groups, factory) if spec.optimizer_in_backward else factory(groups)


def _factory(model: Any, spec: TrialSpec, warm_up_steps: int) -> Callable[[Groups], torch.optim.Optimizer]:
    """What makes the optimizer of some groups of parameters."""
    # Undocumented in transformers (5.23): the table of its optimizers. A public function from a name to an optimizer
    # would replace it.
    from transformers import Trainer, TrainingArguments

    betas, eps = (spec.adam_beta1, spec.adam_beta2), spec.adam_epsilon
    if spec.optimizer == "muon":
        others = muon.unsuitable(model)
        return functools.partial(muon.MuonAndAdamW, others=others, lr=spec.learning_rate, betas=betas, eps=eps)
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # required, never written
        optim=spec.optimizer,
        optim_target_modules="all-linear",
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        adam_beta1=spec.adam_beta1,
        adam_beta2=spec.adam_beta2,
        adam_epsilon=spec.adam_epsilon,
        warmup_steps=warm_up_steps,
        report_to=[],
        use_cpu=True,  # keeps it from initialising CUDA; nothing is moved
    )
    factory, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if spec.optimizer in TORCHAO_OPTIMIZERS:
        factory = _uncompiled(factory)
    if spec.optimizer in LOW_RANK_OPTIMIZERS:
        *_, of_matrices = options.pop("params")  # its own groups, without weight decay
        projection = {name: value for name, value in of_matrices.items() if name != "params"}
        others = muon.unsuitable(model)
        of_groups = functools.partial(factory, **options, betas=betas, eps=eps, no_deprecation_warning=True)
        return lambda groups: of_groups(_with_projection(groups, others, projection))
    return lambda groups: _unpaged(factory(groups, **options), model)


def _with_rates(groups: Groups, faster: set[int], spec: TrialSpec) -> list[dict[str, Any]]:
    """The groups with what LoRA+ has a rate for apart; the others first, whose rate is the recorded one."""
    ratio = spec.loraplus_lr_ratio or 1.0
    slow = [{**group, "params": [p for p in group["params"] if id(p) not in faster]} for group in groups]
    fast = [{**group, "params": [p for p in group["params"] if id(p) in faster]} for group in groups]
    return [*slow, *({**group, "lr": ratio * spec.learning_rate} for group in fast)]


def _lora_fa(model: Any, spec: TrialSpec) -> torch.optim.Optimizer:
    """The optimizer of peft for LoRA's B over a frozen A: AdamW of projected gradients (arXiv:2308.03303)."""
    from peft.optimizers import create_lorafa_optimizer

    made = create_lorafa_optimizer(
        model, r=spec.lora_r, lora_alpha=spec.lora_alpha, lr=spec.learning_rate, weight_decay=spec.weight_decay
    )
    for group in made.param_groups:
        group |= {"betas": (spec.adam_beta1, spec.adam_beta2), "eps": spec.adam_epsilon}
    return made


def _uncompiled(factory: Any) -> Any:
    """An optimizer of torchao (0.18) without torch's compiler, whose code the tracker of memory does not see."""
    return type(factory.__name__, (factory,), {"step": torch.compiler.set_stance("force_eager")(factory.step)})


def _with_projection(groups: Groups, others: set[int], projection: dict[str, Any]) -> Groups:
    """The groups with their matrices apart, whose gradients are projected."""
    split = list[dict[str, Any]]()
    for group in groups:
        matrices = [p for p in group["params"] if p.ndim == 2 and id(p) not in others]
        rest = [p for p in group["params"] if p.ndim != 2 or id(p) in others]
        split += [{**group, **projection, "params": matrices}] if matrices else []
        split += [{**group, "params": rest}] if rest else []
    return split


class UpdatesInBackward(torch.optim.Optimizer):
    """Updates each parameter as soon as its gradient is complete, and releases the gradient.

    torch's recipe of an optimizer for each parameter (tutorials, `optimizer_step_in_backward`), as one optimizer.

    Args:
        groups: of parameters, each with its options.
        make: makes an optimizer of groups.
    """

    def __init__(self, groups: Groups, make: Callable[[Groups], torch.optim.Optimizer]) -> None:
        parts = [make([{**group, "params": [p]}]) for group in groups for p in group["params"]]
        # Schedules set the rates of these groups, and each part reads its own: they are the same objects.
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts, self._norms = parts, list[torch.Tensor]()
        for part in parts:
            self.state.update(part.state)
            part.state = self.state
            for parameter in part.param_groups[0]["params"]:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._update, part))

    def _update(self, part: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        part.step()
        part.zero_grad(set_to_none=True)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # overloads
        """Nothing is left to update; returns the loss of the closure, if there is one."""
        return None if closure is None else closure()

    def take_norm(self) -> torch.Tensor:
        """Norm of all gradients since the last call."""
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(self._norms))
        self._norms.clear()
        return norm

    def train(self) -> None:
        """As of optimizers without a schedule."""
        for part in self._parts:
            set_averaged(part, False)

    def eval(self) -> None:
        """As of optimizers without a schedule."""
        for part in self._parts:
            set_averaged(part, True)


def set_averaged(optimizer: Any, averaged: bool) -> None:
    """Let the weights be averages over the steps, to evaluate and keep, or those that gradients are taken at. They are
    two of optimizers without a schedule alone.
    """
    change = getattr(optimizer, "eval" if averaged else "train", None)
    if change is not None:
        change()


def _unpaged(optimizer: Any, model: Any) -> Any:
    """The optimizer, with AdEMAMix's state unpaged on a CPU.

    Patches bitsandbytes (0.50), whose other paged optimizers do so themselves there; this one fails.
    """
    from bitsandbytes.optim.ademamix import AdEMAMix

    if not (model.device.type == "cpu" and isinstance(optimizer, AdEMAMix) and optimizer.is_paged):
        return optimizer
    paged: Any = optimizer._get_state_double_buffer

    def unpaged(parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
        optimizer.is_paged = False
        try:
            return paged(parameter, dtype=dtype)
        finally:
            optimizer.is_paged = True

    vars(optimizer)["_get_state_double_buffer"] = unpaged
    return optimizer
