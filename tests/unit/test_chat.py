"""Conversations: the ids are those of the tokenizer's own chat template, and the assistant's words alone are learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import END, EOS, counted, recipe_over, rows_of

from trainkit.data.tokens import load_tokenizer, prepare
from trainkit.errors import DataError
from trainkit.recipe.schema import Recipe

Make = Callable[..., Recipe]

TURNS = "{% for m in messages %}[CLS]{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
PLAIN = TURNS + "{% if add_generation_prompt %}[CLS]assistant\n{% endif %}"
MARKED = (
    "{% for m in messages %}[CLS]{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)
FORGETFUL = "{% for m in messages %}[CLS]{{ m.role }}\n{{ m.content if loop.last else '' }}{% endfor %}"
ENDLESS = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
STRICT = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}" + PLAIN

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "so"},
]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def recipe(chat_template: str | None, rows: list[dict[str, Any]], **data: Any) -> Recipe:
        return recipe_over(tmp_path, "causal", rows, None, {"chat_template": chat_template}, **data)

    return recipe


def learned(recipe: Recipe) -> list[str]:
    """Of each row the learned text, | where something in between is not."""
    tokenizer = load_tokenizer(recipe).tokenizer
    said = []
    for row in rows_of(prepare(recipe).train, "labels"):
        bar = tokenizer("|")["input_ids"][0]
        said.append(tokenizer.decode([bar if token == -100 else token for token in row]).strip("|"))
    return ["|".join(part for part in text.split("|") if part) for text in said]


@pytest.mark.parametrize(("template", "end"), [(PLAIN, "<|end|>\n"), (MARKED, "<|end|>")])
def test_the_assistants_turns_alone_are_learned(make: Make, template: str, end: str) -> None:
    recipe = make(template, [{"chat": CHAT}, {"chat": CHAT[1:3]}, {"chat": CHAT[:2]}], messages="chat")
    assert learned(recipe) == [f"yo{end}|so{end}", f"yo{end}", ""]
    assert counted(prepare(recipe).train) == [2 * len(f"yo{end}") - 12, len(f"yo{end}") - 6, 0], "<|end|> is one token, not seven"
    assert prepare(recipe).notes == ["data.train: 1 of 3 rows have no label left"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_ids_are_the_chat_templates_own(make: Make, template: str) -> None:
    recipe = make(template, [{"chat": CHAT}], messages="{chat}")
    whole = load_tokenizer(recipe).tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert rows_of(prepare(recipe).train, "input_ids") == [whole]
    assert [token for token in rows_of(prepare(recipe).train, "labels")[0] if token == END] == [END, END]


NEVER_EMPTY = "{% if messages[0].role == 'system' %}{% endif %}" + PLAIN
NO_CONTENT_FIRST = "{% for m in messages %}{{ 'said' if loop.first else m.content }}<|end|>{% endfor %}"


@pytest.mark.parametrize("template", [PLAIN, MARKED, NEVER_EMPTY])
def test_a_conversation_may_begin_with_the_assistant(make: Make, template: str) -> None:
    end = "<|end|>" if template == MARKED else "<|end|>\n"
    assert learned(make(template, [{"chat": CHAT[2:]}, {"chat": CHAT[2:3]}], messages="chat")) == [f"yo{end}|so{end}", f"yo{end}"]


def test_a_first_turn_whose_words_are_not_shown_is_learned_as_it_stands(make: Make) -> None:
    assert learned(make(NO_CONTENT_FIRST, [{"chat": CHAT[2:3]}], messages="chat")) == ["said<|end|>"]


def test_templates_of_turns_make_a_conversation(make: Make) -> None:
    turns = [{"role": "system", "content": "be {tone}"}, {"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}]
    recipe = make(PLAIN, [{"q": "hi", "a": "yo", "tone": "brief"}], messages=turns)
    whole = load_tokenizer(recipe).tokenizer.apply_chat_template(CHAT[:3], tokenize=True, return_dict=False)
    assert rows_of(prepare(recipe).train, "input_ids") == [whole]
    assert learned(recipe) == ["yo<|end|>\n"]


def test_a_mark_that_is_special_in_the_vocabulary_alone_ends_a_turn(make: Make) -> None:
    recipe = make(PLAIN, [{"chat": CHAT}], messages="chat")
    path = Path(recipe.model.path) / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if "special_tokens" not in key}))
    tokenizer = load_tokenizer(recipe).tokenizer
    assert END not in tokenizer.all_special_ids and tokenizer.added_tokens_decoder[END].special
    assert END in rows_of(prepare(recipe).train, "labels")[0] and EOS not in rows_of(prepare(recipe).train, "labels")[0]


def test_a_mark_that_opens_a_turn_does_not_end_it(make: Make) -> None:
    """Also where the template asks for no opening, so that it is learned with the words."""
    recipe = make("{% for m in messages %}<|end|>{{ m.content }}{% endfor %}", [{"chat": CHAT[1:3]}], messages="chat")
    assert learned(recipe) == ["<|end|>yo</s>"]


def test_a_template_without_an_end_mark_gets_eos(make: Make) -> None:
    recipe = make(ENDLESS, [{"chat": CHAT}, {"chat": CHAT[1:]}, {"chat": CHAT[1:4]}], messages="chat")
    ends = [row[-1] for row in rows_of(prepare(recipe).train, "labels")]
    assert ends == [EOS, EOS, -100], "a row that the user ends is not closed"
    assert learned(recipe)[0] == "yo;|so;</s>"


def test_a_long_conversation_is_cut_as_it_stands(make: Make) -> None:
    recipe = make(PLAIN, [{"chat": CHAT[1:3]}], messages="chat", max_length=22)
    whole = load_tokenizer(recipe).tokenizer.apply_chat_template(CHAT[1:3], tokenize=True, return_dict=False)
    prepared = prepare(recipe)
    assert rows_of(prepared.train, "input_ids") == [whole[:22]]
    assert prepared.report["train"].truncated == {"row": 1}
    assert learned(recipe) == ["y"], "cut in the middle of the answer: no EOS is made up"


@pytest.mark.parametrize(
    ("template", "chat", "said"),
    [
        (FORGETFUL, CHAT, "row 0: .*the chat template writes a turn otherwise once others follow it.*Write source and target"),
        (STRICT, CHAT, "row 0: .*the chat template refuses this conversation: no system role"),
        (PLAIN, [], "row 0: column chat is no list of turns with role and content"),
        (PLAIN, [{"from": "user", "value": "hi"}], "its turns have from, value"),
        (PLAIN, [{"role": "user", "content": None}], "its turns have role, content"),
        (PLAIN, "user: hi", "is no list of turns"),
        (PLAIN, None, "row 0: column chat is null"),
    ],
)
def test_a_conversation_that_cannot_be_read_names_its_row(make: Make, template: str, chat: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        prepare(make(template, [{"chat": chat}, {"chat": chat}], messages="chat"))


def test_a_token_across_the_border_of_a_turn_is_an_error(tmp_path: Path) -> None:
    settings: Any = {"chat_template": ENDLESS, "merges": ((":", "y"),)}
    make = partial(recipe_over, tmp_path, "causal", settings=settings, messages="chat")
    with pytest.raises(DataError, match=r"row 0: .*a token runs across the border of an assistant's turn"):
        prepare(make([{"chat": CHAT}]))


def test_a_tokenizer_without_a_chat_template_is_an_error(make: Make) -> None:
    with pytest.raises(DataError, match=r"data\.messages: the tokenizer of .* has no chat template"):
        prepare(make(None, [{"chat": CHAT}], messages="chat"))


def test_another_chat_template_is_tokenized_anew(make: Make, tmp_path: Path) -> None:
    first = prepare(make(PLAIN, [{"chat": CHAT}], messages="chat")).train
    (tmp_path / "model-None" / "chat_template.jinja").write_text(ENDLESS)
    assert prepare(make(PLAIN, [{"chat": CHAT}], messages="chat")).train != first
