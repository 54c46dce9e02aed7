"""A document as plain values in which every key path knows its file and line, so that each fault can say where it stands.

The YAML reader (reader.py) and the ZeRO reader (zero.py) fill it; the checks read it.
JSON is read here, because the json module keeps no lines.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainkit.errors import Fault

KeyPath = tuple[str, ...]

_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+)')


@dataclass(frozen=True)
class Place:
    """Where a key stands: a file (or `--set a.b=c`, `with_`) and a line counted from 1. `override`: put there by one of those two."""

    file: str
    line: int | None = None
    override: bool = False


@dataclass
class Document:
    """Values, the place of each key path, and what was wrong with the text itself (duplicate keys)."""

    file: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """The place of a key, or of the nearest section around it when the key itself is absent."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return Place(self.file)

    def fault(self, path: KeyPath, message: str) -> Fault:
        place = self.place(path)
        return Fault(place.file, place.line, ".".join(path), message)

    def get(self, path: KeyPath) -> Any:
        """The value at a key path, in which items of lists stand by their number; None where the path leads nowhere."""
        value: Any = self.values
        for key in path:
            if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, dict) and key in value:
                value = value[key]
            else:
                return None
        return value

    def put(self, path: KeyPath, value: Any, place: Place) -> None:
        """Set a key. Absent and null sections on the way are made; anything else on the way is a fault."""
        section = self.values
        for length, part in enumerate(path[:-1], 1):
            if section.get(part) is None:
                section[part] = {}
                self.places[path[:length]] = place
            section = section[part]
            if not isinstance(section, dict):
                self.faults.append(Fault(place.file, None, ".".join(path), f"{'.'.join(path[:length])} is a value, not a section"))
                return
        for old in [known for known in self.places if known[: len(path)] == path]:
            del self.places[old]
        section[path[-1]] = value
        self.places |= dict.fromkeys(_key_paths(value, path), place)

    def find(self, name: str) -> list[KeyPath]:
        """All key paths that end in this name."""
        return [path for path in self.places if path[-1] == name]


def _key_paths(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """This key, and all keys and items in its value."""
    yield path
    inner = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    for key, item in inner.items():
        yield from _key_paths(item, (*path, str(key)))


def in_shell(path: KeyPath, value: Any) -> str:
    """`key=value` behind --set, for YAML and for the shell."""
    return shlex.quote(f"{'.'.join(path)}={json.dumps(value, ensure_ascii=False)}")


def dotted(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Sections in sections as one mapping of dotted keys; an empty section stays a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= dotted(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return flat


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word with the nearest spelling, or None when nothing is near."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean x?)` or nothing."""
    near = nearest(word, known)
    return f" (did you mean {near}?)" if near else ""


def shown(value: Any) -> str:
    """A value as one would write it in the file, shortened."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(text: str, file: str) -> Document:
    """JSON with lines and duplicate keys. A syntax error and a document that is no object are faults of the document."""
    document = Document(file)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        document.faults.append(Fault(file, error.lineno, "", f"not JSON: {error.msg} (column {error.colno})"))
        return document
    except RecursionError:
        document.faults.append(Fault(file, None, "", "not readable: nested too deeply"))
        return document
    if not isinstance(values, dict):
        document.faults.append(Fault(file, 1, "", f"expected an object in braces, given {shown(values)}"))
        return document
    document.values = values
    _note_json_lines(text, document)
    return document


def _note_json_lines(text: str, document: Document) -> None:
    """Walk over the tokens of valid JSON: a string that a colon follows is a key."""
    tokens = [(match[1], text.count("\n", 0, match.start(1)) + 1) for match in _TOKEN.finditer(text)]
    stack: list[str | None] = []  # the key under which each open bracket stands; None inside lists and at the top
    key: str | None = None
    lists = 0  # how many are open
    for (token, line), (following, _) in zip(tokens, [*tokens[1:], ("", 0)], strict=True):
        lists += {"[": 1, "]": -1}.get(token, 0)
        if token in "{[":
            stack.append(key)
            key = None
        elif token in "}]":
            stack.pop()
        elif following == ":":
            key = json.loads(token)
            if not lists:  # the objects of a list may well have the same keys
                note_key(document, (*(outer for outer in stack if outer is not None), str(key)), line)
        elif token == ",":
            key = None


def note_key(document: Document, path: KeyPath, line: int) -> None:
    """Remember where a key stands; a second one of the same name is a fault."""
    if path in document.places:
        message = f"stands twice (first on line {document.places[path].line}): keep one"
        document.faults.append(Fault(document.file, line, ".".join(path), message))
        return
    document.places[path] = Place(document.file, line)
