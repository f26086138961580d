"""YAML files, read safely (a safe loader, limits, one line for what is wrong), and specs as YAML."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from harness._util.messages import first_line, kind_of, one_line
from harness._util.redact import redact_home
from harness._util.units import MIB
from harness.errors import InputError
from harness.sources import models, stories
from harness.spec.trial import TrialSpec

_MAX_FILE_BYTES = MIB
MAX_VALUES = 100_000
"""More than a file of this size can hold without aliases of aliases."""

_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml's, where it is there, is ten times as fast."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that rejects duplicate keys: the first would be lost silently."""


def _mapping(loader: _Loader, node: yaml.Node) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):  # `!!map 3`
        raise yaml.constructor.ConstructorError(
            None, None, f"{node.tag} on a value that is not a mapping", node.start_mark
        )
    own = {id(key_node) for key_node, _ in node.value}
    loader.flatten_mapping(node)  # puts the keys that `<<` merges before its own, which may replace them
    if len(node.value) > MAX_VALUES:
        raise yaml.constructor.ConstructorError(None, None, _too_much("<<"), node.start_mark)
    seen: dict[Any, Any] = {}
    given = set()
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool) and key is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"{kind_of(key)} is not a valid key", key_node.start_mark
            )
        if key in given:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        if id(key_node) in own:
            given.add(key)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    value: int = loader.construct_yaml_int(node)
    str(value)  # raises for a number in another base with more digits than Python prints
    return value


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)

_Loader.add_constructor("tag:yaml.org,2002:int", _whole)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: there is no mapping, or the file is too large, too deep or not plain YAML.
    """
    try:
        with path.open("rb") as file:  # a pipe or a device has no size, and perhaps no end
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            size = max(path.stat().st_size, len(content))
            raise InputError(one_line(f"{path}: {size} bytes; a grid file has at most {_MAX_FILE_BYTES}"))
        document = yaml.load(content.decode(), _Loader)  # noqa: S506 - derived from SafeLoader
        count = _count(document, {})
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], n=1)
        hint = f"did you mean {near[0]}?" if near else f"looked in {path.parent.absolute()}"
        raise InputError(one_line(f"{path}: no such file; {hint}")) from None
    except IsADirectoryError:
        raise InputError(one_line(f"{path} is a folder; give a grid file like grids/techniques.yml")) from None
    except OSError as error:
        raise InputError(one_line(f"{path}: cannot be read ({error.strerror})")) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise InputError(one_line(f"{path.name}: not valid YAML{line}: {problem}")) from None
    except RecursionError:
        raise InputError(f"{path.name}: not valid YAML: nested too deeply") from None
    except InputError:
        raise
    except (ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # PyYAML's errors for `!!int ""`, `!!bool maybe`, `!!timestamp today` and 2025-13-01.
        detail = f" ({error})" if isinstance(error, ValueError | KeyError) else ""
        raise InputError(one_line(f"{path.name}: not valid YAML: no such number, date or flag{detail}")) from None
    if count > MAX_VALUES:
        raise InputError(_too_much(path.name))
    if not isinstance(document, dict):
        raise InputError(
            one_line(f"{path.name}: holds {kind_of(document)}; a grid file is a mapping with name, base and vary")
        )
    return document


def spec_to_yaml(spec: TrialSpec, *, full_paths: bool = False, without: Collection[str] = ()) -> str:
    """The configuration as a training file: its canonical keys without those that are null.

    Args:
        spec: the configuration.
        full_paths: write relative paths in full, for a file in whatever folder.
        without: keys to leave out.
    """
    given = {key: value for key, value in spec.canonical().items() if value is not None}
    given["attention"] = spec.attention
    if spec.pad_to_sequence_len is not None:
        given["pad_to_sequence_len"] = spec.pad_to_sequence_len
    if full_paths and spec.folder is not None:
        given["base_model"] = redact_home(models.absolute(spec.base_model, spec.folder))
        for dataset in (*given["datasets"], *given.get("test_datasets", ())):
            dataset["path"] = redact_home(stories.absolute(dataset["path"], spec.folder))
    given = {key: value for key, value in given.items() if key not in without}
    return str(yaml.dump(given, Dumper=_DUMPER, sort_keys=False, allow_unicode=True))


def _too_much(what: str) -> str:
    return f"{what}: its aliases stand for more than {MAX_VALUES} values; write fewer"


def _count(value: Any, known: dict[int, int]) -> int:
    """Number of values in a document with its aliases expanded, without expanding them."""
    if isinstance(value, dict | list | tuple | set) and id(value) not in known:
        inside = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(item, known) for item in inside)
    return known.get(id(value), 1)
