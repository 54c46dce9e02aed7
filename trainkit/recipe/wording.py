"""The grammar of templates: text with columns in braces, nested fields as {sql[human_readable]}, a doubled brace for a brace.

The recipe's checks ask it whether a template can be read; data/templates.py makes text of rows with it.
"""

from __future__ import annotations

import re

ColumnPath = tuple[str, ...]  # a column, then the way into it

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")


def pieces_of(text: str) -> list[str | ColumnPath]:
    """Text and columns in turn; raises ValueError for a brace that is not closed or holds no column."""
    pieces: list[str | ColumnPath] = []
    end = 0
    for match in _PIECE.finditer(text):
        pieces.append(text[end : match.start()])
        end = match.end()
        if match[0] in ("{{", "}}"):
            pieces.append(match[0][0])
        elif match[1] is not None and (field := _FIELD.fullmatch(match[1].strip())):
            pieces.append((field[1].strip(), *re.findall(r"\[([^\[\]]+)\]", field[2])))
        else:
            raise ValueError(f"{text!r}: {match[0]!r} is no column in braces; write a brace itself as '{{{{' or '}}}}'")
    return [piece for piece in [*pieces, text[end:]] if piece != ""]


def path_of(text: str) -> ColumnPath:
    """The one column of `label`, `{label}` or `{answers[text]}`; raises ValueError for anything else."""
    pieces = pieces_of(text if "{" in text else f"{{{text}}}")
    if len(pieces) != 1 or isinstance(pieces[0], str):
        raise ValueError(f"{text!r}: name one column, for example label or {{label}}")
    return pieces[0]
