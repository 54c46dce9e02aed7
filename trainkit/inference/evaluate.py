"""Evaluation over the whole evaluation set, spread over the workers: the loss, token-exact, and metrics by generation or by class.

Under ZeRO-3 every forward is a collective, so all ranks run equally many batches and generate in step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from trainkit.data.arrays import IGNORED_LABEL
from trainkit.data.padding import StepFeed
from trainkit.inference.metrics import CLASS_METRICS, TEXT_METRICS
from trainkit.inference.predict import Rank, answering, classify, decoded, generate
from trainkit.training.tasks import base_model

if TYPE_CHECKING:
    from trainkit.data.tokens import TokenArrays
    from trainkit.training.engine import Engine

__all__ = ["Rank", "evaluate_loss", "evaluate_metrics"]

SHOWN = 3  # examples on a run's last screen
Example = dict[str, str]


def evaluate_loss(engine: Engine, feed: StepFeed, num_steps: int) -> dict[str, float]:
    """{"loss": sum of the cross-entropies over the whole set / its labels that count}, the same on every rank; NaN without labels.

    Step by step each rank takes its micro-batches of the evaluation set; sums are in float64 and meet once.
    """
    total, labels = torch.zeros((), dtype=torch.float64, device=engine.device), 0
    with engine.evaluating():
        for step in range(1, num_steps + 1):
            batch = feed.micro_batches(step)
            labels += batch.label_tokens
            for micro in batch.micro_batches:
                total += engine.sum_loss(micro).double()
    dist.all_reduce(total)
    return {"loss": total.item() / labels if labels else float("nan")}


def evaluate_metrics(
    model: Any,
    *,
    metrics: Sequence[str],
    task: str,
    arrays: TokenArrays,
    tokenizer: Any,
    label_names: Sequence[str] | None,
    where: Rank,
    max_new_tokens: int,
) -> tuple[dict[str, float], list[Example]]:
    """(metrics over all rows, the first rows as {"source", "expected", "predicted"}), the same on every rank.

    model: an engine's model (under ZeRO-3 with where.in_step) or a plain one on where.device; all ranks call together. Text is generated
    greedily from what stands before the first label, and compared with the first labelled stretch: in a chat, the first answer.
    """
    if task == "classification":
        return _class_metrics(model, metrics, arrays, tokenizer, label_names, where)
    spans = [_span(arrays, task, row) for row in range(arrays.rows)]
    with answering(model):
        mine = list(generate(model, [prompt for prompt, _ in spans], tokenizer, where, task=task, max_new_tokens=max_new_tokens))
    answers = _from_all_ranks(mine, where)
    references = [decoded(tokenizer, reference) for _, reference in spans]
    values: dict[str, float] = {}
    for name in metrics:
        values |= TEXT_METRICS[name](answers, references)
    sources = [decoded(tokenizer, prompt) for prompt, _ in spans[:SHOWN]]
    return values, _examples(sources, references, answers)


def _class_metrics(
    model: Any, metrics: Sequence[str], arrays: TokenArrays, tokenizer: Any, label_names: Sequence[str] | None, where: Rank
) -> tuple[dict[str, float], list[Example]]:
    texts = _rows(arrays, "input_ids")
    types = _rows(arrays, "token_type_ids") if "token_type_ids" in arrays.columns else None
    with answering(model):
        mine = list(classify(model, texts, types, tokenizer, where))
    answers, expected = _from_all_ranks(mine, where), [int(row[0]) for row in _rows(arrays, "labels")]
    names = label_names or list(base_model(model).config.id2label.values())
    values: dict[str, float] = {}
    for name in metrics:
        values |= CLASS_METRICS[name](answers, expected, len(names))
    sources = [decoded(tokenizer, text) for text in texts[:SHOWN]]
    return values, _examples(sources, [names[number] for number in expected[:SHOWN]], [names[number] for number in answers[:SHOWN]])


def _span(arrays: TokenArrays, task: str, row: int) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, reference) as token ids. A causal row that is labelled from its first token on is prompted with that token."""
    ids, labels = arrays.by_column["input_ids"].row(row), arrays.by_column["labels"].row(row)
    if task != "causal":
        return ids, labels[labels != IGNORED_LABEL]
    learned = labels[1:] != IGNORED_LABEL
    if not learned.any():
        return ids, labels[:0]
    first = 1 + int(learned.argmax())
    rest = learned[first - 1 :]
    return ids[:first], labels[first : first + (len(rest) if rest.all() else int(rest.argmin()))]


def _rows(arrays: TokenArrays, name: str) -> list[np.ndarray]:
    column = arrays.by_column[name]
    return [column.row(row) for row in range(arrays.rows)]


def _examples(sources: Sequence[str], expected: Sequence[str], predicted: Sequence[str]) -> list[Example]:
    return [{"source": a, "expected": b, "predicted": c} for a, b, c in zip(sources, expected, predicted, strict=False)]


def _from_all_ranks(mine: list[tuple[int, Any]], where: Rank) -> list[Any]:
    """The answers of all ranks in the order of the rows."""
    parts: list[Any] = [mine]
    if where.world_size > 1:
        parts = [None] * where.world_size
        dist.all_gather_object(parts, mine)
    return [answer for _, answer in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]
