"""Token arrays on disk: ragged rows, memory-mapped, complete exactly when their manifest is there and holds.

<folder>/manifest.json               rows, columns, sizes in bytes, and what the preparation wants to remember
<folder>/<column>.values.npy         all rows end to end, in the smallest integer type that holds them
<folder>/<column>.offsets.npy        int64, rows + 1: row i is values[offsets[i] : offsets[i + 1]]
<folder>/label_tokens.npy            int32, rows: how many labels of a row count toward N
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

_COPY_VALUES = 1 << 22


class Ragged:
    """Rows of different lengths. Nothing is read before it is used."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray):
        self.values, self.offsets = values, offsets

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32, one per row."""
        return np.diff(self.offsets).astype(np.int32)

    def row(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


class TokenArrays:
    """The rows of one split: columns input_ids and labels, and token_type_ids where rows are sentence pairs.

    seq2seq: labels are the target's ids. causal: labels are as long as input_ids, -100 where nothing is learned. classification: labels
    hold one number a row.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.rows: int = manifest["rows"]
        self.columns: list[str] = manifest["columns"]
        self._ragged: dict[str, Ragged] = {}

    @classmethod
    def open(cls, folder: str | Path) -> TokenArrays:
        """Raises FileNotFoundError or ValueError when the arrays are not complete."""
        manifest = read_manifest(Path(folder))
        if manifest is None:
            raise ValueError(f"{folder}: the token arrays are not complete")
        return cls(Path(folder), manifest)

    def column(self, name: str) -> Ragged:
        if name not in self._ragged:
            self._ragged[name] = Ragged(self._load(f"{name}.values.npy"), self._load(f"{name}.offsets.npy"))
        return self._ragged[name]

    @cached_property
    def label_tokens(self) -> np.ndarray:
        """int32, one per row: labels that count toward N (causal: after the shift; classification: 1)."""
        return self._load("label_tokens.npy")

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.folder / name, mmap_mode="r")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest if every file that it names has its size; None for a folder that is missing, torn or truncated."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["bytes"]}
        return manifest if sizes == manifest["bytes"] and manifest["rows"] > 0 and manifest["columns"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class Writer:
    """Writes token arrays row by row with memory for one chunk, beside their place; `finish` moves them there.

    Use as a context: whatever is not finished is removed.
    """

    def __init__(self, folder: Path):
        self.target = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.work = _beside(folder)
        self.work.mkdir()
        self.streams: dict[str, IO[bytes]] = {}
        self.lengths: dict[str, list[np.ndarray]] = {}
        self.bounds: dict[str, tuple[int, int]] = {}
        self.label_tokens: list[np.ndarray] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in self.streams.values():
            stream.close()
        shutil.rmtree(self.work, ignore_errors=True)

    def append(self, columns: Mapping[str, Sequence[Sequence[int]]], label_tokens: Sequence[int]) -> None:
        """One chunk of rows: per column a list of rows. Every chunk has the same columns."""
        for name, rows in columns.items():
            if name not in self.streams:
                self.streams[name] = (self.work / f"{name}.raw").open("wb")
                self.lengths[name], self.bounds[name] = [], (0, 0)
            flat = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
            low, high = self.bounds[name]
            self.bounds[name] = min(low, int(flat.min(initial=0))), max(high, int(flat.max(initial=0)))
            self.lengths[name].append(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))
            flat.tofile(self.streams[name])
        self.label_tokens.append(np.asarray(label_tokens, dtype=np.int32))

    def finish(self, **remembered: Any) -> None:
        """Convert, write the manifest last, and move the folder to its place; one that is complete there already stays."""
        for name, stream in self.streams.items():
            stream.close()
            lengths = np.concatenate(self.lengths[name])
            np.save(self.work / f"{name}.offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
            self._narrow(name, int(lengths.sum()))
        np.save(self.work / "label_tokens.npy", np.concatenate(self.label_tokens))
        sizes = {path.name: path.stat().st_size for path in self.work.iterdir()}
        rows = sum(map(len, self.label_tokens))
        manifest = {"rows": rows, "columns": list(self.streams), "bytes": sizes} | remembered
        (self.work / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        self._move()

    def _narrow(self, name: str, total: int) -> None:
        raw = self.work / f"{name}.raw"
        kind = _smallest_type(*self.bounds[name])
        out = np.lib.format.open_memmap(self.work / f"{name}.values.npy", mode="w+", dtype=kind, shape=(total,))
        with raw.open("rb") as stream:
            for first in range(0, total, _COPY_VALUES):
                part = np.fromfile(stream, dtype=np.int64, count=min(_COPY_VALUES, total - first))
                out[first : first + len(part)] = part
        out.flush()
        raw.unlink()

    def _move(self) -> None:
        try:
            self.work.replace(self.target)
        except OSError:  # something lies there: if complete, it is as good as this; if not, it makes room
            if read_manifest(self.target) is None:
                broken = _beside(self.target)
                self.target.replace(broken)
                self.work.replace(self.target)
                shutil.rmtree(broken, ignore_errors=True)


def _beside(folder: Path) -> Path:
    """A hidden name of its own in the same place, so that a move is one step."""
    return folder.parent / f".{folder.name}-{uuid.uuid4().hex[:12]}"


def _smallest_type(low: int, high: int) -> np.dtype:
    kinds = (np.int8, np.int16, np.int32, np.int64) if low < 0 else (np.uint8, np.uint16, np.uint32, np.int64)
    return np.dtype(next(kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max))
