"""Templates: "translate to SQL: {question}", with columns in braces and nested fields as {sql[human_readable]}.

A doubled brace is a brace. A row's missing or null column is an error that names row and column, never the text "None".
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from trainkit.errors import DataError
from trainkit.recipe.schema import Recipe
from trainkit.recipe.wording import path_of, pieces_of

Read = TypeVar("Read")


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
    return Template(tuple(piece if isinstance(piece, str) else Field(piece[0], piece[1:]) for piece in _read(pieces_of, text, key)))


def parse_field(text: str, key: str) -> Field:
    """The one column of `label`, `{label}` or `{answers[text]}`; raises DataError for anything else."""
    column, *path = _read(path_of, text, key)
    return Field(column, tuple(path))


def _read(grammar: Callable[[str], Read], text: str, key: str) -> Read:
    try:
        return grammar(text)
    except ValueError as error:
        raise DataError(f"{key}: {error}") from None


def columns_of(recipe: Recipe) -> list[str]:
    """The columns that the recipe's form reads; raises DataError for a template that cannot be read."""
    data = recipe.data
    if isinstance(data.messages, str):
        return [parse_field(data.messages, "data.messages").column]
    if data.messages is not None:
        return list(dict.fromkeys(column for turn in data.messages for column in parse(turn.content, "data.messages").columns))
    if data.source is None and data.target is None:
        return ["input_ids", "labels"]
    sources = data.source if isinstance(data.source, list) else [data.source or ""]
    columns = [column for source in sources for column in parse(source, "data.source").columns]
    if recipe.model.task == "classification":
        return list(dict.fromkeys([*columns, parse_field(data.target or "", "data.target").column]))
    return list(dict.fromkeys([*columns, *parse(data.target or "", "data.target").columns]))


def check_columns(wanted: Sequence[str], present: Sequence[str], key: str) -> None:
    """Raises DataError naming the first wanted column that the data lacks, those that it has and the nearest."""
    for column in wanted:
        if column not in present:
            near = difflib.get_close_matches(column, present, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{key}: the data has no column {column!r}; it has {', '.join(present)}.{hint}", column=column)
