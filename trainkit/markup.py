"""What the terminal prints, for a notebook: rich's tables and texts as HTML, or as plain lines."""

from __future__ import annotations

import io
from html import escape

from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

_COLOURS = {"yellow": "#b58900", "green": "#2a8f3c", "red": "#c0392b"}


def plain(shown: RenderableType, width: int = 100) -> str:
    """Lines of at most `width` characters without control codes."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False, no_color=True, force_jupyter=False)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def html(shown: RenderableType) -> str:
    """Tables as tables, texts as paragraphs, groups one after the other. Raises TypeError for anything else."""
    if isinstance(shown, Group):
        return "\n".join(html(part) for part in shown.renderables)
    if isinstance(shown, Table):
        return _table(shown)
    if isinstance(shown, str | Text):
        return f"<div>{_words(shown)}</div>"
    raise TypeError(f"no HTML for a {type(shown).__name__}")


def _table(table: Table) -> str:
    columns = list(table.columns)
    rows = zip(*(column.cells for column in columns), strict=True)
    head = ""
    if table.show_header:
        head = "".join(f'<th style="text-align:{column.justify};{_css(column.style)}">{_words(column.header)}</th>' for column in columns)
    lines = [f"<tr>{head}</tr>"] if head else []
    for row, cells in zip(table.rows, rows, strict=True):
        cell_style = [f"text-align:{column.justify};{_css(column.style)}{_css(row.style)}" for column in columns]
        lines.append(
            "<tr>" + "".join(f'<td style="{style}">{_words(cell)}</td>' for style, cell in zip(cell_style, cells, strict=True)) + "</tr>"
        )
    return "<table>" + "\n".join(lines) + "</table>"


def _words(cell: RenderableType) -> str:
    """The text of a cell; the spaces that indent it in a terminal are left out."""
    text = cell if isinstance(cell, Text) else Text.from_markup(str(cell))
    words = "<br>".join(escape(line.strip()) for line in text.plain.split("\n"))
    css = _css(text.style)
    return f'<span style="{css}">{words}</span>' if css else words


def _css(style: str | Style | None) -> str:
    parsed = style if isinstance(style, Style) else Style.parse(style or "")
    colour = _COLOURS.get(parsed.color.name) if parsed.color is not None else None
    rules = [f"color:{colour};" if colour else "", "font-weight:bold;" if parsed.bold else "", "opacity:0.65;" if parsed.dim else ""]
    return "".join(rules)
