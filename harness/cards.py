"""Memory of common cards, so that a plan can be made before one is rented. No torch, no driver."""

from __future__ import annotations

from harness.wording import unknown

_MIB = 2**20

# What the driver reports as the card's total (nvidia-smi), which is less than the figure it is sold by where error
# correction or the firmware keeps a part.
CARDS: dict[str, int] = {
    "t4": 15360 * _MIB,
    "rtx3060": 12288 * _MIB,
    "rtx4060ti-16": 16380 * _MIB,
    "rtx4080": 16376 * _MIB,
    "a10": 23028 * _MIB,
    "l4": 23034 * _MIB,
    "rtx3090": 24576 * _MIB,
    "rtx4090": 24564 * _MIB,
    "rtx5090": 32607 * _MIB,
    "a100-40": 40960 * _MIB,
    "l40s": 46068 * _MIB,
    "a6000": 49140 * _MIB,
    "a100-80": 81920 * _MIB,
    "h100": 81559 * _MIB,
    "h200": 143771 * _MIB,
}

CONTEXT_BYTES = 512 * _MIB
"""What a process keeps on a card outside torch's allocator: the CUDA context and the modules loaded into it, 0.3 to
0.5 GiB."""


def available(card: str) -> int:
    """Bytes of a card that torch's allocator may have.

    Raises:
        ValueError: the card is not known; the nearest name is given.
    """
    if card not in CARDS:
        raise ValueError(unknown("card", card, CARDS))
    return CARDS[card] - CONTEXT_BYTES
