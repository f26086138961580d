"""Memory and rates of common cards, to predict for a card before renting it. No torch, no driver."""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness._util.messages import unknown
from harness._util.units import GIB, MIB
from harness.predict.roofline import Rates

Capability = tuple[int, int]
"""Compute capability: what kernels a card has depends on it."""
VOLTA: Capability = (7, 0)
TURING: Capability = (7, 5)
AMPERE: Capability = (8, 0)
HOPPER: Capability = (9, 0)
BLACKWELL: Capability = (10, 0)
CONTEXT_BYTES = 512 * MIB
"""Memory of a process on a card outside torch's allocator where nothing is known of the card: the CUDA context and its
loaded kernels, 0.1 to 0.5 GiB."""


@dataclass(frozen=True)
class Card:
    """What a prediction depends on."""

    memory_bytes: int
    """As torch reports it: less than advertised, and less than nvidia-smi shows."""
    capability: Capability
    context_bytes: int = CONTEXT_BYTES
    """Of a process, outside torch's allocator."""


def _card(gib: float, capability: Capability, **others: int) -> Card:
    return Card(int(gib * GIB), capability, **others)


# What torch reports, from its messages on running out of memory in public issue threads; the least where machines
# differ (error correction, firmware). The T4's context is that of fitcheck's measurements (0.3.1).
CARDS: dict[str, Card] = {
    "p100": _card(15.89, (6, 0)),
    "v100-16": _card(15.77, VOLTA),
    "v100-32": _card(31.73, VOLTA),
    "t4": Card(14912 * MIB, TURING, context_bytes=141 * MIB),
    "rtx2080ti": _card(10.75, TURING),
    "rtx3060": _card(11.75, AMPERE),
    "rtx3080": _card(9.76, AMPERE),
    "rtx3090": _card(23.69, AMPERE),
    "a10": _card(21.98, AMPERE),
    "a40": _card(44.34, AMPERE),
    "a6000": _card(47.38, AMPERE),
    "a100-40": _card(39.39, AMPERE),
    "a100-80": _card(79.15, AMPERE),
    "rtx4060ti-16": _card(15.58, AMPERE),
    "rtx4070": _card(11.72, AMPERE),
    "rtx4080": _card(15.69, AMPERE),
    "rtx4090": _card(23.64, AMPERE),
    "l4": _card(21.95, AMPERE),
    "l40s": _card(44.39, AMPERE),
    "h100": _card(79.10, HOPPER),
    "h200": _card(139.72, HOPPER),
    "b200": _card(178.35, BLACKWELL),
    "rtx5090": _card(31.35, BLACKWELL),
}
_CALL_SECONDS = 6e-6
"""Host time of one operation of an eager step; a few microseconds on current hosts."""


def _sheet(fp32: float, bf16: float | None, fp16: float, int8: float, bandwidth: float) -> Rates:
    """Rates from TFLOP/s and GB/s."""
    flops = {"float32": fp32, "bfloat16": bf16, "float16": fp16, "int8": int8}
    return Rates(
        flops_per_second={name: rate * 1e12 for name, rate in flops.items() if rate is not None},
        bytes_per_second=bandwidth * 1e9,
        call_seconds=_CALL_SECONDS,
        concurrent=True,
    )


# NVIDIA's data sheets: dense matrix products, accumulated in fp32 (int32 for int8), fp32 without TF32; SXM where there
# are several form factors.
RATES: dict[str, Rates] = {
    "t4": _sheet(8.1, None, 65, 130, 320),
    "rtx3090": _sheet(35.6, 71, 71, 284, 936),
    "rtx4090": _sheet(82.6, 165.2, 165.2, 660.6, 1008),
    "a10": _sheet(31.2, 125, 125, 250, 600),
    "l4": _sheet(30.3, 121, 121, 242, 300),
    "l40s": _sheet(91.6, 362, 362, 733, 864),
    "a100-40": _sheet(19.5, 312, 312, 624, 1555),
    "a100-80": _sheet(19.5, 312, 312, 624, 2039),
    "h100": _sheet(67, 989.5, 989.5, 1979, 3350),
    "h200": _sheet(67, 989.5, 989.5, 1979, 4800),
}


def capacity(name: str) -> int:
    """Bytes of a card that torch's allocator may take.

    Raises:
        ValueError: unknown card; the message suggests the nearest name.
    """
    if name not in CARDS:
        raise ValueError(unknown("card", name, CARDS))
    return CARDS[name].memory_bytes - CARDS[name].context_bytes


def generation(capability: Capability) -> Capability:
    """The least of a generation whose cards hold the same in a step."""
    return max((each for each in (AMPERE, HOPPER) if each <= capability), default=TURING)


def of_device(device_name: str, memory_bytes: int) -> Card:
    """The card of that name, as the driver gives it, like `NVIDIA A100-SXM4-80GB`; of an unknown one what is common.

    Args:
        device_name: of the driver.
        memory_bytes: that it has.
    """
    squashed = "".join(filter(str.isalnum, device_name.lower()))
    models = {name: name.partition("-")[0] for name in CARDS}
    # The longest name: `a10` is in `a100`. Of those with several sizes, the nearest.
    fitting = sorted(
        (name for name, model in models.items() if model in squashed),
        key=lambda name: (-len(models[name]), abs(CARDS[name].memory_bytes - memory_bytes)),
    )
    known = CARDS[fitting[0]] if fitting else Card(memory_bytes, AMPERE)
    return replace(known, memory_bytes=min(known.memory_bytes, memory_bytes))
