"""The one table that says what each figure means.

Base units inside (bytes, seconds, nats); `Metric.show` makes the pretty ones. A figure that was
not measured is null.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from harness._util.units import (
    show_bytes,
    show_count,
    show_nats,
    show_rate,
    show_scientific,
    show_seconds,
    show_share,
    show_small_share,
)

COMPONENTS = ("weights", "adapters", "gradients", "optimizer", "activations")
"""What holds memory at the peak; each has its figure, `memory_<component>_bytes`."""


AcrossProcesses = Literal["first", "heaviest", "highest", "sum"]
_NEGLIGIBLE = {"memory": 0.01, "size": 0.01, "speed": 0.02, "loss": 0.01, "text": 0.01, "score": 0.01}


@dataclass(frozen=True)
class Metric:
    """One figure: what it is called, counted in, and means."""

    name: str
    label: str
    """What people read, within a sentence: `peak memory`, `tokens/s`."""
    type: Literal["int", "float"]
    unit: str
    better: Literal["lower", "higher", None]
    group: Literal["memory", "speed", "loss", "size", "text", "score"]
    definition: str
    show: Callable[[float], str]
    exact: bool = False
    """Whether the same trial gives the same figure each time, to the byte: one pair decides a comparison."""
    across_processes: AcrossProcesses = "first"
    """Figure of a trial of several processes: that of the first, of the one with the highest `peak_memory_bytes`
    (heaviest), the highest, or the sum."""

    @property
    def heading(self) -> str:
        """The label as a heading."""
        return self.label[:1].upper() + self.label[1:]

    @property
    def scale(self) -> Literal["ratio", "difference"]:
        """How two of them are compared."""
        return "difference" if self.group in ("loss", "text", "score") else "ratio"

    @property
    def negligible(self) -> float:
        """Effects up to this size are called the same: a share for ratios, nats for differences."""
        return _NEGLIGIBLE[self.group]

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or not self.definition.endswith("."):
            raise ValueError(f"metric {self.name!r} needs a name that is an identifier, and a sentence")


def _bytes(
    name: str,
    label: str,
    definition: str,
    better: Literal["lower", None] = "lower",
    *,
    exact: bool = True,
    across_processes: AcrossProcesses = "first",
) -> Metric:
    return Metric(name, label, "int", "B", better, "memory", definition, show_bytes, exact, across_processes)


def _rate(name: str, label: str, unit: str, definition: str) -> Metric:
    return Metric(name, label, "float", unit, "higher", "speed", definition, show_rate)


def _seconds(name: str, label: str, definition: str) -> Metric:
    return Metric(name, label, "float", "s", "lower", "speed", definition, show_seconds)


def _count(name: str, label: str, definition: str) -> Metric:
    return Metric(name, label, "int", "", None, "size", definition, show_count, exact=True)


def _fraction(name: str, label: str, group: Literal["speed", "size"], definition: str, **more: Any) -> Metric:
    return Metric(name, label, "float", "", None, group, definition, show_share, **more)


def _nats(name: str, label: str, definition: str) -> Metric:
    return Metric(name, label, "float", "nats", "lower", "loss", definition, show_nats)


def _score(name: str, label: str, definition: str) -> Metric:
    return Metric(name, label, "float", "", "higher", "score", definition, show_share)


def _text(name: str, label: str, definition: str, better: Literal["lower", "higher", None]) -> Metric:
    return Metric(name, label, "float", "", better, "text", definition, show_rate)


_TABLE = (
    _bytes(
        "peak_memory_bytes",
        "peak memory",
        "Highest sum of live tensor storage over all training steps, weights and all. CUDA: the allocator's maximum "
        "since the first step; CPU: the live-tensor tracker.",
        across_processes="heaviest",
    ),
    _bytes(
        "peak_load_bytes",
        "peak while loading",
        "The same while loading; null where neither device nor tracker sees it.",
        across_processes="highest",
    ),
    _bytes("peak_evaluate_bytes", "peak while evaluating", "The same while evaluating.", across_processes="highest"),
    _bytes("peak_timed_bytes", "peak while timing", "The same of timed steps.", across_processes="highest"),
    _bytes(
        "peak_reserved_bytes",
        "peak reserved memory",
        "Most that the CUDA allocator held from the driver.",
        exact=False,
        across_processes="highest",
    ),
    _bytes(
        "peak_process_bytes",
        "peak process memory",
        "Most that the process held: driver's figure on CUDA (NVML), peak RSS on a CPU.",
        exact=False,
        across_processes="highest",
    ),
    _bytes(
        "predicted_peak_memory_bytes",
        "predicted peak memory",
        "What was predicted for peak_memory_bytes; null where nothing predicted it.",
        None,
    ),
    _bytes(
        "predicted_reserved_bytes",
        "predicted reserve",
        "What was predicted for peak_reserved_bytes, of the whole trial; null where nothing predicted it.",
        None,
    ),
    _bytes(
        "memory_weights_bytes",
        "weights",
        "Share of the peak held by the base model's weights, quantisation scales included.",
        across_processes="heaviest",
    ),
    _bytes(
        "memory_adapters_bytes", "adapters", "Share of the peak held by adapter weights.", across_processes="heaviest"
    ),
    _bytes(
        "memory_gradients_bytes",
        "gradients",
        "Share of the peak held by accumulated gradients.",
        across_processes="heaviest",
    ),
    _bytes(
        "memory_optimizer_bytes", "optimizer", "Share of the peak held by optimizer state.", across_processes="heaviest"
    ),
    _bytes(
        "memory_activations_bytes",
        "activations",
        "Share of the peak held by everything else: activations and temporaries.",
        across_processes="heaviest",
    ),
    _bytes(
        "oom_reached_bytes",
        "reached before out of memory",
        "Out of memory: bytes held when it happened, a lower bound on the need.",
        None,
    ),
    _bytes("oom_requested_bytes", "requested at out of memory", "Out of memory: bytes asked on top of those.", None),
    _rate(
        "tokens_per_second",
        "tokens/s",
        "tok/s",
        "Non-padding tokens of the timed steps, divided by their seconds. Steps are timed in visits of their own, and "
        "those during which the machine worked for others do not count.",
    ),
    _rate("supervised_tokens_per_second", "supervised tokens/s", "tok/s", "The same for tokens that carry loss."),
    _rate("padded_tokens_per_second", "padded tokens/s", "tok/s", "The same for all positions, padding included."),
    _rate("samples_per_second", "samples/s", "1/s", "Examples of the timed steps, divided by their seconds."),
    _seconds("step_seconds_median", "median step time", "Median of the timed optimizer steps."),
    _seconds(
        "step_seconds_p95", "95th percentile step time", "95th percentile of the timed optimizer steps, interpolated."
    ),
    _seconds(
        "predicted_step_seconds",
        "predicted step time",
        "What was predicted for a timed step of mean length, from the device's measured rates; null without them.",
    ),
    Metric(
        "roofline_share",
        "speed over that at measured rates",
        "float",
        "",
        "higher",
        "speed",
        "Seconds that the operations of a position take at the device's measured matrix rate and bandwidth, each at "
        "the slower of both, times padded_tokens_per_second. No limit: above 1, steps ran faster than those rates.",
        show_share,
    ),
    Metric(
        "flops_per_token",
        "FLOP/token",
        "float",
        "FLOP/tok",
        None,
        "speed",
        "Floating-point operations of the tracked steps, recomputation included, per non-padding token; "
        "counted from matrix products and attention (multiply and add are two).",
        show_scientific,
    ),
    Metric(
        "flops_per_second",
        "FLOP/s",
        "float",
        "FLOP/s",
        "higher",
        "speed",
        "flops_per_token times tokens_per_second.",
        show_scientific,
    ),
    Metric(
        "joules_per_token",
        "energy per token",
        "float",
        "J/tok",
        "lower",
        "speed",
        "Energy of the card over the timed steps (the driver's counter), per non-padding token; null on a CPU, and "
        "where they took less than a second.",
        show_rate,
        across_processes="sum",
    ),
    _fraction(
        "card_clock_share",
        "card clock",
        "speed",
        "Median clock of the card's multiprocessors over the timed steps, divided by their highest.",
    ),
    Metric(
        "card_temperature",
        "card temperature",
        "int",
        "°C",
        None,
        "speed",
        "Highest temperature of the card over the timed steps.",
        show_count,
        across_processes="highest",
    ),
    _fraction(
        "throttled_share",
        "time throttled",
        "speed",
        "Share of the timed steps' looks at the card (five a second) that found its clock held down by heat or power.",
        across_processes="highest",
    ),
    _nats(
        "eval_loss",
        "eval loss",
        "Loss per completion token on the held-out stories after training, weighted by tokens.",
    ),
    _nats(
        "eval_loss_before",
        "eval loss before training",
        "The same before training: the base at this precision, with an adapter as it begins.",
    ),
    _nats(
        "forgetting",
        "forgetting",
        "Loss per token on the bundled general text after training minus the same before, weighted by tokens.",
    ),
    _nats(
        "general_loss_before",
        "general loss before training",
        "Loss per token on the bundled general text before training.",
    ),
    _score(
        "task_score",
        "task score",
        "Share of the questions of evaluate_tasks that are answered rightly after training; of several tasks the mean.",
    ),
    _score("task_score_before", "task score before training", "The same before training."),
    Metric("eval_perplexity", "eval perplexity", "float", "", "lower", "loss", "exp(eval_loss).", show_rate),
    _count("trainable_parameters", "trainable parameters", "Parameters that the optimizer changes."),
    _count("total_parameters", "total parameters", "Parameters of base and adapters, as if unquantised."),
    _fraction(
        "weights_in_format",
        "linear weights in format",
        "size",
        "Weights of the base's linear layers and experts that are in the format of `precision`, as a part of all.",
    ),
    _bytes("adapter_bytes", "adapter", "Bytes of the adapter's weights as they are saved."),
    Metric(
        "adapter_share",
        "adapter share",
        "float",
        "",
        "lower",
        "size",
        "Parameters of the adapter divided by those of the base.",
        show_small_share,
        exact=True,
    ),
    _count("optimizer_steps", "optimizer steps", "Optimizer steps made."),
    _count("timed_steps", "timed steps", "Optimizer steps behind the speeds."),
    _count("timed_visits", "timed visits", "Timing visits behind the speeds."),
    _count("disturbed_steps", "disturbed steps", "Timed steps during which the machine worked for others."),
    _count("training_stories", "training stories", "Stories that there were to train on."),
    _count("trained_tokens", "trained tokens", "Non-padding tokens trained on."),
    _count("truncated_examples", "truncated examples", "Training and held-out examples cut to the sequence length."),
    _count("truncated_held_out", "truncated held-out examples", "Those of them that are held out."),
    _count(
        "dropped_examples", "dropped examples", "Training examples too long, or without a completion token once cut."
    ),
    _count("held_out_copies", "copies of held-out stories", "Rows of a held-out story beyond the first: left out."),
    _count("skipped_rows", "empty rows", "Rows without text that skip_empty_rows passed over."),
    _count("folded_prompts", "folded prompts", "Prompts with the system text in the user's turn, for want of its own."),
    _count(
        "short_stories",
        "short stories",
        "Stories passed over when choosing the held-out ones: fewer than min_completion_tokens completion tokens "
        "within eval_sequence_length, or too long where excess_length is drop. They are trained on like any other.",
    ),
    _count("evaluated_stories", "evaluated stories", "Held-out stories behind eval_loss."),
    _count("judged_tokens", "judged tokens", "Completion tokens behind eval_loss."),
    Metric("load_seconds", "load time", "float", "s", "lower", "speed", "Seconds to load the model.", show_seconds),
    Metric(
        "adapter_seconds",
        "adapter start-up",
        "float",
        "s",
        "lower",
        "speed",
        "Seconds to make the adapter over the loaded base, with what it takes of the base's weights, such as singular "
        "vectors, or of the data. Within the load time; null for full fine-tuning.",
        show_seconds,
    ),
    Metric(
        "compile_seconds",
        "compile time",
        "float",
        "s",
        "lower",
        "speed",
        "Seconds that torch's compiler took, from an empty cache; timed steps have none of it. Null without it.",
        show_seconds,
        across_processes="highest",
    ),
    _count(
        "recompilations",
        "recompilations",
        "Graphs that were compiled beyond the first of each piece of code: for an input without gradient (the first "
        "layer's, over frozen embeddings), other widths, other masks.",
    ),
    Metric("trial_seconds", "trial time", "float", "s", "lower", "speed", "Seconds of the whole trial.", show_seconds),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}

_INFERENCE = (
    _rate(
        "prefill_tokens_per_second",
        "prefill tokens/s",
        "tok/s",
        "Tokens of a prompt divided by the seconds until its first new token, one request at a time, without autocast.",
    ),
    _rate(
        "decode_tokens_per_second", "decode tokens/s", "tok/s", "New tokens after the first divided by their seconds."
    ),
    _seconds("token_seconds_p50", "median token", "Median of the seconds that a new token takes after the first."),
    _seconds("token_seconds_p95", "95th percentile token", "95th percentile of the same, interpolated."),
    _bytes("model_bytes", "model size", "Live tensor storage of the model that answers, scales included."),
    _bytes(
        "peak_inference_bytes", "peak while answering", "Highest live tensor storage in a request, weights and all."
    ),
    Metric(
        "logit_difference",
        "logit difference",
        "float",
        "",
        "lower",
        "size",
        "Largest difference of any logit from the unmerged model's, on held-out stories.",
        show_scientific,
    ),
    _nats("story_loss", "loss", "Loss per completion token on the held-out stories, weighted by tokens."),
    _text("rouge_l", "ROUGE-L", "ROUGE-L F1 of generated stories against the held-out ones.", "higher"),
    _text(
        "distinct_2", "distinct pairs", "Distinct pairs of words divided by all pairs, in a generated story.", "higher"
    ),
    _text("repetition", "repetition", "Share of runs of four words that the same story had before.", "lower"),
    _text("words", "words", "Words of a generated story.", None),
)

INFERENCE: dict[str, Metric] = {metric.name: metric for metric in _INFERENCE}
"""Figures of an inference benchmark: the base, the base under its adapter, and the two merged."""

FIGURES: dict[str, Metric] = METRICS | INFERENCE

MOSTLY_IN_FORMAT = 0.9
"""The format of a precision holds for at least this part of the linear weights, or pages say for how much."""

HEADLINE = ("peak_memory_bytes", "tokens_per_second", "eval_loss")
"""The three figures that every technique is judged by: memory, speed, loss."""

FITS = ("peak_memory_bytes", "peak_load_bytes", "peak_evaluate_bytes")
"""What fits is decided by the highest of these."""

# A trial that did not train keeps its memory and sizes, which are valid; its scores are not.
SCORES: frozenset[str] = frozenset(m.name for m in _TABLE if m.group in {"speed", "loss", "score"}) - {
    "load_seconds",
    "adapter_seconds",
    "compile_seconds",
    "trial_seconds",
    "eval_loss_before",
    "general_loss_before",
    "task_score_before",
    "flops_per_token",
    "predicted_step_seconds",
}


def check(name: str, value: float | int | None) -> float | int | None:
    """The value as its metric's type; null for null.

    Raises:
        ValueError: unknown metric, or a number that is not finite: that is a status, not a figure.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}")
    if value is None:
        return None
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}: a figure that is not finite is not a measurement")
    return int(value) if METRICS[name].type == "int" else float(value)
