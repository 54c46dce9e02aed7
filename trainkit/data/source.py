"""Rows from where the recipe says: a hub id, a folder, a save_to_disk folder, a file, a glob or a list of files.

Files are sorted by path and rows stay in file order, so a row's number is its id. Nothing is guessed about a path: one that exists is
local, one that looks like a path and does not exist is an error, anything else is a hub id.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np

from trainkit.data.order import combine, permute
from trainkit.errors import DataError
from trainkit.planning.facts import DataFacts
from trainkit.recipe.schema import Recipe

READERS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
_HUB_PROBE_SECONDS = 5.0
_SPLIT = re.compile(r"([^\[\]]+)(\[.*\])?")


@dataclass(frozen=True)
class Rows:
    """datasets.Dataset of the rows to train on and to evaluate on."""

    train: Any
    eval: Any | None


def load_rows(recipe: Recipe) -> Rows:
    """Raises DataError for data that is missing, unreadable or empty."""
    import datasets

    datasets.disable_progress_bars()
    train = _load(recipe, recipe.data.train, "data.train")
    if isinstance(recipe.data.eval, float):
        kept, held_out = hold_out(len(train), recipe.data.eval, recipe.train.seed)
        return Rows(_not_empty(train.select(kept), "data.train"), _not_empty(train.select(held_out), "data.eval"))
    if recipe.data.eval is None:
        return Rows(train, None)
    return Rows(train, _load(recipe, recipe.data.eval, "data.eval"))


def count_rows(recipe: Recipe) -> DataFacts:
    """Rows to train on and to evaluate on, without tokenizing; of a hub set without downloading it."""
    if not isinstance(recipe.data.path, str) or _is_local(recipe.data.path) or Path(recipe.data.train).exists():
        rows = load_rows(recipe)
        return DataFacts(len(rows.train), None if rows.eval is None else len(rows.eval))
    builder = _from_hub(recipe, "load_dataset_builder")
    train = _counted(builder, recipe.data.train)
    if isinstance(recipe.data.eval, float):
        kept, held_out = hold_out(train or 0, recipe.data.eval, recipe.train.seed)
        return DataFacts(len(kept), len(held_out)) if train is not None else DataFacts(None, None)
    return DataFacts(train, None if recipe.data.eval is None else _counted(builder, recipe.data.eval))


def hold_out(rows: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers kept, row numbers held out), both ascending: a function of row count, fraction and seed alone."""
    count = min(rows, max(1, round(rows * fraction)))
    held_out = np.sort(permute(np.arange(count), rows, combine(seed, 0x0E7A1))) if rows else np.empty(0, np.int64)
    return np.setdiff1d(np.arange(rows), held_out), held_out


@cache
def hub_is_reached() -> bool:
    """Probe the hub once; out of reach, the hub libraries go offline at once instead of retrying for half a minute."""
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    try:
        if not offline:
            port = address.port or (443 if address.scheme == "https" else 80)
            socket.create_connection((address.hostname or "", port), timeout=_HUB_PROBE_SECONDS).close()
            return True
    except OSError:
        pass
    os.environ["HF_HUB_OFFLINE"] = "1"
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    import datasets

    datasets.config.HF_HUB_OFFLINE = True
    return False


def no_hub(key: str, name: str) -> str:
    """What to say when a hub id is neither local nor cached and the hub is not reached."""
    return (
        f"{key}: {name}: no such file or folder here, and the Hugging Face hub is not reached. "
        "Write the path of a local folder, or connect to the hub (HF_ENDPOINT, proxy)"
    )


def _load(recipe: Recipe, wanted: str, key: str) -> Any:
    path = recipe.data.path
    if Path(wanted).is_file():
        return _not_empty(_from_files(recipe, [Path(wanted)], "train", key), key)
    split, _ = _parts(wanted, key)
    if isinstance(path, str) and Path(path).is_dir() and _is_saved(Path(path)):
        return _not_empty(_from_disk(Path(path), wanted, key), key)
    if not isinstance(path, str) or _is_local(path):
        return _not_empty(_from_files(recipe, _files_of_split(path, split, key), wanted, key), key)
    return _not_empty(_from_hub(recipe, "load_dataset", split=wanted), key)


def _is_local(path: str) -> bool:
    """Whether the path means this machine; raises DataError for one that can only mean it and does not exist."""
    if Path(path).exists() or _globbed(path):
        return True
    looks_local = path.startswith((".", "/", "~")) or path.endswith("/") or Path(path).suffix.lstrip(".") in (*READERS, "gz")
    if looks_local or any(sign in path for sign in "*?["):
        hint = " scripts/prepare_wikisql makes this folder." if "wikisql" in path.lower() else ""
        raise DataError(f"data.path: {path}: no such file or folder.{hint}")
    return False


def _globbed(path: str) -> list[Path]:
    """Files that a pattern with * ? or [ names, sorted; ** goes through folders."""
    start = Path(path).anchor or "."
    pattern = path.removeprefix(start) if Path(path).anchor else path
    return sorted(file for file in Path(start).glob(pattern) if file.is_file()) if any(sign in path for sign in "*?[") else []


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or ((folder / "state.json").exists() and (folder / "dataset_info.json").exists())


def _parts(wanted: str, key: str) -> tuple[str, str | None]:
    match = _SPLIT.fullmatch(wanted)
    if match is None:
        raise DataError(f"{key}: {wanted!r} is neither a file nor a split; write for example train or train[:200]")
    return match[1], match[2]


def _files_of_split(path: str | list[str], split: str, key: str) -> list[Path]:
    """A folder's files of a split, by their names; a file, a glob or a list of files is the split train."""
    if isinstance(path, str) and Path(path).is_dir():
        files = sorted(file for file in Path(path).rglob("*") if _reader_of(file) is not None and not file.name.startswith("."))
        named = [file for file in files if re.match(rf"{re.escape(split)}([-_.]|$)", file.name)]
        if not files:
            raise DataError(f"data.path: {path}: the folder holds no {', '.join(f'.{ending}' for ending in READERS)} file (.gz too)")
        if named:
            return named
        names = sorted({re.split(r"[-_.]", file.name)[0] for file in files})
        if split == "train" and not {"validation", "test", "dev", "valid"} & set(names):
            return files
        raise DataError(f"{key}: {path} has no files of a split {split!r}; it has {', '.join(names)}")
    if split != "train":
        raise DataError(f"{key}: {split!r}: data.path names files, which are the split train; write the file of this split")
    files = [Path(name) for name in path] if isinstance(path, list) else (_globbed(path) or [Path(path)])
    for file in files:
        if not file.is_file():
            raise DataError(f"data.path: {file}: no such file")
        if _reader_of(file) is None:
            raise DataError(
                f"data.path: {file}: no reader for this ending; write {', '.join(f'.{ending}' for ending in READERS)}, also .gz"
            )
    return sorted(files)


def _reader_of(file: Path) -> str | None:
    parts = file.name.lower().split(".")
    ending = parts[-2] if parts[-1] == "gz" and len(parts) > 2 else parts[-1]
    return READERS.get(ending)


def _from_files(recipe: Recipe, files: Sequence[Path], wanted: str, key: str) -> Any:
    import datasets

    readers = {_reader_of(file) for file in files}
    if len(readers) != 1 or None in readers:
        raise DataError(f"{key}: files of several kinds in one split: {', '.join(file.name for file in files[:4])}")
    split, _ = _parts(wanted, key) if wanted != "train" else ("train", None)
    try:
        whole = datasets.load_dataset(
            readers.pop(), data_files={"rows": [str(file) for file in files]}, split="rows", cache_dir=str(_cache(recipe))
        )
    except Exception as error:  # datasets wraps each reader's errors in its own
        names = ", ".join(str(file) for file in files[:4]) + (" and others" if len(files) > 4 else "")
        raise DataError(f"{key}: cannot read {names}: {_reason(error)}") from None
    return _sliced(whole, split, wanted, key)


def _from_disk(folder: Path, wanted: str, key: str) -> Any:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"data.path: {folder}: this save_to_disk folder cannot be read: {_reason(error)}") from None
    split, _ = _parts(wanted, key)
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{key}: {folder} has no split {split!r}; it has {', '.join(saved)}")
        saved = saved[split]
    elif split != "train":
        raise DataError(f"{key}: {folder} holds one set, which is the split train; there is no {split!r}")
    return _sliced(saved, split, wanted, key)


def _sliced(whole: Any, split: str, wanted: str, key: str) -> Any:
    import datasets

    if wanted == split:
        return whole
    try:
        (part,) = datasets.ReadInstruction.from_spec(wanted).to_absolute({split: len(whole)})
    except (ValueError, AssertionError) as error:
        raise DataError(f"{key}: {wanted!r}: {_reason(error)}; write for example train[:200] or train[:10%]") from None
    return whole.select(range(part.from_ or 0, len(whole) if part.to is None else part.to))


def _from_hub(recipe: Recipe, how: str, **more: Any) -> Any:
    import datasets

    reached = hub_is_reached()
    try:
        return getattr(datasets, how)(
            recipe.data.path, recipe.data.name, revision=recipe.data.revision, cache_dir=str(_cache(recipe)), **more
        )
    except Exception as error:
        if not reached:
            raise DataError(no_hub("data.path", str(recipe.data.path)), hub=True) from None
        if "script" in str(error).lower():
            raise DataError(
                f"data.path: {recipe.data.path}: this hub set is a script, which datasets 5 does not run. "
                "Prepare a folder of files instead; for WikiSQL scripts/prepare_wikisql does it"
            ) from None
        raise DataError(f"data.path: {recipe.data.path}: {_reason(error)}") from None


def _counted(builder: Any, wanted: str) -> int | None:
    split, part = _parts(wanted, "data.train")
    known = builder.info.splits or {}
    if split not in known:
        return None
    import datasets

    count = known[split].num_examples
    if part is None:
        return count
    (absolute,) = datasets.ReadInstruction.from_spec(wanted).to_absolute({split: count})
    return (count if absolute.to is None else absolute.to) - (absolute.from_ or 0)


def _cache(recipe: Recipe) -> Path:
    return Path(recipe.run.storage_path) / ".cache" / "datasets"


def _not_empty(rows: Any, key: str) -> Any:
    if len(rows) == 0:
        raise DataError(f"{key}: the data set is empty")
    return rows


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:300]
