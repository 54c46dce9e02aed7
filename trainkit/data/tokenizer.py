"""The model's tokenizer, as every part of a run loads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.data.hub import hub_is_reached, no_hub
from trainkit.errors import DataError, first_line
from trainkit.recipe.schema import Recipe


@dataclass(frozen=True)
class LoadedTokenizer:
    tokenizer: Any
    note: str | None  # what had to be chosen


def load_tokenizer(recipe: Recipe) -> LoadedTokenizer:
    """The model's tokenizer with a pad token. Raises DataError when there is none to load."""
    import transformers

    local = Path(recipe.model.path).exists()
    reached = local or hub_is_reached()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(recipe.model.path, revision=recipe.model.revision)
    except Exception as error:  # each backend fails in its own way
        if not reached:
            raise DataError(no_hub("model.path", recipe.model.path), hub=True) from None
        raise DataError(f"model.path: {recipe.model.path}: no tokenizer can be read here: {first_line(error)}") from None
    if tokenizer.pad_token_id is not None:
        return LoadedTokenizer(tokenizer, None)
    chosen = tokenizer.eos_token or tokenizer.unk_token
    if chosen is None:
        raise DataError(
            f"model.path: {recipe.model.path}: the tokenizer has no pad, EOS or unknown token; set pad_token in its tokenizer_config.json"
        )
    tokenizer.pad_token = chosen
    return LoadedTokenizer(tokenizer, f"the tokenizer has no pad token: {chosen!r} pads, masked by position")
