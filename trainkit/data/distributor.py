"""The DataDistributor: one actor that cuts every optimizer step into micro-batches and hands each rank its share.

It holds no position. A call names the steps it wants, and the answer is a pure function of (data, seed, step, world size), so a
restarted actor can neither replay nor skip; what it remembers is only what it tells people. On the wire rows are ragged, all of a call
end to end, in the smallest integer type that holds them; padding happens at the worker (feed.py).
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainkit.data.batches import Budget, Part, Shape, compose, deal
from trainkit.data.catalogue import Catalogues
from trainkit.data.order import epoch_of_step, samples_of_step
from trainkit.data.packing import pack
from trainkit.data.tokens import TokenArrays
from trainkit.units import format_seconds

_ROWS_OF_CATALOGUE = 65_536  # whose lengths choose the shapes: an order drawn from the whole set
_CALLS_AT_ONCE = 8  # of ranks for steps
_TALK = "talk"  # Ray's concurrency group of calls that are answered while those are stuck
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
    pack_length: int | None = None  # causal: most tokens of a sequence into which several rows are packed; None: one row each


@dataclass(frozen=True)
class WireMicroBatch:
    """Rows of one micro-batch, ragged: `columns[name] = (values of all rows end to end, length of each row)`."""

    index: int  # among the k micro-batches of the step, over all ranks
    shape: Shape  # to be padded to
    sample_ids: np.ndarray
    columns: dict[str, tuple[np.ndarray, np.ndarray]]
    packed: np.ndarray | None = None  # rows in each packed sequence


@dataclass(frozen=True)
class WireStep:
    """One rank's share of an optimizer step, and the numbers of the whole step."""

    step: int
    epoch: int  # from 0
    samples: int  # of the whole step
    label_tokens: int  # N: labels that count, of the whole step over all ranks
    num_micro_batches: int  # k, over all ranks
    micro_batches: list[WireMicroBatch]


@dataclass(frozen=True)
class WireCall:
    """The answer to one call: few arrays, because each costs a message more than its bytes do. `unpack` gives views of them."""

    first: int
    steps: np.ndarray  # int64 [steps, 5]: epoch, samples, label_tokens, k, micro-batches of this rank
    micro_batches: np.ndarray  # int64 [micro-batches, 5]: index, samples, and the shape's rows, source, target
    sample_ids: np.ndarray
    columns: dict[str, tuple[np.ndarray, np.ndarray]]
    packed: np.ndarray | None  # rows of every packed sequence; a micro-batch has shape.rows of them

    @property
    def num_bytes(self) -> int:
        return sum(values.nbytes + lengths.nbytes for values, lengths in self.columns.values()) + self.sample_ids.nbytes

    def unpack(self) -> list[WireStep]:
        micro_batches = iter(self._micro_batches())
        steps = []
        for step, (epoch, samples, label_tokens, k, mine) in enumerate(self.steps.tolist(), start=self.first):
            steps.append(WireStep(step, epoch, samples, label_tokens, k, [next(micro_batches) for _ in range(mine)]))
        return steps

    def _micro_batches(self) -> Iterator[WireMicroBatch]:
        row = sequence = 0
        value = dict.fromkeys(self.columns, 0)
        for index, samples, *shape in self.micro_batches.tolist():
            columns = {}
            for name, (values, lengths) in self.columns.items():
                own = lengths[row : row + samples]
                end = value[name] + int(own.sum())
                columns[name], value[name] = (values[value[name] : end], own), end
            packed = None if self.packed is None else self.packed[sequence : sequence + shape[0]]
            yield WireMicroBatch(index, Shape(*shape), self.sample_ids[row : row + samples], columns, packed)
            row, sequence = row + samples, sequence + shape[0]


@dataclass
class Handed:
    """What a rank has been given of a split, for people to read; a restarted actor counts anew."""

    steps: int = 0
    samples: int = 0
    since: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)


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
        self.composed, self.composing = functools.lru_cache(kept)(self._compose), threading.Lock()
        self.lock = threading.Lock()
        self.handed: dict[tuple[str, int], Handed] = {}
        self.working_on: dict[int, tuple[str, float]] = {}  # thread to (what, since when)

    def steps(self, split: str, first: int, count: int, rank: int, most_bytes: int | None = None) -> WireCall:
        """Steps first .. first + count - 1 of `split` for one rank, counted from 1; fewer, and at least one, if they reach `most_bytes`."""
        began = time.monotonic()
        with self._doing(f"reading {split} step {first} for rank {rank}"):
            call = self._pack(split, first, count, rank, most_bytes)
        with self.lock:
            handed = self.handed.setdefault((split, rank), Handed(since=began))
            handed.steps, handed.samples = handed.steps + len(call.steps), handed.samples + len(call.sample_ids)
            handed.last = time.monotonic()
        return call

    def manifests(self) -> dict[str, dict[str, Any]]:
        """What identifies the content of the arrays: a copy on another node must say the same."""
        return {split: arrays.manifest for split, arrays in self.arrays.items()}

    def doing(self) -> str:
        """What the actor is working on now, with since when; a call that waits for a disk is seen here."""
        with self.lock:
            now = time.monotonic()
            return "; ".join(f"{what} for {format_seconds(now - since)}" for what, since in self.working_on.values()) or "nothing"

    def get_progress(self, rank: int, split: str = "train") -> dict[str, Any]:
        """What `rank` was handed since this actor started, its rate, and how many steps it is behind the furthest rank."""
        with self.lock:
            of_split = {other: handed for (name, other), handed in self.handed.items() if name == split}
            mine = of_split.get(rank, Handed())
            steps = {other: handed.steps for other, handed in of_split.items()} | {rank: mine.steps}
            return {
                "rank": rank,
                "steps": mine.steps,
                "samples": mine.samples,
                "samples_per_second": mine.samples / max(1e-9, mine.last - mine.since) if mine.steps else 0.0,
                "steps_behind": max(steps.values()) - mine.steps,
                "slowest_rank": min(steps, key=lambda other: (steps[other], other)),
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
        feeding, arrays = self.feedings[split], self.arrays[split]
        ids = samples_of_step(feeding.seed, arrays.rows, feeding.samples_per_step, step, feeding.shuffle)
        source = arrays.column("input_ids").lengths(ids)
        if feeding.pack_length is not None:
            longest = max(feeding.pack_length, arrays.manifest["longest"]["input_ids"])  # rows that came tokenized are cut by nobody
            return ids, pack(source, feeding.world_size, feeding.budget, longest)
        target = self._targets(split, ids)
        return ids, compose(source, target, feeding.world_size, feeding.budget, self.catalogues)

    def _catalogues(self) -> Catalogues | None:
        """The shapes for all splits, from the lengths of some rows of the first and the longest of all; None where none are needed."""
        split, feeding = next(iter(self.feedings.items()))
        if feeding.budget.tokens is None or feeding.pack_length is not None:
            return None
        rows = samples_of_step(0, self.arrays[split].rows, min(_ROWS_OF_CATALOGUE, self.arrays[split].rows), 1)
        longest = {name: max(arrays.manifest["longest"][name] for arrays in self.arrays.values()) for name in ("input_ids", "labels")}
        most = longest["input_ids"], longest["labels"] if feeding.task == "seq2seq" else 0
        source, target = self.arrays[split].column("input_ids").lengths(rows), self._targets(split, rows)
        return Catalogues(source, target, feeding.samples_per_step, feeding.budget, most)

    def _targets(self, split: str, rows: np.ndarray) -> np.ndarray:
        """Lengths that count beside input_ids: those of seq2seq labels."""
        if self.feedings[split].task != "seq2seq":
            return np.zeros(len(rows), np.int64)
        return self.arrays[split].column("labels").lengths(rows)

    def _pack(self, split: str, first: int, count: int, rank: int, most_bytes: int | None) -> WireCall:
        feeding, arrays = self.feedings[split], self.arrays[split]
        steps, micro_batches, sample_ids, packed = [], [], [], []
        columns = [arrays.column(name) for name in arrays.columns]
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
            if most_bytes is not None:
                of_step = np.concatenate(sample_ids[len(sample_ids) - len(mine) :])
                num_bytes += sum(int(column.lengths(of_step).sum()) * column.values.itemsize for column in columns)
                if num_bytes >= most_bytes:
                    break
        rows = np.concatenate(sample_ids)
        gathered = {name: column.gather(rows) for name, column in zip(arrays.columns, columns, strict=True)}
        return WireCall(
            first=first,
            steps=np.array(steps, dtype=np.int64),
            micro_batches=np.array(micro_batches, dtype=np.int64),
            sample_ids=_narrow(rows),
            columns={name: (values, _narrow(lengths)) for name, (values, lengths) in gathered.items()},
            packed=np.concatenate(packed) if packed else None,
        )


def _narrow(numbers: np.ndarray) -> np.ndarray:
    """Numbers from 0 in the smallest type that holds them."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))


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

    def nearest(self) -> Any:
        """The handle for a worker on this node."""
        import ray

        return self.of_node.get(ray.get_runtime_context().get_node_id(), self.of_driver)


def said(handle: Any, timeout: float) -> str:
    """What an actor is doing; also when it does not say so in time, or is gone."""
    import ray

    try:
        return f"is {ray.get(handle.doing.options(concurrency_group=_TALK).remote(), timeout=timeout)}"
    except ray.exceptions.RayError:  # a timeout is one of them
        return "does not answer"


def make_distributors(feedings: dict[str, Feeding], timeout: float = 60.0) -> Distributors:
    """One DataDistributor on the driver's node, and one on each other node that sees the same arrays.

    The pure order keeps them coherent without talk. A node that does not answer in `timeout` seconds is served by the driver's.
    """
    import ray

    of_driver, here = make_distributor(feedings), ray.get_runtime_context().get_node_id()
    asked = {node: make_distributor(feedings, node) for node in (node["NodeID"] for node in ray.nodes() if node["Alive"]) if node != here}
    wanted = ray.get(of_driver.manifests.options(concurrency_group=_TALK).remote())
    of_node = {}
    for node, handle in asked.items():
        try:
            same = ray.get(handle.manifests.options(concurrency_group=_TALK).remote(), timeout=timeout) == wanted
        except ray.exceptions.RayError:  # the node sees no such folder, another one, or went away; a timeout is one of them
            same = False
        if same:
            of_node[node] = handle
        else:
            ray.kill(handle)
    return Distributors(of_driver, of_node)
