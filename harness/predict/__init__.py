"""Predicts memory and step time of a trial without a GPU or weights, whether it fits, and what makes it fit.

peak (replays evaluation and training steps on fake tensors: fake_weights, loading, emulation, cuda_kernels,
fused_kernels, replay),
allocator (what torch takes from the driver for it), predictor (a pool of processes that predict specs), prediction
(what is predicted, and whether it fits), largest (the largest value that fits), fixes (changes that make it fit),
matching (adapters as large as the baseline's), calibration (corrects peaks by measured rows), roofline (step time),
device_rates and rates_cache (rates of this device), cards.
"""

__all__ = [
    "allocator",
    "calibration",
    "cards",
    "fixes",
    "largest",
    "matching",
    "prediction",
    "predictor",
    "rates_cache",
    "roofline",
]
