"""Cross entropy by a kernel that multiplies by the head too: `loss: liger | cce`.

The kernels are of the packages liger-kernel and cut-cross-entropy, for CUDA cards. They take a head's weight and know
nothing else of a model's code. So a head must be a plain layer, and what the code makes of it is compared once with
the product.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from harness._util.messages import pip_install
from harness.errors import InputError
from harness.spec.keys import FUSED_LOSSES
from harness.spec.trial import TrialSpec
from harness.training.batches import IGNORED
from harness.training.without_logits import LogitsOf, losses_for_logits

Kernel = Callable[..., torch.Tensor]
"""From inputs of shape (positions, width), a weight of shape (vocabulary, width), targets and a bias to the losses."""

_IMPORTED = {"liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
_LARGE = 100.0
"""The largest input of a head where it is compared: a softcap changes large logits alone."""
_AFTER_THE_HEAD = {"final_logit_softcapping": None, "logits_scaling": 1, "logit_scale": 1}
"""What configurations of transformers' models (5.23) say of it, with the value that changes nothing."""


def refuse_missing(spec: TrialSpec) -> None:
    """Check that the package of a spec's loss is there.

    Raises:
        InputError: it is not installed.
    """
    package = FUSED_LOSSES.get(spec.loss)
    if package is not None and importlib.util.find_spec(_IMPORTED[package]) is None:
        raise InputError(f"loss {spec.loss}: {package} is not installed; {pip_install(spec.loss)}")


def refuse_if_impossible(causal: Any, loss: str) -> None:
    """Check that a kernel takes the head of a model, by its type.

    Args:
        causal: without the wrapper of its adapters, whose layers it has.
        loss: whose kernel.

    Raises:
        InputError: it does not.
    """
    head, config = causal.get_output_embeddings(), causal.config.get_text_config()
    for name, neutral in _AFTER_THE_HEAD.items():
        if getattr(config, name, neutral) != neutral:
            raise InputError(
                f"loss {loss}: {type(causal).__name__} has {name} after its head, which the kernel leaves out; use "
                "loss: chunked"
            )
    if type(head) is not torch.nn.Linear:
        raise InputError(
            f"loss {loss}: its kernel takes a plain head, and that of {type(causal).__name__} is {type(head).__name__}"
            "; use loss: chunked, which runs the model's own"
        )
    if loss == "cce" and head.bias is not None:
        raise InputError(
            f"loss cce: its kernel takes no bias, which the head of {type(causal).__name__} has; use loss: liger or "
            "loss: chunked"
        )
    if loss == "cce" and head.weight.dtype is torch.float32:
        raise InputError(
            "loss cce: its kernel multiplies in 16 bit, and the head is fp32; use precision: bf16 (over a quantised "
            "base upcast_unquantized: false), loss: liger or loss: chunked"
        )


def refuse_other_code(causal: Any, loss: str) -> None:
    """Check that a model's logits are the product of its decoder's output and its head, by values.

    Raises:
        InputError: its code does something else too, such as a softcap.
    """
    head = causal.get_output_embeddings()

    def compared(hidden: torch.Tensor, _: torch.Tensor, logits_of: LogitsOf) -> torch.Tensor:
        large = (_LARGE * hidden[0].float() / hidden.abs().max()).to(head.weight.dtype)
        expected = F.linear(large, head.weight, head.bias).float()
        if not torch.allclose(logits_of(large).float(), expected, rtol=0.02, atol=0.02 * float(expected.std())):
            raise InputError(
                f"loss {loss}: {type(causal).__name__} does more to its logits than to multiply by its head; "
                "use loss: chunked, which runs the model's own code"
            )
        return hidden.sum()

    token = torch.zeros((1, 1), dtype=torch.int64, device=head.weight.device)
    training = causal.training
    causal.eval()  # draws no numbers
    try:
        with torch.no_grad(), losses_for_logits(causal, token, compared, loss):
            causal(input_ids=token)
    finally:
        causal.train(training)


def losses(
    hidden: torch.Tensor, targets: torch.Tensor, _: LogitsOf | None = None, *, causal: Any, loss: str
) -> torch.Tensor:
    """Sums of the cross entropies of each example in nats, or in training that of all of them.

    Args:
        hidden: the decoder's output, of shape (examples, length, width).
        targets: the next tokens, int64 of shape (examples, length).
        causal: the model.
        loss: whose kernel.
    """
    head, summed = causal.get_output_embeddings(), KERNELS[loss]
    hidden = hidden.to(head.weight.dtype)  # autocast computes norms in fp32
    if torch.is_grad_enabled():
        return summed(hidden.flatten(0, 1), head.weight, targets.flatten(), head.bias)
    examples = zip(hidden, targets, strict=True)
    return torch.stack([summed(example, head.weight, wanted, head.bias) for example, wanted in examples])


def _liger(
    inputs: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as losses_of

    summed: torch.Tensor = losses_of(inputs, weight, targets, bias, ignore_index=IGNORED, reduction="sum")
    return summed


def _cce(inputs: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    from cut_cross_entropy import cce
    from cut_cross_entropy import linear_cross_entropy as losses_of

    # Patches cut-cross-entropy (25.1), which compiles a sort of the vocabulary: under the tracker of memory torch's
    # compiler fails. Not needed once that is an option of it.
    cce.sort_logit_avg = inspect.unwrap(cce.sort_logit_avg)
    # It leaves out what 16 bit cannot add to a gradient.
    summed: torch.Tensor = losses_of(inputs, weight, targets, ignore_index=IGNORED, reduction="sum", filter_eps="auto")
    return summed


KERNELS: dict[str, Kernel] = {"liger": _liger, "cce": _cce}
"""Sums over the positions whose target is not `IGNORED`, by losses."""
