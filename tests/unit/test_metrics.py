"""Metrics against values worked out by hand, and F1 against a slow, obvious version and scikit-learn's printed results."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.inference.metrics import accuracy, exact_match, f1, rouge

Classes = list[tuple[int, int]]


def slow_f1(pairs: Classes, positive: int) -> Fraction:
    hits = sum(a == b == positive for a, b in pairs)
    predicted, labelled = sum(a == positive for a, _ in pairs), sum(b == positive for _, b in pairs)
    if hits == 0:
        return Fraction(0)
    precision, recall = Fraction(hits, predicted), Fraction(hits, labelled)
    return 2 * precision * recall / (precision + recall)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_f1_of_two_classes_is_that_of_class_1(pairs: Classes) -> None:
    predicted, expected = zip(*pairs, strict=True)
    assert f1(predicted, expected, 2)["f1"] == pytest.approx(float(slow_f1(pairs, 1)))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_f1_of_many_classes_is_the_mean_over_those_that_occur(pairs: Classes) -> None:
    predicted, expected = zip(*pairs, strict=True)
    scores = [slow_f1(pairs, number) for number in {*predicted, *expected}]
    assert f1(predicted, expected, 5)["f1"] == pytest.approx(float(sum(scores) / len(scores)))


@pytest.mark.parametrize(
    "expected, predicted, num_classes, value",
    [  # sklearn.metrics.f1_score(expected, predicted, average=..., zero_division=0), scikit-learn 1.9.1
        ([0, 1, 1, 0, 1, 1], [0, 1, 0, 1, 1, 1], 2, 0.75),  # binary
        ([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], 3, 0.26666666666666666),  # macro
        ([0, 0, 2, 2, 3], [0, 2, 2, 2, 0], 9, 0.43333333333333335),  # macro, classes that never occur
        ([0, 0, 0], [0, 0, 0], 2, 0.0),  # binary, class 1 never occurs
    ],
)
def test_f1_equals_scikit_learn(expected: list[int], predicted: list[int], num_classes: int, value: float) -> None:
    assert f1(predicted, expected, num_classes)["f1"] == pytest.approx(value)


def test_accuracy_and_exact_match_are_shares() -> None:
    assert accuracy([1, 0, 2, 2], [1, 0, 2, 0], 3) == {"accuracy": 0.75}
    assert exact_match([" SELECT a ", "SELECT b", "select c"], ["SELECT a", "SELECT b", "SELECT c"]) == {
        "exact_match": pytest.approx(2 / 3)
    }


def test_a_metric_of_nothing_is_nan_and_unequal_lengths_are_refused() -> None:
    assert math.isnan(exact_match([], [])["exact_match"]) and math.isnan(accuracy([], [], 2)["accuracy"])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        exact_match(["a"], ["a", "b"])


@pytest.mark.parametrize(
    "predicted, expected, values",
    [
        # Lin's own example: 3 of 4 words, one of 3 pairs ("the gunman"), longest common subsequences of 3 and 2 words
        ("police kill the gunman", "police killed the gunman", (3 / 4, 1 / 3, 3 / 4)),
        ("the gunman kill police", "police killed the gunman", (3 / 4, 1 / 3, 2 / 4)),
        # 9 and 8 words of which 6 are common, 8 and 7 pairs of which 2 are, and "the quick brown jumps the"
        ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log.", (2 * 6 / 17, 2 * 2 / 15, 2 * 5 / 17)),
        ("a a a", "a", (2 / 4, 0.0, 2 / 4)),  # a word counts as often as it stands on both sides
        ("", "words", (0.0, 0.0, 0.0)),
        ("Same, WORDS!", "same words", (1.0, 1.0, 1.0)),
    ],
)
def test_rouge_equals_values_worked_out_by_hand(predicted: str, expected: str, values: tuple[float, float, float]) -> None:
    scores = rouge([predicted], [expected])
    assert list(scores) == ["rouge1", "rouge2", "rougeL"]
    assert tuple(scores.values()) == pytest.approx(values)


def test_rouge_is_the_mean_over_rows_and_reads_other_alphabets() -> None:
    assert rouge(["a b", "x"], ["a b", "y"]) == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}
    assert rouge(["Привет, мир"], ["привет мир"])["rouge1"] == 1.0
