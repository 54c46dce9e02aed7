"""Rows of runs as aligned text, Markdown and CSV: for people rounded and with what all runs share said once, in CSV as they are."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainkit.runs.compare import Row

OOM = "OOM"
NOT_KNOWN = "-"
MOST_WIDTH = 10_000  # of the console in a pipe, where nothing needs to fit
_GAP = 2  # characters between two columns
_NARROWEST_NAME = 16
LEGEND = (
    "seconds and rates count the optimizer steps; command: start, evaluation and export too, of a resumed run those of its last command; "
    "training loss: mean over the steps; peak, planned: of the worker with most"
)


@dataclass(frozen=True)
class Column:
    """`field` of Row in CSV, under `header` in text and Markdown; `cell` writes it for people."""

    field: str
    header: str
    cell: Callable[[Row], str]
    is_number: bool = True
    is_wish: bool = False  # what was asked for and not what came out: said once where all rows agree


COLUMNS = (
    Column("run", "run", lambda row: row.run, is_number=False),
    Column("model", "model", lambda row: row.model, is_number=False, is_wish=True),
    Column("technique", "technique", lambda row: row.technique, is_number=False, is_wish=True),
    Column("workers", "workers", lambda row: str(row.workers), is_wish=True),
    Column("device", "device", lambda row: row.device, is_number=False, is_wish=True),
    Column("precision", "precision", lambda row: row.precision, is_number=False, is_wish=True),
    Column("samples_per_step", "samples\na step", lambda row: f"{row.samples_per_step:,}", is_wish=True),
    Column("steps", "steps", lambda row: _reached(row)),
    Column("epochs", "epochs", lambda row: _written(row.epochs, ".3g")),
    Column("seconds", "seconds", lambda row: _unless_oom(row, _written(row.seconds, ",.1f"))),
    Column("wall_seconds", "command\nseconds", lambda row: _written(row.wall_seconds, ",.0f")),
    Column("samples_per_second", "samples/s", lambda row: _unless_oom(row, significant(row.samples_per_second))),
    Column("tokens_per_second", "tokens/s", lambda row: _unless_oom(row, significant(row.tokens_per_second))),
    Column("mfu", "MFU", lambda row: _unless_oom(row, _written(row.mfu, ".1%"))),
    Column("peak_gib", "peak\nGiB", lambda row: _unless_oom(row, _written(row.peak_gib, ".2f"))),
    Column("planned_gib", "planned\nGiB", lambda row: _written(row.planned_gib, ".2f")),
    Column("train_loss", "training\nloss", lambda row: _unless_oom(row, _written(row.train_loss, ".4f"))),
    Column("eval_loss", "evaluation\nloss", lambda row: _unless_oom(row, _written(row.eval_loss, ".4f"))),
    Column("status", "status", lambda row: ended(row), is_number=False),
)


_MEASURED = ("seconds", "samples_per_second", "tokens_per_second", "mfu", "peak_gib", "train_loss", "eval_loss")  # while steps were taken


def ended(row: Row) -> str:
    """completed | out of memory | failed (NonFiniteError) | interrupted | unfinished"""
    if row.out_of_memory:
        return "out of memory"
    return f"failed ({row.error})" if row.status == "failed" else row.status


def significant(number: float | None) -> str:
    """13,091, 353, 69.2, 0.114: at least three digits that say something."""
    return _written(number, ",.0f" if number is not None and abs(number) >= 100 else ".3g")


def as_text(rows: Sequence[Row], notes: Sequence[str], width: int) -> RenderableType:
    """Aligned columns. Those that do not fit in `width` characters follow below, behind the runs' names again."""
    shared, columns = _without_shared(rows)
    parts: list[RenderableType] = [Text(shared)] if shared else []
    for page in _pages(rows, columns, width):
        parts += [_text_table(rows, page), Text()]
    return Group(*parts, *(Text(note, style="dim") for note in (LEGEND, *notes)))


def as_markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    shared, columns = _without_shared(rows)
    table = markdown_table(
        [column.header for column in columns],
        [[column.cell(row) for column in columns] for row in rows],
        [column.is_number for column in columns],
    )
    listed = "".join(f"- {note}\n" for note in (LEGEND, *notes))
    return (f"{shared}\n\n" if shared else "") + f"{table}\n{listed}"


def as_csv(rows: Sequence[Row]) -> str:
    """One line a run: numbers unrounded, nothing where they are not known. The status tells what ran out of memory."""
    text = io.StringIO()
    records = [record(row) for row in rows]
    writer = csv.DictWriter(text, [*(column.field for column in COLUMNS), "planned_steps"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def record(row: Row) -> dict[str, Any]:
    """For CSV and data frames. What was measured until memory ran out says nothing about the whole and stays away."""
    values = {column.field: getattr(row, column.field) for column in COLUMNS}
    if row.out_of_memory:
        values |= dict.fromkeys(_MEASURED)
    return values | {"status": ended(row), "planned_steps": row.planned_steps}


def markdown_table(headers: Sequence[str], cells: Sequence[Sequence[str]], is_number: Sequence[bool]) -> str:
    """Also aligned for those who read it as text."""
    lines = [[_in_line(cell).replace("|", "\\|") for cell in line] for line in (headers, *cells)]
    widths = [max(3, *map(cell_len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * (width - 1) + (":" if number else "-") for width, number in zip(widths, is_number, strict=True)]
    lines.insert(1, rule)
    return "".join(f"| {' | '.join(_filled(line, widths, is_number))} |\n" for line in lines)


def _filled(cells: Iterable[str], widths: Iterable[int], is_number: Iterable[bool]) -> list[str]:
    padded = []
    for cell, width, number in zip(cells, widths, is_number, strict=True):
        space = " " * (width - cell_len(cell))
        padded.append(space + cell if number else cell + space)
    return padded


def _without_shared(rows: Sequence[Row]) -> tuple[str, list[Column]]:
    """What was the same wish in all of several rows, as a sentence, and the columns that are left."""
    shared = [column for column in COLUMNS if column.is_wish and len(rows) > 1 and len({column.cell(row) for row in rows}) == 1]
    said = ", ".join(f"{_in_line(column.header)} {column.cell(rows[0])}" for column in shared)
    return (f"all runs: {said}" if shared else ""), [column for column in COLUMNS if column not in shared]


def _pages(rows: Sequence[Row], columns: Sequence[Column], width: int) -> list[list[Column]]:
    """The columns of each table that fits; all begin with the run's name, which is folded where it takes more than a third."""
    name, *rest = columns
    name_width = min(_width(rows, name), max(_NARROWEST_NAME, width // 3))
    pages, used = [[name]], name_width
    for column in rest:
        needed = _GAP + _width(rows, column)
        if len(pages[-1]) > 1 and used + needed > width:
            pages.append([name])
            used = name_width
        pages[-1].append(column)
        used += needed
    return pages


def _width(rows: Sequence[Row], column: Column) -> int:
    return max(cell_len(text) for text in (*column.header.split("\n"), *(column.cell(row) for row in rows)))


def _text_table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.is_number else "left"
        table.add_column(column.header, justify=justify, vertical="bottom", no_wrap=column is not COLUMNS[0], overflow="fold")
    for row in rows:
        table.add_row(*(Text(column.cell(row)) for column in columns))
    return table


def _in_line(text: str) -> str:
    return text.replace("\n", " ")


def _reached(row: Row) -> str:
    return f"{row.steps:,}" if row.steps == row.planned_steps else f"{row.steps:,} of {row.planned_steps:,}"


def _unless_oom(row: Row, text: str) -> str:
    return OOM if row.out_of_memory else text


def _written(number: float | None, how: str) -> str:
    return NOT_KNOWN if number is None else format(number, how)
