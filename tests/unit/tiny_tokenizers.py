"""Tokenizers made in a test's own folder, and recipes over them.

They are byte-level and, unless a test asks for merges, without any: one token a byte, so that token counts can be read off the text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainkit.data.tokens import TokenArrays, load_tokenizer
from trainkit.recipe.schema import Recipe

PAD, EOS, UNK, CLS, SEP, END = range(6)
Rows = list[dict[str, Any]]

SPECIAL = ["<pad>", "</s>", "<unk>", "[CLS]", "[SEP]", "<|end|>"]
ENDINGS = {
    "eos": processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)]),
    "pair": processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    ),
}


def make(folder: Path, ending: str | None = "eos", *, merges: tuple[tuple[str, str], ...] = (), **settings: str | None) -> Path:
    """Save a tokenizer to `folder`. `ending`: which special tokens it adds; `settings`: chat_template, eos_token=None and the like."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    if ending is not None:
        tokenizer.post_processor = ENDINGS[ending]
    chat_template = settings.pop("chat_template", None)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | settings
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        extra_special_tokens=["[CLS]", "[SEP]", "<|end|>"],
        **{name: token for name, token in names.items() if token is not None},
    )
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


def recipe_of(task: str, model: Path, tmp_path: Path, **data: Any) -> Recipe:
    sections: dict[str, Any] = {"model": {"path": str(model), "task": task}, "data": data, "run": {"storage_path": str(tmp_path / "runs")}}
    return Recipe.model_validate({"name": "r", "batch": {"samples": 2}, "optimizer": {"lr": 0.1}, "train": {"epochs": 1}} | sections)


def recipe_over(
    tmp_path: Path, task: str, rows: Rows, ending: str | None = "eos", settings: dict[str, str | None] | None = None, **data: Any
) -> Recipe:
    """A recipe over rows written to a file, with a tokenizer made for it."""
    model = tmp_path / f"model-{ending}"
    if not model.exists():
        make(model, ending, **(settings or {}))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe_of(task, model, tmp_path, **({"path": str(file)} | data))


def ids(text: str, recipe: Recipe) -> list[int]:
    """The text's tokens and no special ones."""
    return load_tokenizer(recipe).tokenizer(text, add_special_tokens=False)["input_ids"]


def rows_of(folder: str | None, column: str) -> list[list[int]]:
    assert folder is not None
    arrays = TokenArrays.open(folder)
    return [arrays.by_column[column].row(row).tolist() for row in range(arrays.rows)]


def counted(folder: str) -> list[int]:
    return TokenArrays.open(folder).label_tokens.tolist()
