"""Token arrays on disk: what is written is what is read, and only what is complete counts."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.arrays import TokenArrays, Writer, holds, ragged, read_manifest

ROWS = st.lists(st.lists(st.integers(-100, 70_000), max_size=9), min_size=1, max_size=12)


def written(folder: Path, rows: list[list[int]], chunk: int = 5) -> TokenArrays:
    with Writer(folder) as writer:
        for first in range(0, len(rows), chunk):
            part = rows[first : first + chunk]
            writer.append({"input_ids": ragged(part), "labels": ragged(part)}, np.array([len(row) for row in part]))
        writer.finish(truncated={})
    return TokenArrays.open(folder)


@given(rows=ROWS, chunk=st.integers(1, 5))
def test_rows_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], chunk: int) -> None:
    arrays = written(tmp_path_factory.mktemp("arrays") / "key", rows, chunk)
    column = arrays.by_column["labels"]
    assert [column.row(i).tolist() for i in range(arrays.rows)] == rows
    assert column.lengths(np.arange(len(rows))).tolist() == arrays.label_tokens.tolist() == [len(row) for row in rows]
    some = np.arange(len(rows))[::-2]
    selected = column.select(some)
    assert selected.gather().tolist() == [token for row in some for token in rows[row]]
    assert selected.lengths.tolist() == [len(rows[row]) for row in some]
    assert len(selected[1:3]) == len(some[1:3]) and selected[1:3].gather().tolist() == [token for row in some[1:3] for token in rows[row]]
    selected.read()
    for width in (max(map(len, rows)), 20):
        windows = selected.windows(width)
        assert windows.shape == (len(some), width)
        assert [window[: len(rows[row])].tolist() for row, window in zip(some, windows, strict=True)] == [rows[row] for row in some]
    found = arrays.manifest
    assert found["longest"] == dict.fromkeys(("input_ids", "labels"), max(map(len, rows)))
    assert found["tokens"]["labels"] == sum(map(len, rows)) and found["unlabelled"] == sum(not row for row in rows)


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [(0, 255, "uint8"), (0, 256, "uint16"), (0, 65_536, "uint32"), (-100, 127, "int8"), (-100, 32_767, "int16"), (-100, 32_768, "int32")],
)
def test_values_are_stored_in_the_smallest_type_that_holds_them(tmp_path: Path, low: int, high: int, kind: str) -> None:
    values = written(tmp_path / "key", [[low, high], [3]]).by_column["input_ids"].values
    assert values.dtype == kind and values.tolist() == [low, high, 3]


def test_arrays_are_mapped_not_read(tmp_path: Path) -> None:
    assert isinstance(written(tmp_path / "key", [[1, 2]]).by_column["input_ids"].values.base, np.memmap)


def test_what_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "key") as writer:
        writer.append({"input_ids": ragged([[1]]), "labels": ragged([[1]])}, np.array([1]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_its_manifest_is_not_complete(tmp_path: Path) -> None:
    written(tmp_path / "key", [[1, 2]])
    (tmp_path / "key" / "manifest.json").unlink()
    assert read_manifest(tmp_path / "key") is None
    with pytest.raises(ValueError, match="not complete"):
        TokenArrays.open(tmp_path / "key")


@pytest.mark.parametrize("name", ["input_ids.values.npy", "labels.offsets.npy", "label_tokens.npy"])
def test_a_truncated_file_is_noticed(tmp_path: Path, name: str) -> None:
    written(tmp_path / "key", [[1, 2], [3]])
    file = tmp_path / "key" / name
    file.write_bytes(file.read_bytes()[:-1])
    assert read_manifest(tmp_path / "key") is None


@pytest.mark.parametrize("name", ["input_ids.values.npy", "labels.offsets.npy", "label_tokens.npy"])
def test_a_flipped_bit_is_noticed_and_makes_room(tmp_path: Path, name: str) -> None:
    written(tmp_path / "key", [[1, 2], [3]])
    file = tmp_path / "key" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert read_manifest(tmp_path / "key") is not None and not holds(tmp_path / "key")
    written(tmp_path / "key", [[1, 2], [3]])
    assert holds(tmp_path / "key")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bytes": {}}', '{"bytes": []}', '{"rows": 1'])
def test_a_manifest_that_says_nothing_is_no_manifest(tmp_path: Path, text: str) -> None:
    written(tmp_path / "key", [[1]])
    (tmp_path / "key" / "manifest.json").write_text(text)
    assert read_manifest(tmp_path / "key") is None


def test_the_first_of_two_writers_stays(tmp_path: Path) -> None:
    with Writer(tmp_path / "key") as late:
        late.append({"input_ids": ragged([[9]]), "labels": ragged([[9]])}, np.array([1]))
        written(tmp_path / "key", [[1]])
        late.finish()
    assert TokenArrays.open(tmp_path / "key").by_column["labels"].row(0).tolist() == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_whoever_opens_a_damaged_folder_while_it_is_rebuilt_finds_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, folder, opened = [[1, 2], [3]], tmp_path / "key", []
    written(folder, rows)
    (folder / "labels.values.npy").write_bytes((folder / "labels.values.npy").read_bytes()[:-1] + b"9")
    replace = Path.replace

    def watched(self: Path, target: Path) -> None:
        for move in (lambda: None, lambda: replace(self, target)):
            with contextlib.suppress(OSError) if target == folder else contextlib.nullcontext():
                move()
            opened.append(TokenArrays.open(folder).by_column["labels"].row(1).tolist())
        if target == folder:
            raise OSError

    monkeypatch.setattr(Path, "replace", watched)
    assert [written(folder, rows).by_column["labels"].row(index).tolist() for index in (0, 1)] == rows
    assert opened[0] == [57] and opened[-1] == [3] and len(opened) >= 10


def test_a_broken_folder_makes_room(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "manifest.json").write_text(json.dumps({"bytes": {"gone.npy": 1}}))
    assert written(tmp_path / "key", [[1]]).rows == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]
