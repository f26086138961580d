"""Where stories and base models come from: files, bundled ones, the hub.

stories (the examples of datasets), places (where their rows are), parts (what is trained on and what the data hold
out), files and json_rows (rows of a file), shapes, chats and other_data (what a row becomes, by its columns), examples
(that), splits (how many are held out), cells (values of a row), models (base models), task_files (questions), hub
(access to it), fingerprints (of data and base models), home (the user's cache folder).
"""

__all__ = ["fingerprints", "home", "models", "splits", "stories", "task_files"]
