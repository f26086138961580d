"""What a spec asks for that one kind of device alone has."""

from __future__ import annotations

from harness.environment import DeviceType
from harness.errors import InputError
from harness.spec.keys import FUSED_LOSSES
from harness.spec.trial import TrialSpec


def refuse_on(spec: TrialSpec, device_type: DeviceType) -> None:
    """Check that a kind of device can do what a spec says.

    Raises:
        InputError: it cannot.
    """
    if device_type == "cuda":
        return
    if spec.checkpoint_offload and spec.gradient_checkpointing:
        raise InputError(
            "checkpoint_offload on a CPU: its activations are in the memory of the host already; use "
            "checkpoint_offload: false, or device: cuda"
        )
    if spec.loss in FUSED_LOSSES:
        raise InputError(
            f"loss {spec.loss} on a CPU: its kernels are of CUDA cards; use loss: chunked, or device: cuda"
        )
    if spec.attention == "flex_attention":
        raise InputError(
            "attention flex_attention on a CPU: torch has no gradient of it there; use attention: sdpa, or device: cuda"
        )
