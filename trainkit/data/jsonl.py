"""JSON files as Python reads them: dates stay text, and a column's type is merged over all rows of all files.

datasets infers types from the first 10 MB: where a later row has another one, it refuses the file. Here whole numbers and fractions
become fractions, what is absent or null takes the other rows' type, and anything else that differs is kept value by value. Whole numbers
of more than 64 bits, for which Arrow has no type, become their digits as text, and so do the fractions of a column of several types, which
datasets would read back with other digits.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

_INT64 = 2**63
_MANY_DIGITS = re.compile("[1-9][0-9]{18,}")


def opened(file: Path) -> IO[str]:
    """As text; utf-8-sig leaves out the mark that some editors put first."""
    zipped = file.suffix.lower() == ".gz"
    return gzip.open(file, "rt", encoding="utf-8-sig") if zipped else file.open(encoding="utf-8-sig", newline="")


def loses_digits(file: Path) -> bool:
    """Whether datasets may keep fewer digits of a number than stand in this file: those of a list it rounds, those beyond 64 bits, too."""
    with opened(file) as stream:
        return any(line.lstrip().startswith("[") or any(map(_is_beyond, _MANY_DIGITS.findall(line))) for line in stream)


def _is_beyond(digits: str) -> bool:
    return len(digits) > 19 or int(digits) >= _INT64


def rows_of(files: list[str], features: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of files with one object a line, or one list of objects, or one object; with features, as datasets takes them in, and null
    for a column that a row lacks.

    Raises ValueError, naming the line, for what is no JSON and for a row that is no object.
    """
    for file in files:
        with opened(Path(file)) as stream:
            for number, row in _values(stream):
                if not isinstance(row, dict):
                    raise ValueError(f"line {number}: a row is an object in braces, not {json.dumps(row)[:60]}")
                yield row if features is None else {name: _as(feature, row.get(name)) for name, feature in features.items()}


def _values(stream: IO[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        whole = line.strip() == "{" or line.lstrip().startswith("[")
        if line.strip():
            found = _parsed(line + stream.read() if whole else line, number)
            yield from ((number, row) for row in found) if whole and isinstance(found, list) else [(number, found)]


def _parsed(text: str, line: int) -> Any:
    try:
        return json.loads(text.rstrip(" \t\r\n"))  # what is torn off ends on its own line
    except json.JSONDecodeError as error:
        raise ValueError(f"line {line + error.lineno - 1}: not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"line {line}: nested too deeply") from None


def _as(feature: Any, value: Any) -> Any:
    """Json's own reader takes a text that happens to be JSON for what it says: here it gets JSON of the text."""
    import datasets

    if isinstance(feature, datasets.Json) and value is not None:
        return json.dumps(_with_digits_as_text(value))
    if isinstance(feature, datasets.List) and value is not None:
        return [_as(feature.feature, item) for item in value]
    if isinstance(feature, dict) and value is not None:
        return {key: _as(inner, value.get(key)) for key, inner in feature.items()}
    return value


def _with_digits_as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_digits_as_text(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_digits_as_text(item) for key, item in value.items()}
    return json.dumps(value) if isinstance(value, float) or _is_long(value) else value


def _is_long(value: Any) -> bool:
    return isinstance(value, int) and not -_INT64 <= value < _INT64


def merged_features(files: list[str]) -> dict[str, Any]:
    """The columns over all rows, in the order in which they are met, with their merged types."""
    features: dict[str, Any] = {}
    for row in rows_of(files):
        for column, value in row.items():
            found = _feature_of(value)
            features[column] = _merged(features[column], found) if column in features else found
    return features


def _feature_of(value: Any) -> Any:
    import datasets

    if isinstance(value, list):
        inner: Any = datasets.Value("null")
        for item in value:
            inner = _merged(inner, _feature_of(item))
        return datasets.List(inner)
    if isinstance(value, dict) and value:
        return {key: _feature_of(item) for key, item in value.items()}
    if _is_long(value):
        return datasets.Json()
    names = {type(None): "null", bool: "bool", int: "int64", float: "float64", str: "string"}
    return datasets.Value(names[type(value)]) if type(value) in names else datasets.Json()


def _merged(one: Any, other: Any) -> Any:
    import datasets

    null = datasets.Value("null")
    if one == other or other == null:
        return one
    if one == null:
        return other
    if isinstance(one, datasets.Value) and isinstance(other, datasets.Value) and {one.dtype, other.dtype} == {"int64", "float64"}:
        return datasets.Value("float64")
    if isinstance(one, datasets.List) and isinstance(other, datasets.List):
        return datasets.List(_merged(one.feature, other.feature))
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return {key: _merged(one[key], other[key]) for key in one}
    return datasets.Json()
