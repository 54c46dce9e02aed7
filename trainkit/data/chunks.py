"""Rows encoded in chunks: here, in one process per core, or wherever else a `Spread` takes them."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context, parent_process
from typing import Any, NamedTuple

import numpy as np

from trainkit.data.arrays import ragged
from trainkit.data.encoding import Form, form_of
from trainkit.data.tokenizer import load_tokenizer
from trainkit.errors import CapacityError
from trainkit.recipe.schema import Recipe

CHUNK = 2000  # rows that are encoded at once
PARALLEL_ROWS = 200_000  # from here on, processes are worth the seconds in which they start


@dataclass(frozen=True)
class Encoder:
    """All that a process needs to encode rows of one split. It travels by pickle, the rows by the names of the files they lie in."""

    recipe: Recipe
    part: Any  # datasets.Dataset
    label_names: list[str] | None
    vocabulary: int | None

    @cached_property
    def form(self) -> Form:
        return form_of(self.recipe, load_tokenizer(self.recipe).tokenizer, self.label_names, self.part.column_names, self.vocabulary)

    def chunk(self, first: int, count: int) -> Chunk:
        """Rows first .. first + count - 1."""
        rows = self.part[first : first + count]
        encoded = self.form.encode([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)], first)
        columns = {name: ragged(column) for name, column in encoded.columns.items()}
        return Chunk(columns, np.asarray(encoded.label_tokens, dtype=np.int32), encoded.truncated)


class Chunk(NamedTuple):
    columns: dict[str, tuple[np.ndarray, np.ndarray]]  # values end to end, lengths
    label_tokens: np.ndarray
    truncated: dict[str, int]


Spread = Callable[[Encoder, range], Iterable[Chunk]]  # the chunks that begin at these rows, each of range.step rows, in order


def here(encoder: Encoder, firsts: range) -> Iterator[Chunk]:
    """In this process, or, when there are many rows, in one process per core; a few chunks a process are under way.

    Raises CapacityError when one of them is ended from outside.
    """
    processes = len(os.sched_getaffinity(0))
    if len(encoder.part) < PARALLEL_ROWS or processes == 1:
        yield from (encoder.chunk(first, firsts.step) for first in firsts)
        return
    waiting: deque[Future[Chunk]] = deque()
    with ProcessPoolExecutor(processes, get_context("spawn"), _take, (encoder,)) as pool:
        try:
            for first in firsts:
                waiting.append(pool.submit(_chunk, first, firsts.step))
                if len(waiting) > 3 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise CapacityError(
                "a process that tokenizes was ended from outside, as a system does that has no memory left. There is one for each core: "
                "free some memory, or give the command fewer cores, as `taskset -c 0-3` does"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_taken: list[Encoder] = []  # of a process of the pool


def _take(encoder: Encoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends the pool
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    _taken.append(encoder)


def _end_with_the_driver() -> None:
    """A driver that was killed ends no pool, whose processes would wait for work for ever."""
    driver = parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


def _chunk(first: int, count: int) -> Chunk:
    return _taken[-1].chunk(first, count)
