"""From rows to token arrays: what is learned, what is cut, what is reported, and which rows are refused.

The tokenizer gives one token a byte, so lengths are those of the text.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from tiny_tokenizers import EOS, PAD, counted, ids, recipe_of, recipe_over, rows_of

from trainkit.data import chunks, encoding
from trainkit.data.tokens import TokenArrays, load_tokenizer, prepare
from trainkit.errors import DataError
from trainkit.recipe.schema import Recipe

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(recipe_over, tmp_path)


# seq2seq


def test_seq2seq_rows_end_in_eos_and_every_target_token_counts(make: Make) -> None:
    recipe = make("seq2seq", [{"q": "a", "s": "bc"}, {"q": "", "s": ""}], source="to: {q}", target="{s}")
    prepared = prepare(recipe)
    assert rows_of(prepared.train, "input_ids") == [[*ids("to: a", recipe), EOS], [*ids("to: ", recipe), EOS]]
    assert rows_of(prepared.train, "labels") == [[*ids("bc", recipe), EOS], [EOS]]
    assert counted(prepared.train) == [3, 1]
    assert "token_type_ids" not in TokenArrays.open(prepared.train).columns


@pytest.mark.parametrize("ending", ["eos", None])
def test_cut_targets_keep_eos_and_are_counted(make: Make, ending: str | None) -> None:
    rows = [{"q": "x" * length, "s": "y" * length} for length in (3, 4, 5, 9)]
    recipe = make("seq2seq", rows, ending, source="{q}", target="{s}", max_source_length=5, max_target_length=5)
    prepared = prepare(recipe)
    x, y = ids("x", recipe), ids("y", recipe)
    assert rows_of(prepared.train, "labels") == [[*y * 3, EOS], [*y * 4, EOS], [*y * 4, EOS], [*y * 4, EOS]]
    end = [EOS] if ending else []
    assert rows_of(prepared.train, "input_ids") == [
        [*x * 3, *end],
        [*x * 4, *end],
        [*x * (5 - len(end)), *end],
        [*x * (5 - len(end)), *end],
    ]
    report = prepared.report["train"]
    assert report.truncated == {"source": 2 if ending else 1, "target": 2}
    assert (report.rows, report.longest, report.tokens["labels"], report.unlabelled) == (4, {"input_ids": 5, "labels": 5}, 19, 0)
    assert "data.train: 2 of 4 rows cut at the limit (target)" in prepared.notes


def test_limits_without_a_word_are_512(make: Make) -> None:
    prepared = prepare(make("seq2seq", [{"q": "x" * 600, "s": "y" * 600}], source="{q}", target="{s}"))
    assert prepared.report["train"].longest == {"input_ids": 512, "labels": 512}


def test_a_limit_without_room_is_an_error(make: Make) -> None:
    with pytest.raises(DataError, match=r"data\.max_source_length: 1 leaves no room .* write at least 2"):
        prepare(make("seq2seq", [{"q": "x", "s": "y"}], source="{q}", target="{s}", max_source_length=1))


def test_a_source_without_a_token_is_an_error(make: Make) -> None:
    with pytest.raises(DataError, match="row 1: the source is empty"):
        prepare(make("seq2seq", [{"q": "x", "s": "y"}, {"q": "", "s": "y"}], None, source="{q}", target="{s}"))


# causal


@pytest.mark.parametrize("ending", ["eos", None])
def test_completion_and_eos_are_learned_and_the_prompt_is_not(make: Make, ending: str | None) -> None:
    recipe = make("causal", [{"p": "Q:", "c": "yes"}, {"p": "", "c": "no"}], ending, source="{p}", target="{c}")
    prepared = prepare(recipe)
    prompt, yes, no = ids("Q:", recipe), ids("yes", recipe), ids("no", recipe)
    assert rows_of(prepared.train, "input_ids") == [[*prompt, *yes, EOS], [*no, EOS]]
    assert rows_of(prepared.train, "labels") == [[-100, -100, *yes, EOS], [*no, EOS]]
    assert counted(prepared.train) == [4, 2], "the first token of a row has nothing before it that predicts it"


def test_rows_without_a_label_left_stay_and_are_reported(make: Make) -> None:
    rows = [{"p": "x" * 9, "c": "yes"}, {"p": "x" * 4, "c": "yes"}, {"p": "x", "c": "yes"}]
    recipe = make("causal", rows, source="{p}", target="{c}", max_length=6)
    prepared = prepare(recipe)
    x = ids("x", recipe)
    assert rows_of(prepared.train, "labels") == [[-100] * 6, [*[-100] * 4, ids("y", recipe)[0], EOS], [-100, *ids("yes", recipe), EOS]]
    assert rows_of(prepared.train, "input_ids")[:2] == [x * 6, [*x * 4, ids("y", recipe)[0], EOS]]
    assert counted(prepared.train) == [0, 2, 4]
    report = prepared.report["train"]
    assert (report.truncated, report.unlabelled, report.tokens["labels"]) == ({"row": 2}, 1, 6)
    assert prepared.notes == ["data.train: 2 of 3 rows cut at the limit (row)", "data.train: 1 of 3 rows have no label left"]


def test_a_tokenizer_that_cuts_at_the_left_keeps_the_completion(make: Make) -> None:
    recipe = make(
        "causal",
        [{"p": "x" * 9, "c": "yes"}, {"p": "x", "c": "y" * 9}],
        settings={"truncation_side": "left"},
        source="{p}",
        target="{c}",
        max_length=6,
    )
    prepared = prepare(recipe)
    x, yes, y = (ids(text, recipe) for text in ("x", "yes", "y"))
    assert rows_of(prepared.train, "input_ids") == [[*x * 2, *yes, EOS], [*y * 5, EOS]]
    assert rows_of(prepared.train, "labels") == [[-100, -100, *yes, EOS], [*y * 5, EOS]]
    assert prepared.report["train"].truncated == {"row": 2}


def test_a_cut_at_the_left_leaves_what_the_tokenizer_puts_in_front(make: Make) -> None:
    tokenizer = SimpleNamespace(truncation_side="left", bos_token_id=1)
    rows = [([1, 5, 6, 7, 8, 2], [False, False, True, True, True, True]), ([5, 6, 7, 8, 9, 2], [True] * 6)]
    encoded = encoding._causal(tokenizer, rows, 4, 2, 0).columns
    assert encoded["input_ids"] == [[1, 7, 8, 2], [7, 8, 9, 2]] and encoded["labels"] == [[-100, 7, 8, 2], [7, 8, 9, 2]]
    assert encoding._causal(tokenizer, rows[:1], 1, 2, 0).columns["input_ids"] == [[1]]


def test_no_label_in_any_row_is_an_error(make: Make) -> None:
    with pytest.raises(DataError, match=r"data\.train: no row has a label to learn"):
        prepare(make("causal", [{"p": "x" * 9, "c": "yes"}] * 3, source="{p}", target="{c}", max_length=6))


def test_plain_text_is_learned_whole(make: Make) -> None:
    recipe = make("causal", [{"t": "abc"}, {"t": "d" * 9}], target="{t}", max_length=5)
    prepared = prepare(recipe)
    assert rows_of(prepared.train, "labels") == [[*ids("abc", recipe), EOS], [*ids("dddd", recipe), EOS]]
    assert rows_of(prepared.train, "labels") == rows_of(prepared.train, "input_ids")
    assert counted(prepared.train) == [3, 4]


# ready columns


def test_ready_rows_are_taken_as_they_are(make: Make) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "text": "left alone"}, {"input_ids": [8], "labels": [8], "text": ""}]
    prepared = prepare(make("causal", rows))
    assert rows_of(prepared.train, "input_ids") == [[5, 6, 7], [8]]
    assert rows_of(prepared.train, "labels") == [[-100, 6, 7], [8]]
    assert counted(prepared.train) == [2, 0]
    prepared = prepare(make("seq2seq", [{"input_ids": [5, 6], "labels": [-100, 6, 7]}]))
    assert rows_of(prepared.train, "labels") == [[-100, 6, 7]] and counted(prepared.train) == [2]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"labels": [1]}, "3 input_ids but 1 labels"),
        ({"labels": None}, "column labels is null"),
        ({"labels": [1, 2, -7]}, "negative token ids"),
        ({"input_ids": [1, 2, -1]}, "negative token ids"),
        ({"input_ids": []}, "no list of token ids"),
        ({"attention_mask": [1, 1, 0]}, "without padding"),
        ({"input_ids": [1, 2, 999999]}, "token id 999999, and the model has 262, from 0 to 261"),
        ({"labels": [1, 2, 262]}, "token id 262, and the model has 262"),
        ({"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5]}, "over the recipe's limit of 4"),
    ],
)
def test_ready_rows_that_cannot_be_trained_name_their_row(make: Make, row: dict[str, Any], said: str) -> None:
    good = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 1, 1]}
    with pytest.raises(DataError, match=f"row 1: .*{said}"):
        prepare(make("causal", [good, good | row], max_length=4))


def test_ready_ids_may_fill_the_models_own_vocabulary(make: Make, tmp_path: Path) -> None:
    recipe = make("causal", [{"input_ids": [261, 299], "labels": [261, 299]}])
    transformers.GPT2Config(vocab_size=300).save_pretrained(tmp_path / "model-eos")
    assert rows_of(prepare(recipe).train, "input_ids") == [[261, 299]]


def test_ready_fractions_are_no_token_ids(make: Make) -> None:
    with pytest.raises(DataError, match="row 0: column input_ids is no list of token ids"):
        prepare(make("causal", [{"input_ids": [1.5, 2.0], "labels": [1, 2]}]))
    with pytest.raises(DataError, match="the data has no column 'labels'"):
        prepare(make("causal", [{"input_ids": [1]}]))


# bad rows


@pytest.mark.parametrize(
    ("task", "data"),
    [("seq2seq", {"source": "{q}", "target": "{s}"}), ("causal", {"source": "{q}", "target": "{s}"}), ("causal", {"target": "{q}{s}"})],
)
def test_a_null_is_an_error_with_its_row_and_never_a_text(make: Make, task: str, data: dict[str, Any]) -> None:
    rows = [{"q": "x", "s": "y"}] * 2500 + [{"q": "x", "s": None}]
    with pytest.raises(DataError, match="row 2500: column s is null") as caught:
        prepare(make(task, rows, **data))
    assert (caught.value.row, caught.value.column) == (2500, "s")


def test_a_column_that_is_not_in_the_data_is_named_with_the_nearest(make: Make) -> None:
    with pytest.raises(DataError, match=r"no column 'qestion'; it has question, sql\. Did you mean 'question'\?"):
        prepare(make("seq2seq", [{"question": "x", "sql": "y"}], source="{qestion}", target="{sql}"))


# tokenizers


def test_a_tokenizer_without_a_pad_token_gets_one_and_says_so(make: Make) -> None:
    recipe = make("causal", [{"t": "abc"}], settings={"pad_token": None}, target="{t}")
    loaded = load_tokenizer(recipe)
    assert loaded.tokenizer.pad_token_id == EOS
    assert prepare(recipe).notes == ["the tokenizer has no pad token: '</s>' pads, masked by position"]


def test_a_tokenizer_with_a_pad_token_keeps_it(make: Make) -> None:
    loaded = load_tokenizer(make("causal", [{"t": "abc"}], target="{t}"))
    assert (loaded.tokenizer.pad_token_id, loaded.note) == (PAD, None)


def test_a_folder_without_a_tokenizer_is_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"model\.path: .*empty: no tokenizer can be read here"):
        load_tokenizer(recipe_of("causal", tmp_path / "empty", tmp_path, path="x", target="{t}"))


def test_chunks_do_not_show(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make("seq2seq", [{"q": "x" * (number % 7), "s": "y" * number} for number in range(25)], source=">{q}", target="{s}")
    whole = prepare(recipe)
    before = [rows_of(whole.train, name) for name in ("input_ids", "labels")]
    shutil.rmtree(whole.train)
    monkeypatch.setattr(chunks, "CHUNK", 4)
    assert [rows_of(prepare(recipe).train, name) for name in ("input_ids", "labels")] == before


# real data


def test_wikisql_with_its_tokenizer(shared: Path, tmp_path: Path) -> None:
    data, model = shared / "data" / "wikisql", shared / "models" / "t5-small"
    recipe = recipe_of(
        "seq2seq", model, tmp_path, path=str(data), train="train[:300]", eval="validation[:50]",
        source="translate to SQL: {question}", target="{sql}", max_source_length=24, max_target_length=96,
    )  # fmt: skip
    prepared = prepare(recipe)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    with gzip.open(data / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(300), lines, strict=False)]
    sources = [tokenizer(f"translate to SQL: {row['question']}")["input_ids"] for row in rows]
    assert rows_of(prepared.train, "input_ids") == [ids if len(ids) <= 24 else [*ids[:23], tokenizer.eos_token_id] for ids in sources]
    assert rows_of(prepared.train, "labels") == [tokenizer(text_target=row["sql"])["input_ids"][-96:] for row in rows]
    assert prepared.report["train"].truncated == {"source": sum(len(ids) > 24 for ids in sources), "target": 0}
    assert prepared.report["eval"].rows == 50
