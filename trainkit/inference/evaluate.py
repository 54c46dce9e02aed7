"""Evaluation over the whole evaluation set, spread over the workers: the loss, token-exact, and metrics by generation or by class.

Under ZeRO-3 every forward is a collective, so all ranks run equally many batches and generate in step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from trainkit.data.feed import IGNORED_LABEL, StepBatch, rectangle
from trainkit.inference.metrics import CLASS_METRICS, TEXT_METRICS
from trainkit.training.model import base_model

if TYPE_CHECKING:
    from trainkit.data.tokens import TokenArrays
    from trainkit.training.engine import Engine

BATCH_ROWS = 64
SHOWN = 3  # examples of a run's last screen


class StepFeed(Protocol):
    def micro_batches(self, step: int) -> StepBatch: ...


def evaluate_loss(engine: Engine, feed: StepFeed, num_steps: int) -> dict[str, float]:
    """{"loss": sum of the cross-entropies over the whole set / its labels that count}, the same on every rank.

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
    return {"loss": total.item() / max(1, labels)}


@dataclass(frozen=True)
class Rank:
    """Which part of the rows is whose, and whether all ranks must generate in step (ZeRO-3)."""

    rank: int
    world_size: int
    device: torch.device
    in_step: bool = False


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
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """(metrics over all rows, the first rows as {"source", "expected", "predicted"}), the same on every rank.

    model: an engine's model (under ZeRO-3 with where.in_step) or a plain one on where.device. Text is generated greedily.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if task == "classification":
                mine = list(_classify(model, arrays, tokenizer, where))
            else:
                mine = list(_generate(model, task, arrays, tokenizer, where, max_new_tokens))
    finally:
        model.train(training)
    answers = dict(sorted(pair for part in _gathered(mine, where.world_size) for pair in part))
    if task == "classification":
        names = label_names or []
        expected = [int(arrays.column("labels").row(row)[0]) for row in answers]
        values = [CLASS_METRICS[name](list(answers.values()), expected, len(names)) for name in metrics]
        texts = {row: (names[answers[row]], names[expected[row]]) for row in list(answers)[:SHOWN]}
    else:
        references = [_decoded(tokenizer, _reference(arrays, row)) for row in answers]
        values = [TEXT_METRICS[name](list(answers.values()), references) for name in metrics]
        texts = {row: (answers[row], references[row]) for row in list(answers)[:SHOWN]}
    sources = {row: _decoded(tokenizer, _prompt(arrays, task, row)) for row in texts}
    examples = [{"source": sources[row], "expected": expected, "predicted": got} for row, (got, expected) in texts.items()]
    return {key: value for part in values for key, value in part.items()}, examples


def _batches(lengths: np.ndarray, where: Rank) -> Iterator[tuple[np.ndarray, bool]]:
    """(row numbers, do they count?) of this rank, long rows first. In step, a rank that has run out repeats a row that does not count."""
    rows = np.argsort(-lengths, kind="stable")
    batches = [rows[first : first + BATCH_ROWS] for first in range(0, len(rows), BATCH_ROWS)]
    turns = -(-len(batches) // where.world_size)
    for turn in range(turns):
        index = turn * where.world_size + where.rank
        if index < len(batches):
            yield batches[index], True
        elif where.in_step:
            yield rows[:1], False


def _generate(model: Any, task: str, arrays: TokenArrays, tokenizer: Any, where: Rank, max_new_tokens: int) -> Iterator[tuple[int, str]]:
    left = task == "causal"  # a decoder goes on where its prompt ends
    prompts = [_prompt(arrays, task, row) for row in range(arrays.rows)]
    for rows, counts in _batches(np.array([len(prompt) for prompt in prompts]), where):
        ids, mask = _padded([prompts[row] for row in rows], tokenizer.pad_token_id, left)
        out = base_model(model).generate(
            input_ids=torch.from_numpy(ids).to(where.device),
            attention_mask=torch.from_numpy(mask).to(where.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            synced_gpus=where.in_step,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = out[:, ids.shape[1] :] if left else out
        if counts:
            yield from zip(rows.tolist(), (_decoded(tokenizer, answer) for answer in answers.cpu().numpy()), strict=True)


def _classify(model: Any, arrays: TokenArrays, tokenizer: Any, where: Rank) -> Iterator[tuple[int, int]]:
    column = arrays.column("input_ids")
    types = arrays.column("token_type_ids") if "token_type_ids" in arrays.columns else None
    for rows, counts in _batches(column.lengths, where):
        ids, mask = _padded([column.row(row) for row in rows], tokenizer.pad_token_id)
        more = {} if types is None else {"token_type_ids": torch.from_numpy(_padded([types.row(row) for row in rows], 0)[0]).to(where.device)}
        logits = model(input_ids=torch.from_numpy(ids).to(where.device), attention_mask=torch.from_numpy(mask).to(where.device), **more).logits
        if counts:
            yield from zip(rows.tolist(), logits.argmax(-1).tolist(), strict=True)


def _prompt(arrays: TokenArrays, task: str, row: int) -> np.ndarray:
    """What the model is given: all of input_ids, under causal the part before the first label."""
    ids = arrays.column("input_ids").row(row)
    if task != "causal":
        return ids
    learned = np.flatnonzero(arrays.column("labels").row(row) != IGNORED_LABEL)
    return ids[: max(1, int(learned[0]))] if len(learned) else ids


def _reference(arrays: TokenArrays, row: int) -> np.ndarray:
    labels = arrays.column("labels").row(row)
    return labels[labels != IGNORED_LABEL]


def _decoded(tokenizer: Any, ids: np.ndarray) -> str:
    return tokenizer.decode([int(token) for token in ids], skip_special_tokens=True).strip()


def _padded(rows: list[np.ndarray], fill: int, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), int64 [rows, longest rounded up]."""
    lengths = np.array([len(row) for row in rows])
    flat = np.concatenate([row[::-1] if left else row for row in rows])
    ids = rectangle(flat, lengths, fill)
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    return (np.ascontiguousarray(ids[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])) if left else (ids, mask)


def _gathered(mine: list[Any], world_size: int) -> list[list[Any]]:
    if world_size == 1:
        return [mine]
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, mine)
    return parts
