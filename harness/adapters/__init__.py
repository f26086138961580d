"""Works with trained adapters: merging into the base, the inference benchmark, and story generation.

trained (finds an adapter, and how it was trained), merge and benchmark (each request runs in a process of its own); in
that process, with torch: session (base, unmerged and merged model), merged_model, inference, generation and
story_metrics.
"""

__all__ = ["benchmark", "merge", "trained"]
