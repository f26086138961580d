"""Where stories and base models come from: files, bundled ones, the hub.

files (rows of a file), stories (datasets as prompts and completions), splits (how many are held out), models (base
models), hub (access to it), fingerprints (of data and base models), home (the user's cache folder).
"""

__all__ = ["fingerprints", "home", "models", "splits", "stories"]
