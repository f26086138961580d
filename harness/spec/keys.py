"""Types of the values that keys of a trial take: names of formats, optimizers and schedules, patterns of layers."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, StrictStr

from harness._util.messages import unknown
from harness.spec.datasets import Line

Precision = Literal["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed", "int8", "int4", "nf4", "fp4"]
QUANTISED: frozenset[str] = frozenset({"int8", "int4", "nf4", "fp4"})
FORMATS: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("int8", "nf4", "fp4"),
    "torchao": ("int8",),
    "hqq": ("int8", "int4"),
}
"""Quantised precisions by the library that has them. peft (0.21) puts no adapters on torchao's 4-bit weights."""
Quantizer = Literal["bitsandbytes", "torchao", "hqq"]
_OF_CARDS = {"fp8": "8.9", "nvfp4": "10.0"}
"""Formats whose products are of cards alone, with the lowest compute capability that has them."""

FUSED_LOSSES: dict[str, str] = {"liger": "liger-kernel", "cce": "cut-cross-entropy"}
"""Losses that kernels of packages take, for CUDA cards, with the packages."""

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "adamw_torch_4bit",
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit",
    "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    "sgd", "adagrad", "adafactor", "muon", "lora_fa",
    "stable_adamw", "schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd", "galore_adamw", "apollo_adamw",
]  # fmt: skip
SCHEDULE_FREE_OPTIMIZERS: frozenset[str] = frozenset(
    {"schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"}
)
"""Those that train at a constant rate, whatever the schedule, and whose weights to evaluate are averages."""
WARMING_UP_OPTIMIZERS: frozenset[str] = frozenset({"schedule_free_adamw", "schedule_free_sgd"})
"""Those that warm up themselves over as many steps as they are told. RAdam's warm-up follows from its betas."""
LOW_RANK_OPTIMIZERS: frozenset[str] = frozenset({"galore_adamw", "apollo_adamw"})
"""Those whose state is of projections of the gradients of matrices."""

TORCHAO_OPTIMIZERS: frozenset[str] = frozenset({"adamw_torch_8bit", "adamw_torch_4bit"})
"""Those of torchao, whose state is of 8 or 4 bits."""

SHARDED_OPTIMIZERS: frozenset[str] = frozenset({"adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"})
"""Those of torch, which update a shard as they do a whole weight."""

WITHOUT_BETAS: frozenset[str] = frozenset(
    {
        *("sgd", "adagrad", "adafactor", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
        "schedule_free_sgd",
    }
)
"""Those that are not told Adam's decay rates of moments, nor its epsilon: some have others of their own."""
WITHOUT_EPSILON: frozenset[str] = WITHOUT_BETAS | {"lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"}
"""Those that are not told Adam's epsilon."""

Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]  # fmt: skip


def refuse_format_of_cards(precision: object) -> object:
    """Hand on a precision, unless it is one that is known and not measured.

    Raises:
        ValueError: it is fp8 or nvfp4.
    """
    if isinstance(precision, str) and precision in _OF_CARDS:
        raise ValueError(
            f"{precision} is of cards of compute capability {_OF_CARDS[precision]} or newer, and is not measured here; "
            "use bf16, or int8, int4 or nf4 for less memory"
        )
    return precision


def check_format(precision: str, quantizer: str) -> None:
    """Check that a quantizer has a precision.

    Raises:
        ValueError: it is a format of other quantizers.
    """
    if precision in QUANTISED and precision not in FORMATS[quantizer]:
        others = [name for name, formats in FORMATS.items() if precision in formats]
        raise ValueError(
            f"precision {precision} with quantizer {quantizer}, which has {' and '.join(FORMATS[quantizer])}: "
            f"use that, or quantizer: {' or '.join(others)}"
        )


OWN_TEMPLATE = "own"
"""Value of `chat_template`: the model's own, which it must have."""
ChatTemplate = Annotated[StrictStr, Field(min_length=1, max_length=20_000)]
TokenRole = Literal["bos_token", "eos_token", "pad_token", "unk_token"]
SpecialTokens = tuple[tuple[TokenRole, Line], ...]


ALL_LINEAR = "all-linear"
"""What `lora_target_modules` accepts in place of `lora_target_linear: true`."""


def is_pattern(target: str) -> bool:
    """Whether an entry of `lora_target_modules` is a regular expression, not a name like `q_proj` or `0.mlp.fc1`."""
    return re.fullmatch(r"[\w.-]+", target) is None


def check_pattern(text: str, *, alone: bool) -> None:
    """Check an entry of `lora_target_modules` that is no name.

    Raises:
        ValueError: it is no regular expression, or does not stand alone.
    """
    if not alone:
        raise ValueError(f"{text!r} is no name of a layer; a regular expression stands alone, without a list")
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{text!r} is neither a name of a layer nor a regular expression ({error})") from None


FULL, LORA = "none", "lora"
ADAPTERS: tuple[str, ...] = (
    "lora", "adalora", "adamss", "adaption_prompt", "beft", "boft", "c3a", "cartridge", "cpt", "deft", "delora",
    "fourierft", "frod", "glora", "gralora", "hira", "hra", "ia3", "lily", "ln_tuning", "loha", "lokr", "miss", "oft",
    "osf", "p_tuning", "peanut", "prefix_tuning", "prompt_tuning", "psoft", "pvera", "randlora", "road", "shira",
    "supertuning", "tinylora", "trainable_tokens", "unilora", "vblora", "vera", "waveft",
)  # fmt: skip
"""Methods of peft (0.21) that train a causal language model by its text alone."""
_OTHER_ADAPTERS = {
    "multitask_prompt_tuning": "it trains on several tasks that are told apart",
    "poly": "it trains on several tasks that are told apart",
    "shadow": "it trains a second model next to the base",
    "xlora": "it mixes adapters that were trained before",
}
"""Methods of peft that need more than a text, with the reason."""


@functools.cache
def _later_adapters() -> frozenset[str]:
    """Methods that a later peft has. Read from its source: importing it takes seconds."""
    spec = importlib.util.find_spec("peft")
    types = Path(spec.origin).with_name("utils") / "peft_types.py" if spec is not None and spec.origin else None
    if types is None or not types.is_file():
        return frozenset()
    return frozenset(name.lower() for name in re.findall(r'^    ([A-Z\d_]+) = "\1"$', types.read_text("utf-8"), re.M))


def check_adapter(name: str) -> str:
    """Hand on the name of a method of peft, or `none`.

    Raises:
        ValueError: there is none of that name, or it cannot be trained on texts alone.
    """
    if name in (FULL, *ADAPTERS) or (name in _later_adapters() and name not in _OTHER_ADAPTERS):
        return name
    if name in _OTHER_ADAPTERS:
        raise ValueError(f"{name} is not trained here: {_OTHER_ADAPTERS[name]}; `harness methods` lists those that are")
    raise ValueError(unknown("adapter", name, (FULL, *ADAPTERS), _methods_near(name)))


def _methods_near(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), ADAPTERS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use {LORA} or {FULL}"
    return f"; {hint} (`harness methods` lists all)"


Adapter = Annotated[StrictStr, AfterValidator(check_adapter)]


def _as_pairs(options: object) -> object:
    """A mapping as pairs in the order of their names, so that equal options make equal trials; null if it is empty.

    Raises:
        ValueError: it is neither a mapping of names nor such pairs.
    """
    if options is None:
        return None
    pairs = list(options.items()) if isinstance(options, Mapping) else options
    if not isinstance(pairs, list | tuple) or not all(_is_pair(each) for each in pairs):
        raise ValueError(f"{options!r} is no mapping of names to values, like {{r: 8, alpha: 16}}")
    return tuple(sorted(dict(pairs).items())) or None


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)


AdapterOptions = Annotated[tuple[tuple[StrictStr, JsonValue], ...] | None, BeforeValidator(_as_pairs)]

INITIALISATIONS = ("default", "gaussian", "orthogonal", "pissa", "olora", "mica", "eva", "corda", "loftq")
OF_UNQUANTISED = ("pissa", "mica", "corda")
"""Those that take parts of weights that are not quantised."""
INITIALISED_LATER = frozenset({"eva", "corda", "loftq"})
"""Those that take more than a layer and its weights: passes over data, or the weights before they were quantised."""
_OTHER_INITIALISATIONS = {"lora_ga": "it needs gradients of passes over the data, which are not made here; use eva"}
_PISSA_ROUNDS = re.compile(r"pissa_niter_[1-9]\d?")


def _check_initialisation(name: Any) -> Any:
    """Hand on a way to begin LoRA's matrices; `true` is peft's name of its default.

    Raises:
        ValueError: there is none of that name.
    """
    name = "default" if name is True else name
    if not isinstance(name, str | bool):
        raise ValueError(f"{name!r} is not the name of one; use {', '.join(INITIALISATIONS)}, or pissa_niter_4")
    if name in INITIALISATIONS or (isinstance(name, str) and _PISSA_ROUNDS.fullmatch(name)):
        return name
    if name in _OTHER_INITIALISATIONS:
        raise ValueError(f"{name}: {_OTHER_INITIALISATIONS[name]}")
    near = difflib.get_close_matches(str(name).lower(), INITIALISATIONS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"{name!r} is unknown; {hint}use {', '.join(INITIALISATIONS)}, or pissa_niter_4")


Initialisation = Annotated[StrictStr, BeforeValidator(_check_initialisation)]
RateRatio = Annotated[float, Field(strict=True, ge=1)]
Noise = Annotated[float, Field(strict=True, gt=0)]
UnitInterval = Annotated[float, Field(strict=True, ge=0, lt=1)]
