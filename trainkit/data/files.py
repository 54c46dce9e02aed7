"""Local files to rows: .json .jsonl .csv .parquet, also .gz, read through `datasets` into an Arrow file under a cache folder.

Four habits of its readers would change the data unseen and are kept out:
- a file is known to them by path and time of change; here the cache folder is named after a hash of the bytes, so that new content
  under an old date is read anew;
- texts that look like dates become timestamps ("2020-01-01" would be learned as "2020-01-01 00:00:00"); they stay text;
- in a JSON column of several types a text such as "0042" becomes 42, whole numbers of more than 64 bits become fractions, and fractions
  in a list lose digits; texts stay texts, and digits stay (jsonl.py);
- csv cells become numbers and words such as NA become null ("007" would be 7.0); here a cell is the text that stands there, an empty
  one is null, and a row with too many cells is an error.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import glob
import gzip
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainkit.data import jsonl
from trainkit.data.arrays import crc32_of
from trainkit.errors import DataError
from trainkit.runs.files import write_whole

READERS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
ENDINGS = ", ".join(f".{ending}" for ending in READERS) + " (.gz too)"
_FORMAT = 2  # of the cache: another one wherever the same bytes become other rows
_HASHED_BYTES = 1 << 22
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_LONGEST_CELL = 1 << 30  # characters; Python's own limit is 131,072
_CHECKSUMS = "checksums.json"  # in a cache folder, last: crc32 of the rows that lie there
_OTHER_WAY = "other_way.json"  # in a cache folder: the files were not read at once; of JSON files it holds the columns


def reader_of(file: Path) -> str | None:
    """Which reader a file's ending asks for; None for an ending that has none."""
    parts = file.name.lower().split(".")
    ending = parts[-2] if parts[-1] == "gz" and len(parts) > 2 else parts[-1]
    return READERS.get(ending)


def stem_of(file: Path) -> str:
    """The name without its ending and .gz: `train` of train.jsonl.gz."""
    name = file.name[:-3] if file.name.lower().endswith(".gz") else file.name
    return name.rpartition(".")[0] or name


def is_pattern(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def globbed(path: str) -> list[Path]:
    """Files of a glob, sorted by path; empty for a path without wildcards."""
    found = glob.glob(path, recursive=True) if is_pattern(path) else []  # noqa: PTH207 -- the pattern may be absolute
    return sorted(Path(name) for name in found if Path(name).is_file())


def read_files(files: Sequence[Path], cache: Path, key: str, wanted: Sequence[str] = ()) -> Any:
    """A datasets.Dataset of all rows, files in the given order. `key` is the recipe's key that asks for them, `wanted` its columns.

    Files may differ in columns that are not wanted. Raises DataError for files of several kinds, an unreadable or broken one (named),
    files that do not fit together, and no rows at all.
    """
    kind = _kind(files, key)
    folder = cache / _content_hash(files, key)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second finds the rows read
            rows = _from_cache(kind, files, folder, wanted)
            return _read_anew(kind, files, folder, key, wanted) if rows is None else rows
    except OSError as error:
        raise DataError(f"run.storage_path: {cache}: the data cache cannot be written: {error.strerror}") from None


def _from_cache(kind: str, files: Sequence[Path], folder: Path, wanted: Sequence[str]) -> Any | None:
    """The rows of an earlier read; None, and no cache, where there is none or it is damaged."""
    if folder.exists():
        try:
            written = json.loads((folder / _CHECKSUMS).read_text("utf-8"))
            if any(crc32_of(folder / name) != crc for name, crc in written.items()):
                raise ValueError("damaged")
            return _read(kind, files, folder, wanted, fresh=False)
        except Exception:
            shutil.rmtree(folder)
    return None


def _read_anew(kind: str, files: Sequence[Path], folder: Path, key: str, wanted: Sequence[str]) -> Any:
    if kind == "csv":
        for file in files:
            _check_csv(file, key)
    folder.mkdir()  # after the check: rows that lie in the cache are not checked again
    try:
        rows = _read(kind, files, folder, wanted, fresh=True)
        write_whole(folder / _CHECKSUMS, json.dumps(_checksums(folder)))
        return rows
    except Exception as error:  # datasets wraps each reader's errors in its own
        if (full := _full_disk(error)) is not None:
            raise full from None
        if _says_empty(error):
            raise DataError(f"{key}: the data set is empty: {_names(files)} holds no rows") from None
        if broken := _first_broken(kind, files, folder):
            raise DataError(f"{key}: cannot read {broken[0]}: {reason(broken[1])}", file=str(broken[0])) from None
        raise DataError(f"{key}: {_names(files)} do not fit together: {reason(error)}", file=str(files[0])) from None


def _checksums(folder: Path) -> dict[str, int]:
    """crc32 of the rows that lie there."""
    return {str(path.relative_to(folder)): crc32_of(path) for path in sorted(folder.rglob("*.arrow"))}


def reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    cause = error.__cause__ or error
    return (" ".join(str(cause).split()) or type(cause).__name__)[:300]


def _kind(files: Sequence[Path], key: str) -> str:
    kinds = {file: reader_of(file) for file in files}
    for file, kind in kinds.items():
        if kind is None:
            raise DataError(f"{key}: {file}: no reader for this ending; readable are {ENDINGS}")
    if len(set(kinds.values())) > 1:
        raise DataError(f"{key}: files of several kinds in one split: {_names(files)}; name those of one kind")
    return next(kind for kind in kinds.values() if kind is not None)


def _names(files: Sequence[Path]) -> str:
    return ", ".join(str(file) for file in files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")


def _content_hash(files: Sequence[Path], key: str) -> str:
    digest = hashlib.blake2b(str(_FORMAT).encode(), digest_size=16)
    for file in files:
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(_HASHED_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise DataError(f"{key}: cannot read {file}: {error.strerror}", file=str(file)) from None
        digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
    return digest.hexdigest()


def _read(kind: str, files: Sequence[Path], folder: Path, wanted: Sequence[str], fresh: bool) -> Any:
    """All files at once by the reader of datasets; where it refuses or changes them, another way, which is marked in the cache folder."""
    if not (folder / _OTHER_WAY).exists():
        try:
            rows = _at_once(kind, files, folder)
            if kind != "json" or not fresh or not _changes_values(rows.features, files):
                return rows
        except Exception as error:
            if not fresh or _says_empty(error) or _full_disk(error) or (kind != "json" and len(files) == 1):
                raise
    return _as_written(files, folder) if kind == "json" else _one_by_one(kind, files, folder, wanted)


def _at_once(kind: str, files: Sequence[Path], folder: Path) -> Any:
    import datasets

    more: dict[str, Any] = {}
    if kind == "csv":
        more = {"features": _text_columns(files[0]), "keep_default_na": False, "na_values": [""], "index_col": False}
    if kind == "parquet":
        files = [_unpacked(file, folder) for file in files]
    paths = [glob.escape(str(file)) for file in files]  # datasets reads a path as a glob
    rows = datasets.load_dataset(kind, data_files={"rows": paths}, split="rows", cache_dir=str(folder), **more)
    if kind != "json":
        return rows
    as_text = _dates_as_text(rows.features)
    return rows if as_text == rows.features else _generated(files, folder, datasets.Features(as_text))


def _unpacked(file: Path, folder: Path) -> Path:
    """A .parquet.gz unpacked into the cache folder: its readers need places to jump to."""
    if file.suffix.lower() != ".gz":
        return file
    plain = folder / f"{hashlib.blake2b(str(file).encode(), digest_size=8).hexdigest()}.parquet"
    if not plain.exists():
        folder.mkdir(exist_ok=True)
        with gzip.open(file) as packed, plain.with_suffix(".part").open("wb") as out:
            shutil.copyfileobj(packed, out)
        plain.with_suffix(".part").rename(plain)
    return plain


def _as_written(files: Sequence[Path], folder: Path) -> Any:
    import datasets

    mark = folder / _OTHER_WAY
    if mark.exists():
        return _generated(files, folder, datasets.Features.from_dict(json.loads(mark.read_text())))
    features = datasets.Features(jsonl.merged_features([str(file) for file in files]))
    rows = _generated(files, folder, features)
    mark.write_text(json.dumps(features.to_dict()))
    return rows


def _generated(files: Sequence[Path], folder: Path, features: Any) -> Any:
    import datasets

    found = {"files": [str(file) for file in files], "features": features}
    return datasets.Dataset.from_generator(jsonl.rows_of, features=features, cache_dir=str(folder), gen_kwargs=found)


def _one_by_one(kind: str, files: Sequence[Path], folder: Path, wanted: Sequence[str]) -> Any:
    """The wanted columns of each file, one after the other; raises ValueError for a file that lacks one."""
    import datasets

    parts = {}
    for number, file in enumerate(files):
        try:
            parts[file] = _at_once(kind, [file], folder / str(number))
        except Exception as error:
            if not _says_empty(error):
                raise
    kept = [column for column in (*wanted, "attention_mask") if all(column in part.column_names for part in parts.values())]
    for file, part in parts.items():
        if lacking := [column for column in wanted if column not in part.column_names]:
            raise ValueError(f"{file.name} has no column {lacking[0]}; it has {', '.join(part.column_names)}")
    rows = datasets.concatenate_datasets([part.select_columns(kept) for part in parts.values()])
    (folder / _OTHER_WAY).write_text("{}")
    return rows


def _text_columns(file: Path) -> Any:
    """Columns of a csv file; one without a name is named as pandas does."""
    import datasets

    with jsonl.opened(file) as stream:
        header = next(csv.reader(stream))
    return datasets.Features({name or f"Unnamed: {place}": datasets.Value("string") for place, name in enumerate(header)})


def _check_csv(file: Path, key: str) -> None:
    """Raises DataError, naming the line, for two columns of one name and for a row with more cells than there are columns.

    pandas would take the first of the two, and would make an index of the first cells, so that all columns shift.
    """
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with jsonl.opened(file) as stream:
            rows = csv.reader(stream)
            header = next(rows, None)
            if header == []:
                raise DataError(f"{key}: {file}:1: the line is empty: the names of the columns belong there", file=str(file))
            header = header or []
            if twice := [name for name, times in Counter(header).items() if name and times > 1]:
                raise DataError(f"{key}: {file}:1: the column {twice[0]} stands twice: rename one", file=str(file))
            for row in rows:
                if len(row) > len(header):
                    cells = f"{len(row)} cells in a row, and the header names {len(header)} columns"
                    raise DataError(f"{key}: {file}:{rows.line_num}: {cells}: quote a cell that holds a comma", file=str(file))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{key}: cannot read {file}: {reason(error)}", file=str(file)) from None


def _dates_as_text(feature: Any) -> Any:
    """The same feature with text where the reader saw dates or times."""
    import datasets

    if isinstance(feature, dict):
        return {name: _dates_as_text(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(_dates_as_text(feature.feature))
    is_date = isinstance(feature, datasets.Value) and feature.dtype.startswith(("timestamp", "date", "time"))
    return datasets.Value("string") if is_date else feature


def _changes_values(features: Any, files: Sequence[Path]) -> bool:
    """Whether the JSON reader of datasets made other values of some than stand in the files: see the module."""
    import datasets

    def kinds(feature: Any) -> Iterator[Any]:
        if isinstance(feature, datasets.List):
            yield from kinds(feature.feature)
        elif isinstance(feature, dict):
            for inner in feature.values():
                yield from kinds(inner)
        else:
            yield feature

    found = list(kinds(features))
    has_fractions = any(isinstance(kind, datasets.Value) and kind.dtype.startswith("float") for kind in found)
    return any(isinstance(kind, datasets.Json) for kind in found) or (has_fractions and any(map(jsonl.loses_digits, files)))


def _full_disk(error: BaseException | None) -> OSError | None:
    """The error itself, or one that led to it, that says that nothing more can be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_IS_FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


def _says_empty(error: BaseException) -> bool:
    """How the readers put it that there are no rows."""
    return isinstance(error, StopIteration) or "corresponds to no data" in str(error)


def _first_broken(kind: str, files: Sequence[Path], folder: Path) -> tuple[Path, Exception] | None:
    """The first file that cannot be read by itself, and why."""
    for number, file in enumerate(files):
        try:
            _read(kind, [file], folder / f"alone-{number}", (), fresh=True)
        except Exception as error:
            if not _says_empty(error):
                return file, error
    return None
