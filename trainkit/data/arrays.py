"""Token arrays on disk: ragged rows, memory-mapped, complete exactly when their manifest is there and holds.

<folder>/manifest.json               rows, columns, size and crc32 of every file, statistics, and what the preparation wants to remember
<folder>/<column>.values.npy         all rows end to end, in the smallest integer type that holds them
<folder>/<column>.offsets.npy        int64, rows + 1: row i is values[offsets[i] : offsets[i + 1]]
<folder>/label_tokens.npy            int32, rows: how many labels of a row count toward N

Neither reading nor writing needs memory in proportion to the rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

IGNORED_LABEL = -100  # of a token that is not learned: torch's own
_LONG = 64  # mean length from which rows are copied one by one: below, finding them all at once is faster
_PIECE = 1 << 22  # values or bytes that are converted or checked at once
_LOOK_SECONDS = 0.2


class Ragged:
    """Rows of different lengths. Nothing is read before it is used."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray):
        self.values, self.offsets = np.asarray(values), np.asarray(offsets)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """int64, of the given rows."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def row(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def select(self, rows: np.ndarray) -> Selection:
        begins = self.offsets[rows]
        return Selection(self.values, begins, self.offsets[rows + 1] - begins)


@dataclass(frozen=True)
class Selection:
    """Some rows of a column, found once; a slice of them is found for free."""

    values: np.ndarray  # of the whole column
    begins: np.ndarray  # int64, where each row begins in them
    lengths: np.ndarray  # int64

    @classmethod
    def of(cls, values: np.ndarray, lengths: np.ndarray) -> Selection:
        """Of rows that lie end to end, all of them."""
        lengths = lengths.astype(np.int64)
        return cls(values, np.cumsum(lengths) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, part: slice) -> Selection:
        return Selection(self.values, self.begins[part], self.lengths[part])

    def gather(self) -> np.ndarray:
        """The values of the rows end to end."""
        begins, lengths, total = self.begins, self.lengths, self.lengths.sum()
        if len(self) and total >= _LONG * len(self):
            ends = begins + lengths
            return np.concatenate([self.values[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)])
        values: np.ndarray = self.values[np.repeat(begins - np.cumsum(lengths) + lengths, lengths) + np.arange(total)]
        return values

    def windows(self, width: int) -> np.ndarray:
        """[rows, width]: the values of each row, which is not longer; what is beyond its end is not its own."""
        begins, last = self.begins, len(self.values) - width
        if not begins.max(initial=-1) > last:
            return _every_window(self.values, width)[begins]
        out = np.zeros((len(self), width), self.values.dtype) if last < 0 else _every_window(self.values, width)[np.minimum(begins, last)]
        for row in np.flatnonzero(begins > last):  # too near to the end
            rest = self.values[begins[row] :]
            out[row, : len(rest)] = rest[:width]
        return out

    def read(self) -> None:
        """Have the first and the last value of each row in memory, and so, as systems read ahead, what lies between."""
        if len(self.values):
            for place in (self.begins, self.begins + self.lengths - 1):
                self.values[np.clip(place, 0, len(self.values) - 1)].max(initial=0)


def _every_window(values: np.ndarray, width: int) -> np.ndarray:
    """[len(values) - width + 1, width]: from each value on, without a copy."""
    size = values.itemsize
    return np.ndarray((len(values) - width + 1, width), values.dtype, values, strides=(size, size))


class TokenArrays:
    """The rows of one split: columns input_ids and labels, and token_type_ids where rows are sentence pairs.

    seq2seq: labels are the target's ids. causal: labels are as long as input_ids, -100 where nothing is learned. classification: labels
    hold one number a row.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.rows: int = manifest["rows"]
        self.columns: list[str] = manifest["columns"]

    @classmethod
    def open(cls, folder: str | Path) -> TokenArrays:
        """Raises ValueError when the arrays are not complete."""
        manifest = read_manifest(Path(folder))
        if manifest is None:
            raise ValueError(f"{folder}: the token arrays are not complete")
        return cls(Path(folder), manifest)

    @cached_property
    def by_column(self) -> dict[str, Ragged]:
        return {name: Ragged(self._load(f"{name}.values.npy"), self._load(f"{name}.offsets.npy")) for name in self.columns}

    @cached_property
    def label_tokens(self) -> np.ndarray:
        """int32, one per row: labels that count toward N (causal: after the shift; classification: 1)."""
        return np.asarray(self._load("label_tokens.npy"))

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.folder / name, mmap_mode="r")


def ragged(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(values end to end, lengths) of rows, each in the smallest type that holds it."""
    values = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    return values.astype(_smallest_type(int(values.min(initial=0)), int(values.max(initial=0)))), lengths.astype(np.uint32)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest if every file that it names has its size; None for a folder that is missing, torn or truncated."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["bytes"]}
        known = set(manifest["crc32"]) == set(sizes) and manifest["rows"] > 0 and manifest["columns"]
        return manifest if sizes == manifest["bytes"] and known else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def holds(folder: Path) -> bool:
    """Whether the arrays are complete and every file still has the content it was written with. Reads all of them once."""
    manifest = read_manifest(folder)
    return manifest is not None and all(crc32_of(folder / name) == crc for name, crc in manifest["crc32"].items())


def crc32_of(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


@contextlib.contextmanager
def alone_at(folder: Path, waiting: Callable[[float], None]) -> Iterator[None]:
    """No other process is here for the same folder; what dead ones began beside it is removed. `waiting(seconds)` is called meanwhile.

    The lock goes with its process, however that ends: what lies beside the folder while nobody holds the lock belongs to nobody.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a") as lock:
        began = time.monotonic()
        while not _taken(lock):
            waiting(time.monotonic() - began)
            time.sleep(_LOOK_SECONDS)
        for left in leftovers(folder):
            shutil.rmtree(left, ignore_errors=True)
        yield


def leftovers(folder: Path) -> list[Path]:
    """Unfinished arrays for this folder: those of a process that writes them now, or of one that died."""
    return list(folder.parent.glob(f".{folder.name}-*"))


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
        self.bounds: dict[str, tuple[int, int]] = {}  # of the values of a column
        self.longest: dict[str, int] = {}
        self.sums = {"rows": 0, "label_tokens": 0, "unlabelled": 0}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in self.streams.values():
            stream.close()
        shutil.rmtree(self.work, ignore_errors=True)

    def append(self, columns: Mapping[str, tuple[np.ndarray, np.ndarray]], label_tokens: np.ndarray) -> None:
        """One chunk of rows: per column the values of all rows end to end, and each row's length. Every chunk has the same columns."""
        for name, (values, lengths) in columns.items():
            low, high = self.bounds.get(name, (0, 0))
            self.bounds[name] = min(low, int(values.min(initial=0))), max(high, int(values.max(initial=0)))
            self.longest[name] = max(self.longest.get(name, 0), int(lengths.max(initial=0)))
            self._stream(f"{name}.values", values)
            self._stream(f"{name}.lengths", lengths)
        self._stream("label_tokens", label_tokens)
        counts = (("rows", len(label_tokens)), ("label_tokens", label_tokens.sum()), ("unlabelled", (label_tokens == 0).sum()))
        for name, number in counts:
            self.sums[name] += int(number)

    def finish(self, **remembered: Any) -> None:
        """Convert, write the manifest last, and move all to its place; arrays that are complete there already stay."""
        for stream in self.streams.values():
            stream.close()
        tokens = {}
        for name, bounds in self.bounds.items():
            tokens[name] = self._convert(f"{name}.values", f"{name}.values", _smallest_type(*bounds))
            self._convert(f"{name}.lengths", f"{name}.offsets", np.dtype(np.int64), summed=True)
        self._convert("label_tokens", "label_tokens", np.dtype(np.int32))
        files = sorted(self.work.iterdir())
        manifest = {
            "rows": self.sums["rows"],
            "columns": list(self.bounds),
            "bytes": {path.name: path.stat().st_size for path in files},
            "crc32": {path.name: crc32_of(path) for path in files},
            "longest": self.longest,
            "tokens": tokens | {"labels": self.sums["label_tokens"]},
            "unlabelled": self.sums["unlabelled"],
        }
        (self.work / "manifest.json").write_text(json.dumps(manifest | remembered), "utf-8")
        self._move()

    def _stream(self, name: str, values: np.ndarray) -> None:
        if name not in self.streams:
            self.streams[name] = (self.work / f"{name}.raw").open("wb")
        values.astype(np.int64).tofile(self.streams[name])

    def _convert(self, name: str, to: str, kind: np.dtype, summed: bool = False) -> int:
        """A raw file of int64 becomes <to>.npy, piece by piece; `summed` writes the running sum, with a 0 in front. Returns the count."""
        raw = self.work / f"{name}.raw"
        count, before = raw.stat().st_size // 8, int(summed)
        out = np.lib.format.open_memmap(self.work / f"{to}.npy", mode="w+", dtype=kind, shape=(count + before,))
        with raw.open("rb") as stream:
            for first in range(before, count + before, _PIECE):
                piece = np.fromfile(stream, dtype=np.int64, count=min(_PIECE, count + before - first))
                out[first : first + len(piece)] = out[first - 1] + np.cumsum(piece) if summed else piece
        out.flush()
        raw.unlink()
        return count

    def _move(self) -> None:
        """In one step; over a folder that lies there file by file, so that whoever opens it meanwhile finds every name."""
        try:
            self.work.replace(self.target)
        except OSError:  # something lies there: if complete, it is as good as this
            if not holds(self.target):
                for path in sorted(self.work.iterdir(), key=lambda path: path.name == "manifest.json"):
                    path.replace(self.target / path.name)


def _beside(folder: Path) -> Path:
    """A hidden name of its own in the same place, so that a move is one step."""
    return folder.parent / f".{folder.name}-{uuid.uuid4().hex[:12]}"


def _smallest_type(low: int, high: int) -> np.dtype:
    kinds = (np.int8, np.int16, np.int32, np.int64) if low < 0 else (np.uint8, np.uint16, np.uint32, np.int64)
    return np.dtype(next(kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max))
