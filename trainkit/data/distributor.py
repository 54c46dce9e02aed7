"""The DataDistributor: one actor that cuts every optimizer step into micro-batches and hands each rank its share.

It holds no position. A call names the steps it wants, and the answer is a pure function of (data, seed, step, world size), so a
restarted actor can neither replay nor skip; what it remembers is only what it tells people (handed.py). Workers on a node whose actor
reads the same arrays read the rows themselves; to others they travel, ragged (wire.py). Padding happens at the worker (feed.py).
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trainkit.data.arrays import Ragged, TokenArrays
from trainkit.data.batches import Budget, Part, Shape, compose, deal
from trainkit.data.catalogue import Catalogues
from trainkit.data.covers import Covers, choose_covers
from trainkit.data.handed import Handed, furthest, lag, slowest
from trainkit.data.order import epoch_of_step, samples_of_step
from trainkit.data.packing import pack
from trainkit.data.wire import WireCall, narrow
from trainkit.planning.flops import works
from trainkit.units import format_seconds

_ROWS_OF_CATALOGUE = 65_536  # whose lengths choose the shapes: an order drawn from the whole set
_CALLS_AT_ONCE = 8  # of ranks for steps
_TALK = "talk"  # Ray's concurrency group of calls that are answered while those are stuck
_STEPS_JOINED, _SAMPLES_JOINED = 256, 65_536  # whose shapes are joined, at most: composing them takes a second
_HORIZON = 1000  # steps for which graphs are worth their making; not a run's own, which may change when it is resumed
_STEPS_KEPT, _SAMPLES_KEPT = 1024, 1 << 22  # composed ones, for the ranks that ask for them later


@dataclass(frozen=True)
class Feeding:
    """What decides the batches of a data set: the same values give the same batches in every process."""

    folder: str
    task: str
    seed: int
    samples_per_step: int
    world_size: int
    budget: Budget
    shuffle: bool
    joined: bool = False  # few shapes are to serve, as CUDA graphs want it; else each micro-batch keeps its own
    pack_length: int | None = None  # causal: most tokens of a sequence into which several rows are packed; None: one row each


class DataDistributor:
    """A plain class; `make_distributor` makes it a Ray actor. `feedings` maps "train" and "eval" to their rule."""

    def __init__(self, feedings: dict[str, Feeding]):
        self.feedings = feedings
        self.arrays = {split: TokenArrays.open(feeding.folder) for split, feeding in feedings.items()}
        self.catalogues = self._catalogues()
        if self.catalogues is not None:
            _ = self.catalogues.first  # chosen now, while the workers start
        largest = max(feeding.samples_per_step for feeding in feedings.values())
        kept = min(_STEPS_KEPT, max(64, _SAMPLES_KEPT // largest))
        self.covers: dict[tuple[str, int], Covers] = {}  # of a split's steps in k micro-batches
        self.composed, self.composing = functools.lru_cache(kept)(self._compose), threading.Lock()
        self.lock = threading.Lock()
        self.handed: dict[str, dict[int, Handed]] = {split: {} for split in feedings}  # by rank
        self.working_on: dict[int, tuple[str, float]] = {}  # thread to (what, since when)

    def steps(self, split: str, first: int, count: int, rank: int, most_bytes: int | None = None, with_rows: bool = True) -> WireCall:
        """Steps first .. first + count - 1 of `split` for one rank, counted from 1; fewer, but one at least, if rows reach `most_bytes`.

        with_rows: whether the rows come with it, for a rank that cannot read them itself.
        """
        began = time.monotonic()
        with self._doing(f"reading {split} step {first} for rank {rank}"):
            call = self._pack(split, first, count, rank, most_bytes, with_rows)
        with self.lock:
            self.handed[split].setdefault(rank, Handed(since=began)).take(call.samples_by_step())
        return call

    def manifests(self) -> dict[str, dict[str, Any]]:
        """What identifies the content of the arrays: a copy on another node must say the same."""
        return {split: arrays.manifest for split, arrays in self.arrays.items()}

    def shapes(self, split: str, first: int, count: int) -> dict[Shape, int]:
        """How often each shape of micro-batches occurs in the steps first .. first + count - 1, over all ranks."""
        with self.composing:
            return dict(Counter(part.shape for step in range(first, first + count) for part in self.composed(split, step)[1]))

    def doing(self) -> str:
        """What the actor is working on now, with since when (a call that waits for a disk is seen here), and which rank is behind."""
        with self.lock:
            now = time.monotonic()
            working = [f"{what} for {format_seconds(now - since)}" for what, since in self.working_on.values()] or ["idle"]
            return "; ".join(working + [text for split, ranks in self.handed.items() if (text := lag(split, ranks))])

    def handed_to(self, split: str) -> dict[int, Handed]:
        """What each rank that asked was handed since this actor started."""
        with self.lock:
            return {rank: replace(handed) for rank, handed in self.handed[split].items()}

    def get_progress(self, rank: int, split: str = "train") -> dict[str, Any]:
        """What `rank` was handed since this actor started, its rate, and how many steps it is behind the furthest rank."""
        ranks = self.handed_to(split)
        mine = ranks.setdefault(rank, Handed())
        return {
            "rank": rank,
            "steps": mine.steps,
            "last_step": mine.last_step,
            "samples": mine.samples,
            "samples_per_second": mine.samples_per_second,
            "steps_behind": furthest(ranks) - mine.last_step,
            "slowest_rank": slowest(ranks),
        }

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        thread = threading.get_ident()
        with self.lock:
            self.working_on[thread] = what, time.monotonic()
        try:
            yield
        finally:
            with self.lock:
                self.working_on.pop(thread)

    def _compose(self, split: str, step: int) -> tuple[np.ndarray, list[Part]]:
        """One at a time: the first one joins shapes."""
        feeding = self.feedings[split]
        ids, parts = self._cut(split, step, feeding.world_size)
        if not feeding.joined or feeding.pack_length is not None:
            return ids, parts
        if (split, len(parts)) not in self.covers:
            self.covers[split, len(parts)] = self._joined(split, len(parts))
        covers = self.covers[split, len(parts)]
        return ids, sorted((part._replace(shape=covers(part.shape)) for part in parts), key=lambda part: -part.shape.cost)

    def _joined(self, split: str, k: int) -> Covers:
        """Of the first steps, all cut into k. Dropout is drawn by shapes: neither the step that is asked for nor the world size enters."""
        feeding = self.feedings[split]
        looked_at = min(_STEPS_JOINED, max(1, _SAMPLES_JOINED // feeding.samples_per_step))
        cuts = (self._cut(split, step, k)[1] for step in range(1, looked_at + 1))
        uses = Counter(part.shape for parts in cuts if len(parts) == k for part in parts)
        return choose_covers(uses, _HORIZON / looked_at, feeding.budget.tokens)

    def _cut(self, split: str, step: int, world_size: int) -> tuple[np.ndarray, list[Part]]:
        feeding, arrays = self.feedings[split], self.arrays[split]
        ids = samples_of_step(feeding.seed, arrays.rows, feeding.samples_per_step, step, feeding.shuffle)
        source = arrays.by_column["input_ids"].lengths(ids)
        if feeding.pack_length is not None:
            longest = max(feeding.pack_length, arrays.manifest["longest"]["input_ids"])  # rows that came tokenized are cut by nobody
            return ids, pack(source, world_size, feeding.budget, longest)
        target = self._targets(split, ids)
        return ids, compose(source, target, world_size, feeding.budget, self.catalogues)

    def _catalogues(self) -> Catalogues | None:
        """The shapes for all splits, from the lengths of some rows of the first and the longest of all; None where none are needed."""
        split, feeding = next(iter(self.feedings.items()))
        if feeding.budget.tokens is None or feeding.pack_length is not None:
            return None
        rows = samples_of_step(0, self.arrays[split].rows, min(_ROWS_OF_CATALOGUE, self.arrays[split].rows), 1)
        longest = {name: max(arrays.manifest["longest"][name] for arrays in self.arrays.values()) for name in ("input_ids", "labels")}
        most = longest["input_ids"], longest["labels"] if feeding.task == "seq2seq" else 0
        source, target = self.arrays[split].by_column["input_ids"].lengths(rows), self._targets(split, rows)
        return Catalogues(source, target, feeding.samples_per_step, feeding.budget, most)

    def _targets(self, split: str, rows: np.ndarray) -> np.ndarray:
        """Lengths that count beside input_ids: those of seq2seq labels."""
        if self.feedings[split].task != "seq2seq":
            return np.zeros(len(rows), np.int64)
        return self.arrays[split].by_column["labels"].lengths(rows)

    def _pack(self, split: str, first: int, count: int, rank: int, most_bytes: int | None, with_rows: bool) -> WireCall:
        feeding, arrays = self.feedings[split], self.arrays[split]
        steps, micro_batches, sample_ids, packed = [], [], [], []
        columns = arrays.by_column
        num_bytes = 0
        for step in range(first, first + count):
            with self.composing:  # all ranks ask for the same steps at about the same time
                ids, parts = self.composed(split, step)
            mine = deal([part.shape.cost for part in parts], feeding.world_size)[rank]
            epoch = epoch_of_step(arrays.rows, feeding.samples_per_step, step)[0]
            steps.append((epoch, len(ids), int(arrays.label_tokens[ids].sum()), len(parts), len(mine)))
            for index in mine:
                part = parts[index]
                micro_batches.append((index, len(part.samples), *part.shape))
                sample_ids.append(ids[part.samples])
                packed += [] if part.packed is None else [part.packed]
            of_step = np.concatenate(sample_ids[len(sample_ids) - len(mine) :])
            num_bytes += sum(int(column.lengths(of_step).sum()) * column.values.itemsize for column in columns.values())
            if most_bytes is not None and num_bytes >= most_bytes:
                break
        rows, shapes = np.concatenate(sample_ids), np.array(micro_batches, dtype=np.int64)
        selected = {name: column.select(rows) for name, column in columns.items()}
        if not with_rows:  # who reads them next shall not wait for a disk: it holds the lock of a Python that trains
            for column in selected.values():
                column.read()
        return WireCall(
            first=first,
            steps=np.array(steps, dtype=np.int64),
            micro_batches=np.concatenate([shapes, works(selected["input_ids"].lengths, self._targets(split, rows), shapes[:, 1])], axis=1),
            sample_ids=narrow(rows),
            columns={name: (column.gather(), narrow(column.lengths)) for name, column in selected.items()} if with_rows else None,
            packed=np.concatenate(packed) if packed else None,
            num_bytes=num_bytes,
        )


def make_distributor(feedings: dict[str, Feeding], node_id: str | None = None):  # type: ignore[no-untyped-def]  # ray's handle has no type
    """Start a DataDistributor as a Ray actor on a node, the driver's by default; returns its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id or ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=_CALLS_AT_ONCE, concurrency_groups={_TALK: 2})(
        DataDistributor
    )
    return actor.options(scheduling_strategy=there).remote(feedings)


@dataclass(frozen=True)
class Distributors:
    """Handles: the driver's, which serves everyone, and those of nodes that have one of their own, by node id."""

    of_driver: Any
    of_node: dict[str, Any]
    home: str  # the driver's node

    def nearest(self) -> Any:
        """The handle for a worker on this node."""
        import ray

        return self.of_node.get(ray.get_runtime_context().get_node_id(), self.of_driver)

    def rows_at_hand(self, folder: str) -> dict[str, Ragged] | None:
        """The columns of the arrays in `folder` on a node that has an actor, which reads the same; None elsewhere, or if gone."""
        import ray

        if ray.get_runtime_context().get_node_id() not in {self.home, *self.of_node}:
            return None
        try:
            return TokenArrays.open(folder).by_column
        except (OSError, ValueError):
            return None

    def shapes(self, split: str, first: int, count: int) -> dict[Shape, int]:
        """How often each shape of micro-batches occurs in the steps first .. first + count - 1; waits until the shapes are chosen."""
        import ray

        answer: dict[Shape, int] = ray.get(self.of_driver.shapes.remote(split, first, count))
        return answer

    def handed_to(self, split: str, timeout: float) -> dict[int, Handed]:
        """What each rank was handed; without those whose actor does not answer in time."""
        asked = [handle.handed_to.options(concurrency_group=_TALK).remote(split) for handle in (self.of_driver, *self.of_node.values())]
        return {rank: handed for answer in _answers(asked, timeout).values() for rank, handed in answer.items()}


def activity_of(handle: Any, timeout: float) -> str:
    """What an actor is doing; also when it does not say so in time, or is gone."""
    import ray

    try:
        return f"is {ray.get(handle.doing.options(concurrency_group=_TALK).remote(), timeout=timeout)}"
    except ray.exceptions.RayError:  # a timeout is one of them
        return "does not answer"


def make_distributors(feedings: dict[str, Feeding], nodes: Iterable[str], timeout: float = 60.0) -> Distributors:
    """One DataDistributor on the driver's node, and one on each other of `nodes` (ids) that sees the same arrays.

    The pure order keeps them coherent without talk. A node that does not answer in `timeout` seconds is served by the driver's.
    """
    import ray

    of_driver, here = make_distributor(feedings), ray.get_runtime_context().get_node_id()
    of_node = {node: make_distributor(feedings, node) for node in nodes if node != here}
    asked = {node: _manifests(handle) for node, handle in of_node.items()}
    wanted = ray.get(_manifests(of_driver))
    answered = _answers(asked.values(), timeout)
    for node, answer in asked.items():
        if answered.get(answer) != wanted:  # the node sees no such folder, or another one, or is too late
            ray.kill(of_node.pop(node))
    return Distributors(of_driver, of_node, here)


def _manifests(handle: Any) -> Any:
    return handle.manifests.options(concurrency_group=_TALK).remote()


def _answers(asked: Iterable[Any], timeout: float) -> dict[Any, Any]:
    """What comes within `timeout` seconds, of all together; nothing of an actor that failed or is gone."""
    import ray

    waiting, answers = list(asked), {}
    for answer in ray.wait(waiting, num_returns=len(waiting), timeout=timeout)[0] if waiting else []:
        with contextlib.suppress(ray.exceptions.RayError):
            answers[answer] = ray.get(answer)
    return answers
