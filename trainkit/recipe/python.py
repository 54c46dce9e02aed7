"""A recipe's values as Python gives them, made as plain as YAML's: mappings, lists, text, numbers, true, false, null."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from trainkit.errors import Fault
from trainkit.recipe.document import Document, KeyPath, Place


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
