"""A recipe's values as Python gives them, made as plain as YAML's: mappings, lists, text, numbers, true, false, null."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from trainkit.errors import Fault, UsageError
from trainkit.recipe.document import Document, KeyPath, Place
from trainkit.recipe.schema import Recipe


def check_kinds(source: Any, changes: Any) -> None:
    """Raises UsageError for a source or changes of a kind that no recipe is made of."""
    if not isinstance(source, str | os.PathLike | Mapping | Recipe):
        raise UsageError(f"recipe: write a file, a mapping of sections or a Recipe, not {_kind(source)}")
    listed = isinstance(changes, Sequence) and not isinstance(changes, str | bytes) and all(isinstance(change, str) for change in changes)
    if not listed and not isinstance(changes, Mapping):
        raise UsageError(
            f'changes of a recipe: write a mapping such as {{"batch.samples": 64}}, or a list of "key=value", not {_kind(changes)}'
        )


def document_of(values: Mapping[Any, Any], file: str) -> Document:
    """A mapping of sections as a document. `file` names it in messages."""
    document = Document(file)
    for key, value in _plain(values, (), document).items():
        document.put((key,), value, Place(file))
    return document


def put_changes(document: Document, changes: Mapping[Any, Any], file: str) -> None:
    """Dotted keys and their values, as `--set` puts them."""
    for key, value in changes.items():
        path = tuple(part.strip() for part in str(key).split("."))
        if not all(path):
            document.faults.append(Fault(file, None, str(key), 'write a key as "section.key"'))
        else:
            document.put(path, _plain(value, path, document), Place(file, override=True))


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


def _plain(value: Any, path: KeyPath, document: Document) -> Any:
    """A copy in YAML's types. What has none stays as it is, and the check of its key refuses it."""
    if isinstance(value, Mapping):
        document.faults += [
            Fault(document.file, None, ".".join(path), f"the key {key!r} must be text") for key in value if not isinstance(key, str)
        ]
        return {str(key): _plain(item, (*path, str(key)), document) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, path, document) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, Integral):  # numpy's numbers, of a sweep
        return int(value)
    return float(value) if isinstance(value, Real) else value
