"""Figures as people read them, and sizes as they write them."""

from __future__ import annotations

import re

MIB = 2**20
GIB = 2**30
_WITHOUT_UNIT = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT])i?\s*$", re.IGNORECASE)
_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*$", re.IGNORECASE)


def parse_bytes(value: int | str) -> int:
    """``"24GiB"``, ``"500 MB"`` or a plain count of bytes → bytes (GiB = 2**30, GB = 10**9).

    ``"24G"`` is refused: it is GiB to Docker and Slurm and GB to Kubernetes, and the 7 % between them decide what fits.

    Raises:
        ValueError: the text is not a positive size.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is not a size; write it like 24GiB or 500MB")
    if isinstance(value, int):
        size = value
    else:
        if bare := _WITHOUT_UNIT.match(value):
            number, prefix = bare[1], bare[2].upper()
            raise ValueError(f"{value!r} is not a size; write {number}{prefix}iB (powers of 2) or {number}{prefix}B")
        match = _BYTES.match(value)
        if match is None:
            raise ValueError(f"{value!r} is not a size; write it like 24GiB or 500MB")
        number, prefix, binary = match.groups()
        bytes_ = float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")
        size = int(min(bytes_, 2**63))
    if not 0 < size < 2**63:
        raise ValueError(f"{value!r} is not a size that memory can have; write it like 24GiB or 500MB")
    return size


def show_bytes(value: float) -> str:
    """Bytes with a binary unit: 1.50 GiB."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def byte_unit(largest: float) -> tuple[str, float]:
    """The unit for figures up to `largest` bytes that share a column or an axis, and its size in bytes."""
    return ("GiB", float(GIB)) if largest >= 2 * GIB else ("MiB", float(MIB))


def show_count(value: float) -> str:
    """A count with thousands separated: 4,884,480."""
    return f"{value:,.0f}"


def show_seconds(value: float) -> str:
    """Seconds, milliseconds below one: 1.25 s, 80 ms."""
    return f"{value:.2f} s" if abs(value) >= 1 else f"{value * 1000:.0f} ms"


def show_rate(value: float) -> str:
    """Three digits or so: 153, 8.21."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def show_nats(value: float) -> str:
    """Nats: 3.1416."""
    return f"{value:.4f}"


def show_share(value: float) -> str:
    """A percentage: 43%."""
    return f"{value:.0%}"


def show_small_share(value: float) -> str:
    """A percentage of three digits: 3.63%, 0.52%."""
    return f"{100 * value:.3g}%"


def show_scientific(value: float) -> str:
    """4.05e+11."""
    return f"{value:.3g}"


def counted(number: int, noun: str) -> str:
    """A number with what it counts: `1 trial`, `1,024 trials`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
