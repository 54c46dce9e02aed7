"""Tokenization: once per (rows, templates, tokenizer, limits), into token arrays under <storage_path>/.cache/tokens.

The key is a hash of the content itself, so data that changed under the same name is tokenized anew. A preparation that was interrupted
leaves nothing, and one that was killed leaves what the next one of the same key removes. Of two at once the second waits and finds the
arrays of the first.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainkit.data import chunks, templates
from trainkit.data.arrays import TokenArrays, Writer, alone_at, holds, leftovers
from trainkit.data.chunks import Encoder, Spread
from trainkit.data.encoding import form_of, limits
from trainkit.data.source import Rows, load_rows
from trainkit.data.tokenizer import LoadedTokenizer, load_tokenizer
from trainkit.errors import DataError
from trainkit.recipe.schema import Recipe

__all__ = ["LoadedTokenizer", "Prepared", "SplitReport", "TokenArrays", "load_tokenizer", "prepare"]

FORMAT = 4  # part of the cache's key: raise it when the same rows would be encoded otherwise
Progress = Callable[[int, int], None]
Waiting = Callable[[float], None]
_INTEGER = re.compile(r"0|-?[1-9]\d*")
_FRACTION = re.compile(r"[+-]?\d*\.\d+(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class SplitReport:
    """What tokenizing made of one split. Tokens are counted per column (input_ids, labels); a label of -100 is no token."""

    rows: int
    truncated: dict[str, int]  # part of the row (seq2seq: source, target; causal: row) to number of rows cut at the limit
    unlabelled: int  # rows without a label left: they stay in the data and count 0 in N
    longest: dict[str, int]
    tokens: dict[str, int]


@dataclass(frozen=True)
class Prepared:
    """Folders of token arrays, and what the preparation found."""

    train: str
    eval: str | None
    label_names: list[str] | None  # classification: number to name
    notes: list[str] = field(default_factory=list)
    report: dict[str, SplitReport] = field(default_factory=dict)  # by train and eval

    @property
    def key(self) -> str:
        """Of the training rows' content: data, templates, tokenizer and limits."""
        return Path(self.train).name


def prepare(
    recipe: Recipe, progress: Progress = lambda done, total: None, spread: Spread = chunks.here, waiting: Waiting = lambda seconds: None
) -> Prepared:
    """Tokenize what is not tokenized yet. `progress(done, total)` counts rows over both splits; `spread` says which processes encode;
    `waiting(seconds)` is called again and again while another process tokenizes the same rows.

    Raises DataError for everything wrong with data, templates and tokenizer, naming row and column where there is one.
    """
    loaded = load_tokenizer(recipe)
    rows = load_rows(recipe)
    names = _label_names(recipe, rows) if recipe.model.task == "classification" else None
    ready = recipe.data.source is None and recipe.data.target is None and recipe.data.messages is None
    vocabulary = _vocabulary(recipe, loaded.tokenizer) if ready else None
    form = form_of(recipe, loaded.tokenizer, names, rows.train.column_names, vocabulary)
    splits = {"train": rows.train} | ({} if rows.eval is None else {"eval": rows.eval})
    for split, part in splits.items():
        templates.check_columns(form.columns, part.column_names, f"data.{split}")
    settings, total, done = _settings_key(recipe, loaded.tokenizer, names, vocabulary), sum(map(len, splits.values())), 0
    folders, report = {}, {}
    for split, part in splits.items():
        part = part.select_columns(list(dict.fromkeys(form.columns)))
        folder = Path(recipe.run.storage_path) / ".cache" / "tokens" / _content_key(part, settings)
        if leftovers(folder) or not holds(folder):
            encoder = Encoder(recipe, part, names, vocabulary)
            _tokenize_once(encoder, spread, folder, _beyond(done, total, progress), waiting)
        done += len(part)
        progress(done, total)
        folders[split], report[split] = str(folder), _report(TokenArrays.open(folder))
    if report["train"].unlabelled == report["train"].rows:
        raise DataError("data.train: no row has a label to learn: the prompts fill the length limit, or no turn is an assistant's")
    notes = [note for note in (loaded.note, *_notes(report)) if note]
    return Prepared(folders["train"], folders.get("eval"), None if names is None else _shown_names(recipe, rows, names), notes, report)


def _vocabulary(recipe: Recipe, tokenizer: Any) -> int:
    """Token ids of the tokenizer, or of the model where it has more (a table padded to a round number)."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(recipe.model.path, revision=recipe.model.revision)
    except Exception:  # a folder with a tokenizer alone; what is wrong with a model is said where it is loaded
        return len(tokenizer)
    return max(len(tokenizer), getattr(config.get_text_config(), "vocab_size", None) or 0)


def _beyond(before: int, total: int, progress: Progress) -> Callable[[int], None]:
    return lambda done: progress(before + done, total)


def _tokenize_once(encoder: Encoder, spread: Spread, folder: Path, done: Callable[[int], None], waiting: Waiting) -> None:
    """`done(rows)` counts those of this split."""
    try:
        with alone_at(folder, waiting):
            if not holds(folder):  # else another process was faster
                _tokenize(encoder, spread, folder, done)
    except OSError as error:
        raise DataError(f"{folder.parent}: the token cache cannot be written: {error.strerror or error}") from None


def _tokenize(encoder: Encoder, spread: Spread, folder: Path, done: Callable[[int], None]) -> None:
    truncated: Counter[str] = Counter()
    with Writer(folder) as writer:
        for chunk in spread(encoder, range(0, len(encoder.part), chunks.CHUNK)):
            truncated.update(chunk.truncated)
            writer.append(chunk.columns, chunk.label_tokens)
            done(writer.sums["rows"])
        writer.finish(truncated=dict(truncated))


def _report(arrays: TokenArrays) -> SplitReport:
    found = arrays.manifest
    return SplitReport(
        rows=arrays.rows,
        truncated=found["truncated"],
        unlabelled=found["unlabelled"],
        longest={name: found["longest"][name] for name in ("input_ids", "labels")},
        tokens={name: found["tokens"][name] for name in ("input_ids", "labels")},
    )


def _notes(report: dict[str, SplitReport]) -> Iterator[str]:
    for split, found in report.items():
        for part, number in found.truncated.items():
            if number:
                yield f"data.{split}: {number:,} of {found.rows:,} rows cut at the limit ({part})"
        if found.unlabelled:
            yield f"data.{split}: {found.unlabelled:,} of {found.rows:,} rows have no label left"


def _label_names(recipe: Recipe, rows: Rows) -> list[str]:
    """Spellings of the classes over the whole set, in the order of their numbers.

    ClassLabel keeps its numbers. Integers, also written as text, are in the order of their values, so that 0..n-1 keep them; everything
    else is sorted as text. Raises DataError for null, for numbers with a fraction, and for a single class.
    """
    import datasets

    assert recipe.data.target is not None
    label = templates.parse_field(recipe.data.target, "data.target")
    parts = [part for part in (rows.train, rows.eval) if part is not None]
    for part in parts:
        templates.check_columns([label.column], part.column_names, "data.target")
    features = [part.features[label.column] for part in parts]
    if isinstance(features[0], datasets.ClassLabel):
        if any(getattr(feature, "names", None) != features[0].names for feature in features):
            raise DataError(f"data.eval: the labels of column {label} have other names than those to train on")
        return _several([str(number) for number in range(features[0].num_classes)], label)
    values = {value for part in parts for value in _values(part, label)}
    if any(isinstance(value, float) or (isinstance(value, str) and _FRACTION.fullmatch(value)) for value in values):
        raise DataError(f"data.target: column {label} holds numbers with a fraction; classification needs strings, integers or booleans")
    names = {str(value) for value in values}
    return _several(sorted(names, key=int) if all(_INTEGER.fullmatch(name) for name in names) else sorted(names), label)


def _several(names: list[str], label: templates.Field) -> list[str]:
    if len(names) < 2:
        only = f"only {names[0]!r}" if names else "no label"
        raise DataError(f"data.target: column {label} holds {only}: classification learns to tell two or more classes apart")
    return names


def _values(part: Any, label: templates.Field) -> set[Any]:
    """Different values of a label column; raises DataError for null and for what is no single value."""
    found: set[Any] = set()
    number = 0
    for batch in part.select_columns([label.column]).iter(batch_size=10_000):
        for value in batch[label.column]:
            row = {label.column: value}
            label.text_of(row, number)
            found.add(label.of(row, number))
            number += 1
    return found


def _shown_names(recipe: Recipe, rows: Rows, names: Sequence[str]) -> list[str]:
    """What id2label says: a ClassLabel's names, else the labels themselves."""
    label = templates.parse_field(recipe.data.target or "", "data.target")
    return list(getattr(rows.train.features[label.column], "names", None) or names)


def _settings_key(recipe: Recipe, tokenizer: Any, names: Sequence[str] | None, vocabulary: int | None) -> str:
    data = recipe.data
    wording = [data.source, data.target, data.messages if isinstance(data.messages, str) else [m.model_dump() for m in data.messages or []]]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = backend.to_str() if backend is not None else [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = [str(tokenizer.special_tokens_map), str(tokenizer.chat_template), tokenizer.truncation_side]
    written = [FORMAT, recipe.model.task, wording, limits(recipe), names, pieces, special, vocabulary]
    return hashlib.sha256(json.dumps(written).encode()).hexdigest()


def _content_key(part: Any, settings: str) -> str:
    """Of the rows' values themselves, read once in chunks."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for table in part.with_format("arrow").iter(batch_size=10_000):
        digest.update(str(table.schema.remove_metadata()).encode())
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()
