"""Memory and rates of common cards, to predict for a card before renting it. No torch, no driver."""

from __future__ import annotations

from harness._util.messages import unknown
from harness._util.units import MIB
from harness.predict.roofline import Rates

# Total memory as the driver reports it (nvidia-smi). Less than advertised where error correction or firmware reserves a
# part.
CARDS: dict[str, int] = {
    "t4": 15360 * MIB,
    "rtx3060": 12288 * MIB,
    "rtx4060ti-16": 16380 * MIB,
    "rtx4080": 16376 * MIB,
    "a10": 23028 * MIB,
    "l4": 23034 * MIB,
    "rtx3090": 24576 * MIB,
    "rtx4090": 24564 * MIB,
    "rtx5090": 32607 * MIB,
    "a100-40": 40960 * MIB,
    "l40s": 46068 * MIB,
    "a6000": 49140 * MIB,
    "a100-80": 81920 * MIB,
    "h100": 81559 * MIB,
    "h200": 143771 * MIB,
}
CONTEXT_BYTES = 512 * MIB
"""Memory of a process on a card outside torch's allocator: the CUDA context and its loaded modules, 0.3 to 0.5 GiB."""
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


def capacity(card: str) -> int:
    """Bytes of a card that torch's allocator may use.

    Raises:
        ValueError: unknown card; the message suggests the nearest name.
    """
    if card not in CARDS:
        raise ValueError(unknown("card", card, CARDS))
    return CARDS[card] - CONTEXT_BYTES
