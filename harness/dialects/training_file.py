"""Which tool a training file is of, and what it means here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harness._util.messages import unknown
from harness.dialects import axolotl, llama_factory, torchtune, trl
from harness.dialects.rules import Dialect, read

OWN = "harness"
"""The tool of files that have no keys but harness's own."""
_ADAPTERS = ("lora_", "use_rslora", "use_dora")


@dataclass(frozen=True)
class TrainingFile:
    """What a training file means."""

    tool: str
    """Its name, like `Axolotl`."""
    values: Mapping[str, Any]
    """Spec keys, as in a grid file."""
    mapped: Mapping[str, str]
    """Keys of the file that became something: what, in words or as `sequence_length: 1024`."""
    notes: Mapping[str, str]
    """Those of them that became something else than their own."""
    no_effect: Mapping[str, str]
    """Keys without effect on what is measured: what they are about."""
    without: Mapping[str, str]
    """Keys that would change what is measured and are left out, since they are not supported: with value and advice."""

    @property
    def about(self) -> dict[str, Any]:
        """What is recorded with the results, as plain JSON values."""
        return {
            "tool": self.tool,
            "notes": dict(self.notes),
            "no_effect": dict(self.no_effect),
            "without": dict(self.without),
        }

    @classmethod
    def recorded(cls, about: Any) -> TrainingFile | None:
        """What `about` recorded; null where it recorded nothing that can be read."""
        if not isinstance(about, Mapping) or not isinstance(about.get("tool"), str):
            return None
        notes, no_effect, without = (
            {str(k): str(v) for k, v in part.items()} if isinstance(part, Mapping) else {}
            for part in (about.get("notes"), about.get("no_effect"), about.get("without"))
        )
        return cls(about["tool"], {}, {}, notes, no_effect, without)

    @property
    def suffix(self) -> str:
        """For a title: `, without sample_packing`; empty where nothing is left out."""
        return f", without {', '.join(self.without)}" if self.without else ""


def is_training_file(document: Mapping[str, Any], grid_keys: Iterable[str]) -> bool:
    """Whether a document is a training file of some tool, not a grid file.

    Args:
        document: keys and values.
        grid_keys: keys of a grid file. Other tools have keys like `name` too, where `base_model` is none of theirs.
    """
    if torchtune.is_one(document):
        return not isinstance(document.get("base"), Mapping)
    if "model_name_or_path" in document:
        return "base" not in document
    return "base_model" in document and not document.keys() & {*grid_keys}


def recognise(document: Mapping[str, Any], own_keys: Iterable[str], *, inline: bool = False) -> Dialect | None:
    """The dialect of a training file; null: harness's own.

    Args:
        document: keys and values.
        own_keys: spec keys.
        inline: it is a mapping within a grid file, which is harness's own unless it has keys of another tool.
    """
    keys, own, axolotls = {str(key) for key in document}, {*own_keys}, axolotl.DIALECT.table.keys()
    if torchtune.is_one(document):
        return torchtune.DIALECT
    if "model_name_or_path" in keys:
        return llama_factory.DIALECT if llama_factory.is_one(document) else trl.DIALECT
    if inline:
        return axolotl.DIALECT if keys <= own | axolotls and not keys <= own else None
    only_own, only_axolotls = keys & own - axolotls, keys & axolotls - own
    return None if only_own and not only_axolotls else axolotl.DIALECT


def interpret(
    document: Mapping[str, Any], own_keys: Iterable[str], *, inline: bool = False, without_unsupported: bool = False
) -> TrainingFile:
    """What a training file means.

    Args:
        document: keys and values.
        own_keys: spec keys, which a file may have too.
        inline: as in `recognise`.
        without_unsupported: leave out what is not supported.

    Raises:
        ValueError: in one line: it is for another task, has keys that no table has, or asks for what is not supported.
    """
    own = tuple(own_keys)
    dialect = recognise(document, own, inline=inline)
    if dialect is None:
        return TrainingFile(OWN, dict(document) if inline else _own_values(document), {}, {}, {}, {})
    if inline and dialect is axolotl.DIALECT:
        _refuse_adapter_keys_alone(document, own)
    reader, strangers = read(dialect, document, own)
    if reader.other_tasks:
        raise ValueError(
            f"{dialect.tool}: {'; '.join(reader.other_tasks.values())}; harness measures supervised fine-tuning of "
            "language models on text"
        )
    known = (*dialect.table, *own)
    wrong = [unknown("key", name, known) for name in strangers]
    if reader.unsupported and not without_unsupported:
        count = len(reader.unsupported)
        wrong.append(
            f"{f'{count} keys' if count > 1 else 'a key'} would change what is measured and cannot be taken over: "
            f"{'; '.join(reader.reasons)}; change the file, or go on without with --without-unsupported"
        )
    if wrong:
        raise ValueError(f"{dialect.tool}: {'; '.join(wrong)}")
    return TrainingFile(dialect.tool, reader.values, reader.mapped, reader.notes, reader.no_effect, reader.unsupported)


def _refuse_adapter_keys_alone(document: Mapping[str, Any], own: Iterable[str]) -> None:
    """In a grid file, whose trials have LoRA by default, a key of Axolotl would make full fine-tuning of them."""
    of_adapters = [str(key) for key in document if str(key).startswith(_ADAPTERS)]
    if of_adapters and "adapter" not in document:
        others = [str(key) for key in document if key not in {*own}]
        raise ValueError(
            f"{of_adapters[0]} without adapter: with keys of Axolotl ({', '.join(others[:3])}) that is full "
            "fine-tuning; give adapter: lora, or leave those keys out"
        )


def _own_values(document: Mapping[str, Any]) -> dict[str, Any]:
    """A training file in harness's own keys: without an adapter it is full fine-tuning, as in other tools' files."""
    if "adapter" in document:
        return dict(document)
    of_adapters = [key for key in document if str(key).startswith(_ADAPTERS)]
    if of_adapters:
        raise ValueError(
            f"{of_adapters[0]} without adapter: give adapter: lora; a training file without adapter is full fine-tuning"
        )
    return {**document, "adapter": "none"}
