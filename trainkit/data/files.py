"""Local files to rows: .json .jsonl .csv .parquet, also .gz, read through `datasets` into an Arrow file under a cache folder.

Three habits of its readers would change the data unseen and are kept out:
- a file is known to them by path and time of change; here the cache folder is named after a hash of the bytes, so that new content
  under an old date is read anew;
- texts that look like dates become timestamps ("2020-01-01" would be learned as "2020-01-01 00:00:00"); they stay text;
- csv cells become numbers and words such as NA become null ("007" would be 7.0); here a cell is the text that stands there, an empty
  one is null.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from trainkit.errors import DataError

READERS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
ENDINGS = ", ".join(f".{ending}" for ending in READERS) + " (.gz too)"
_HASHED_BYTES = 1 << 22


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


def read_files(files: Sequence[Path], cache: Path, key: str) -> Any:
    """A datasets.Dataset of all rows, files in the given order. `key` is the recipe's key that asks for them.

    Raises DataError for files of several kinds, an unreadable or broken one (named), files that do not fit together, and no rows at all.
    """
    kind = _kind(files, key)
    folder = cache / _content_hash(files, key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"run.storage_path: {cache}: the data cache cannot be written: {error.strerror}") from None
    try:
        return _read(kind, files, folder)
    except Exception as error:  # datasets wraps each reader's errors in its own
        if _says_empty(error):
            raise DataError(f"{key}: the data set is empty: {_names(files)} holds no rows") from None
        file = _first_broken(kind, files, folder)
        what = f"{_names(files)} do not fit together" if file is None else f"cannot read {file}"
        raise DataError(f"{key}: {what}: {reason(error)}", file=str(file or files[0])) from None


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
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(_HASHED_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise DataError(f"{key}: cannot read {file}: {error.strerror}", file=str(file)) from None
        digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
    return digest.hexdigest()


def _read(kind: str, files: Sequence[Path], folder: Path) -> Any:
    import datasets

    more: dict[str, Any] = {}
    if kind == "csv":
        more = {"features": _text_columns(files[0]), "keep_default_na": False, "na_values": [""]}
    paths = [glob.escape(str(file)) for file in files]  # datasets reads a path as a glob
    rows = datasets.load_dataset(kind, data_files={"rows": paths}, split="rows", cache_dir=str(folder), **more)
    if kind != "json":
        return rows
    as_text = _dates_as_text(rows.features)
    if as_text == rows.features:
        return rows
    return datasets.Dataset.from_generator(
        _json_rows, features=datasets.Features(as_text), cache_dir=str(folder), gen_kwargs={"files": [str(file) for file in files]}
    )


def _text_columns(file: Path) -> Any:
    import datasets

    with _opened(file) as stream:
        return datasets.Features({name: datasets.Value("string") for name in next(csv.reader(stream))})


def _dates_as_text(feature: Any) -> Any:
    """The same feature with text where the reader saw dates or times."""
    import datasets

    if isinstance(feature, dict):
        return {name: _dates_as_text(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(_dates_as_text(feature.feature))
    is_date = isinstance(feature, datasets.Value) and feature.dtype.startswith(("timestamp", "date", "time"))
    return datasets.Value("string") if is_date else feature


def _json_rows(files: list[str]) -> Iterator[dict[str, Any]]:
    """Rows as Python's json reads them: one object a line, or one list of objects."""
    for file in files:
        with _opened(Path(file)) as stream:
            start = stream.readline()
            if start.lstrip().startswith("["):
                yield from json.loads(start + stream.read())
            else:
                yield from (json.loads(line) for line in (start, *stream) if line.strip())


def _opened(file: Path) -> IO[str]:
    """As text; utf-8-sig leaves out the mark that some editors put first."""
    zipped = file.suffix.lower() == ".gz"
    return gzip.open(file, "rt", encoding="utf-8-sig") if zipped else file.open(encoding="utf-8-sig", newline="")


def _says_empty(error: BaseException) -> bool:
    """How the readers put it that there are no rows."""
    return isinstance(error, StopIteration) or "corresponds to no data" in str(error)


def _first_broken(kind: str, files: Sequence[Path], folder: Path) -> Path | None:
    """The first file that cannot be read by itself."""
    for file in files:
        try:
            _read(kind, [file], folder)
        except Exception as error:
            if not _says_empty(error):
                return file
    return None
