"""Rows from where the recipe says: a hub id, a folder, a save_to_disk folder, a file, a glob or a list of files.

Files are sorted by path and rows stay in file order, so a row's number is its id. Nothing is guessed about a path: one that exists is
local, one that looks like a path and does not exist is an error, anything else is a hub id. Local files are read once into
<storage_path>/.cache/datasets; hub sets lie where Hugging Face's own libraries keep them, so that a set fetched earlier is found offline.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.data.files import ENDINGS, READERS, globbed, is_pattern, read_files, reader_of, reason, stem_of
from trainkit.data.hub import hub_is_reached, no_hub
from trainkit.data.order import combine, permute
from trainkit.data.templates import check_columns, columns_of
from trainkit.errors import DataError
from trainkit.planning.facts import DataFacts
from trainkit.recipe.schema import Recipe

_HELD_OUT = 0x0E7A1  # keeps the held-out rows apart from the sample order, which has the same seed
_SPLIT = re.compile(r"\s*([^\[\]+]+?)\s*(\[.*)?\s*")
_DIGITS = "0123456789"
_OTHER_SPLITS = {"validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing"}


@dataclass(frozen=True)
class Rows:
    """datasets.Dataset of the rows to train on and to evaluate on."""

    train: Any
    eval: Any | None


def load_rows(recipe: Recipe) -> Rows:
    """Raises DataError for data that is missing, unreadable or empty, and for a hub id without a hub."""
    _quiet()
    train = _load(recipe, recipe.data.train, "data.train")
    if isinstance(recipe.data.eval, float):
        kept, held_out = hold_out(len(train), recipe.data.eval, recipe.train.seed)
        if not len(kept):
            raise DataError(f"data.eval: holding out {recipe.data.eval} leaves none of the {len(train)} rows to train on")
        return Rows(train.select(kept), train.select(held_out))
    if recipe.data.eval is None:
        return Rows(train, None)
    return Rows(train, _load(recipe, recipe.data.eval, "data.eval"))


def count_rows(recipe: Recipe) -> DataFacts:
    """Rows to train on and to evaluate on, without tokenizing; of a hub set without downloading it.

    A count that the hub does not tell is None. Raises DataError as load_rows does, with the fact hub=True where only the hub is missing,
    and for local data that lacks a column of the recipe's.
    """
    if not isinstance(recipe.data.path, str) or _is_local(recipe.data.path) or Path(recipe.data.train).is_file():
        rows = load_rows(recipe)
        for split, part in (("train", rows.train), ("eval", rows.eval)):
            if part is not None:
                check_columns(columns_of(recipe), part.column_names, f"data.{split}")
        return DataFacts(len(rows.train), None if rows.eval is None else len(rows.eval))
    _quiet()
    builder = _from_hub(recipe, "load_dataset_builder")
    train = _counted(builder, recipe.data.train, "data.train")
    if isinstance(recipe.data.eval, float):
        if train is None:
            return DataFacts(None, None)
        kept, held_out = hold_out(train, recipe.data.eval, recipe.train.seed)
        return DataFacts(len(kept), len(held_out))
    if recipe.data.eval is None:
        return DataFacts(train, None)
    if Path(recipe.data.eval).is_file():
        return DataFacts(train, len(_load(recipe, recipe.data.eval, "data.eval")))
    return DataFacts(train, _counted(builder, recipe.data.eval, "data.eval"))


def hold_out(rows: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers kept, row numbers held out), both ascending: a function of row count, fraction and seed alone."""
    count = min(rows, max(1, round(rows * fraction)))
    held_out = np.sort(permute(np.arange(count), rows, combine(seed, _HELD_OUT))) if rows else np.empty(0, np.int64)
    return np.setdiff1d(np.arange(rows), held_out), held_out


def _quiet() -> None:
    """No bars, no log, and no report to a server that a local file was opened, for which datasets waits 5 s without a network."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is said once, by the error


def _load(recipe: Recipe, wanted: str, key: str) -> Any:
    path = recipe.data.path
    if Path(wanted).is_file():
        rows = read_files([Path(wanted)], _cache(recipe), key, columns_of(recipe))
    elif isinstance(path, str) and not _is_local(path):
        rows = _from_hub(recipe, "load_dataset", split=wanted)
    else:
        rows = _joined([_local_part(recipe, part, key) for part in wanted.split("+")], wanted, key)
    if len(rows) == 0:
        raise DataError(f"{key}: the data set is empty: {wanted!r} of {path} holds no rows")
    return rows


def _joined(parts: list[Any], wanted: str, key: str) -> Any:
    """The parts of train+validation one after the other."""
    import datasets

    if len(parts) == 1:
        return parts[0]
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        raise DataError(f"{key}: {wanted!r}: the parts do not fit together: {reason(error)}") from None


def _local_part(recipe: Recipe, wanted: str, key: str) -> Any:
    """The rows of `train` or `train[:200]` in a local path."""
    path = recipe.data.path
    match = _SPLIT.fullmatch(wanted)
    if match is None:
        raise DataError(f"{key}: {wanted!r} is neither a file nor a split; write for example train or train[:200]")
    split, part = match[1], match[2]
    if isinstance(path, str) and Path(path).is_dir() and _is_saved(Path(path)):
        whole = _from_disk(Path(path), split, key)
    elif isinstance(path, str) and Path(path).is_dir():
        whole = read_files(_files_of_split(Path(path), split, key), _cache(recipe), key, columns_of(recipe))
    else:
        whole = read_files(_named_files(path, split, key), _cache(recipe), key, columns_of(recipe))
    if part is None:
        return whole
    first, end = _bounds(f"rows{part}", len(whole), wanted, key)
    return whole.select(range(first, end))


def _bounds(instruction: str, rows: int, wanted: str, key: str) -> tuple[int, int]:
    """First and last row, the last not included, of an instruction such as rows[:10%] about a split `rows`."""
    import datasets

    try:
        (part,) = datasets.ReadInstruction.from_spec(instruction).to_absolute({"rows": rows})
    except (ValueError, AssertionError) as error:
        said = reason(error).replace(instruction, wanted)
        raise DataError(f"{key}: {wanted!r} of {rows:,} rows: {said}; write for example train[:200] or train[:10%]") from None
    first, end = part.from_ or 0, rows if part.to is None else part.to
    if first >= end:
        raise DataError(f"{key}: {wanted!r} of {rows:,} rows: no row is left")
    return first, end


def _is_local(path: str) -> bool:
    """Whether the path means this machine; raises DataError for one that can only mean it and does not exist."""
    if Path(path).exists() or globbed(path):
        return True
    looks_local = path.startswith((".", "/", "~")) or path.endswith("/") or Path(path).suffix.lstrip(".") in (*READERS, "gz")
    if looks_local or is_pattern(path):
        hint = " scripts/prepare_wikisql makes this folder." if "wikisql" in path.lower() else ""
        raise DataError(f"data.path: {path}: no such file or folder.{hint}")
    return False


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or ((folder / "state.json").exists() and (folder / "dataset_info.json").exists())


def _files_of_split(folder: Path, split: str, key: str) -> list[Path]:
    """A folder's files of a split: <split>.jsonl, else <split>-*.jsonl and the like or those in a folder <split>, else those that have it
    as a word somewhere, such as wiki-<split>.jsonl; or a file's own name.

    A folder whose files name no split is the split train.
    """
    inside = {file: file.relative_to(folder) for file in folder.rglob("*") if reader_of(file) is not None and file.is_file()}
    files = sorted(file for file, name in inside.items() if not any(part.startswith(".") for part in name.parts))
    if not files:
        raise DataError(f"data.path: {folder}: the folder holds no file that can be read: {ENDINGS}")
    named = [file for file in files if split in (inside[file].as_posix(), stem_of(file))]
    if not named:
        named = [file for file in files if re.match(rf"{re.escape(split)}[-_.]", file.name) or split in inside[file].parts[:-1]]
    words = {
        file: {word.rstrip(_DIGITS) for part in (*name.parts[:-1], stem_of(file)) for word in re.split(r"[-_. ()]", part.lower())}
        for file, name in inside.items()
    }
    asked = set(re.split(r"[-_. ()]", split.lower()))
    others = {file for file in files if (_OTHER_SPLITS - asked) & words[file]}
    if named and not {file for file in named if split in (inside[file].as_posix(), stem_of(file))}:
        named = [file for file in named if file not in others] or named
    if not named:
        border = re.compile(rf"(^|[-_. (]){re.escape(split)}($|[-_. )0-9])", re.IGNORECASE)
        named = [file for file in files if any(border.search(part) for part in (*inside[file].parts[:-1], stem_of(file)))]
    if named:
        return _once(named, key)
    if split == "train" and not others:
        return _once(files, key)
    names = sorted({re.split(r"[-_.]", file.name)[0] for file in files} | {part for file in files for part in inside[file].parts[:-1]})
    raise DataError(
        f"{key}: {folder} has no files of a split {split!r}; it has {', '.join(names)}. Write one of these, or a file of the folder"
    )


def _once(files: list[Path], key: str) -> list[Path]:
    times = Counter(files)
    for file in files:
        if times[file] > 1:
            raise DataError(f"{key}: {file} is named twice, and its rows would count twice: name it once")
        if file.suffix == ".gz" and file.with_suffix("") in times:
            raise DataError(f"{key}: {file} and {file.with_suffix('').name} are the same rows twice: remove one of them")
    return files


def _named_files(path: str | list[str], split: str, key: str) -> list[Path]:
    """The files that data.path names one by one or by globs, sorted: they are the split train."""
    if split != "train":
        no_split = "data.path names files, which are the split train; write the file of this split, or a held-out fraction such as 0.1"
        raise DataError(f"{key}: {split!r}: {'no such file' if reader_of(Path(split)) else no_split}")
    files: list[Path] = []
    for name in path if isinstance(path, list) else [path]:
        found = [Path(name)] if Path(name).exists() else globbed(name)
        if not found:
            raise DataError(f"data.path: {name}: no such file")
        if found[0].is_dir():
            raise DataError(f"data.path: {name}: is a folder; write it alone, or write a glob of its files")
        files += found
    return _once(sorted(files), key)


def _from_disk(folder: Path, split: str, key: str) -> Any:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"data.path: {folder}: this save_to_disk folder cannot be read: {reason(error)}") from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{key}: {folder} has no split {split!r}; it has {', '.join(saved)}")
        return saved[split].with_format(None)  # a set is saved with its set_format, which makes tensors of rows
    if split != "train":
        way_out = "; write a held-out fraction such as 0.1, or null" if key == "data.eval" else ""
        raise DataError(f"{key}: {folder} holds one set, which is the split train; there is no {split!r}{way_out}")
    return saved.with_format(None)


def _from_hub(recipe: Recipe, how: str, **more: Any) -> Any:
    import datasets

    reached = hub_is_reached()
    try:
        return getattr(datasets, how)(recipe.data.path, recipe.data.name, revision=recipe.data.revision, **more)
    except Exception as error:
        if "scripts are no longer supported" in str(error):
            raise DataError(
                f"data.path: {recipe.data.path}: this hub set is a script, which datasets 5 does not run. "
                "Prepare a folder of files instead; for WikiSQL scripts/prepare_wikisql does it"
            ) from None
        if not reached:
            raise DataError(no_hub("data.path", str(recipe.data.path)), hub=True) from None
        raise DataError(f"data.path: {recipe.data.path}: {reason(error)}") from None


def _counted(builder: Any, wanted: str, key: str) -> int | None:
    """Rows of `train[:200]` or `train+validation` by the hub's own record; None where it keeps none."""
    known, total = builder.info.splits, 0
    if not known:
        return None
    for match in (_SPLIT.fullmatch(part) for part in wanted.split("+")):
        if match is None or match[1] not in known:
            raise DataError(f"{key}: the data set has no split {wanted!r}; it has {', '.join(known)}")
        rows = known[match[1]].num_examples
        first, end = (0, rows) if match[2] is None else _bounds(f"rows{match[2]}", rows, wanted, key)
        total += end - first
    return total


def _cache(recipe: Recipe) -> Path:
    return Path(recipe.run.storage_path) / ".cache" / "datasets"
