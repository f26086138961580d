"""Sizes at which adapters are as large as the baseline's: as many trained parameters, or as high a predicted peak.

A method's size is a whole number (rank, block, tokens), and the figure rises or falls with it; the size whose figure
comes nearest is found by building the model without values, or by predicting its peak, a few times.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from harness.environment import resolve_device
from harness.errors import InputError
from harness.grids.document import Match
from harness.predict import peak
from harness.spec.keys import FULL, LORA
from harness.spec.trial import TrialSpec
from harness.training import adapter_targets, model

_RANKS = dict.fromkeys(
    ("loha", "lokr", "delora", "deft", "glora", "gralora", "hira", "hra", "lily", "miss", "peanut", "psoft", "pvera",
     "randlora", "tinylora", "vera", "adamss"),
    "r",
)  # fmt: skip
_SIZES = _RANKS | {
    LORA: "lora_r",
    "adalora": "init_r",
    "adaption_prompt": "adapter_len",
    "boft": "boft_block_size",
    "c3a": "block_size",
    "cartridge": "num_virtual_tokens",
    "fourierft": "n_frequency",
    "oft": "oft_block_size",
    "osf": "effective_rank",
    "p_tuning": "num_virtual_tokens",
    "prefix_tuning": "num_virtual_tokens",
    "prompt_tuning": "num_virtual_tokens",
    "unilora": "theta_d_length",
    "vblora": "num_vectors",
    "waveft": "n_frequency",
}
"""The option that is a method's size; `lora_r` is a key. Other methods have one size alone, or their models cannot be
built without values."""
_BLOCKS = frozenset({"boft", "c3a", "oft"})
"""Methods whose size divides the widths of layers."""
_UNKNOWN = (NotImplementedError, peak.Unpredictable)
"""What is raised where a figure is not known without values."""
_POWERS = 10
"""Powers of four that are tried, the first of which is 1."""
_NEAREST = 8
"""Sizes that are tried where the one that is aimed at does not go with the layers."""
_SURELY = 64
"""Size up to which all of them are."""
_TARGET_OF_ADALORA = 2 / 3
"""`target_r` as a part of `init_r`, as in peft's defaults (8 of 12)."""


class Matched(NamedTuple):
    """A spec at the size that comes nearest."""

    spec: TrialSpec
    size: str
    """Of the adapter, like `r 8`; empty where the method has no sizes."""
    ratio: float | None
    """Its figure as a multiple of the baseline's; null: it is not known before it is measured."""


def match(
    trials: Iterable[tuple[str, TrialSpec]], baseline: TrialSpec, figure: Match, *, trust_remote_code: bool = False
) -> list[Matched]:
    """Each spec at the size whose figure comes nearest to the baseline's.

    Args:
        trials: label and spec of each, with adapters.
        baseline: whose figure is wanted.
        figure: which.
        trust_remote_code: let models from the hub run their own code.

    Raises:
        InputError: a model cannot be built; the trial is named.
    """

    def measure(spec: TrialSpec) -> int:
        if figure == "peak_memory_bytes":
            device_type = resolve_device(spec.device)
            return peak.predict(spec, device_type, trust_remote_code=trust_remote_code).peak_memory_bytes
        network = model.skeleton(spec, trust_remote_code=trust_remote_code)
        return sum(parameter.numel() for parameter in model.trainable(network))

    wanted = measure(baseline)
    blocks = functools.cache(lambda: _common_divisors(baseline, trust_remote_code))
    matched = []
    for label, spec in trials:
        try:
            matched.append(_nearest(spec, wanted, measure, blocks))
        except InputError as error:
            raise InputError(f"{label}: {error}") from None
    return matched


def _common_divisors(spec: TrialSpec, trust_remote_code: bool) -> list[int]:
    """Of the widths of all linear layers but the head."""
    base = spec.model_copy(update={"adapter": FULL, "adapter_options": None})
    network = model.skeleton(base, trust_remote_code=trust_remote_code)
    linear = [network.get_submodule(name) for name in adapter_targets.linear_names(network)]
    common = math.gcd(*(width for each in linear for width in each.weight.shape))
    return [size for size in range(1, common + 1) if common % size == 0]


def _nearest(
    spec: TrialSpec, wanted: int, measure: Callable[[TrialSpec], int], blocks: Callable[[], list[int]]
) -> Matched:
    if spec.adapter not in _SIZES:
        try:
            return Matched(spec, "", measure(spec) / wanted)
        except _UNKNOWN:
            return Matched(spec, "", None)

    @functools.cache
    def at(size: int) -> float | None:
        """The figure at a size as a multiple of what is wanted; null: the layers do not take the size."""
        try:
            return measure(_sized(spec, size)) / wanted or None
        except (InputError, *_UNKNOWN):
            return None

    sizes = blocks() if spec.adapter in _BLOCKS else _approached(at)
    ratios = {size: ratio for size in sizes if (ratio := at(size)) is not None}
    if not ratios:
        with contextlib.suppress(*_UNKNOWN):
            measure(_sized(spec, 1))  # whose refusal says why
        return Matched(spec, "", None)
    size = min(ratios, key=lambda size: (abs(math.log(ratios[size])), size))
    return Matched(_sized(spec, size), f"{_SIZES[spec.adapter]} {size}", ratios[size])


def _approached(at: Callable[[int], float | None]) -> list[int]:
    """Sizes on the way to the nearest one: powers of four until the ratio passes 1, then between the last two of them,
    each where a line through the ratios of both is 1.
    """
    low, tried = 1, [1]
    for high in (4**power for power in range(1, _POWERS)):
        tried.append(high)
        before, after = at(low), at(high)
        if before is not None and after is not None:
            if (before < 1) != (after < 1):
                return tried + _between(at, low, high)
            if high > _SURELY and abs(after - 1) >= abs(before - 1):
                break  # it goes away from 1, or does not depend on the size
        low = low if after is None else high
    return tried


def _between(at: Callable[[int], float | None], low: int, high: int) -> list[int]:
    tried = []
    while high - low > 1:
        before, after = at(low), at(high)
        if before is None or after is None:
            break
        part = (1 - before) / (after - before)
        aimed = min(max(low + round(part * (high - low)), low + 1), high - 1)
        sizes = sorted(range(low + 1, high), key=lambda size: abs(size - aimed))[:_NEAREST]
        size = next((size for size in sizes if at(size) is not None), None)
        if size is None:
            break
        tried.append(size)
        ratio = at(size) or 1.0
        low, high = (low, size) if (ratio < 1) != (before < 1) else (size, high)
    return tried


def _sized(spec: TrialSpec, size: int) -> TrialSpec:
    name = _SIZES[spec.adapter]
    if spec.adapter == LORA:
        return spec.model_copy(update={name: size, "lora_alpha": max(1, round(spec.lora_alpha * size / spec.lora_r))})
    options: dict[str, Any] = dict(spec.adapter_options or ()) | {name: size}
    if spec.adapter == "adalora":
        options["target_r"] = max(1, round(_TARGET_OF_ADALORA * size))
    return spec.model_copy(update={"adapter_options": tuple(sorted(options.items()))})
