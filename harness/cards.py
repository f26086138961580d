"""Memory and rates of common cards, so that a plan can be made before one is rented. No torch, no driver."""

from __future__ import annotations

from harness.roofline import Rates
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


_CALL_SECONDS = 6e-6
"""What an operation of an eager step costs the host, of a few microseconds on current ones."""


def _sheet(fp32: float, bf16: float | None, fp16: float, int8: float, bandwidth: float) -> Rates:
    """Rates from TFLOP/s and GB/s."""
    given = {"float32": fp32, "bfloat16": bf16, "float16": fp16, "int8": int8}
    return Rates(
        flops_per_second={name: rate * 1e12 for name, rate in given.items() if rate is not None},
        bytes_per_second=bandwidth * 1e9,
        call_seconds=_CALL_SECONDS,
        concurrent=True,
    )


# NVIDIA's data sheets: products of dense matrices, sums in fp32 (int32 for int8), fp32 without TF32; SXM where there
# are several forms.
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


def available(card: str) -> int:
    """Bytes of a card that torch's allocator may have.

    Raises:
        ValueError: the card is not known; the nearest name is given.
    """
    if card not in CARDS:
        raise ValueError(unknown("card", card, CARDS))
    return CARDS[card] - CONTEXT_BYTES
