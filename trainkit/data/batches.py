"""How the samples of one optimizer step become micro-batches: pure arithmetic on lengths.

k, the number of micro-batches of a step, is the smallest multiple of the world size with which all fit the budget. Which samples stand
together is a function of (lengths, k, budget) alone; a rank takes its share of the k. So layouts with equal k train identical
micro-batches, whatever their world size and accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def compose(source: np.ndarray, target: np.ndarray, world_size: int, budget: Budget) -> list[np.ndarray]:
    """Cut a step into k micro-batches.

    source, target: lengths in tokens, one per sample of the step; target is all 0 where a row is one sequence.
    Returns k arrays of indices into the step's samples, most expensive first; some are empty when there are fewer samples than k.
    A sample longer than a token budget stands alone.
    """
    source, target = round_up(source), round_up(target)
    by_length = np.lexsort((np.arange(len(source)), -source, -(source + target)))
    sizes = list(zip(source[by_length].tolist(), target[by_length].tolist(), strict=True))
    if budget.tokens is None:
        k = _multiple(-(-len(sizes) // budget.limit), world_size)
        return [by_length[part] for part in np.array_split(np.arange(len(sizes)), k)]
    k = _multiple(len(_cuts(sizes, budget, budget.limit)), world_size)
    cuts = _widen(_even_cuts(sizes, budget, k), len(sizes), k)
    parts = [by_length[first:last] for first, last in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]
    parts.sort(key=lambda part: -budget.cost(len(part), int(source[part].max()), int(target[part].max())))
    return parts + [by_length[:0]] * (k - len(parts))


def share(k: int, rank: int, world_size: int) -> list[int]:
    """Indices of the micro-batches that a rank trains: every round deals one to each rank, there and back (costs descend)."""
    return [first + (rank if turn % 2 == 0 else world_size - 1 - rank) for turn, first in enumerate(range(0, k, world_size))]


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
