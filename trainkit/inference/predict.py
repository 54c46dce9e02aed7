"""What a model answers: generated text, or a class. For many tokenized rows spread over ranks, and for a few texts after a run.

Generation is greedy. Long rows come first, so that a batch holds rows of one length and what does not fit shows at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.integrations import deepspeed as zero3_setting
from transformers.utils import logging as transformers_logging

from trainkit.data import templates
from trainkit.data.padding import rectangle
from trainkit.data.tokens import load_tokenizer
from trainkit.errors import DataError, UsageError, first_line
from trainkit.planning.facts import DEFAULT_LENGTH
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Recipe
from trainkit.training.model import load_exported
from trainkit.training.tasks import base_model

BATCH_ROWS = 64
BATCH_TOKENS = 32_768  # of one batch: padded prompts and what is generated
Rows = Sequence[np.ndarray]


@dataclass(frozen=True)
class Rank:
    """Which part of the rows is whose, and whether all ranks must run in step (ZeRO-3: every forward is a collective)."""

    rank: int
    world_size: int
    device: torch.device
    in_step: bool = False


def predict(
    run: Path, inputs: Sequence[str | Mapping[str, Any]], *, max_new_tokens: int | None = None, device: torch.device | None = None
) -> list[str]:
    """What the model of a finished run answers, in the order of `inputs`: generated text, or the name of a class.

    inputs: texts that the model sees as they are (under a chat recipe: what the user says), or rows whose columns fill data.source.
    device: the first GPU by default, else the CPU. Raises UsageError where no model/ lies and for rows that the recipe has no template
    for, DataError for a row that lacks a column or holds a null.
    """
    recipe, folder = open_run(run)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = Rank(0, 1, device)
    tokenizer = exported_tokenizer(recipe, folder)
    columns = _encoded(recipe, tokenizer, inputs)
    model = load_run_model(recipe, folder).to(device)
    with answering(model):
        if recipe.model.task == "classification":
            names = base_model(model).config.id2label
            classes = classify(model, columns["input_ids"], columns.get("token_type_ids"), tokenizer, where)
            answers = {row: names[number] for row, number in classes}
        else:
            limit = max_new_tokens or recipe.data.max_target_length or recipe.data.max_length or DEFAULT_LENGTH
            answers = dict(generate(model, columns["input_ids"], tokenizer, where, task=recipe.model.task, max_new_tokens=limit))
    return [answers[row] for row in range(len(inputs))]


def open_run(run: Path) -> tuple[Recipe, Path]:
    """A run's resolved recipe and its model/ folder. Raises UsageError where no model lies."""
    if not (run / "model").is_dir():
        raise UsageError(f"{run}: no model/ lies here; it is written at the end of a run. Name the folder of a completed run")
    return read_recipe(run / "recipe.yaml"), run / "model"


def exported_tokenizer(recipe: Recipe, folder: Path) -> Any:
    """The tokenizer that lies with an exported model."""
    here = recipe.model.model_copy(update={"path": str(folder), "revision": None})
    return load_tokenizer(recipe.model_copy(update={"model": here})).tokenizer


def load_run_model(recipe: Recipe, folder: Path) -> Any:
    """load_plain for what a user names; raises DataError where the folder, or the base model of an adapter, cannot be read."""
    try:
        with _no_bars():
            return load_plain(folder, recipe.model.task, recipe.model.precision)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: the model, or the base of its adapter, cannot be loaded: {first_line(error)}") from None


def load_plain(folder: str | Path, task: str, precision: str, attention: str | None = None) -> Any:
    """load_exported as in a process without DeepSpeed, also beside a living ZeRO-3 engine.

    There transformers would partition every model that it loads: a collective, and not the model that the user gets.
    """
    living = zero3_setting._hf_deepspeed_config_weak_ref
    zero3_setting.unset_hf_deepspeed_config()
    try:
        return load_exported(folder, task, precision, attention)
    finally:
        zero3_setting._hf_deepspeed_config_weak_ref = living


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws one for every model that it loads."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def answering(model: Any) -> Iterator[None]:
    """Dropout off, no graph; the model comes back in the mode that it had."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def generate(model: Any, prompts: Rows, tokenizer: Any, where: Rank, *, task: str, max_new_tokens: int) -> Iterator[tuple[int, str]]:
    """(row, greedy continuation or, under seq2seq, target as stripped text) of this rank's share of the prompts, in no order."""
    left = task == "causal"  # a decoder goes on where its prompt ends
    stops = _stops(model, tokenizer)
    for rows, counts in batches(_lengths(prompts), where, max_new_tokens):
        ids, mask = _padded([prompts[row] for row in rows], tokenizer.pad_token_id, left)
        out = base_model(model).generate(
            input_ids=ids.to(where.device),
            attention_mask=mask.to(where.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            synced_gpus=where.in_step,
            pad_token_id=tokenizer.pad_token_id,
            **({"eos_token_id": stops} if stops else {}),
        )
        answers = (out[:, ids.shape[1] :] if left else out).cpu().numpy()
        if counts:
            yield from zip(rows.tolist(), (decoded(tokenizer, answer) for answer in answers), strict=True)


def classify(model: Any, texts: Rows, types: Rows | None, tokenizer: Any, where: Rank) -> Iterator[tuple[int, int]]:
    """(row, number of the likeliest class) of this rank's share of the rows, in no order. types: token types of sentence pairs."""

    def tensor(column: Rows, fill: int, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = _padded([column[row] for row in rows], fill)
        return ids.to(where.device), mask.to(where.device)

    for rows, counts in batches(_lengths(texts), where):
        ids, mask = tensor(texts, tokenizer.pad_token_id, rows)
        more = {} if types is None else {"token_type_ids": tensor(types, 0, rows)[0]}
        logits = model(input_ids=ids, attention_mask=mask, **more).logits
        if counts:
            yield from zip(rows.tolist(), logits.argmax(-1).tolist(), strict=True)


def batches(lengths: np.ndarray, where: Rank, max_new_tokens: int = 0) -> Iterator[tuple[np.ndarray, bool]]:
    """(row numbers, do they count?) of this rank, long rows first; every row counts on exactly one rank.

    In step all ranks run equally many batches: one that has run out repeats the shortest row, which does not count.
    """
    order = np.argsort(-lengths, kind="stable")
    parts: list[np.ndarray] = []
    first = 0
    while first < len(order):
        fitting = BATCH_TOKENS // max(1, int(lengths[order[first]]) + max_new_tokens)
        parts.append(order[first : first + min(BATCH_ROWS, max(1, fitting))])
        first += len(parts[-1])
    for turn in range(0, len(parts), where.world_size):
        if turn + where.rank < len(parts):
            yield parts[turn + where.rank], True
        elif where.in_step:
            yield order[-1:], False


def decoded(tokenizer: Any, ids: np.ndarray) -> str:
    return tokenizer.decode([int(token) for token in ids], skip_special_tokens=True).strip()


def _stops(model: Any, tokenizer: Any) -> list[int]:
    """EOS, and the model's own ends, such as the end of a chat turn, where the tokenizer knows them as special tokens."""
    own = base_model(model).generation_config.eos_token_id
    ends = own if isinstance(own, list) else [] if own is None else [own]
    special = {end for end in ends if not tokenizer.decode([end], skip_special_tokens=True)}
    return sorted(special | ({tokenizer.eos_token_id} - {None}))


def _lengths(rows: Rows) -> np.ndarray:
    return np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))


def _padded(rows: Rows, fill: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), int64 [rows, longest rounded up]."""
    lengths = _lengths(rows)
    ids = rectangle(np.concatenate([row[::-1] if left else row for row in rows]), lengths, fill)
    mask = (torch.arange(ids.shape[1]) < torch.from_numpy(lengths)[:, None]).long()
    return (ids.flip(1), mask.flip(1)) if left else (ids, mask)


def _encoded(recipe: Recipe, tokenizer: Any, inputs: Sequence[str | Mapping[str, Any]]) -> dict[str, Rows]:
    """Token columns of the inputs, cut where training would cut them; a causal prompt is whole and does not end in EOS."""
    data, task = recipe.data, recipe.model.task
    texts = [_texts(recipe, tokenizer, one, number) for number, one in enumerate(inputs)]
    limit = {} if task == "causal" else {"truncation": True, "max_length": data.max_source_length or data.max_length or DEFAULT_LENGTH}
    tokens = [tokenizer(*parts, add_special_tokens=data.messages is None, **limit) for parts in texts]
    ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in tokens]
    if task == "causal":
        ids = [row[:-1] if len(row) > 1 and row[-1] == tokenizer.eos_token_id else row for row in ids]
    pairs = isinstance(data.source, list) and all("token_type_ids" in row for row in tokens)
    return {"input_ids": ids} | ({"token_type_ids": [np.asarray(row["token_type_ids"]) for row in tokens]} if pairs else {})


def _texts(recipe: Recipe, tokenizer: Any, one: str | Mapping[str, Any], number: int) -> list[str]:
    """The text, or the two texts of a pair, that the tokenizer gets."""
    source = recipe.data.source
    if isinstance(one, str):
        if recipe.data.messages is None:
            return [one]
        return [tokenizer.apply_chat_template([{"role": "user", "content": one}], tokenize=False, add_generation_prompt=True)]
    if source is None:
        raise UsageError("this run's recipe has no data.source for a row to fill: give texts")
    parsed = [templates.parse(text, "data.source") for text in (source if isinstance(source, list) else [source])]
    templates.check_columns([name for template in parsed for name in template.columns], list(one), f"row {number}")
    return [template.of(one, number) for template in parsed]
