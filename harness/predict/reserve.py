"""From traces of allocations to what torch's allocator reserves for them."""

from __future__ import annotations

from collections.abc import Sequence

from harness.predict.allocator import CachingAllocator, Event, least_limit
from harness.predict.prediction import Prediction

Traces = tuple[Sequence[Event], Sequence[Event], Sequence[Event]]
"""Of loading, evaluation and training."""


def with_reserve(prediction: Prediction, traces: Traces, *, expandable_segments: bool) -> Prediction:
    """The prediction with the figures of torch's allocator, whose blocks may be larger than what is asked for.

    Args:
        prediction: of live tensors.
        traces: of the same.
        expandable_segments: of the allocator.
    """
    live = set[int]()
    loaded, evaluated, trained = (_known_only(events, live) for events in traces)
    allocator = CachingAllocator(expandable_segments=expandable_segments)
    peaks = []
    for events in (loaded, evaluated, trained):
        allocator.restart_peak()
        allocator.run(events)
        peaks.append(allocator.peak_allocated)
    load, evaluation, training = peaks
    breakdown = prediction.breakdown
    larger = training - prediction.peak_memory_bytes
    return prediction.model_copy(
        update={
            "peak_memory_bytes": training,
            "peak_load_bytes": load,
            "peak_evaluate_bytes": None if prediction.peak_evaluate_bytes is None else evaluation,
            "peak_reserved_bytes": allocator.peak_reserved,
            "least_reserved_bytes": least_limit(
                [*loaded, *evaluated, *trained],
                expandable_segments=expandable_segments,
                unlimited=(max(peaks), allocator.peak_reserved),
            ),
            "phases": {phase: size + larger for phase, size in prediction.phases.items()},
            "breakdown": breakdown | {"memory_activations_bytes": breakdown["memory_activations_bytes"] + larger},
        }
    )


def _known_only(events: Sequence[Event], live: set[int]) -> list[Event]:
    """The events without releases of what was allocated before the traces begin; `live` are the keys in use."""
    known = list[Event]()
    for key, size in events:
        if size:
            live.add(key)
        elif key not in live:
            continue
        else:
            live.remove(key)
        known.append((key, size))
    return known
