"""Rows to token ids and labels, one function per form of the recipe: chunk in, columns out.

Truncation is the tokenizer's: special tokens count toward the limit and EOS stays. EOS is learned: where the tokenizer does not append
it, a target or completion gets it. Labels that are not learned are -100.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainkit.data import chat, templates
from trainkit.data.arrays import IGNORED_LABEL
from trainkit.errors import DataError
from trainkit.planning.facts import DEFAULT_LENGTH
from trainkit.recipe.schema import Recipe

Row = dict[str, Any]


@dataclass
class Encoded:
    """Columns of a chunk of rows, and how many labels of each row count toward N."""

    columns: dict[str, list[list[int]]]
    label_tokens: list[int]
    truncated: dict[str, int] = field(default_factory=dict)  # part of the row to number of rows cut


Encode = Callable[[list[Row], int], Encoded]


@dataclass(frozen=True)
class Form:
    """How the recipe's rows are encoded, and the columns that this reads. `encode` gets rows and the number of the first."""

    columns: tuple[str, ...]
    encode: Encode


def form_of(
    recipe: Recipe, tokenizer: Any, label_names: Sequence[str] | None, present: Sequence[str] = (), vocabulary: int | None = None
) -> Form:
    """`present`: the columns that the data has. `vocabulary`: how many token ids there are; None: as many as the tokenizer has.

    Raises DataError for a template that cannot be read, a limit without room for a token, or a tokenizer that lacks what the form needs.
    """
    data, task = recipe.data, recipe.model.task
    if data.messages is not None:
        return _chat(recipe, tokenizer)
    if data.source is None and data.target is None:
        return _ready(recipe, present, len(tokenizer) if vocabulary is None else vocabulary)
    if task == "classification":
        return _classification(recipe, tokenizer, label_names or [])
    if task == "seq2seq":
        return _seq2seq(recipe, tokenizer)
    return _plain_text(recipe, tokenizer) if data.source is None else _completion(recipe, tokenizer)


def limits(recipe: Recipe) -> dict[str, int]:
    """Most tokens by the recipe's key, defaults filled in."""
    keys = ("max_source_length", "max_target_length") if recipe.model.task == "seq2seq" else ("max_length",)
    return {key: getattr(recipe.data, key) or DEFAULT_LENGTH for key in keys}


def _seq2seq(recipe: Recipe, tokenizer: Any) -> Form:
    assert isinstance(recipe.data.source, str) and recipe.data.target is not None
    source, target = templates.parse(recipe.data.source, "data.source"), templates.parse(recipe.data.target, "data.target")
    most_source, most_target = limits(recipe).values()
    _check_room(tokenizer, 1, most_source, "data.max_source_length")
    _check_room(tokenizer, 1, most_target, "data.max_target_length")

    def encode(rows: list[Row], first: int) -> Encoded:
        inputs, cut_source = _tokenize(tokenizer, _texts(source, rows, first), limit=most_source)
        _check_not_empty(inputs["input_ids"], first)
        targets, cut_target = _tokenize(tokenizer, text_target=_texts(target, rows, first), limit=most_target)
        labels, cut_for_eos = _ending_in_eos(targets["input_ids"], tokenizer.eos_token_id, most_target)
        truncated = {"source": int(cut_source.sum()), "target": int((cut_target | cut_for_eos).sum())}
        return Encoded({"input_ids": inputs["input_ids"], "labels": labels}, [len(row) for row in labels], truncated)

    return Form((*source.columns, *target.columns), encode)


def _completion(recipe: Recipe, tokenizer: Any) -> Form:
    """Prompt and completion are tokenized apart; completion and EOS are labelled."""
    assert isinstance(recipe.data.source, str) and recipe.data.target is not None
    source, target = templates.parse(recipe.data.source, "data.source"), templates.parse(recipe.data.target, "data.target")
    limit, eos = limits(recipe)["max_length"], tokenizer.eos_token_id

    def encode(rows: list[Row], first: int) -> Encoded:
        prompts = tokenizer(_texts(source, rows, first), verbose=False)["input_ids"]
        completions = tokenizer(_texts(target, rows, first), add_special_tokens=False, verbose=False)["input_ids"]
        marked = []
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt = prompt[:-1] if eos is not None and prompt[-1:] == [eos] else prompt  # the row goes on after the prompt
            completion = completion if eos is None else [*completion, eos]
            marked.append(([*prompt, *completion], [False] * len(prompt) + [True] * len(completion)))
        return _causal(tokenizer, marked, limit, eos, first)

    return Form((*source.columns, *target.columns), encode)


def _plain_text(recipe: Recipe, tokenizer: Any) -> Form:
    assert recipe.data.target is not None
    text = templates.parse(recipe.data.target, "data.target")
    limit, eos = limits(recipe)["max_length"], tokenizer.eos_token_id

    def encode(rows: list[Row], first: int) -> Encoded:
        ids = tokenizer(_texts(text, rows, first), verbose=False)["input_ids"]
        whole = [row if eos is None or row[-1:] == [eos] else [*row, eos] for row in ids]
        return _causal(tokenizer, [(row, [True] * len(row)) for row in whole], limit, eos, first)

    return Form(tuple(text.columns), encode)


def _chat(recipe: Recipe, tokenizer: Any) -> Form:
    """The tokenizer's chat template, which writes all special tokens itself; a row over the limit is simply cut."""
    assert recipe.data.messages is not None
    if not tokenizer.chat_template:
        raise DataError(
            f"data.messages: the tokenizer of {recipe.model.path} has no chat template. "
            "Take an instruction-tuned model's tokenizer, or write source and target"
        )
    limit = limits(recipe)["max_length"]
    columns, conversation = chat.reader(recipe.data.messages)

    def encode(rows: list[Row], first: int) -> Encoded:
        conversations = [conversation(row, number) for number, row in enumerate(rows, start=first)]
        return _causal(tokenizer, chat.tokenize(tokenizer, conversations, first), limit, None, first)

    return Form(columns, encode)


def _ready(recipe: Recipe, present: Sequence[str], vocabulary: int) -> Form:
    """Columns input_ids and labels as they are: ids of the vocabulary, without padding, within a limit that the recipe names."""
    causal = recipe.model.task == "causal"
    most_ids = recipe.data.max_length if causal else recipe.data.max_source_length
    most_labels = recipe.data.max_length if causal else recipe.data.max_target_length
    mask = ("attention_mask",) if "attention_mask" in present else ()

    def encode(rows: list[Row], first: int) -> Encoded:
        for number, row in enumerate(rows, start=first):
            ids, labels = _integers(row, "input_ids", most_ids, number), _integers(row, "labels", most_labels, number)
            if ids.min() < 0 or labels.min() < IGNORED_LABEL or ((labels < 0) & (labels != IGNORED_LABEL)).any():
                raise DataError(f"row {number}: negative token ids; a label that is not learned is {IGNORED_LABEL}", row=number)
            if (most := max(ids.max(), labels.max())) >= vocabulary:
                raise DataError(f"row {number}: token id {most}, and the model has {vocabulary}, from 0 to {vocabulary - 1}", row=number)
            if causal and len(labels) != len(ids):
                raise DataError(f"row {number}: {len(ids)} input_ids but {len(labels)} labels; causal rows have as many", row=number)
            if mask and not all(row["attention_mask"] or [0]):
                raise DataError(f"row {number}: attention_mask has zeros: give the rows without padding, it is added here", row=number)
        columns = {name: [list(row[name]) for row in rows] for name in ("input_ids", "labels")}
        return Encoded(columns, [_counted(row[1:] if causal else row) for row in columns["labels"]])

    return Form(("input_ids", "labels", *mask), encode)


def _integers(row: Row, column: str, limit: int | None, number: int) -> np.ndarray:
    if row[column] is None:
        raise DataError(f"row {number}: column {column} is null. Fill it or leave the row out of the data", row=number, column=column)
    values = np.asarray(row[column])
    if values.dtype.kind not in "iu" or values.ndim != 1 or not len(values):
        raise DataError(f"row {number}: column {column} is no list of token ids: {str(row[column])[:60]}", row=number, column=column)
    if limit is not None and len(values) > limit:
        raise DataError(f"row {number}: {len(values)} {column}, over the recipe's limit of {limit}; ready rows are not cut", row=number)
    return values


def _classification(recipe: Recipe, tokenizer: Any, label_names: Sequence[str]) -> Form:
    assert recipe.data.source is not None and recipe.data.target is not None
    sources = recipe.data.source if isinstance(recipe.data.source, list) else [recipe.data.source]
    parsed = [templates.parse(source, "data.source") for source in sources]
    label, limit = templates.parse_field(recipe.data.target, "data.target"), limits(recipe)["max_length"]
    _check_room(tokenizer, len(parsed), limit, "data.max_length")
    number_of = {name: index for index, name in enumerate(label_names)}

    def encode(rows: list[Row], first: int) -> Encoded:
        tokens, cut = _tokenize(tokenizer, *(_texts(template, rows, first) for template in parsed), limit=limit)
        _check_not_empty(tokens["input_ids"], first)
        labels = [[_number(number_of, label, row, number)] for number, row in enumerate(rows, start=first)]
        columns = {"input_ids": tokens["input_ids"], "labels": labels}
        if len(parsed) == 2 and "token_type_ids" in tokens:
            columns["token_type_ids"] = tokens["token_type_ids"]
        return Encoded(columns, [1] * len(rows), {"source": int(cut.sum())})

    return Form((*(column for template in parsed for column in template.columns), label.column), encode)


def _number(number_of: dict[str, int], label: templates.Field, row: Row, number: int) -> int:
    value = label.of(row, number)
    if str(value) not in number_of:
        what = f"column {label} is {value!r}, which is none of the {len(number_of)} labels"
        raise DataError(f"row {number}: {what}", row=number, column=label.column)
    return number_of[str(value)]


def _texts(template: templates.Template, rows: list[Row], first: int) -> list[str]:
    return [template.of(row, number) for number, row in enumerate(rows, start=first)]


def _check_room(tokenizer: Any, texts: int, limit: int, key: str) -> None:
    """A tokenizer leaves a row whole, whatever the limit, where its special tokens alone pass it."""
    special = tokenizer.num_special_tokens_to_add(texts == 2)
    if limit <= special:
        raise DataError(f"{key}: {limit} leaves no room beside the tokenizer's {special} special tokens; write at least {special + 1}")


def _check_not_empty(rows: list[list[int]], first: int) -> None:
    for number, ids in enumerate(rows, start=first):
        if not ids:
            raise DataError(f"row {number}: the source is empty and the tokenizer adds no token of its own", row=number)


def _tokenize(tokenizer: Any, *texts: list[str], limit: int, **more: Any) -> tuple[dict[str, list[list[int]]], np.ndarray]:
    """(columns, which rows were cut). The tokenizer cuts, longest part of a pair first."""
    tokens = tokenizer(*texts, truncation=True, max_length=limit, verbose=False, **more)
    cut = np.array([len(ids) == limit for ids in tokens["input_ids"]], dtype=bool)
    if cut.any():
        full = np.flatnonzero(cut)
        again = [[part[row] for row in full] for part in texts]
        whole = tokenizer(*again, verbose=False, **{key: [part[row] for row in full] for key, part in more.items()})
        cut[full] = [len(ids) > limit for ids in whole["input_ids"]]
    return tokens, cut


def _ending_in_eos(rows: list[list[int]], eos: int | None, limit: int) -> tuple[list[list[int]], np.ndarray]:
    """(rows that end in EOS within the limit, which of them lost a token for it)."""
    lacking = np.array([eos is not None and row[-1:] != [eos] for row in rows], dtype=bool)
    ended = [[*row[: limit - 1], eos] if lacks and eos is not None else row for row, lacks in zip(rows, lacking, strict=True)]
    return ended, lacking & np.array([len(row) >= limit for row in rows], dtype=bool)


def _causal(tokenizer: Any, rows: list[chat.Marked], limit: int, eos: int | None, first: int) -> Encoded:
    """Labels where learned. A row over the limit is cut on the tokenizer's side; if its last token goes and the one that is then last is
    learned, that becomes `eos`, unless it is None."""
    _check_not_empty([ids for ids, _ in rows], first)
    out = Encoded({"input_ids": [], "labels": []}, [], {"row": 0})
    for ids, learned in rows:
        labels = [token if counts else IGNORED_LABEL for token, counts in zip(ids, learned, strict=True)]
        if len(ids) > limit:
            at_the_left = tokenizer.truncation_side == "left"
            front = int(at_the_left and ids[0] == tokenizer.bos_token_id)  # what the tokenizer puts in front stays
            kept = [*range(front), *range(len(ids) - limit + front, len(ids))] if at_the_left else range(limit)
            ids, labels = [ids[place] for place in kept], [labels[place] for place in kept]
            out.truncated["row"] += 1
            if eos is not None and not at_the_left and labels[-1] != IGNORED_LABEL:
                ids[-1] = labels[-1] = eos
        out.columns["input_ids"].append(ids)
        out.columns["labels"].append(labels)
        out.label_tokens.append(_counted(labels[1:]))
    return out


def _counted(labels: list[int]) -> int:
    return sum(label != IGNORED_LABEL for label in labels)
