"""Classification: sentence pairs with their token types, and labels numbered over the whole set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_tokenizers import CLS, SEP, counted, ids, recipe_of, recipe_over, rows_of
from tiny_tokenizers import make as make_tokenizer

from trainkit.data.tokens import TokenArrays, prepare
from trainkit.errors import DataError
from trainkit.recipe.schema import Recipe

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(recipe_over, tmp_path)


def test_a_sentence_pair_carries_its_token_types(make: Make) -> None:
    recipe = make(
        "classification", [{"a": "xy", "b": "z", "l": 0}, {"a": "x", "b": "z", "l": 1}], "pair", source=["{a}", "{b}"], target="l"
    )
    prepared = prepare(recipe)
    assert rows_of(prepared.train, "input_ids")[0] == [CLS, *ids("xy", recipe), SEP, *ids("z", recipe), SEP]
    assert rows_of(prepared.train, "token_type_ids") == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert rows_of(prepared.train, "labels") == [[0], [1]] and counted(prepared.train) == [1, 1]


def test_the_longer_sentence_of_a_pair_is_cut(make: Make) -> None:
    rows = [{"a": "x" * 9, "b": "z", "l": 0}, {"a": "x", "b": "z", "l": 1}]
    recipe = make("classification", rows, "pair", source=["{a}", "{b}"], target="l", max_length=7)
    prepared = prepare(recipe)
    assert rows_of(prepared.train, "input_ids")[0] == [CLS, *ids("xxx", recipe), SEP, *ids("z", recipe), SEP]
    assert prepared.report["train"].truncated == {"source": 1}
    with pytest.raises(DataError, match=r"data\.max_length: 3 leaves no room"):
        prepare(make("classification", rows, "pair", source=["{a}", "{b}"], target="l", max_length=3))


def test_a_single_sentence_has_no_token_types(make: Make) -> None:
    prepared = prepare(make("classification", [{"a": "x", "l": 0}, {"a": "x", "l": 1}], "pair", source="{a}", target="l"))
    assert TokenArrays.open(prepared.train).columns == ["input_ids", "labels"]


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["no", "yes", "no"], ["no", "yes"], [0, 1, 0]),
        ([2, 0, 1], ["0", "1", "2"], [2, 0, 1]),
        ([3, 20, 1], ["1", "3", "20"], [1, 2, 0]),
        (["10", "9", "10"], ["9", "10"], [1, 0, 1]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
    ],
)
def test_labels_get_numbers_in_their_order(make: Make, labels: list[Any], names: list[str], numbers: list[int]) -> None:
    prepared = prepare(make("classification", [{"a": "x", "l": label} for label in labels], source="{a}", target="{l}"))
    assert prepared.label_names == names
    assert [row[0] for row in rows_of(prepared.train, "labels")] == numbers


def test_labels_are_those_of_train_and_eval_together(make: Make, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text('{"a": "x", "l": "apple"}\n')
    prepared = prepare(make("classification", [{"a": "x", "l": "pear"}], source="{a}", target="l", eval=str(tmp_path / "eval.jsonl")))
    assert prepared.label_names == ["apple", "pear"]
    assert rows_of(prepared.train, "labels") == [[1]] and rows_of(prepared.eval, "labels") == [[0]]


def saved(folder: Path, numbers: list[int], names: list[str], split: str) -> None:
    features = datasets.Features({"a": datasets.Value("string"), "l": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"a": ["x"] * len(numbers), "l": numbers}, features=features)
    rows.to_parquet(str(folder / f"{split}.parquet"))


def test_a_class_label_keeps_its_numbers_and_names(make: Make, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    saved(tmp_path / "d", [2, 0], ["z", "y", "x"], "train")
    saved(tmp_path / "d", [1], ["z", "y", "x"], "test")
    recipe = make("classification", [], path=str(tmp_path / "d"), source="{a}", target="l", eval="test")
    prepared = prepare(recipe)
    assert prepared.label_names == ["z", "y", "x"]
    assert rows_of(prepared.train, "labels") == [[2], [0]]
    saved(tmp_path / "d", [1], ["x", "y", "z"], "test")
    with pytest.raises(DataError, match="the labels of column l have other names"):
        prepare(recipe)
    saved(tmp_path / "d", [-1, 1], ["z", "y", "x"], "test")
    with pytest.raises(DataError, match="row 0: column l is -1, which is none of the 3 labels"):
        prepare(recipe)


@pytest.mark.parametrize(
    ("first", "label", "said"),
    [
        (1, 0.5, "numbers with a fraction"),
        ("1", "0.5", "numbers with a fraction"),
        (1, None, "row 1: column l is null"),
        ([1], [1], "row 0: column l holds a list"),
    ],
)
def test_labels_that_are_no_classes_are_an_error(make: Make, first: Any, label: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        prepare(make("classification", [{"a": "x", "l": first}, {"a": "x", "l": label}], source="{a}", target="l"))


@pytest.mark.parametrize("labels", [[1, 1], ["yes"]])
def test_a_single_class_is_an_error(make: Make, labels: list[Any]) -> None:
    with pytest.raises(DataError, match=rf"data\.target: column l holds only '{labels[0]}': classification learns to tell two"):
        prepare(make("classification", [{"a": "x", "l": label} for label in labels], source="{a}", target="l"))


def test_mrpc_is_read_as_pairs(shared: Path, tmp_path: Path) -> None:
    data = {"path": str(shared / "data" / "mrpc"), "train": "train[:50]", "eval": "test[:20]"}
    form = {"source": ["{sentence1}", "{sentence2}"], "target": "label"}
    recipe = recipe_of("classification", make_tokenizer(tmp_path / "m", "pair"), tmp_path, **data, **form)
    prepared = prepare(recipe)
    assert prepared.label_names == ["0", "1"]
    types, tokens = rows_of(prepared.train, "token_type_ids"), rows_of(prepared.train, "input_ids")
    for row, kinds in zip(tokens, types, strict=True):
        first = row.index(SEP) + 1
        assert kinds == [0] * first + [1] * (len(row) - first) and row.count(SEP) == 2
