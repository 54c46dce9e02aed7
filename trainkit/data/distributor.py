"""The DataDistributor: one actor that cuts every optimizer step into micro-batches and hands each rank its share.

It holds no position. A call names the steps it wants, and the answer is a pure function of (data, seed, step, world size), so a
restarted actor can neither replay nor skip. On the wire rows are ragged and in the smallest integer type that the column needs;
padding happens at the worker (feed.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from trainkit.data.batches import Budget, compose, share
from trainkit.data.order import epoch_of_step, samples_of_step
from trainkit.data.tokens import TokenArrays


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


@dataclass(frozen=True)
class WireMicroBatch:
    """Rows of one micro-batch, ragged: `columns[name] = (values of all rows end to end, length of each row)`."""

    index: int  # among the k micro-batches of the step, over all ranks
    sample_ids: np.ndarray
    columns: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class WireStep:
    """One rank's share of an optimizer step, and the numbers of the whole step."""

    step: int
    epoch: int  # from 0
    samples: int  # of the whole step
    label_tokens: int  # N: labels that count, of the whole step over all ranks
    num_micro_batches: int  # k, over all ranks
    micro_batches: list[WireMicroBatch]


class DataDistributor:
    """A plain class; `make_distributor` makes it a Ray actor. `feedings` maps "train" and "eval" to their rule."""

    def __init__(self, feedings: dict[str, Feeding]):
        self.feedings = feedings
        self.arrays = {split: TokenArrays.open(feeding.folder) for split, feeding in feedings.items()}
        self.composed = functools.lru_cache(maxsize=64)(self._compose)

    def steps(self, split: str, first: int, count: int, rank: int) -> list[WireStep]:
        """Steps first .. first + count - 1 of `split` for one rank; steps count from 1."""
        return [self._step(split, step, rank) for step in range(first, first + count)]

    def num_steps(self, split: str) -> int:
        """Steps of one pass over `split`."""
        feeding = self.feedings[split]
        return -(-self.arrays[split].rows // feeding.samples_per_step)

    def _compose(self, split: str, step: int) -> tuple[np.ndarray, list[np.ndarray]]:
        feeding, arrays = self.feedings[split], self.arrays[split]
        ids = samples_of_step(feeding.seed, arrays.rows, feeding.samples_per_step, step, feeding.shuffle)
        source = arrays.column("input_ids").lengths[ids]
        target = arrays.column("labels").lengths[ids] if feeding.task == "seq2seq" else np.zeros_like(source)
        return ids, compose(source, target, feeding.world_size, feeding.budget)

    def _step(self, split: str, step: int, rank: int) -> WireStep:
        feeding, arrays = self.feedings[split], self.arrays[split]
        ids, parts = self.composed(split, step)
        mine = [self._micro_batch(arrays, index, ids[parts[index]]) for index in share(len(parts), rank, feeding.world_size)]
        return WireStep(
            step=step,
            epoch=epoch_of_step(arrays.rows, feeding.samples_per_step, step)[0],
            samples=len(ids),
            label_tokens=int(arrays.label_tokens[ids].sum()),
            num_micro_batches=len(parts),
            micro_batches=mine,
        )

    @staticmethod
    def _micro_batch(arrays: TokenArrays, index: int, ids: np.ndarray) -> WireMicroBatch:
        columns = {}
        for name in arrays.columns:
            column = arrays.column(name)
            rows = [column.row(int(row)) for row in ids]
            values = np.concatenate(rows) if rows else np.empty(0, column.values.dtype)
            columns[name] = (values, column.lengths[ids])
        return WireMicroBatch(index, ids, columns)


def make_distributor(feedings: dict[str, Feeding]):  # type: ignore[no-untyped-def]  # ray's ActorHandle has no type
    """Start the DataDistributor as a Ray actor on the driver's node; returns its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(DataDistributor)
    return actor.options(scheduling_strategy=here).remote(feedings)
