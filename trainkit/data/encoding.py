"""Rows to token ids and labels, one function per form of the recipe: chunk in, columns out.

Truncation is the tokenizer's: special tokens count toward the limit and EOS stays. EOS is learned: where the tokenizer does not append
it, a target or completion gets it. Labels that are not learned are -100.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainkit.data import templates
from trainkit.errors import DataError
from trainkit.recipe.schema import Recipe

IGNORED = -100
DEFAULT_LENGTH = 512
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
    """How the recipe's rows are encoded, and the columns that this reads."""

    columns: tuple[str, ...]
    encode: Encode


def form_of(recipe: Recipe, tokenizer: Any, label_names: Sequence[str] | None) -> Form:
    """Raises DataError for a template that cannot be read or a tokenizer that lacks what the form needs."""
    data, task = recipe.data, recipe.model.task
    if data.messages is not None:
        return _chat(recipe, tokenizer)
    if data.source is None and data.target is None:
        return _ready(recipe)
    if task == "classification":
        return _classification(recipe, tokenizer, label_names or [])
    if task == "seq2seq":
        return _seq2seq(recipe, tokenizer)
    return _plain_text(recipe, tokenizer) if data.source is None else _completion(recipe, tokenizer)


def label_column(recipe: Recipe) -> str:
    """The column of data.target under classification: `label` or `{label}`."""
    target = recipe.data.target
    return "labels" if target is None else target.strip().removeprefix("{").removesuffix("}").strip()


def _seq2seq(recipe: Recipe, tokenizer: Any) -> Form:
    assert isinstance(recipe.data.source, str) and recipe.data.target is not None
    source, target = templates.parse(recipe.data.source, "data.source"), templates.parse(recipe.data.target, "data.target")
    most_source, most_target = recipe.data.max_source_length or DEFAULT_LENGTH, recipe.data.max_target_length or DEFAULT_LENGTH

    def encode(rows: list[Row], first: int) -> Encoded:
        inputs, cut_source = _tokenize(tokenizer, [source.of(row, first + i) for i, row in enumerate(rows)], limit=most_source)
        targets, cut_target = _tokenize(tokenizer, text_target=[target.of(row, first + i) for i, row in enumerate(rows)], limit=most_target)
        labels = [_ending_in_eos(ids, tokenizer.eos_token_id, most_target) for ids in targets["input_ids"]]
        columns = {"input_ids": inputs["input_ids"], "labels": labels}
        return Encoded(columns, [len(row) for row in labels], {"source": cut_source, "target": cut_target})

    return Form((*source.columns, *target.columns), encode)


def _completion(recipe: Recipe, tokenizer: Any) -> Form:
    """Prompt and completion are tokenized apart; completion and EOS are labelled."""
    assert isinstance(recipe.data.source, str) and recipe.data.target is not None
    source, target = templates.parse(recipe.data.source, "data.source"), templates.parse(recipe.data.target, "data.target")
    limit, eos = recipe.data.max_length or DEFAULT_LENGTH, tokenizer.eos_token_id

    def encode(rows: list[Row], first: int) -> Encoded:
        prompts = tokenizer([source.of(row, first + i) for i, row in enumerate(rows)], add_special_tokens=True)["input_ids"]
        completions = tokenizer([target.of(row, first + i) for i, row in enumerate(rows)], add_special_tokens=False)["input_ids"]
        spans = []
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt = prompt[:-1] if prompt and prompt[-1] == eos else prompt  # the row goes on after the prompt
            completion = completion if eos is None else [*completion, eos]
            spans.append([(prompt, False), (completion, True)])
        return _causal(spans, limit, eos)

    return Form((*source.columns, *target.columns), encode)


def _plain_text(recipe: Recipe, tokenizer: Any) -> Form:
    assert recipe.data.target is not None
    text = templates.parse(recipe.data.target, "data.target")
    limit, eos = recipe.data.max_length or DEFAULT_LENGTH, tokenizer.eos_token_id

    def encode(rows: list[Row], first: int) -> Encoded:
        ids = tokenizer([text.of(row, first + i) for i, row in enumerate(rows)], add_special_tokens=True)["input_ids"]
        return _causal([[(row if eos is None or row[-1:] == [eos] else [*row, eos], True)] for row in ids], limit, eos)

    return Form(tuple(text.columns), encode)


def _chat(recipe: Recipe, tokenizer: Any) -> Form:
    """The tokenizer's chat template; loss on assistant turns only, their end-of-turn token included."""
    if not tokenizer.chat_template:
        raise DataError(
            f"data.messages: the tokenizer of {recipe.model.path} has no chat template. "
            "Take an instruction-tuned model's tokenizer, or write source and target"
        )
    limit, eos = recipe.data.max_length or DEFAULT_LENGTH, tokenizer.eos_token_id
    columns, conversation = _conversations(recipe)

    def encode(rows: list[Row], first: int) -> Encoded:
        return _causal([_turns(tokenizer, conversation(row, first + i), first + i) for i, row in enumerate(rows)], limit, eos)

    return Form(columns, encode)


def _conversations(recipe: Recipe) -> tuple[tuple[str, ...], Callable[[Row, int], list[dict[str, str]]]]:
    messages = recipe.data.messages
    if isinstance(messages, str):
        column = templates.Field(messages.strip().removeprefix("{").removesuffix("}").strip())
        return (column.column,), lambda row, number: _checked_turns(column.of(row, number), column, number)
    assert messages is not None
    parsed = [(message.role, templates.parse(message.content, "data.messages")) for message in messages]
    names = tuple(name for _, template in parsed for name in template.columns)
    return names, lambda row, number: [{"role": role, "content": template.of(row, number)} for role, template in parsed]


def _checked_turns(turns: Any, column: templates.Field, number: int) -> list[dict[str, str]]:
    sound = (
        isinstance(turns, list)
        and turns
        and all(isinstance(turn, dict) and turn.get("role") and turn.get("content") is not None for turn in turns)
    )
    if not sound:
        raise DataError(f"row {number}: column {column} is no list of {{role, content}}", row=number, column=column.column)
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _turns(tokenizer: Any, conversation: list[dict[str, str]], number: int) -> list[tuple[list[int], bool]]:
    """(ids, learned?) of each turn. The conversation is rendered turn by turn; each rendering must begin with the one before."""
    spans: list[tuple[list[int], bool]] = []
    before = ""
    for end, turn in enumerate(conversation, start=1):
        learned = turn["role"] == "assistant"
        if learned:
            opened = tokenizer.apply_chat_template(conversation[: end - 1], tokenize=False, add_generation_prompt=True)
            spans.append((_piece(tokenizer, before, opened, number), False))
            before = opened
        text = tokenizer.apply_chat_template(conversation[:end], tokenize=False)
        spans.append((_piece(tokenizer, before, text, number), learned))
        before = text
    return spans


def _piece(tokenizer: Any, before: str, text: str, number: int) -> list[int]:
    if not text.startswith(before):
        raise DataError(
            f"row {number}: data.messages: the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart. "
            "Write source and target instead",
            row=number,
        )
    return tokenizer(text[len(before) :], add_special_tokens=False)["input_ids"]


def _ready(recipe: Recipe) -> Form:
    """Columns input_ids and labels as they are. A causal row's labels are as long as its ids."""
    task = recipe.model.task

    def encode(rows: list[Row], first: int) -> Encoded:
        for number, row in enumerate(rows, start=first):
            for name in ("input_ids", "labels"):
                if row[name] is None:
                    raise DataError(f"row {number}: column {name} is null", row=number, column=name)
            if task == "causal" and len(row["labels"]) != len(row["input_ids"]):
                raise DataError(f"row {number}: {len(row['input_ids'])} input_ids but {len(row['labels'])} labels", row=number)
        labels = [[row["labels"]] if task == "classification" else list(row["labels"]) for row in rows]
        columns = {"input_ids": [list(row["input_ids"]) for row in rows], "labels": labels}
        return Encoded(columns, [_counted(row[1:] if task == "causal" else row) for row in labels])

    return Form(("input_ids", "labels"), encode)


def _classification(recipe: Recipe, tokenizer: Any, label_names: Sequence[str]) -> Form:
    sources = recipe.data.source if isinstance(recipe.data.source, list) else [recipe.data.source or ""]
    parsed = [templates.parse(source, "data.source") for source in sources]
    label, limit = templates.Field(label_column(recipe)), recipe.data.max_length or DEFAULT_LENGTH
    number_of = {name: index for index, name in enumerate(label_names)}

    def encode(rows: list[Row], first: int) -> Encoded:
        texts = [[template.of(row, first + i) for i, row in enumerate(rows)] for template in parsed]
        tokens, cut = _tokenize(tokenizer, *texts, limit=limit)
        labels = [[_number(number_of, label.of(row, first + i), label, first + i)] for i, row in enumerate(rows)]
        columns = {"input_ids": tokens["input_ids"], "labels": labels}
        if len(parsed) == 2 and "token_type_ids" in tokens:
            columns["token_type_ids"] = tokens["token_type_ids"]
        return Encoded(columns, [1] * len(rows), {"source": cut})

    return Form((*(column for template in parsed for column in template.columns), label.column), encode)


def _number(number_of: dict[str, int], value: Any, label: templates.Field, number: int) -> int:
    if str(value) not in number_of:
        raise DataError(
            f"row {number}: column {label} is {value!r}, which is none of the {len(number_of)} labels", row=number, column=label.column
        )
    return number_of[str(value)]


def _tokenize(tokenizer: Any, *texts: list[str], limit: int = DEFAULT_LENGTH, **more: Any) -> tuple[dict[str, list[list[int]]], int]:
    """(columns, rows cut). The tokenizer cuts, longest part of a pair first."""
    tokens = tokenizer(*texts, truncation=True, max_length=limit, **more)
    full = [len(ids) == limit for ids in tokens["input_ids"]]
    if not any(full):
        return tokens, 0
    at_limit = [[text for text, is_full in zip(part, full, strict=True) if is_full] for part in (*texts, *more.values())]
    whole = tokenizer(*at_limit[: len(texts)], **dict(zip(more, at_limit[len(texts) :], strict=True)))
    return tokens, sum(len(ids) > limit for ids in whole["input_ids"])


def _ending_in_eos(ids: list[int], eos: int | None, limit: int) -> list[int]:
    return ids if eos is None or ids[-1:] == [eos] else [*ids[: limit - 1], eos]


def _causal(rows: list[list[tuple[list[int], bool]]], limit: int, eos: int | None) -> Encoded:
    """Spans end to end, labels where learned. A row over the limit is cut, and ends in EOS if its last token is learned."""
    out = Encoded({"input_ids": [], "labels": []}, [], {"row": 0})
    for spans in rows:
        ids = [token for span, _ in spans for token in span]
        labels = [token if learned else IGNORED for span, learned in spans for token in span]
        if len(ids) > limit:
            ids, labels = ids[:limit], labels[:limit]
            out.truncated["row"] += 1
            if eos is not None and labels[-1] != IGNORED:
                ids[-1] = labels[-1] = eos
        out.columns["input_ids"].append(ids)
        out.columns["labels"].append(labels)
        out.label_tokens.append(_counted(labels[1:]))
    return out


def _counted(labels: list[int]) -> int:
    return sum(label != IGNORED for label in labels)
