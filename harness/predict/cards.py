"""Memory and rates of common cards, to predict for a card before renting it. No torch, no driver."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

from harness._util.units import GIB, MIB
from harness.predict.roofline import Rates

Capability = tuple[int, int]
"""Compute capability: what kernels a card has depends on it."""
TURING: Capability = (7, 5)
AMPERE: Capability = (8, 0)
HOPPER: Capability = (9, 0)
CONTEXT_BYTES = 512 * MIB
"""Memory of a process outside torch's allocator, the CUDA context, where a card's is not known: published ones take
0.14 to 0.52 GiB."""
_BEFORE_AMPERE = re.compile(r"\b(GTX|RTX 20\d\d|Quadro|TITAN|Tesla [MPVT]\d+|[MPVT]\d{1,4})\b", re.IGNORECASE)
"""In the names of cards without kernels for attention in bf16, whose scores are then in memory."""
_RESERVE = 512 * MIB
"""What the driver keeps of a card that is not listed: 0.1 to 0.8 GiB of those that are."""


@dataclass(frozen=True)
class Card:
    """What of a card decides the memory of a step on it."""

    device: str
    """The part of the driver's name for it that tells it from others: RTX 4090 of NVIDIA GeForce RTX 4090."""
    capability: Capability
    """Compute capability."""
    driver_bytes: int
    """Total memory as the driver reports it (nvidia-smi, NVML). Less than advertised where error correction takes a
    part."""
    torch_bytes: int
    """Total memory as torch reports it (`get_device_properties`, `mem_get_info`): what processes can have."""
    context_bytes: int = CONTEXT_BYTES
    """Memory that the context of a process takes."""

    @property
    def capacity(self) -> int:
        """Bytes that torch's allocator may take, where no other process has any."""
        return self.torch_bytes - self.context_bytes


def _card(device: str, capability: Capability, driver: int, torch: int, context: int | None = None) -> Card:
    """A card from figures in MiB."""
    context_bytes = CONTEXT_BYTES if context is None else context * MIB
    return Card(device, capability, driver * MIB, torch * MIB, context_bytes)


# Third column: nvidia-smi. Fourth: torch, on Linux, from logs and messages of OutOfMemoryError that people published.
# Drivers since 2024 keep 70 to 190 MiB more than older ones; the lower figures stand here. On Windows torch reports
# nearly all of the third, and a display takes its part.
CARDS: dict[str, Card] = {
    "p100": _card("P100", (6, 0), 16384, 16269),
    "v100-16": _card("V100", (7, 0), 16384, 16144),
    "v100-32": _card("V100", (7, 0), 32768, 32494),
    "t4": _card("T4", (7, 5), 15360, 14912, context=141),  # measured on one
    "rtx2080ti": _card("RTX 2080 Ti", (7, 5), 11264, 10825),
    "a100-40": _card("A100", (8, 0), 40960, 40441),
    "a100-80": _card("A100", (8, 0), 81920, 81152),
    "rtx3060": _card("RTX 3060", (8, 6), 12288, 11910),
    "rtx3080": _card("RTX 3080", (8, 6), 10240, 9877),  # 10009 with older drivers, less what the RTX 3060 lost
    "rtx3080ti": _card("RTX 3080 Ti", (8, 6), 12288, 11910),
    # github.com/invoke-ai/InvokeAI/issues/9413: an idle context, torch 2.7.1 for CUDA 12.8. The 3090 Ti has its chip.
    "rtx3090": _card("RTX 3090", (8, 6), 24576, 24139, context=256),
    "rtx3090ti": _card("RTX 3090 Ti", (8, 6), 24564, 24142, context=256),
    "a10": _card("A10", (8, 6), 23028, 22587),
    "a10g": _card("A10G", (8, 6), 23028, 22587),
    "a40": _card("A40", (8, 6), 46068, 45416),
    "a6000": _card("RTX A6000", (8, 6), 49140, 48538),
    "rtx4060ti-16": _card("RTX 4060 Ti", (8, 9), 16380, 15944),
    "rtx4070": _card("RTX 4070", (8, 9), 12282, 11872),  # 12002 with older drivers, less what the RTX 4090 lost
    "rtx4070ti-super": _card("RTX 4070 Ti SUPER", (8, 9), 16376, 15944),  # as the RTX 4080 SUPER
    "rtx4080": _card("RTX 4080", (8, 9), 16376, 15944),
    "rtx4090": _card("RTX 4090", (8, 9), 24564, 24081),
    "l4": _card("L4", (8, 9), 23034, 22563),
    "l40s": _card("L40S", (8, 9), 46068, 45455),
    # github.com/unslothai/unsloth-zoo/pull/1053: after mem_get_info, torch 2.10 for CUDA 13.0.
    "rtx6000-ada": _card("RTX 6000 Ada", (8, 9), 49140, 48497, context=426),
    "h100": _card("H100", (9, 0), 81559, 81082),
    "h100-nvl": _card("H100 NVL", (9, 0), 95830, 95320),
    "h200": _card("H200", (9, 0), 143771, 143156),
    "gh200": _card("GH200", (9, 0), 97871, 96768),
    "b200": _card("B200", (10, 0), 183359, 182630),
    "rtx5080": _card("RTX 5080", (12, 0), 16303, 15840),
    "rtx5090": _card("RTX 5090", (12, 0), 32607, 32102),
    "rtx-pro-6000": _card("RTX PRO 6000", (12, 0), 97887, 97249),
}
DEFAULT_CARD = CARDS["h100"]
"""A card for `cuda` without a name: one with the larger workspaces, so that a prediction is not too low."""
_CALL_SECONDS = 6e-6
"""Host time of one operation of an eager step; a few microseconds on current hosts."""


def _sheet(
    fp32: float, tf32: float | None, bf16: float | None, fp16: float, int8: float, bandwidth: float
) -> Rates:  # fmt: skip
    """Rates from TFLOP/s and GB/s."""
    flops = {"float32": fp32, "tf32": tf32, "bfloat16": bf16, "float16": fp16, "int8": int8}
    return Rates(
        flops_per_second={name: rate * 1e12 for name, rate in flops.items() if rate is not None},
        bytes_per_second=bandwidth * 1e9,
        call_seconds=_CALL_SECONDS,
        concurrent=True,
    )


# NVIDIA's data sheets: dense matrix products, accumulated in fp32 (int32 for int8); SXM where there are several form
# factors. Turing has no TensorFloat-32 and no bf16.
RATES: dict[str, Rates] = {
    "t4": _sheet(8.1, None, None, 65, 130, 320),
    "rtx3090": _sheet(35.6, 35.6, 71, 71, 284, 936),
    "rtx4090": _sheet(82.6, 82.6, 165.2, 165.2, 660.6, 1008),
    "a10": _sheet(31.2, 62.5, 125, 125, 250, 600),
    "l4": _sheet(30.3, 60, 121, 121, 242, 300),
    "l40s": _sheet(91.6, 183, 362, 362, 733, 864),
    "a100-40": _sheet(19.5, 156, 312, 312, 624, 1555),
    "a100-80": _sheet(19.5, 156, 312, 312, 624, 2039),
    "h100": _sheet(67, 494.7, 989.5, 989.5, 1979, 3350),
    "h200": _sheet(67, 494.7, 989.5, 989.5, 1979, 4800),
}


def generation(capability: Capability) -> Capability:
    """The least of a generation, whose cards hold the same in a step."""
    return max((each for each in (AMPERE, HOPPER) if each <= capability), default=TURING)


def named(card: str) -> Card:
    """A card by its name here, or by the driver's.

    Raises:
        ValueError: unknown card; the message suggests others only where the name is the beginning of theirs.
    """
    return CARDS[key_of(card)]


def capacity(card: str) -> int:
    """Bytes of a card that torch's allocator may take.

    Raises:
        ValueError: as `named`.
    """
    return named(card).capacity


_LEFT_OUT = re.compile(r"^(nvidia|geforce|tesla|pcie|sxm\d*|hbm\d\w*|generation|blackwell|workstation|server|edition)$")
"""Words of the driver's names that tell no card of this list from another."""


def key_of(name: str) -> str:
    """The name here of a card that is given by it or by the driver's name, like NVIDIA A100-SXM4-80GB.

    Raises:
        ValueError: as `named`.
    """
    words = [re.sub(r"(?<=\d)gb$", "", word) for word in re.split(r"[\s_-]+", name.lower())]
    given = "".join(word for word in words if not _LEFT_OUT.match(word))
    if not given:
        raise ValueError(f"{name!r} names no card; give one, like rtx4090 or a100-80")
    if given in (exact := _by_name()):
        return exact[given]
    alike = [key for key in CARDS if given in _beginnings(key)]
    if alike:
        raise ValueError(f"unknown card {name!r}; did you mean {' or '.join(alike)}?")
    raise ValueError(
        f"card {name!r} is not listed; give its memory instead (--memory 8GiB --device cuda), or one of "
        f"{', '.join(CARDS)}"
    )


@functools.cache
def _by_name() -> dict[str, str]:
    """Names without spaces and hyphens: those here, and the driver's where one card has it, alone or with the
    memory.
    """
    names = {}
    for key, card in CARDS.items():
        device = card.device.lower().replace(" ", "")
        if sum(other.device == card.device for other in CARDS.values()) == 1 and not _is_one_of_several(key, card):
            names[device] = key
        # What is advertised lies between the driver's bytes in GiB and in GB: 141 GB of an H200, 24 of an L4.
        for size in range(round(card.driver_bytes / GIB), round(card.driver_bytes / 1e9) + 1):
            names[f"{device}{size}"] = key
    names["gh200480"] = "gh200"  # the driver names it by the memory of its processor
    return names | {key.replace("-", ""): key for key in CARDS}


def _is_one_of_several(key: str, card: Card) -> bool:
    """Whether a card's name here has its memory, since another version has the same name: RTX 4060 Ti of 8 GB."""
    return key.endswith(f"-{round(card.driver_bytes / GIB)}")


def _beginnings(key: str) -> list[str]:
    """A name's first words, without hyphens; none where the last word makes it another model."""
    words = key.split("-")
    return [] if words[-1] == "super" else ["".join(words[:count]) for count in range(1, len(words))]


def of_device(name: str, driver_bytes: int) -> Card:
    """The card that the driver calls by a name and gives so many bytes: a listed one, else the default with that
    memory.

    Laptop versions, and parts of a card, have the name of a listed one and other memory; they are not listed.
    """
    words = f" {name.replace('-', ' ').lower()} "
    alike = [card for card in CARDS.values() if f" {card.device.lower()} " in words]
    alike = [card for card in alike if abs(card.driver_bytes - driver_bytes) <= 0.03 * card.driver_bytes]
    if alike:
        return max(alike, key=lambda card: len(card.device))
    usable = driver_bytes - _RESERVE
    capability = TURING if _BEFORE_AMPERE.search(name) else DEFAULT_CARD.capability
    return replace(
        DEFAULT_CARD,
        device=name,
        capability=capability,
        driver_bytes=driver_bytes,
        torch_bytes=usable,
        context_bytes=CONTEXT_BYTES,
    )
