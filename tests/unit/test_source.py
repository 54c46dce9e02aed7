"""Rows from every place that a recipe may name, in their order, as they are written; and what is said when they cannot be had."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.source import count_rows, hold_out, load_rows
from trainkit.errors import DataError
from trainkit.recipe.schema import Recipe

Load = Any


@pytest.fixture
def recipe(tmp_path: Path) -> Load:
    """A recipe with these keys under data, whose one column is q."""

    def make(**data: Any) -> Recipe:
        data = {"source": "{q}", "target": "{q}"} | data
        sections = {"model": {"path": "none", "task": "seq2seq"}, "batch": {"samples": 2}, "optimizer": {"lr": 0.1}}
        return Recipe.model_validate(
            {"name": "r", "data": data, "train": {"epochs": 1}, "run": {"storage_path": str(tmp_path / "runs")}} | sections
        )

    return make


@pytest.fixture
def load(recipe: Load) -> Load:
    """The q column of the rows to train on; the counts without tokenizing must agree."""

    def read(**data: Any) -> list[Any]:
        made = recipe(**data)
        rows = load_rows(made)
        facts = count_rows(made)
        assert (facts.train_rows, facts.eval_rows) == (len(rows.train), None if rows.eval is None else len(rows.eval))
        return list(rows.train["q"])

    return read


def write(file: Path, *values: Any, split: str = "") -> Path:
    """A file of rows with one column q (and `split`) in the kind that its ending says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = file.name.removesuffix(".gz").rpartition(".")[2]
    rows = [{"q": value, "split": split} for value in values]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(file))
        if file.suffix == ".gz":
            file.write_bytes(gzip.compress(file.read_bytes()))
        return file
    text = "".join(json.dumps(row) + "\n" for row in rows) if kind == "jsonl" else json.dumps(rows)
    if kind == "csv":
        text = "q,split\n" + "".join(f'"{value}",{split}\n' for value in values)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


# Where rows come from


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet", "json.gz", "jsonl.gz", "csv.gz", "parquet.gz"])
def test_every_kind_of_file_is_read_alone_and_in_a_folder(load: Load, tmp_path: Path, ending: str) -> None:
    write(tmp_path / "d" / f"train.{ending}", "b", "a")
    write(tmp_path / "d" / f"validation.{ending}", "v")
    assert load(path=str(tmp_path / "d" / f"train.{ending}")) == ["b", "a"]
    assert load(path=str(tmp_path / "d"), eval="validation") == ["b", "a"]
    assert load(path=str(tmp_path / "d"), train="validation") == ["v"]


def test_files_are_sorted_by_path_and_rows_keep_their_order(load: Load, tmp_path: Path) -> None:
    names = ["b.jsonl", "a.jsonl", "c/a.jsonl"]
    files = [write(tmp_path / "d" / name, f"{name}-2", f"{name}-1") for name in names]
    wanted = ["a.jsonl-2", "a.jsonl-1", "b.jsonl-2", "b.jsonl-1", "c/a.jsonl-2", "c/a.jsonl-1"]
    assert load(path=str(tmp_path / "d")) == wanted
    assert load(path=[str(file) for file in files]) == wanted
    assert load(path=str(tmp_path / "d" / "**" / "*.jsonl")) == wanted
    assert load(path=[str(tmp_path / "d" / "c" / "*"), str(tmp_path / "d" / "[ab].jsonl")]) == wanted


def test_a_split_is_its_file_else_its_shards_else_its_folder(load: Load, tmp_path: Path) -> None:
    write(tmp_path / "a" / "train-00001.jsonl", "2")
    write(tmp_path / "a" / "train-00000.jsonl", "1")
    write(tmp_path / "a" / "dev.jsonl", "3")
    assert load(path=str(tmp_path / "a"), eval="dev") == ["1", "2"]
    write(tmp_path / "a" / "train.jsonl", "0")
    assert load(path=str(tmp_path / "a")) == ["0"], "train.jsonl is the split; other files only resemble it"
    write(tmp_path / "b" / "train" / "x.jsonl", "1")
    write(tmp_path / "b" / "test" / "x.jsonl", "2")
    assert load(path=str(tmp_path / "b"), train="test") == ["2"]
    assert load(path=str(tmp_path / "b"), train="test/x.jsonl") == ["2"]


@pytest.mark.parametrize("names", [("wiki-train", "wiki-test"), ("my_train_1", "my_test_1"), ("Train", "Test"), ("v1.train", "v1.test"),
                                   ("rows (train)", "rows (test)"), ("train1", "test1")])  # fmt: skip
def test_a_split_is_also_a_word_in_a_files_name(load: Load, tmp_path: Path, names: tuple[str, str]) -> None:
    for split, name in zip(("train", "test"), names, strict=True):
        write(tmp_path / "d" / f"{name}.jsonl", split)
    assert load(path=str(tmp_path / "d"), eval="test") == ["train"]
    assert load(path=str(tmp_path / "d"), train="test") == ["test"]


@pytest.mark.parametrize("others", [("sql_test",), ("rows-dev-2",), ("more/testing/a",), ("evaluation",), ("test1",), ("my rows (test)",)])
def test_files_of_other_splits_are_not_trained_on(load: Load, tmp_path: Path, others: tuple[str, ...]) -> None:
    for name in ("sql", *others):
        write(tmp_path / "d" / f"{name}.jsonl", name)
    with pytest.raises(DataError, match=r"has no files of a split 'train'; it has .*sql.*Write one of these, or a file of the folder"):
        load(path=str(tmp_path / "d"))
    assert load(path=str(tmp_path / "d"), train=str(tmp_path / "d/sql.jsonl")) == ["sql"]


def test_a_split_of_several_words_and_a_beginning_of_names(load: Load, tmp_path: Path) -> None:
    for name in ("mnli-validation_matched", "mnli-validation_mismatched", "wiki-a", "wiki-b", "wiki-validation"):
        write(tmp_path / "d" / f"{name}.jsonl", name)
    assert load(path=str(tmp_path / "d"), train="validation_matched") == ["mnli-validation_matched"]
    assert load(path=str(tmp_path / "d"), train="wiki") == ["wiki-a", "wiki-b"], "what is named for validation is not trained on"
    assert load(path=str(tmp_path / "d"), train="wiki-validation") == ["wiki-validation"]


def test_a_saved_sets_format_changes_no_row(load: Load, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"q": 3, "other": 1}])
    for form in ("torch", "numpy", "pandas"):
        rows.with_format(form, columns=["other"]).save_to_disk(str(tmp_path / form))
        datasets.DatasetDict(train=rows.with_format(form)).save_to_disk(str(tmp_path / f"{form}-splits"))
        assert load(path=str(tmp_path / form)) == load(path=str(tmp_path / f"{form}-splits")) == [3]


def test_hidden_files_are_no_data(load: Load, tmp_path: Path) -> None:
    write(tmp_path / "d" / "x.jsonl", "1")
    write(tmp_path / "d" / ".x.jsonl", "2")
    write(tmp_path / "d" / ".cache" / "y.jsonl", "3")
    assert load(path=str(tmp_path / "d")) == ["1"]


def test_saved_sets_are_read(load: Load, tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"q": ["a", "b", "c"]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(tmp_path / "two")
    assert load(path=str(tmp_path / "one"), train="train[1:]") == ["b", "c"]
    assert load(path=str(tmp_path / "two"), eval="test") == ["a", "b", "c"]
    assert load(path=str(tmp_path / "two"), train="test") == ["c"]
    with pytest.raises(DataError, match=r"has no split 'dev'; it has train, test"):
        load(path=str(tmp_path / "two"), train="dev")
    with pytest.raises(DataError, match="holds one set, which is the split train"):
        load(path=str(tmp_path / "one"), train="test")


def test_train_and_eval_may_be_files(load: Load, recipe: Load, tmp_path: Path) -> None:
    train, other = write(tmp_path / "x.jsonl", "1", "2"), write(tmp_path / "y.jsonl", "3")
    assert load(path=str(train), eval=str(other)) == ["1", "2"]
    assert load(path=str(tmp_path), train=str(other)) == ["3"]
    assert load_rows(recipe(path=str(train), eval=str(other))).eval["q"] == ["3"]


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [("train[:3]", [0, 1, 2]), ("train[:20%]", [0, 1]), ("train[-2:]", [8, 9]), ("train[50%:70%]", [5, 6]),
     ("train[:1]+train[9:]", [0, 9]), ("train[8:]+dev", [8, 9, 100])],
)  # fmt: skip
def test_slices_are_those_of_datasets(load: Load, tmp_path: Path, wanted: str, numbers: list[int]) -> None:
    write(tmp_path / "d" / "train.jsonl", *range(10))
    write(tmp_path / "d" / "dev.jsonl", 100)
    assert load(path=str(tmp_path / "d"), train=wanted) == numbers


@pytest.mark.parametrize("wanted", ["train[a:b]", "train[99:]", "train[3", "[:3]", "train[5:5]", "train[:10%%]"])
def test_a_slice_that_cannot_be_is_an_error(load: Load, tmp_path: Path, wanted: str) -> None:
    write(tmp_path / "d" / "train.jsonl", *range(10))
    with pytest.raises(DataError, match=r"data\.train: "):
        load(path=str(tmp_path / "d"), train=wanted)


# Rows as they are written


def test_dates_stay_text(load: Load, tmp_path: Path) -> None:
    dates = ["2020-01-01", "2021-12-31"]
    for name in ("x.jsonl", "x.json", "y.jsonl.gz"):
        assert load(path=str(write(tmp_path / name, *dates))) == dates
    nested = tmp_path / "n.jsonl"
    nested.write_text("".join(json.dumps({"q": {"when": [date], "n": 1}}) + "\n" for date in dates))
    assert load(path=str(nested)) == [{"when": [date], "n": 1} for date in dates]


def test_a_csv_cell_is_the_text_that_stands_there(load: Load, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b'\xef\xbb\xbfq,n\r\n007,1\r\nNA,2\r\n"a, ""b""\nc",3\r\n1.10,4\r\n,5\r\n')
    assert load(path=str(tmp_path / "x.csv")) == ["007", "NA", 'a, "b"\nc', "1.10", None]


def test_a_name_with_wildcards_in_it_is_a_file(load: Load, tmp_path: Path) -> None:
    assert load(path=str(write(tmp_path / "a[1]" / "x*?.jsonl", "1"))) == ["1"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_new_content_under_the_old_date_is_read_anew(load: Load, tmp_path: Path, name: str) -> None:
    for value in ("1", "2"):
        file = write(tmp_path / name, value)
        os.utime(file, (1, 1))
        assert load(path=str(file)) == [value]


def test_local_files_are_cached_under_the_storage_path(load: Load, tmp_path: Path) -> None:
    load(path=str(write(tmp_path / "d" / "x.jsonl", "1")))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["d", "runs"]
    assert [entry.name for entry in (tmp_path / "d").iterdir()] == ["x.jsonl"]
    assert list((tmp_path / "runs" / ".cache" / "datasets").rglob("*.arrow"))


BIG = 11 << 20  # bytes: over the first block, from which datasets infers the types


def big(file: Path, first: Any, last: Any) -> Path:
    """JSON lines: many rows whose q is `first`, and one at the end with `last` and a new key."""
    line = json.dumps({"q": first, "pad": "x" * 1000}) + "\n"
    file.write_text(line * (BIG // len(line)) + json.dumps({"q": last, "late": 1}) + "\n")
    return file


@pytest.mark.parametrize(
    ("first", "last", "shown"),
    [(None, "text", None), ("2020-01-01", "no date", "2020-01-01"), (1, "text", 1), (1, 1.5, 1.0), ([], [{"a": 1}], []),
     ({"a": 1}, {"b": None}, {"a": 1}), ("same", "same", "same")],
)  # fmt: skip
def test_a_type_that_changes_late_in_a_large_file_is_read(load: Load, tmp_path: Path, first: Any, last: Any, shown: Any) -> None:
    file = big(tmp_path / "x.jsonl", first, last)
    for _ in range(2):
        found = load(path=str(file))
        assert len(found) == BIG // len(json.dumps({"q": first, "pad": "x" * 1000}) + "\n") + 1
        assert (found[0], found[-1], type(found[-1])) == (shown, last, type(last))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_files_may_differ_in_columns_that_the_recipe_does_not_read(load: Load, tmp_path: Path, ending: str) -> None:
    for name, more in (("a", {"n": 1}), ("b", {"m": [2]}), ("c", {"n": "x"})):
        rows = datasets.Dataset.from_list([{"q": name} | more])
        file = tmp_path / f"{name}.{ending}"
        rows.to_parquet(file) if ending == "parquet" else rows.to_csv(file) if ending == "csv" else rows.to_json(file)
    for _ in range(2):
        assert load(path=str(tmp_path / f"*.{ending}")) == ["a", "b", "c"]


def test_files_whose_types_differ_keep_each_value(load: Load, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 7)
    write(tmp_path / "b.jsonl", "text")
    assert load(path=str(tmp_path / "*.jsonl")) == [7, "text"]


LONG = 12345678901234567890


@pytest.mark.parametrize("ending", ["json", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize(
    ("values", "read"),
    [
        (["0042", 7], ["0042", 7]),
        (["null", 1, None, "[1]", '"x"', "1e5", True], ["null", 1, None, "[1]", '"x"', "1e5", True]),
        ([[{"a": "007"}], [{"b": 1}], []], [[{"a": "007"}], [{"b": 1}], []]),
        ([{"a": "007"}, {"a": 7}], [{"a": "007"}, {"a": 7}]),
        ([LONG, 1], [str(LONG), 1]),
        ([{"n": LONG}, {"n": 1}], [{"n": str(LONG)}, {"n": 1}]),
        ([[LONG], "00"], [[str(LONG)], "00"]),
        ([0.7071067811865476, "0042", 7], ["0.7071067811865476", "0042", 7]),
        ([0.1234567890123456789, 1], [0.1234567890123456789, 1.0]),
    ],
)
def test_values_of_several_types_stay_what_they_are(load: Load, tmp_path: Path, ending: str, values: list[Any], read: list[Any]) -> None:
    file = write(tmp_path / f"x.{ending}", *values)
    for _ in range(2):
        found = load(path=str(file))
        assert found == read and [type(value) for value in found] == [type(value) for value in read]


def test_a_list_may_begin_behind_a_space(load: Load, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(' [{"q": 0.12345678901234567}]')
    assert load(path=str(tmp_path / "x.json")) == [0.12345678901234567]


def test_a_full_disk_is_not_the_files_fault(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_no_more(*args: Any, **kwargs: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset") from error

    file = write(tmp_path / "x.jsonl", "1")
    monkeypatch.setattr(datasets, "load_dataset", write_no_more)
    with pytest.raises(DataError, match=r"run\.storage_path: .*the data cache cannot be written: No space left on device"):
        load(path=str(file))


def test_the_index_that_pandas_writes_is_a_column(load: Load, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(",q,a\n0,h,x\n1,i,y\n")
    assert load(path=str(tmp_path / "x.csv")) == ["h", "i"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("q,a\n0,h,x\n", r"x\.csv:2: 3 cells in a row, and the header names 2 columns"),
        ('q,a\n"1\n2",x\nh,x,\n', r"x\.csv:4: 3 cells"),
        ("q,q,a\nh,j,x\n", r"x\.csv:1: the column q stands twice"),
    ],
)
def test_csv_cells_never_shift(load: Load, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "x.csv").write_text(content)
    for _ in range(2):
        with pytest.raises(DataError, match=said):
            load(path=str(tmp_path / "x.csv"))


@pytest.mark.parametrize("name", ["x.jsonl", "dates.jsonl", "mixed.jsonl", "x.csv", "x.parquet"])
@pytest.mark.parametrize("damage", ["truncate", "remove", "flip a bit"])
def test_a_damaged_cache_is_read_anew(load: Load, tmp_path: Path, name: str, damage: str) -> None:
    values = {"dates.jsonl": ["2020-01-01"], "mixed.jsonl": [1, "a"]}.get(name, ["1", "2"])
    file = big(tmp_path / name, *values) if name == "mixed.jsonl" else write(tmp_path / name, *values)
    sound = load(path=str(file))
    for arrow in (tmp_path / "runs" / ".cache" / "datasets").rglob("*.arrow"):
        if damage == "flip a bit":
            content = bytearray(arrow.read_bytes())
            content[content.rfind(b"1")] ^= 1
            arrow.write_bytes(content)
        else:
            os.truncate(arrow, 100) if damage == "truncate" else arrow.unlink()
    assert load(path=str(file)) == sound


def test_json_errors_name_their_line(load: Load, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"q": "1"}\n\n{"q": oops}\n')
    with pytest.raises(DataError, match=r"cannot read .*x\.jsonl: line 3: not JSON: Expecting value \(column 7\)"):
        load(path=str(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_text('{"q": "1"}\n{"q":\n{"q": "2"}\n')
    with pytest.raises(DataError, match=r"line 2: not JSON"):
        load(path=str(tmp_path / "x.jsonl"))
    (tmp_path / "y.jsonl").write_text('{"q": "1"}\n[1, 2]\n')
    with pytest.raises(DataError, match=r"y\.jsonl: line 2: a row is an object in braces, not 1"):
        load(path=str(tmp_path / "y.jsonl"))


def test_a_file_named_twice_is_an_error(load: Load, tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", "1")
    with pytest.raises(DataError, match="is named twice"):
        load(path=[str(file), str(tmp_path / "*.jsonl")])


def test_a_count_finds_a_column_that_is_not_there(recipe: Load, tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", "1")
    with pytest.raises(DataError, match=r"data\.train: the data has no column 'question'; it has q, split"):
        count_rows(recipe(path=str(file), source="{question}"))


# Rows held out


@given(rows=st.integers(0, 400), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_held_out_rows_are_lost_to_training(rows: int, fraction: float, seed: int) -> None:
    kept, held_out = hold_out(rows, fraction, seed)
    assert sorted([*kept, *held_out]) == list(range(rows))
    assert list(kept) == sorted(kept) and list(held_out) == sorted(held_out)
    assert len(held_out) == min(rows, max(1, round(rows * fraction)))
    assert np.array_equal(held_out, hold_out(rows, fraction, seed)[1])


def test_the_seed_decides_which_rows_are_held_out(recipe: Load, tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", *range(100))
    rows = load_rows(recipe(path=str(file), eval=0.1))
    assert len(rows.eval) == 10 and sorted([*rows.train["q"], *rows.eval["q"]]) == list(range(100))
    assert not np.array_equal(hold_out(100, 0.1, 1)[1], hold_out(100, 0.1, 2)[1])
    with pytest.raises(DataError, match="leaves none of the 1 rows"):
        load_rows(recipe(path=str(write(tmp_path / "y.jsonl", 0)), eval=0.5))


# What cannot be read


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.jsonl", b""), ("x.jsonl", b"\n"), ("x.json", b"[]"), ("x.csv", b""), ("x.csv", b"q,n\n"), ("x.jsonl.gz", gzip.compress(b""))],
)
def test_an_empty_set_is_an_error(load: Load, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"data\.train: the data set is empty"):
        load(path=str(tmp_path / name))


def test_a_csv_file_whose_first_line_is_empty_is_an_error(load: Load, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("\nq,n\n1,2\n")
    with pytest.raises(DataError, match=r"x\.csv:1: the line is empty: the names of the columns belong there"):
        load(path=str(tmp_path / "x.csv"))


def test_an_empty_evaluation_set_is_an_error(recipe: Load, tmp_path: Path) -> None:
    write(tmp_path / "d" / "train.jsonl", "1")
    write(tmp_path / "d" / "validation.jsonl")
    with pytest.raises(DataError, match=r"data\.eval: the data set is empty"):
        load_rows(recipe(path=str(tmp_path / "d"), eval="validation"))
    with pytest.raises(DataError, match=r"data\.eval: 'train\[1:\]' of 1 rows"):
        load_rows(recipe(path=str(tmp_path / "d"), eval="train[1:]"))


def test_a_parquet_file_without_rows_is_empty_each_time(load: Load, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"q": ["a"]}).select([]).to_parquet(tmp_path / "x.parquet")
    for _ in range(2):
        with pytest.raises(DataError, match=r"data\.train: the data set is empty"):
            load(path=str(tmp_path / "x.parquet"))


def test_an_empty_file_among_others_is_no_error(load: Load, tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.jsonl")
    write(tmp_path / "d" / "b.jsonl", "1")
    assert load(path=str(tmp_path / "d")) == ["1"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("b.jsonl", b'{"q": "1"}\n{"q": \n'), ("b.jsonl", os.urandom(300)), ("b.parquet", b"PAR1 no"), ("b.jsonl.gz", b"no"),
     ("b.parquet.gz", b"no"), ("b.jsonl.gz", gzip.compress(b'{"q": "1"}\n')[:-5]), ("b.csv", b'q\n"open')],
)  # fmt: skip
def test_a_broken_file_among_whole_ones_is_named(load: Load, tmp_path: Path, name: str, content: bytes) -> None:
    ending = name.partition(".")[2]
    for good in "aceghk":
        write(tmp_path / "d" / f"{good}.{ending}", "1", "2")
    (tmp_path / "d" / name).write_bytes(content)
    with pytest.raises(DataError, match=f"data\\.train: cannot read {tmp_path}/d/{name}: .+"):
        load(path=str(tmp_path / "d"))


def test_files_that_do_not_fit_together_are_an_error(load: Load, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,n\n1,2\n")
    (tmp_path / "b.csv").write_text("q,m\n1,2\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.csv, .*b\.csv do not fit together: b.csv has no column n; it has q, m"):
            load(path=str(tmp_path / "*.csv"), target="{n}")
    write(tmp_path / "c.jsonl", "1")
    with pytest.raises(DataError, match="files of several kinds in one split"):
        load(path=[str(tmp_path / "a.csv"), str(tmp_path / "c.jsonl")])


def test_a_file_and_its_packed_copy_are_an_error(load: Load, tmp_path: Path) -> None:
    write(tmp_path / "d" / "train.jsonl", "1")
    write(tmp_path / "d" / "train.jsonl.gz", "1")
    with pytest.raises(DataError, match="same rows twice"):
        load(path=str(tmp_path / "d"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"path": "{}/none.jsonl"}, r"data\.path: .*none\.jsonl: no such file"),
        ({"path": "{}/wikisql/"}, "scripts/prepare_wikisql makes this folder"),
        ({"path": "{}/*.csv"}, "no such file"),
        ({"path": ["{}/d/train.jsonl", "{}/none.jsonl"]}, "none.jsonl: no such file"),
        ({"path": ["{}/d"]}, "is a folder"),
        ({"path": "{}/other/x.txt"}, "no reader for this ending; readable are .json, .jsonl, .csv, .parquet"),
        ({"path": "{}/other"}, "the folder holds no file that can be read"),
        ({"path": "{}/d", "eval": "test"}, r"data\.eval: .* has no files of a split 'test'; it has train, validation"),
        ({"path": "{}/d/train.jsonl", "eval": "validation"}, "write the file of this split"),
        ({"path": "{}/d/train.jsonl", "eval": "gone.jsonl"}, "'gone.jsonl': no such file"),
    ],
)
def test_data_that_is_not_there_is_named(load: Load, tmp_path: Path, data: dict[str, Any], said: str) -> None:
    write(tmp_path / "d" / "train.jsonl", "1")
    write(tmp_path / "d" / "validation.jsonl", "1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").write_text("1\n")
    path = data["path"]
    here = [name.format(tmp_path) for name in path] if isinstance(path, list) else path.format(tmp_path)
    with pytest.raises(DataError, match=said):
        load(**data | {"path": here})


def test_a_storage_path_that_cannot_be_written_is_named(recipe: Load, tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", "1")
    (tmp_path / "runs").write_text("a file where the runs folder should be")
    with pytest.raises(DataError, match=r"run\.storage_path: .* cannot be written"):
        load_rows(recipe(path=str(file)))
