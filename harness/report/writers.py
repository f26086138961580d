"""Writes a report as Markdown, CSV, LaTeX, images and one HTML page. Text from data is escaped in each."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

from rich.table import Table as RichTable

from harness._util.files import write_whole
from harness._util.terminal import plain, printable
from harness.analysis.comparison import Comparison
from harness.metrics import HEADLINE
from harness.report import page
from harness.report.claim_cards import expects
from harness.report.document import Document
from harness.report.inference_tables import GeneratedStory
from harness.report.plots import Chart
from harness.report.summary import MOST_ROWS
from harness.report.tables import Cell, Table, detectable_differences, headings_of, techniques

_PNG_SCALE = 2.0
_THEME = {
    "background": "white",
    "font": "sans-serif",
    "axis": {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal"},
    "title": {"anchor": "start", "fontSize": 14},
    "view": {"stroke": "#cccccc"},
}


FORMATS = ("html", "md", "csv", "tex", "svg", "png")


def write(
    document: Document,
    folder: Path,
    progress: Callable[[str], None] = lambda what: None,
    *,
    formats: Collection[str] = FORMATS,
) -> list[Path]:
    """Write a report into `folder`: report.html, report.md, comparisons.csv, claims.csv, tables/, plots/; and
    files.json, a list of the last two, by which the next report removes those that it does not have.

    Args:
        document: the report.
        folder: created if missing; files of the same names are replaced.
        progress: called with the name of the file being written.
        formats: of `FORMATS`, those to write. Markdown shows plots where they are written.

    Returns:
        The files.

    Raises:
        OSError: the folder cannot be written.
    """
    written: list[Path] = []

    def keep(name: str, content: Callable[[], str | bytes]) -> None:
        if name.rpartition(".")[2] not in formats:
            return
        progress(name)
        file, made = folder / name, content()
        write_whole(file, made.encode() if isinstance(made, str) else made)
        written.append(file)

    pictures = next((kind for kind in ("svg", "png") if kind in formats), None)
    keep("report.md", lambda: markdown(document, pictures))
    keep("comparisons.csv", lambda: comparisons_csv(document))
    keep("claims.csv", lambda: _claims_csv(document))
    for table in document.tables:
        keep(f"tables/{table.id}.csv", partial(_csv, table.headings, table.rows, _without(document)))
        keep(f"tables/{table.id}.tex", partial(latex, table))
    if {"svg", "png"} & {*formats}:
        for chart in document.charts:
            svg, png = images(chart)
            keep(f"plots/{chart.id}.svg", partial(str, svg))
            keep(f"plots/{chart.id}.png", partial(bytes, png))
    if document.recommended is not None:
        write_whole(folder / "recommended.yml", document.recommended.yaml.encode())
        written.append(folder / "recommended.yml")
    keep("report.html", lambda: page.html(document))
    _remove_former(folder, {file.relative_to(folder).as_posix() for file in written}, formats)
    return written


_LIST = "files.json"
_LISTED = re.compile(r"(plots|tables)/[^/\\]+\.(svg|png|csv|tex)")


def _remove_former(folder: Path, written: Collection[str], formats: Collection[str]) -> None:
    """Remove plots and tables that an earlier report wrote and this one has not: they are of other rows, and look as if
    they were of these. A list says which these are, so that a user's own files stay; so do formats not written now.
    """
    former = _listed(folder / _LIST)
    now = {name for name in written if _LISTED.fullmatch(name)}
    gone = {name for name in former - now if name.rpartition(".")[2] in formats}
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    kept = (former | now) - gone
    if kept != former:
        write_whole(folder / _LIST, json.dumps(sorted(kept), indent=1).encode())


def _listed(file: Path) -> set[str]:
    """The plots and tables that a list names; a file of others may hold anything."""
    try:
        names = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return set()
    return {name for name in names if _LISTED.fullmatch(str(name))} if isinstance(names, list) else set()


def rich_table(table: Table) -> RichTable:
    """A table for a terminal, transposed: a column for each row."""
    shown = RichTable(title=plain(table.title), caption=plain(table.note), title_justify="left", show_header=False)
    shown.add_column(overflow="fold")
    for _ in table.rows:
        shown.add_column(justify="right", overflow="fold")
    for number, heading in enumerate(table.headings):
        shown.add_row(plain(heading), *(plain(row[number].text) for row in table.rows))
    return shown


def terminal(comparison: Comparison) -> RichTable:
    """The technique comparison for a terminal: each figure above its effect against the baseline."""
    m = comparison.measurements
    left_out = f"; left out: {', '.join(m.left_out)}" if m.left_out else ""
    detectable = detectable_differences(comparison)
    caption = plain(f"{m.where}{left_out}") + (f"\n{plain(detectable)}" if detectable else "")
    shown = RichTable(title=plain(m.title), caption=caption, title_justify="left", caption_justify="left")
    for number, heading in enumerate(("Technique", *headings_of(HEADLINE), "n")):
        shown.add_column(heading, justify="right" if number == 4 else "left", overflow="fold")
    for technique, part, *cells, repeats in techniques(comparison, MOST_ROWS).rows:
        figures = [
            f"{plain(value.text)}\n[dim]{plain(against.text)}[/]"
            for value, against in zip(cells[::2], cells[1::2], strict=True)
        ]
        shown.add_row(f"{plain(technique.text)}\n[dim]{part.text}[/]", *figures, repeats.text)
    return shown


def markdown(document: Document, pictures: str | None = "svg") -> str:
    """The report as Markdown that links its plots. Long tables are folded.

    Args:
        document: the report.
        pictures: svg, png, or null: there are none.
    """
    parts = [headline(document, pictures=pictures)]
    rest = [chart for chart in document.charts if not chart.id.startswith("effects")]
    parts += [_md_chart(chart, pictures) for chart in rest] if pictures else []
    parts.append("## Claims\n\n" + _folded("All claims", _md_rows(_CLAIM_HEADINGS, _claim_rows(document))))
    parts += [_md_table(table) for table in document.tables[1:]]
    if document.stories:
        parts.append("## Stories")
        parts += [_md_story(story) for story in document.stories]
    parts.append("## What the words mean\n\n" + "\n".join(f"- {_md(line)}" for line in document.thresholds) + _READING)
    parts.append("## Caveats\n\n" + "\n".join(f"- {_md(caveat)}" for caveat in document.caveats))
    if document.snippets:
        parts.append(_APPENDIX)
        parts += [
            f"{_md(snippet.title)} (for example {_md(snippet.example)}):\n\n```python\n{snippet.code}\n```"
            for snippet in document.snippets
        ]
    return "\n\n".join(parts) + "\n"


def headline(document: Document, folder: str = "", pictures: str | None = "svg") -> str:
    """The first screen as Markdown: what was measured, the picture of all techniques, the three answers, what else is
    to be said, and the first table.

    Args:
        document: the report.
        folder: of its files, with a slash at its end.
        pictures: svg, png, or null: there are none.
    """
    parts = [f"# {_md(document.title)}", _md(document.front.about)]
    effects = [chart for chart in document.charts if chart.id.startswith("effects")]
    parts += [_md_chart(chart, pictures, folder) for chart in effects] if pictures else []
    parts += [_md(line) for line in document.uncompared]
    answers = [
        (card.title, card.technique or card.figure, card.figure if card.technique else "", card.effect,
         "; ".join(card.trades))
        for card in document.front.cards
    ]  # fmt: skip
    if answers:
        parts.append(_md_rows(("Answer", "Technique", "Figure", "Against the baseline", "What it trades"), answers))
    parts.append("\n".join(f"- {_md(sentence)}" for sentence in document.summary))
    if document.recommended is not None:
        parts.append(
            f"The recommended configuration, {_md(document.recommended.label)}, is in {folder}recommended.yml."
        )
    parts.append(f"Measured on {_md(document.where)}.")
    parts.append(_md_table(document.tables[0]))
    return "\n\n".join(parts)


def _md_chart(chart: Chart, pictures: str, folder: str = "") -> str:
    return f"![{_md(chart.title)}]({folder}plots/{quote(chart.id)}.{pictures})\n\n{_md(chart.caption)}"


_MOST_UNFOLDED = 12
"""Rows of a table that a reader of Markdown sees at once."""


def _folded(title: str, table: str) -> str:
    """A table that opens when its title is chosen, where it is long."""
    if table.count("\n") <= _MOST_UNFOLDED + 1:
        return table
    return f"<details><summary>{_md(title)}: {table.count(chr(10)) - 1} rows</summary>\n\n{table}\n\n</details>"


_READING = """
- *not distinguishable*: the interval, which holds with those of all comparisons of the figure, contains "no effect";
  that of a speed is at least as wide as two runs of the baseline differ
- *not decided*, of a claim: the interval reaches across the edge of what the claim says
- *depends*: of several pairs some are better and others worse, or they differ by more than their noise; there is no
  average
- *same within x*: the whole interval lies within x of no effect; losses of a single seed are never called the same
- *not measured*: no two trials that differ in this alone were run"""
_APPENDIX = """## Appendix: recompute it

Every figure can be recomputed from the parquet, after `import numpy, pandas`."""


def _md(text: str) -> str:
    """Escaped text, which cannot end a cell, begin markup, or load anything."""
    line = "".join(c for c in " ".join(text.split()) if c.isprintable())
    for sign in "\\`*[]|":
        line = line.replace(sign, f"\\{sign}")
    return line.replace("&", "&amp;").replace("<", "&lt;")


def _md_story(story: GeneratedStory) -> str:
    """A synopsis, and its stories side by side."""
    headings = ("held out", *story.stories)
    texts = (story.reference, *story.stories.values())
    cells = ["<br>".join(_md(line) for line in text.splitlines() if line.strip()) for text in texts]
    rows = [f"| {' | '.join(map(_md, headings))} |", "|" + " --- |" * len(headings), f"| {' | '.join(cells)} |"]
    return f"{_md(story.trial)}: *{_md(story.synopsis)}*\n\n" + "\n".join(rows)


def _md_table(table: Table) -> str:
    rows = [[cell.text for cell in row] for row in table.rows[:MOST_ROWS]]
    note = f"\n\n{_md(table.note)}" if table.note else ""
    return f"## {_md(table.title)}\n\n{_folded(table.title, _md_rows(table.headings, rows))}{note}"


def _md_rows(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(_md, headings)) + " |", "|" + " --- |" * len(headings)]
    lines += ["| " + " | ".join(map(_md, row)) + " |" for row in rows]
    return "\n".join(lines)


_CLAIM_HEADINGS = ("Claim", "Where", "Expected", "Verdict", "Measured", "Over", "Rests on")


def _claim_rows(document: Document) -> list[list[str]]:
    return [
        [
            v.claim.says,
            v.claim.section,
            expects(v.claim),
            v.word,
            v.size,
            v.pairs,
            v.rests_on,
        ]
        for v in document.verdicts
    ]


def _csv(
    headings: Sequence[str], rows: Iterable[Sequence[Cell]], last: Mapping[str, str] = MappingProxyType({})
) -> str:
    """A table as CSV, with a last column that has the same text in each row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*map(_no_formula, headings), *last])
    writer.writerows(
        [*(_no_formula(c.text) if c.value is None else c.text for c in row), *last.values()] for row in rows
    )
    return out.getvalue()


def _without(document: Document) -> dict[str, str]:
    """A last column for what of the training file was left out; none where nothing was."""
    if document.parts:  # each has its own
        return {}
    file = document.comparison.measurements.training_file
    return {"without": _no_formula(", ".join(file.without))} if file is not None and file.without else {}


def _no_formula(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def _claims_csv(document: Document) -> str:
    rows = ([Cell(text) for text in row] for row in _claim_rows(document))
    if not document.parts:
        return _csv(_CLAIM_HEADINGS, rows, _without(document))
    sources = [Cell(verdict.source) for verdict in document.verdicts]
    return _csv((*_CLAIM_HEADINGS, "Grid"), ([*row, source] for row, source in zip(rows, sources, strict=True)))


def comparisons_csv(document: Document) -> str:
    """One row per configuration and figure, in base units and unrounded; of several grids, with the grid."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    effect = ("effect", "low", "high", "n", "seeds", "basis", "p_family", "verdict", "detectable", "needed", "unit")
    parts = document.parts or (document,)
    without = ["without"] * any(map(_without, parts))
    writer.writerow((*["grid"] * bool(document.parts), "technique", "metric", "figure", *effect, *without))
    for part in parts:
        comparison, last = part.comparison, [_without(part).get(column, "") for column in without]
        labels = comparison.measurements.configs["label"].astype(str).to_dict()
        for metric, estimates in comparison.estimates.items():
            for config, figure in comparison.means[metric].dropna().items():
                e = estimates.get(config)  # type: ignore[call-overload]  # the index holds configurations
                values = (
                    (e.value, e.low, e.high, e.n, e.seeds, e.basis, e.p, e.verdict, e.detectable, e.needed, e.unit)
                    if e
                    else (None,) * len(effect)
                )
                row = (_no_formula(labels[config]), metric, figure, *values, *last)
                writer.writerow((*[_no_formula(part.name)] * bool(document.parts), *row))
    return out.getvalue()


_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "×": r"$\times$", "−": "$-$", "–": "--", "→": r"$\rightarrow$", "÷": r"$\div$", "±": r"$\pm$",
})  # fmt: skip


def _tex(text: str) -> str:
    return printable(" ".join(text.split())).translate(_LATEX)


def latex(table: Table) -> str:
    """A booktabs table."""
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{table}",
        f"\\caption{{{_tex(table.title)}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(table.headings) - 1)}}}",
        "\\toprule",
        " & ".join(map(_tex, table.headings)) + r" \\",
        "\\midrule",
        *(" & ".join(_tex(cell.text) for cell in row) + r" \\" for row in table.rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def images(chart: Chart) -> tuple[str, bytes]:
    """SVG and PNG of a chart on white, for print."""
    import vl_convert

    svg = vl_convert.vegalite_to_svg(chart.spec(), config=_THEME)
    return svg, vl_convert.svg_to_png(svg, scale=_PNG_SCALE)
