"""Experiment and ablation benchmarking for fine-tuning language models on small hardware."""

__version__ = "0.1.0"
