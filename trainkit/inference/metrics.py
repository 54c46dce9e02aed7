"""Metrics as pure functions of predictions and references, as shares between 0 and 1.

exact_match   the predicted text equals the reference, both stripped
rouge         ROUGE-1, -2 and -L F-measures of Lin (2004), over lower-case runs of letters and digits, without stemming: as the
              rouge_score library for ASCII; letters of other alphabets count as letters here
accuracy      the predicted class is the label
f1            of class 1 when there are two classes, else the mean over the classes that occur (macro); 0 for a class never met
              by the other side, as in scikit-learn
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np


def exact_match(predicted: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    return {"exact_match": _mean([a.strip() == b.strip() for a, b in zip(predicted, expected, strict=True)])}


def rouge(predicted: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    pairs = [(_words(a), _words(b)) for a, b in zip(predicted, expected, strict=True)]
    scores = {"rouge1": _ngram_f1(1), "rouge2": _ngram_f1(2), "rougeL": _longest_f1}
    return {name: _mean([score(a, b) for a, b in pairs]) for name, score in scores.items()}


def accuracy(predicted: Sequence[int], expected: Sequence[int], num_classes: int) -> dict[str, float]:
    return {"accuracy": _mean([a == b for a, b in zip(predicted, expected, strict=True)])}


def f1(predicted: Sequence[int], expected: Sequence[int], num_classes: int) -> dict[str, float]:
    got, wanted = np.asarray(predicted), np.asarray(expected)
    classes = [1] if num_classes == 2 else np.union1d(got, wanted).tolist()
    scores = [_f1(int(((got == c) & (wanted == c)).sum()), int((got == c).sum()), int((wanted == c).sum())) for c in classes]
    return {"f1": _mean(scores)}


TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], dict[str, float]]] = {"exact_match": exact_match, "rouge": rouge}
CLASS_METRICS: dict[str, Callable[[Sequence[int], Sequence[int], int], dict[str, float]]] = {"accuracy": accuracy, "f1": f1}


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _ngram_f1(n: int) -> Callable[[list[str], list[str]], float]:
    def score(predicted: list[str], expected: list[str]) -> float:
        got, wanted = (Counter(zip(*(words[start:] for start in range(n)), strict=False)) for words in (predicted, expected))
        return _f1((got & wanted).total(), got.total(), wanted.total())

    return score


def _longest_f1(predicted: list[str], expected: list[str]) -> float:
    """By the longest common subsequence."""
    row = [0] * (len(expected) + 1)
    for word in predicted:
        diagonal = 0
        for index, other in enumerate(expected, start=1):
            diagonal, row[index] = row[index], diagonal + 1 if word == other else max(row[index], row[index - 1])
    return _f1(row[-1], len(predicted), len(expected))


def _f1(common: int, predicted: int, expected: int) -> float:
    return 2 * common / (predicted + expected) if predicted + expected else 0.0


def _mean(values: Sequence[float | bool]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
