"""Predicts peak memory and step time of a trial without a GPU or weights, and whether it fits.

peak (replays the training step on fake tensors: fake_weights, emulation, replay), predictor (a pool of processes that
predict specs), allocator (what torch takes from the driver for it), prediction (what is predicted, and whether it
fits), largest (the largest value that fits), calibration (corrects peaks by measured rows), roofline (step time),
device_rates and rates_cache (rates of this device), cards.
"""

__all__ = ["allocator", "calibration", "cards", "largest", "prediction", "predictor", "rates_cache", "roofline"]
