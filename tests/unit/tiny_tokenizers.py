"""Byte-level tokenizers without merges, made in a test's own folder: one token a byte, so that token counts can be read off the text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

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
