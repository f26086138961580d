"""The commands: a module each, options that several share, and errors as one line and an exit code."""

__all__ = ["app"]
