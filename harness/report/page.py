"""One self-contained page: styles, scripts, charts and data are in it. Text from data is escaped."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from harness._util.files import write_whole
from harness._util.terminal import printable
from harness._util.units import byte_unit
from harness.analysis import words
from harness.analysis.verdicts import Word
from harness.errors import InputError
from harness.metrics import FIGURES
from harness.report.claim_cards import by_section
from harness.report.document import Document
from harness.report.summary import MOST_ROWS
from harness.sources import models

SIGNS = {"better": "▲", "worse": "▼", "same": "=", "not distinguishable": "≈", "depends": "◇"}
"""Of verdicts, so that none is told by its colour alone."""


def html(document: Document, *, live: str = "") -> str:
    """The page of a report.

    Args:
        document: the report.
        live: of a page that is shown while its grid runs, its version, by which it knows that there is a newer one;
            empty: it is a file.
    """
    front = document.front
    counts = Counter(verdict.word for verdict in document.verdicts)
    most = max(front.memory.values(), default=0)
    unit, size = byte_unit(most)
    # The first screen shows the effects.
    plotted = [chart for chart in document.charts if not chart.id.startswith("effects")]
    return render(
        "page.html.j2",
        document=document,
        signs=SIGNS,
        missing=words.MISSING,
        claims=by_section(document.verdicts),
        tally={word: counts[word] for word in get_args(Word) if counts[word]},
        most_rows=MOST_ROWS,
        memory=front.memory,
        opened={each.key: each.shown for each in document.configurations},
        choices={
            "choices": [{"memory": c.memory, "label": c.label, "figures": c.figures} for c in front.choices],
            "most": most,
            "grid": front.grid,
            "unit": unit,
            "size": size,
        },
        plotted=plotted,
        charts={chart.id: chart.spec() for chart in plotted},
        metrics=FIGURES.values(),
        environment_text=json.dumps(document.environment, indent=2),
        vega=_scripts_of_charts(),
        live=live,
    )


def _scripts_of_charts() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script. To bundle them takes seconds: it is done once per release of
    vl-convert, and then read from the cache.
    """
    with contextlib.suppress(InputError, OSError, UnicodeError):  # not there yet, or no folder can be read
        return _cached_scripts().read_text("utf-8")
    import vl_convert

    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # the stub requires an optional argument
    with contextlib.suppress(InputError, OSError):  # a cache that cannot be written: they are bundled again next time
        write_whole(_cached_scripts(), bundle.encode())
    return bundle


def _cached_scripts() -> Path:
    return models.cache_folder() / f"vega-{metadata.version('vl-convert-python')}.js"


def render(template: str, **values: Any) -> str:
    """A template of this package with its values; every text among them is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harness", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # Markup, a subclass, is ours
    )
    return environment.get_template(template).render(**values)
