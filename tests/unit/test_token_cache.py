"""Nothing is tokenized twice, everything that changes the tokens is tokenized anew, and a preparation is whole or not there."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_tokenizers
import transformers
from tiny_tokenizers import recipe_over, rows_of

from trainkit.data import chunks
from trainkit.data.arrays import leftovers
from trainkit.data.chunks import Chunk, Encoder
from trainkit.data.tokens import Prepared, prepare
from trainkit.errors import CapacityError, DataError
from trainkit.recipe.schema import Recipe

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(recipe_over, tmp_path)


def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts every tokenizer call gets from here on."""
    calls: list[int] = []
    plain = transformers.PreTrainedTokenizerFast.__call__

    def counting(self: Any, text: Any = None, *more: Any, **named: Any) -> Any:
        calls.append(len(text if text is not None else named["text_target"]))
        return plain(self, text, *more, **named)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__call__", counting)
    return calls


def in_cache(storage: Path) -> list[str]:
    """All that lies among the token arrays, locks aside."""
    return sorted(entry.name for entry in (storage / ".cache" / "tokens").iterdir() if entry.suffix != ".lock")


ROWS = [{"q": f"x{number}", "s": "y"} for number in range(10)]
FORM = {"source": "{q}", "target": "{s}", "eval": 0.2}


def test_the_same_inputs_are_tokenized_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, progress = tokenized(monkeypatch), []
    first = prepare(make("seq2seq", ROWS, **FORM), lambda done, total: progress.append((done, total)))
    assert sum(calls) == 20 and progress[-1] == (10, 10)
    calls.clear()
    assert prepare(make("seq2seq", ROWS, **FORM)) == first
    assert calls == []


def test_a_cache_serves_the_same_rows_under_another_name(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(make("seq2seq", ROWS, **FORM))
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "copy.jsonl")
    calls = tokenized(monkeypatch)
    assert prepare(make("seq2seq", ROWS, **FORM | {"path": str(tmp_path / "copy.jsonl")})) == first
    assert calls == []


@pytest.mark.parametrize(
    "change", [{"source": "{q}!"}, {"target": "{s}{s}"}, {"max_source_length": 400}, {"max_target_length": 2}, {"train": "train[:9]"}]
)
def test_whatever_changes_the_tokens_is_tokenized_anew(make: Make, change: dict[str, Any]) -> None:
    assert prepare(make("seq2seq", ROWS, **FORM | change)).train != prepare(make("seq2seq", ROWS, **FORM)).train


def test_other_rows_or_another_tokenizer_are_tokenized_anew(make: Make, tmp_path: Path) -> None:
    first = prepare(make("seq2seq", ROWS, **FORM))
    other = [*ROWS[:-1], {"q": "x8", "s": "z"}]
    assert prepare(make("seq2seq", other, **FORM)).train != first.train
    assert prepare(make("seq2seq", ROWS, None, **FORM)).train != first.train
    tiny_tokenizers.make(tmp_path / "model-eos", "eos", merges=(("x", "1"),))
    assert prepare(make("seq2seq", ROWS, **FORM)).train != first.train


@pytest.mark.parametrize("damage", ["truncate", "remove", "no manifest"])
def test_a_damaged_cache_is_rebuilt(make: Make, damage: str) -> None:
    recipe = make("seq2seq", ROWS, **FORM)
    folder = Path(prepare(recipe).train)
    sound = rows_of(str(folder), "labels")
    file = folder / ("manifest.json" if damage == "no manifest" else "labels.values.npy")
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    assert rows_of(prepare(recipe).train, "labels") == sound
    assert [entry.name for entry in folder.parent.iterdir() if entry.name.startswith(".")] == []


def test_an_interrupted_preparation_leaves_nothing(make: Make, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(make("seq2seq", ROWS, **FORM), interrupt)
    assert in_cache(tmp_path / "runs") == []


def _prepare(recipe: Recipe) -> Prepared:
    return prepare(recipe)


def test_two_preparations_at_once_agree_also_over_a_damaged_folder(make: Make, tmp_path: Path) -> None:
    recipe = make("seq2seq", ROWS * 100, **FORM)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, other = pool.map(_prepare, [recipe, recipe], chunksize=1)
        sound = rows_of(one.train, "labels")
        (Path(one.train) / "labels.values.npy").unlink()
        again = pool.map(_prepare, [recipe, recipe], chunksize=1)
    assert one == other == again[0] == again[1] == prepare(recipe)
    assert rows_of(one.train, "labels") == sound and len(in_cache(tmp_path / "runs")) == 2


SLOW_ROWS = [{"q": f"x{number}", "s": "y"} for number in range(40)]


def _stopping_in_the_middle(recipe: Recipe, began: Any, go_on: Any) -> None:
    chunks.PARALLEL_ROWS, chunks.CHUNK = 20, 2

    def stop(done: int, total: int) -> None:
        began.set()
        go_on.wait(60)

    prepare(recipe, stop)


@contextmanager
def another_process(recipe: Recipe) -> Iterator[tuple[BaseProcess, Any]]:
    """One that is in the middle of preparing, and what lets it go on."""
    context = multiprocessing.get_context("spawn")
    began, go_on = context.Event(), context.Event()
    process = context.Process(target=_stopping_in_the_middle, args=(recipe, began, go_on))
    process.start()
    try:
        assert began.wait(60)
        yield process, go_on
    finally:
        process.kill()
        process.join()


def nothing_left_to_encode(encoder: Encoder, firsts: range) -> Iterator[Chunk]:
    raise AssertionError


def test_who_comes_second_waits_and_finds_the_arrays_of_the_first(make: Make, tmp_path: Path) -> None:
    recipe, waited = make("seq2seq", SLOW_ROWS, **FORM | {"eval": None}), []
    with another_process(recipe) as (process, go_on):

        def waiting(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 3:
                go_on.set()

        found = prepare(recipe, spread=nothing_left_to_encode, waiting=waiting)
        process.join(30)
    assert process.exitcode == 0 and len(waited) >= 3 and waited == sorted(waited)
    assert in_cache(tmp_path / "runs") == [found.key] and len(rows_of(found.train, "labels")) == 40


def test_a_killed_preparation_ends_its_processes_and_the_next_removes_what_it_left(make: Make, tmp_path: Path) -> None:
    recipe, seen = make("seq2seq", SLOW_ROWS, **FORM | {"eval": None}), []
    with another_process(recipe) as (process, _):
        (unfinished,) = in_cache(tmp_path / "runs")
        pool = psutil.Process(process.pid).children(recursive=True)

        def waiting(seconds: float) -> None:
            seen.append(in_cache(tmp_path / "runs"))
            process.kill()

        found = prepare(recipe, waiting=waiting)
    assert seen[0] == [unfinished], "nothing of a living process is removed"
    assert in_cache(tmp_path / "runs") == [found.key]
    shutil.rmtree(found.train)
    assert prepare(recipe) == found
    assert len(os.sched_getaffinity(0)) == 1 or len(pool) >= 2
    orphans = psutil.wait_procs(pool, timeout=10)[1]
    for orphan in orphans:
        orphan.kill()
    assert orphans == []


def test_what_a_dead_process_left_beside_whole_arrays_is_removed(make: Make, tmp_path: Path) -> None:
    found = prepare(make("seq2seq", ROWS, **FORM))
    folder = Path(found.train)
    for left in (folder, folder.parent / "another-key"):
        (left.parent / f".{left.name}-0123456789ab").mkdir()
    assert prepare(make("seq2seq", ROWS, **FORM)) == found
    assert leftovers(folder) == [] and ".another-key-0123456789ab" in in_cache(tmp_path / "runs")


def test_data_that_changed_under_the_same_name_leaves_the_arrays_of_a_run_that_uses_them(make: Make, tmp_path: Path) -> None:
    first, file = prepare(make("seq2seq", ROWS, **FORM)), tmp_path / "rows.jsonl"
    labels, size = rows_of(first.train, "labels"), file.stat().st_size
    recipe = make("seq2seq", [row | {"s": "z"} for row in ROWS], **FORM)
    os.utime(file, (1, 1))
    second = prepare(recipe)
    assert file.stat().st_size == size and second.key != first.key and second.eval != first.eval
    assert rows_of(second.train, "labels") != labels == rows_of(first.train, "labels")


def test_processes_give_the_same_tokens_as_one(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"q": f"x{number} y", "s": "y" * (number % 5)} for number in range(50)]
    alone = prepare(make("seq2seq", rows, **FORM))
    before = [rows_of(folder, name) for folder in (alone.train, alone.eval) for name in ("input_ids", "labels")]
    shutil.rmtree(alone.train)
    monkeypatch.setattr(chunks, "PARALLEL_ROWS", 20)
    monkeypatch.setattr(chunks, "CHUNK", 3)
    again = prepare(make("seq2seq", rows, **FORM))
    assert again == alone
    assert [rows_of(folder, name) for folder in (again.train, again.eval) for name in ("input_ids", "labels")] == before


def test_a_process_that_was_killed_ends_the_preparation(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "PARALLEL_ROWS", 20)
    monkeypatch.setattr(chunks, "CHUNK", 1)

    def kill(done: int, total: int) -> None:
        for process in psutil.Process().children():
            with suppress(psutil.Error):  # it has ended meanwhile
                if any("spawn_main" in word for word in process.cmdline()):
                    process.kill()

    recipe = make("seq2seq", SLOW_ROWS, **FORM | {"eval": None})
    with pytest.raises(CapacityError, match="a process that tokenizes was ended from outside"):
        prepare(recipe, kill)
    assert in_cache(tmp_path / "runs") == []
    assert prepare(recipe).train


def test_a_fault_in_a_process_names_its_row_and_leaves_nothing(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "PARALLEL_ROWS", 20)
    monkeypatch.setattr(chunks, "CHUNK", 3)
    rows = [{"q": None if number == 31 else "x", "s": "y"} for number in range(50)]
    with pytest.raises(DataError, match="row 31"):
        prepare(make("seq2seq", rows, **FORM | {"eval": None}))
    assert in_cache(tmp_path / "runs") == []
