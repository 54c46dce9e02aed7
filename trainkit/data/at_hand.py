"""Rows that a notebook holds, written once to where a recipe's data.path can point: workers are other processes.

The folder is named after the content, so the same rows are the same data.path: nothing is written twice, and a run goes on with them.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit.data.files import reason
from trainkit.errors import DataError

_HASHED_ROWS = 1000  # at a time


def save_rows(data: Any, cache: Path) -> Path:
    """A save_to_disk folder in `cache`: of one set of rows, which is the split train, or of a mapping of splits to sets.

    A set is a datasets.Dataset, a pandas frame or a list of rows as mappings. Raises DataError for anything else, for a set without
    rows, for rows of different columns and for columns of different types.
    """
    import datasets

    datasets.disable_progress_bars()
    if isinstance(data, Mapping):
        if not data:
            raise DataError("data: a dict without splits: write for example {'train': rows}")
        splits = {str(name): _dataset(part, f"data[{name!r}]") for name, part in data.items()}
        saved: Any = datasets.DatasetDict(splits)
    else:
        saved = _dataset(data, "data")
        splits = {"": saved}
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / _content(splits)
    if not folder.is_dir():
        beside = Path(tempfile.mkdtemp(prefix=".writing-", dir=cache))
        try:
            saved.save_to_disk(str(beside))
            _move(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def _dataset(rows: Any, name: str) -> Any:
    made = _made(rows, name)
    if not len(made):
        raise DataError(f"{name}: there are no rows" + ("" if name == "data" else ": leave this split out"))
    return made


def _made(rows: Any, name: str) -> Any:
    import datasets
    import pandas

    if isinstance(rows, datasets.Dataset):
        return rows.with_format(None)
    try:
        if isinstance(rows, pandas.DataFrame):
            return datasets.Dataset.from_pandas(rows, preserve_index=False)
        if isinstance(rows, Sequence) and not isinstance(rows, str) and all(isinstance(row, Mapping) for row in rows):
            _check_columns(rows, name)
            return datasets.Dataset.from_list([dict(row) for row in rows])
    except (ValueError, TypeError) as error:  # of pyarrow
        raise DataError(f"{name}: the rows cannot be made a table: {reason(error)}") from None
    raise DataError(
        f"{name}: a {type(rows).__name__} is no set of rows: give a datasets.Dataset, a pandas frame, a list of dicts, "
        "or a dict of splits to one of these"
    )


def _check_columns(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """`datasets` takes the first row's columns and drops what other rows have beside them."""
    for number, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            missing, more = rows[0].keys() - row.keys(), row.keys() - rows[0].keys()
            said = [f"lacks {', '.join(sorted(map(str, missing)))}"] if missing else []
            said += [f"has {', '.join(sorted(map(str, more)))} beside them"] if more else []
            raise DataError(f"{name}: row {number} {' and '.join(said)}, the columns of row 0 being {', '.join(map(str, rows[0]))}")


def _content(splits: Mapping[str, Any]) -> str:
    """A hash of names, types and cells. Equal cells that Arrow lays out otherwise may differ in it, which costs a second copy."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, rows in splits.items():
        hashed.update(f"{name!r} {rows.features!r} {len(rows)}".encode())
        for table in rows.with_format("arrow").iter(_HASHED_ROWS):
            for batch in table.combine_chunks().to_batches():
                hashed.update(batch.serialize())
    return hashed.hexdigest()


def _move(beside: Path, folder: Path) -> None:
    """Another process may have been faster: then its folder holds the same."""
    try:
        beside.replace(folder)
    except OSError:
        if not folder.is_dir():
            raise
