"""Which trials a grid has, kept with its rows, where those of its earlier versions are too."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Version(BaseModel):
    """A grid as it was last run in an environment. A version that was run before records nothing when it is run again:
    no moment in its rows tells that it is the latest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    baselines: tuple[str | None, ...]
    """Ids of the baselines of its repeats; null: it has none."""
    specs: dict[str, tuple[str, ...]]
    """Ids of the specs of each label."""
    whole: bool = True
    """Whether these are all labels that the grid has."""

    def after(self, before: Version | None) -> Version:
        """With the labels that a run of some (`--only`) leaves out.

        Args:
            before: what was kept of the run before; null: nothing was.
        """
        if self.whole or before is None:
            return self
        return self.model_copy(update={"specs": {**before.specs, **self.specs}, "whole": before.whole})

    def joined(self, other: Version) -> Version:
        """With the trials of a folder that is joined."""
        pairs = {label: (*self.specs.get(label, ()), *other.specs.get(label, ())) for label in other.specs}
        return Version(
            baselines=tuple(dict.fromkeys((*self.baselines, *other.baselines))),
            specs={**self.specs, **{label: tuple(dict.fromkeys(both)) for label, both in pairs.items()}},
            whole=self.whole and other.whole,
        )


def versions_of(about: Mapping[str, Any]) -> dict[str, Version]:
    """The version of each environment that a description has. A file edited by hand may hold anything."""
    given = about.get("versions")
    versions = {}
    for environment_id, version in given.items() if isinstance(given, dict) else ():
        with contextlib.suppress(ValidationError):
            versions[environment_id] = Version.model_validate(version)
    return versions


def described(versions: Mapping[str, Version]) -> dict[str, Any]:
    """The versions as plain JSON values, which `versions_of` reads."""
    return {environment_id: version.model_dump(mode="json") for environment_id, version in versions.items()}
