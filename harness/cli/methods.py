"""Shows what each method of peft can do, and its options (`harness methods`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness._util.terminal import plain
from harness.cli.console import out

if TYPE_CHECKING:
    from harness.spec.capabilities import Capability


def methods(
    method: Annotated[
        str | None, typer.Argument(metavar="[METHOD]", help="One of them: what it cannot do, and its options.")
    ] = None,
) -> None:
    """List the methods that `adapter` takes, and at which precision each trains, merges and is predicted."""
    from harness.spec.keys import check_adapter

    if method is None:
        _list()
        return
    try:
        check_adapter(method)
    except ValueError as error:
        from harness.errors import InputError

        raise InputError(str(error)) from None
    _describe(method)


def _list() -> None:
    from rich.table import Column, Table

    from harness.spec.capabilities import table
    from harness.spec.keys import ADAPTERS

    tried = table()
    precisions = list(dict.fromkeys(cell.precision for cell in tried.cells))
    longest = max(map(len, ADAPTERS))
    where = (Column("merges", max_width=6), "checkpoints", "shards")
    shown = Table(Column("method", min_width=longest), *precisions, *where, title="Methods that adapter takes")
    for method in ADAPTERS:
        cells = [tried.find(method, precision) for precision in precisions]
        works = [cell for cell in cells if cell is not None and cell.fails is None]
        shown.add_row(
            method,
            *(_training(cell) for cell in cells),
            _where(works, "not_merged"),
            _where(works, "not_checkpointed"),
            _where([cell for cell in works if cell.precision in ("fp32", "bf16")], "not_sharded"),
        )
    out.print(shown)
    versions = ", ".join(f"{name} {version}" for name, version in tried.versions)
    out.print(
        "yes: it trains, and its peak is predicted; open: it trains, and its peak is not predicted; -: it does not. "
        f"As tried over a small Llama with {versions}. `harness methods loha` says why not, and which options it has.",
        highlight=False,
    )


def _training(cell: Capability | None) -> str:
    if cell is None:
        return ""
    if cell.fails is not None:
        return "-"
    return "yes" if cell.not_predicted is None else "open"


def _where(works: list[Capability], reason: str) -> str:
    """Where something works: everywhere, nowhere, or the precisions."""
    there = [cell.precision for cell in works if getattr(cell, reason) is None]
    return "yes" if len(there) == len(works) else ", ".join(there) or "-"


def _describe(method: str) -> None:
    from rich.table import Table

    from harness.launch.isolated import run_isolated
    from harness.spec.capabilities import table

    for cell in (cell for cell in table().cells if cell.method == method):
        reasons = {
            "not saved": cell.not_reloaded,
            "not merged": cell.not_merged,
            "not with gradient checkpointing": cell.not_checkpointed,
            "not sharded": cell.not_sharded,
            "peak not predicted": cell.not_predicted,
        }
        but = "; ".join(f"{what}: {why}" for what, why in reasons.items() if why)
        text = f"does not train: {cell.fails}" if cell.fails else "trains" + (f"; {but}" if but else "")
        out.print(plain(f"{cell.precision}: {text}"), highlight=False, soft_wrap=True)
    shown = Table("option", "default", "meaning", title=f"adapter_options of {method}")
    for name, default, meaning in run_isolated(_options, method):
        shown.add_row(plain(name), plain(default), plain(meaning))
    out.print(shown)


def _options(method: str) -> list[tuple[str, str, str]]:
    from harness.training import adapter_methods

    described: Any = adapter_methods.options_of(method)
    return list(described)
