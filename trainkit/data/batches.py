"""How the samples of one optimizer step become micro-batches: pure arithmetic on lengths.

k, the number of micro-batches of a step, is the smallest multiple of the world size with which all fit the budget. Which samples stand
together is a function of (lengths, k, budget) alone; a rank takes its share of the k. So layouts with equal k train identical
micro-batches, whatever their world size and accumulation.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LENGTH_STEP = 8  # padded lengths are rounded up to this: few shapes, and matrix sizes that tensor cores like


@dataclass(frozen=True)
class Budget:
    """Of one micro-batch on one device: padded tokens, or rows. Exactly one is set."""

    tokens: int | None = None
    rows: int | None = None

    def cost(self, num_rows: int, source: int, target: int) -> int:
        """Padded tokens (rows × (longest source + longest target)) or rows, whichever the budget counts."""
        return num_rows if self.tokens is None else num_rows * (source + target)

    @property
    def limit(self) -> int:
        limit = self.rows if self.tokens is None else self.tokens
        assert limit is not None
        return limit


def round_up(lengths: np.ndarray) -> np.ndarray:
    """Lengths rounded up to LENGTH_STEP; 0 (no such column) stays 0."""
    return -(-np.asarray(lengths, dtype=np.int64) // LENGTH_STEP) * LENGTH_STEP


class Shape(NamedTuple):
    """What a micro-batch is padded to. A row of one sequence has a target of 0."""

    rows: int
    source: int
    target: int

    @property
    def cost(self) -> int:
        """Padded tokens."""
        return self.rows * (self.source + self.target)


class Part(NamedTuple):
    """A micro-batch of a step."""

    samples: np.ndarray  # indices into the step's samples; fewer than the shape's rows, or none, leave rows of padding
    shape: Shape
    packed: np.ndarray | None = None  # samples in each packed sequence, in order


def compose(source: np.ndarray, target: np.ndarray, world_size: int, budget: Budget) -> list[Part]:
    """Cut a step into k micro-batches.

    source, target: lengths in tokens, one per sample of the step; target is all 0 where a row is one sequence.
    Returns k parts, most expensive first; some hold no samples when there are fewer samples than k.
    A sample longer than a token budget stands alone.
    """
    source, target = round_up(source), round_up(target)
    by_length = np.lexsort((np.arange(len(source)), -source, -(source + target)))
    sizes = list(zip(source[by_length].tolist(), target[by_length].tolist(), strict=True))
    if budget.tokens is None:
        k = _multiple(-(-len(sizes) // budget.limit), world_size)
        parts = [by_length[part] for part in np.array_split(np.arange(len(sizes)), k)]
    else:
        k = _multiple(len(_cuts(sizes, budget, budget.limit)), world_size)
        cuts = _widen(_even_cuts(sizes, budget, k), len(sizes), k)
        parts = [by_length[first:last] for first, last in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]
        parts += [by_length[:0]] * (k - len(parts))
    shaped = [Part(part, _shape(source[part], target[part])) for part in parts]
    return sorted(shaped, key=lambda part: -part.shape.cost)


def _shape(source: np.ndarray, target: np.ndarray) -> Shape:
    if not len(source):
        return Shape(1, LENGTH_STEP, LENGTH_STEP)
    return Shape(len(source), int(source.max()), int(target.max()))


def pack(lengths: np.ndarray, world_size: int, budget: Budget, longest: int) -> list[Part]:
    """Cut a step of one-sequence rows into k micro-batches of equal shape, several rows packed into each sequence.

    longest: most tokens of a packed sequence; no row is longer. k is the smallest multiple of the world size with which sequences of that
    length fit the budget (of tokens; of samples, on average over the micro-batches). Rows go longest first into the emptiest sequence
    (LPT; Graham, "Bounds on multiprocessing timing anomalies", 1969), so all are about equally full, and they are as long as the fullest.
    """
    most = int(_coarser(np.array([longest]))[0])
    sequences = _sequences_needed(lengths, most)
    if budget.tokens is None:
        k = _multiple(-(-len(lengths) // budget.limit), world_size)
    else:
        k = _multiple(-(-sequences // max(1, budget.limit // most)), world_size)
    rows = -(-sequences // k)
    filled = _filled(lengths, rows * k)
    length = int(_coarser(np.array([max(int(lengths[part].sum()) for part in filled)]))[0])
    parts = []
    for first in range(0, rows * k, rows):
        own = filled[first : first + rows]
        parts.append(Part(np.concatenate(own), Shape(rows, length, 0), np.array([len(part) for part in own])))
    return parts


def _sequences_needed(lengths: np.ndarray, most: int) -> int:
    sequences = max(1, -(-int(lengths.sum()) // most))
    while max(int(lengths[part].sum()) for part in _filled(lengths, sequences)) > most:
        sequences += max(1, sequences // 50)
    return sequences


def _filled(lengths: np.ndarray, sequences: int) -> list[np.ndarray]:
    """Indices of the rows in each sequence, the fullest sequences first."""
    loads = [(0, number) for number in range(sequences)]
    inside: list[list[int]] = [[] for _ in range(sequences)]
    for row in np.lexsort((np.arange(len(lengths)), -lengths)).tolist():
        load, number = loads[0]
        inside[number].append(row)
        heapq.heapreplace(loads, (load + int(lengths[row]), number))
    return [np.array(sorted(inside[number]), dtype=np.int64) for _, number in sorted(loads, key=lambda item: (-item[0], item[1]))]


def _coarser(lengths: np.ndarray) -> np.ndarray:
    """Rounded up to LENGTH_STEP, and beyond 512 to a power of two of at most a 32nd: few shapes, and little padding."""
    lengths = np.maximum(lengths, 1)
    step = np.maximum(LENGTH_STEP, 2 ** np.maximum(0, np.floor(np.log2(lengths)).astype(np.int64) - 5))
    return -(-lengths // step) * step


def deal(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Indices of the micro-batches that each rank trains, equally many: every round deals one to each rank, dearest to the least loaded.

    costs: of the k micro-batches, descending.
    """
    loads = [0] * world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for first in range(0, len(costs), world_size):
        ranks = sorted(range(world_size), key=lambda rank: (loads[rank], rank))
        for rank, index in zip(ranks, range(first, first + world_size), strict=True):
            shares[rank].append(index)
            loads[rank] += costs[index]
    return shares


def _multiple(groups: int, world_size: int) -> int:
    return max(1, -(-groups // world_size)) * world_size


def _cuts(sizes: list[tuple[int, int]], budget: Budget, limit: int) -> list[int]:
    """First index of each group when groups are filled in order up to `limit`."""
    cuts: list[int] = []
    rows = longest_source = longest_target = 0
    for index, (source, target) in enumerate(sizes):
        rows, longest_source, longest_target = rows + 1, max(longest_source, source), max(longest_target, target)
        if not cuts or budget.cost(rows, longest_source, longest_target) > limit:
            cuts.append(index)
            rows, longest_source, longest_target = 1, source, target
    return cuts


def _even_cuts(sizes: list[tuple[int, int]], budget: Budget, k: int) -> list[int]:
    """The cut into at most k groups whose most expensive group is cheapest (bisection over the limit)."""
    low, high = 1, budget.limit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cuts(sizes, budget, middle)) <= k else (middle + 1, high)
    return _cuts(sizes, budget, high)


def _widen(cuts: list[int], num_samples: int, k: int) -> list[int]:
    """Split the groups with most rows until there are k, or one sample each."""
    while len(cuts) < min(k, num_samples):
        ends = [*cuts[1:], num_samples]
        rows, first = max((last - first, -first) for first, last in zip(cuts, ends, strict=True))
        cuts = sorted([*cuts, -first + rows // 2])
    return cuts
