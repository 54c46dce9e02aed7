"""Templates: "translate to SQL: {question}", with columns in braces and nested fields as {sql[human_readable]}.

A doubled brace is a brace. A row's missing or null column is an error that names row and column, never the text "None".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainkit.errors import DataError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")


@dataclass(frozen=True)
class Field:
    """One column, and the way into it."""

    column: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.column + "".join(f"[{part}]" for part in self.path)

    def of(self, row: Mapping[str, Any], number: int) -> Any:
        """The value in a row; raises DataError naming the row where it is null (also not a number) or not there."""
        value = row[self.column]
        for part in self.path:
            if isinstance(value, Sequence) and not isinstance(value, str) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, Mapping) and part in value:
                value = value[part]
            else:
                raise DataError(f"row {number}: {self}: there is no {part!r} in {str(value)[:60]!r}", row=number, column=self.column)
        if value is None or value != value:
            raise DataError(
                f"row {number}: column {self} is null. Fill it or leave the row out of the data", row=number, column=self.column
            )
        return value

    def text_of(self, row: Mapping[str, Any], number: int) -> str:
        """The value as text; raises DataError for a list, a mapping or bytes, whose Python spelling nobody wants to learn."""
        value = self.of(row, number)
        if isinstance(value, (Mapping, list, bytes)):
            field = f": name one of its fields, for example {{{self}[{next(iter(value))}]}}" if value and isinstance(value, Mapping) else ""
            raise DataError(f"row {number}: column {self} holds a {type(value).__name__}, not text{field}", row=number, column=self.column)
        return str(value)


@dataclass(frozen=True)
class Template:
    """Text pieces and fields in turn."""

    pieces: tuple[str | Field, ...]

    @property
    def columns(self) -> list[str]:
        return [piece.column for piece in self.pieces if isinstance(piece, Field)]

    def of(self, row: Mapping[str, Any], number: int) -> str:
        return "".join(piece if isinstance(piece, str) else piece.text_of(row, number) for piece in self.pieces)


def parse(text: str, key: str) -> Template:
    """Raises DataError naming the recipe's key for a brace that is not closed or holds no column."""
    pieces: list[str | Field] = []
    end = 0
    for match in _PIECE.finditer(text):
        pieces.append(text[end : match.start()])
        end = match.end()
        if match[0] in ("{{", "}}"):
            pieces.append(match[0][0])
        elif match[1] is not None and (field := _FIELD.fullmatch(match[1].strip())):
            pieces.append(Field(field[1].strip(), tuple(re.findall(r"\[([^\[\]]+)\]", field[2]))))
        else:
            raise DataError(f"{key}: {text!r}: {match[0]!r} is no column in braces; write a brace itself as '{{{{' or '}}}}'")
    return Template(tuple(piece for piece in [*pieces, text[end:]] if piece != ""))


def parse_field(text: str, key: str) -> Field:
    """The one column of `label`, `{label}` or `{answers[text]}`; raises DataError for anything else."""
    pieces = parse(text if "{" in text else f"{{{text}}}", key).pieces
    if len(pieces) != 1 or not isinstance(pieces[0], Field):
        raise DataError(f"{key}: {text!r}: name one column, for example label or {{label}}")
    return pieces[0]


def check_columns(wanted: Sequence[str], present: Sequence[str], key: str) -> None:
    """Raises DataError naming the first wanted column that the data lacks, those that it has and the nearest."""
    for column in wanted:
        if column not in present:
            near = difflib.get_close_matches(column, present, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{key}: the data has no column {column!r}; it has {', '.join(present)}.{hint}", column=column)
