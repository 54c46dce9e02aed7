"""Tokenization: once per (rows, templates, tokenizer, limits), into token arrays under <storage_path>/.cache/tokens.

The key is a hash of the content itself, so data that changed under the same name is tokenized anew. A preparation that was interrupted
leaves nothing; two at once each write their own and the first that ends stays.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainkit.data import templates
from trainkit.data.arrays import TokenArrays, Writer, read_manifest
from trainkit.data.encoding import Form, form_of, label_column
from trainkit.data.source import Rows, hub_is_reached, load_rows, no_hub
from trainkit.errors import DataError
from trainkit.recipe.schema import Recipe

__all__ = ["LoadedTokenizer", "Prepared", "TokenArrays", "load_tokenizer", "prepare"]

FORMAT = 1
CHUNK = 2000
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadedTokenizer:
    tokenizer: Any
    note: str | None  # what had to be chosen


@dataclass(frozen=True)
class Prepared:
    """Folders of token arrays, and what the preparation found."""

    train: str
    eval: str | None
    label_names: list[str] | None  # classification: number to name
    notes: list[str] = field(default_factory=list)


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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"model.path: {recipe.model.path}: no tokenizer can be read here: {reason}") from None
    if tokenizer.pad_token_id is not None:
        return LoadedTokenizer(tokenizer, None)
    chosen = tokenizer.eos_token or tokenizer.unk_token
    if chosen is None:
        raise DataError(
            f"model.path: {recipe.model.path}: the tokenizer has no pad, EOS or unknown token; set pad_token in its tokenizer_config.json"
        )
    tokenizer.pad_token = chosen
    return LoadedTokenizer(tokenizer, f"the tokenizer has no pad token: {chosen!r} pads, masked by position")


def prepare(recipe: Recipe, progress: Progress | None = None) -> Prepared:
    """Tokenize what is not tokenized yet. `progress(done, total)` counts rows over both splits."""
    loaded = load_tokenizer(recipe)
    rows = load_rows(recipe)
    names = _label_names(recipe, rows) if recipe.model.task == "classification" else None
    form = form_of(recipe, loaded.tokenizer, names)
    splits = {"train": rows.train} | ({} if rows.eval is None else {"eval": rows.eval})
    for split, part in splits.items():
        templates.check_columns(form.columns, part.column_names, f"data.{split}")
    key, total, done = _settings_key(recipe, loaded.tokenizer, names), sum(map(len, splits.values())), 0
    folders, notes = {}, [] if loaded.note is None else [loaded.note]
    for split, part in splits.items():
        part = part.select_columns(list(dict.fromkeys(form.columns)))
        folder = Path(recipe.run.storage_path) / ".cache" / "tokens" / _content_key(part, key)
        if read_manifest(folder) is None:
            _tokenize(part, form, folder, progress, done, total)
        done += len(part)
        if progress is not None:
            progress(done, total)
        folders[split] = str(folder)
        notes += _notes(split, TokenArrays.open(folder))
    _check_labels(TokenArrays.open(folders["train"]))
    shown = None if names is None else _shown_names(recipe, rows, names)
    return Prepared(folders["train"], folders.get("eval"), shown, notes)


def _tokenize(part: Any, form: Form, folder: Path, progress: Progress | None, done: int, total: int) -> None:
    truncated: Counter[str] = Counter()
    try:
        with Writer(folder) as writer:
            for first in range(0, len(part), CHUNK):
                rows = part[first : first + CHUNK]
                encoded = form.encode([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)], first)
                truncated.update(encoded.truncated)
                writer.append(encoded.columns, encoded.label_tokens)
                if progress is not None:
                    progress(done + first + len(encoded.label_tokens), total)
            writer.finish(truncated=dict(truncated))
    except OSError as error:
        raise DataError(f"{folder.parent}: the token cache cannot be written: {error.strerror or error}") from None


def _check_labels(arrays: TokenArrays) -> None:
    if int(arrays.label_tokens.sum()) == 0:
        raise DataError("data.train: no row has a label to learn: the prompts fill the length limit, or no turn is an assistant's")


def _notes(split: str, arrays: TokenArrays) -> list[str]:
    notes = [
        f"data.{split}: {number:,} of {arrays.rows:,} rows cut at the limit ({part})"
        for part, number in arrays.manifest["truncated"].items()
        if number
    ]
    unlabelled = int((arrays.label_tokens == 0).sum())
    return notes + ([f"data.{split}: {unlabelled:,} of {arrays.rows:,} rows have no label left"] if unlabelled else [])


def _label_names(recipe: Recipe, rows: Rows) -> list[str]:
    """Names of the classes over the whole set, in the order of their numbers.

    ClassLabel keeps its order, integers 0..n-1 keep their value, everything else is sorted. Raises DataError for numbers with a fraction.
    """
    import datasets

    column = label_column(recipe)
    parts = [part for part in (rows.train, rows.eval) if part is not None]
    for part in parts:
        templates.check_columns([column], part.column_names, "data.target")
    feature = rows.train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return [str(number) for number in range(feature.num_classes)]
    values = {value for part in parts for value in part.unique(column)}
    if None in values:
        where = next(i for part in parts for i, value in enumerate(part[column]) if value is None)
        raise DataError(f"row {where}: column {column} is null. Fill it or leave the row out of the data", row=where, column=column)
    if any(isinstance(value, float) for value in values):
        raise DataError(f"data.target: column {column} holds numbers with a fraction; classification needs strings, integers or booleans")
    if all(isinstance(value, int) for value in values) and not any(isinstance(value, bool) for value in values):
        if min(values) >= 0 and max(values) < 1000:
            return [str(number) for number in range(max(values) + 1)]
        return [str(value) for value in sorted(values)]
    return sorted(str(value) for value in values)


def _shown_names(recipe: Recipe, rows: Rows, names: Sequence[str]) -> list[str]:
    """What id2label says: a ClassLabel's names, else the labels themselves."""
    feature = rows.train.features[label_column(recipe)]
    return list(getattr(feature, "names", None) or names)


def _settings_key(recipe: Recipe, tokenizer: Any, names: Sequence[str] | None) -> str:
    data = recipe.data
    wording = [data.source, data.target, data.messages if isinstance(data.messages, str) else [m.model_dump() for m in data.messages or []]]
    limits = [data.max_source_length, data.max_target_length, data.max_length]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = [str(tokenizer.special_tokens_map), str(tokenizer.chat_template)]
    return hashlib.sha256(json.dumps([FORMAT, recipe.model.task, wording, limits, names, pieces, special]).encode()).hexdigest()


def _content_key(part: Any, settings: str) -> str:
    """Of the rows' values themselves, read once in chunks."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for table in part.with_format("arrow").iter(batch_size=10_000):
        digest.update(json.dumps(table.column_names).encode())
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()
