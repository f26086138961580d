"""One report of several grids: each table and claim of the lesson is filled from whichever grid measured it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from harness.analysis import stats
from harness.analysis.compare_runs import differing_fields
from harness.analysis.verdicts import ClaimVerdict
from harness.analysis.words import NOT_MEASURED
from harness.grids.claims import lesson
from harness.report import plots, summary
from harness.report.document import Document
from harness.report.front import front
from harness.report.tables import Cell, Table

_NOT_HERE = "not measured here"
_OPEN = ("not distinguishable", "not decided")


def join(documents: Sequence[Document], title: str) -> Document:
    """One report of several. Nothing is compared between grids: each has its own baseline.

    Args:
        documents: each made for so many grids (`document.document`); where several measured the same, the first counts.
        title: of the report.
    """
    documents = _with_titles_of_their_own(documents)
    first = documents[0]
    judged = _verdicts(documents)
    longer = [f"{each.title}: {sentence}" for each in documents for sentence in each.longer]
    return Document(
        name=first.name,
        title=title,
        where="; ".join(dict.fromkeys(each.where for each in documents)),
        front=front({_prefix(each): each.comparison for each in documents}, first.front.choices),
        summary=(*map(_in_words, documents), *longer, summary.tally(judged)),
        longer=tuple(longer),
        comparison=first.comparison,
        tables=tuple(_tables(documents)),
        verdicts=tuple(judged),
        charts=tuple(
            replace(plots.titled(chart, f"{chart.title}: {each.title}"), id=f"{chart.id}-{each.name}")
            for each in documents
            for chart in each.charts
        ),
        configurations=tuple(
            replace(configuration, key=_prefix(each) + configuration.key)
            for each in documents
            for configuration in each.configurations
        ),
        environment={each.name: each.environment for each in documents},
        caveats=(
            _judged_together(documents),
            *_other_environments(documents),
            *(f"{each.name}: {caveat}" for each in documents for caveat in each.caveats),
        ),
        thresholds=max((each.thresholds for each in documents), key=len),
        snippets=tuple(
            replace(snippet, title=f"{each.name}: {snippet.title}") for each in documents for snippet in each.snippets
        ),
        stories=tuple(story for each in documents for story in each.stories),
        parts=tuple(documents),
    )


def _with_titles_of_their_own(documents: Sequence[Document]) -> list[Document]:
    """With the name of the folder behind a title that several have, as two runs of a grid do."""
    counts = Counter(document.title for document in documents)
    longer = (f"{each.title} ({each.name})" if counts[each.title] > 1 else each.title for each in documents)
    return [replace(each, title=title) for each, title in zip(documents, longer, strict=True)]


def _prefix(document: Document) -> str:
    return f"{document.name}:"


def _judged_together(documents: Sequence[Document]) -> str:
    alphas = sorted({document.comparison.measurements.alpha for document in documents})
    levels, all_of_them = " to ".join(f"{1 - alpha:.2%}" for alpha in alphas[::-1]), 1 - stats.ALPHA
    return (
        f"{len(documents)} grids are judged together, each figure of each at {levels}, so that all intervals of a "
        f"figure hold at once at {all_of_them:.0%}: they are wider than in the reports of the grids alone. Each grid "
        "is compared with its own baseline; where several measured the same, the first counts."
    )


def _other_environments(documents: Sequence[Document]) -> list[str]:
    """In what each grid's machine or versions differ from those of the first."""
    first, *others = documents
    lines = []
    for other in others:
        differences = differing_fields(first.environment, other.environment)
        if differences:
            listed = "; ".join(f"{field}: {theirs} instead of {ours}" for field, ours, theirs in differences)
            lines.append(f"{other.name} was measured in another environment than {first.name}: {listed}.")
    return lines


def _in_words(document: Document) -> str:
    answers = " ".join(card.sentence for card in document.front.cards)
    return f"{document.title} ({document.front.about}). {answers}"


def _verdicts(documents: Sequence[Document]) -> list[ClaimVerdict]:
    """Each claim as the first grid judges it that decides it, else the first that measured it, with the words of the
    others.
    """
    by_claim: dict[str, list[tuple[str, ClaimVerdict]]] = {}
    for document in documents:
        own = document.comparison.measurements.claims
        for verdict in document.verdicts:
            if verdict.claim in own:
                claim = verdict.claim.model_copy(update={"section": f"of {document.name}"})
                verdict = replace(verdict, claim=claim)  # another grid's own claim is another one
            by_claim.setdefault(verdict.claim.model_dump_json(), []).append((document.name, verdict))
    judged = []
    for of_claim in by_claim.values():
        measured = [(name, verdict) for name, verdict in of_claim if verdict.word != _NOT_HERE]
        if not measured:
            judged.append(of_claim[0][1])
            continue
        (name, verdict), *others = sorted(measured, key=lambda each: each[1].word in _OPEN)
        source = "; ".join([name, *(f"by {other}: {each.word}, {each.size}" for other, each in others)])
        judged.append(replace(verdict, source=source))
    return judged


def _tables(documents: Sequence[Document]) -> list[Table]:
    """Tables of the lesson are filled row by row; others have the rows of all grids that have any."""
    of_lesson = {table.id for table in lesson().tables}
    ids = dict.fromkeys(table.id for each in documents for table in each.tables)
    by_id = {id_: [(each.name, table) for each in documents for table in each.tables if table.id == id_] for id_ in ids}
    tables = []
    for id_, same in by_id.items():
        if id_ in of_lesson:
            tables.append(_filled(same))
            continue
        with_rows = [(name, table) for name, table in same if _has_figures(table)] or same[:1]
        if len({table.headings for _, table in with_rows}) == 1:
            tables.append(_together(with_rows))
        else:
            tables += [
                replace(table, id=f"{id_}-{name}", title=f"{table.title}: {name}", keys=_keys(name, table))
                for name, table in with_rows
            ]
    return tables


def _has_figures(table: Table) -> bool:
    return any(cell.value is not None for row in table.rows for cell in row)


def _keys(name: str, table: Table) -> tuple[str, ...]:
    return tuple(f"{name}:{key}" for key in table.keys)


def _together(same: Sequence[tuple[str, Table]]) -> Table:
    """The rows of all, with the grid that each is of behind its first column."""
    table = same[0][1]
    rows = tuple((row[0], Cell(name), *row[1:]) for name, each in same for row in each.rows)
    keys = tuple(key for name, each in same for key in _keys(name, each))
    return replace(table, headings=(table.headings[0], "Grid", *table.headings[1:]), rows=rows, configs=(), keys=keys)


def _filled(same: Sequence[tuple[str, Table]]) -> Table:
    """Each row as the first grid has it that measured any of it; what it did not is another's, which is named."""
    table = same[0][1]
    rows = []
    for number in range(len(table.rows)):
        measured = [(name, each.rows[number]) for name, each in same if _is_measured(each.rows[number])]
        if not measured:
            rows.append((*table.rows[number], Cell(NOT_MEASURED)))
            continue
        (name, row), *others = measured
        names, cells = [name], list(row)
        for other, cells_of_other in others:
            for column, cell in enumerate(cells):
                if cell.text == NOT_MEASURED and cells_of_other[column].text != NOT_MEASURED:
                    cells[column] = replace(cells_of_other[column], text=f"{cells_of_other[column].text} ({other})")
                    names.append(other)
        rows.append((*cells, Cell(", ".join(dict.fromkeys(names)))))
    return replace(table, headings=(*table.headings, "Grid"), rows=tuple(rows))


def _is_measured(row: Sequence[Cell]) -> bool:
    """Whether any effect of a row of the lesson is: its first two columns say what is compared."""
    return any(cell.text != NOT_MEASURED for cell in row[2:7:2])
