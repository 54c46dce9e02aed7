"""Templates: what they make of a row, and what they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.templates import Field, check_columns, parse, parse_field
from trainkit.errors import DataError


def test_columns_in_braces_become_their_values() -> None:
    template = parse("translate to SQL: {question} ({n})", "data.source")
    assert template.columns == ["question", "n"]
    assert template.of({"question": "how many?", "n": 3}, 0) == "translate to SQL: how many? (3)"


def test_nested_fields_and_list_places_are_reached() -> None:
    row = {"sql": {"human_readable": "SELECT", "conds": ["a", "b"]}}
    assert parse("{sql[human_readable]}/{sql[conds][1]}", "data.target").of(row, 0) == "SELECT/b"
    assert parse("{sql[human_readable]}", "data.target").columns == ["sql"]


def test_doubled_braces_are_braces() -> None:
    assert parse('{{"q": "{{{q}}}"}}', "data.source").of({"q": "x"}, 0) == '{"q": "{x}"}'


@given(st.text(alphabet="ab{} \n[]"))
def test_any_text_survives_with_its_braces_doubled(text: str) -> None:
    assert parse(text.replace("{", "{{").replace("}", "}}"), "data.source").of({}, 0) == text


@pytest.mark.parametrize("text", ["{question", "question}", "{}", "{ }", "{a[b}", "{a[]}"])
def test_a_brace_without_a_column_is_an_error(text: str) -> None:
    with pytest.raises(DataError, match=r"data\.source: .* no column in braces"):
        parse(text, "data.source")


@pytest.mark.parametrize("null", [None, float("nan")])
def test_a_null_names_row_and_column(null: float | None) -> None:
    with pytest.raises(DataError, match="row 7: column question is null") as caught:
        parse("q: {question}", "data.source").of({"question": null}, 7)
    assert (caught.value.row, caught.value.column) == (7, "question")


def test_a_field_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match=r"row 2: sql\[nope\]: there is no 'nope'"):
        parse("{sql[nope]}", "data.target").of({"sql": {"agg": 1}}, 2)


@pytest.mark.parametrize(("value", "said"), [({"agg": 1}, r"\{sql\[agg\]\}"), (["a"], "holds a list"), (b"x", "holds a bytes")])
def test_the_python_spelling_of_a_container_is_never_learned(value: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        parse("{sql}", "data.target").of({"sql": value}, 0)


def test_a_label_is_one_column_with_or_without_braces() -> None:
    assert parse_field("label", "data.target") == parse_field("{label}", "data.target") == Field("label")
    assert parse_field("answer[0]", "data.target") == Field("answer", ("0",))
    with pytest.raises(DataError, match="name one column"):
        parse_field("{a} {b}", "data.target")


def test_a_missing_column_lists_the_columns_and_the_nearest() -> None:
    check_columns(["question"], ["question", "sql"], "data.train")
    with pytest.raises(DataError, match=r"data\.train: the data has no column 'qestion'; it has question, sql\. Did you mean 'question'\?"):
        check_columns(["qestion"], ["question", "sql"], "data.train")
