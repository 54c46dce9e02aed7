"""Conversations to token ids by the tokenizer's own chat template, and which of the ids the assistant wrote.

A template that marks the assistant's words ({% generation %}) is asked. For any other, the conversation is rendered up to each assistant
turn and up to its end: these texts, and their tokens, must be beginnings of the whole, or the row is an error. A turn's end mark belongs
to the turn and is learned with it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from trainkit.data import templates
from trainkit.errors import DataError
from trainkit.recipe.schema import Messages

Conversation = list[dict[str, Any]]
Marked = tuple[list[int], list[bool]]  # token ids of a row, and which of them are learned

_MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER_WORDS = "0 other words 0"
_WAY_OUT = "Write source and target instead, or give the template {% generation %} marks"


def reader(messages: str | Sequence[Messages]) -> tuple[tuple[str, ...], Callable[[dict[str, Any], int], Conversation]]:
    """(columns that are read, row and its number to conversation) of data.messages: a chat column, or templates of the turns."""
    if isinstance(messages, str):
        field = templates.parse_field(messages, "data.messages")
        return (field.column,), lambda row, number: _turns(field.of(row, number), field, number)
    parsed = [(message.role, templates.parse(message.content, "data.messages")) for message in messages]
    columns = tuple(column for _, template in parsed for column in template.columns)
    return columns, lambda row, number: [{"role": role, "content": template.of(row, number)} for role, template in parsed]


def tokenize(tokenizer: Any, conversations: list[Conversation], first: int) -> list[Marked]:
    """Token ids of each conversation, learned where the assistant speaks. `first` is the row number of the first conversation.

    A row that ends in the assistant's plain words, without any mark that ends a turn, gets EOS, so that the model learns to stop.
    Raises DataError, naming the row, where the template refuses a conversation or the assistant's tokens cannot be told apart.
    """
    marked = _marked_by_template if _MARKS_ASSISTANT.search(str(tokenizer.chat_template)) else _marked_by_rendering
    marks = _special_ids(tokenizer)
    return [_stopping(tokenizer, marks, ids, learned) for ids, learned in marked(tokenizer, conversations, first)]


def _turns(turns: Any, field: templates.Field, number: int) -> Conversation:
    sound = isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)
    if not sound or not all(turn.get("role") and turn.get("content") is not None for turn in turns):
        keys = f"; its turns have {', '.join(turns[0])}" if sound else ""
        raise DataError(f"row {number}: column {field} is no list of turns with role and content{keys}", row=number, column=field.column)
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns]


def _marked_by_template(tokenizer: Any, conversations: list[Conversation], first: int) -> list[Marked]:
    rows = []
    for number, conversation in enumerate(conversations, start=first):
        row = _applied(tokenizer, conversation, number, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        rows.append((list(row["input_ids"]), [bool(learned) for learned in row["assistant_masks"]]))
    return rows


def _marked_by_rendering(tokenizer: Any, conversations: list[Conversation], first: int) -> list[Marked]:
    rendered = [_rendered(tokenizer, conversation, number) for number, conversation in enumerate(conversations, start=first)]
    texts = [text for whole, borders in rendered for text in (whole, *borders)]
    ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    rows = []
    for number, (_, borders) in enumerate(rendered, start=first):
        whole, ends = list(next(ids)), []
        for part in (list(next(ids)) for _ in borders):
            if whole[: len(part)] != part:
                raise _no_border(number, "a token runs across the border of an assistant's turn")
            ends.append(len(part))
        learned = [False] * len(whole)
        for opened, closed in zip(ends[::2], ends[1::2], strict=True):
            learned[opened:closed] = [True] * (closed - opened)
        rows.append((whole, learned))
    return rows


def _rendered(tokenizer: Any, conversation: Conversation, number: int) -> tuple[str, list[str]]:
    """The whole text, and for each assistant turn its beginnings that end where the turn's words begin and where the turn ends."""
    whole = _applied(tokenizer, conversation, number, tokenize=False)
    borders: list[str] = []
    for index, turn in enumerate(conversation):
        if turn["role"] == "assistant":
            opened = _opening(tokenizer, conversation, index, number)
            closed = _applied(tokenizer, conversation[: index + 1], number, tokenize=False)
            if not (closed.startswith(opened) and whole.startswith(closed)):
                raise _no_border(number, "the chat template writes a turn otherwise once others follow it")
            borders += [opened, closed]
    return whole, borders


def _opening(tokenizer: Any, conversation: Conversation, index: int, number: int) -> str:
    """The text before an assistant turn's words. Templates refuse an empty conversation: there it is what they write before other words."""
    if index:
        return str(_applied(tokenizer, conversation[:index], number, tokenize=False, add_generation_prompt=True))
    other = _applied(tokenizer, [{"role": "assistant", "content": _OTHER_WORDS}], number, tokenize=False)
    return str(other).partition(_OTHER_WORDS)[0] if _OTHER_WORDS in other else ""


def _no_border(number: int, why: str) -> DataError:
    return DataError(f"row {number}: data.messages: the assistant's tokens cannot be told apart: {why}. {_WAY_OUT}", row=number)


def _applied(tokenizer: Any, conversation: Conversation, number: int, **how: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(conversation, **how)
    except Exception as error:  # templates raise their own errors: roles that do not alternate, a role they do not know
        said = " ".join(str(error).split())
        raise DataError(f"row {number}: data.messages: the chat template refuses this conversation: {said}", row=number) from None


def _special_ids(tokenizer: Any) -> set[int]:
    """Also those that are special in the vocabulary only, as <|im_end|> is in some."""
    return {*tokenizer.all_special_ids, *(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)}


def _stopping(tokenizer: Any, marks: set[int], ids: list[int], learned: list[bool]) -> Marked:
    """A mark in front of the turn's words opens it; one behind them ends it."""
    if not ids or not learned[-1] or tokenizer.eos_token_id is None or ids[-1] in marks:
        return ids, learned
    start = len(learned) - learned[::-1].index(False) if False in learned else 0
    words = itertools.dropwhile(marks.__contains__, ids[start:])
    return (ids, learned) if marks & set(words) else ([*ids, tokenizer.eos_token_id], [*learned, True])
