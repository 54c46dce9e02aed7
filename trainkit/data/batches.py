"""How the samples of one optimizer step become micro-batches: pure arithmetic on lengths.

k, the number of micro-batches of a step, is the smallest multiple of the world size with which all fit the budget. Which samples stand
together is a function of (lengths, k, budget, catalogues) alone; a rank takes its share of the k. So layouts with equal k train identical
micro-batches, whatever their world size and accumulation. The shapes come from catalogues of at most 64 each (catalogue.py),
and on GPUs are joined to fewer (covers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from trainkit.planning.facts import LENGTH_STEP

FOREIGN = 2.0  # times their power: what shapes cost that only rare steps need
_SLACK_RUNS, _SLACK_SAMPLES = 4, 1 << 15  # how far a cut may be off an even pace: so many runs, or of runs × samples so much


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


@dataclass(frozen=True)
class Catalogue:
    """The shapes that micro-batches may have, and how samples are put in line for them."""

    shapes: np.ndarray  # int64 [shapes, 3]: rows, source, target
    edges: tuple[int, ...]  # upper bounds of the strips of source length, ascending
    tail: int  # targets longer than this make a strip of their own
    power: int  # of the costs whose sum is made least: a high one wants little padding and equal costs alike
    foreign: np.ndarray | None = None  # bool [shapes]: of another catalogue, to be used where its own do not do

    @cached_property
    def costs(self) -> np.ndarray:
        return self.shapes[:, 0] * (self.shapes[:, 1] + self.shapes[:, 2])

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of lengths that occur, int64 [pairs, 2], and each shape's index in them."""
        pairs, pair = np.unique(self.shapes[:, 1:], axis=0, return_inverse=True)
        return pairs, pair.ravel()

    def powers(self, unit: float) -> np.ndarray:
        """Of the costs in a unit, FOREIGN times as much for foreign shapes. Multiplied out: the same bits on every processor."""
        powers = np.multiply.reduce([self.costs / unit] * self.power)
        return powers if self.foreign is None else np.where(self.foreign, FOREIGN * powers, powers)

    def lent_to(self, other: Catalogue) -> Catalogue:
        """The shapes of both, for samples in these lines: holds what this one holds, and rather in shapes that the other has."""
        shapes = np.unique(np.concatenate([self.shapes, other.shapes]), axis=0)
        own = (shapes[:, None] == other.shapes).all(2).any(1)
        return Catalogue(shapes, self.edges, self.tail, other.power, ~own)


class Catalogues(Protocol):
    """Those of a run. None of them depends on the world size."""

    @property
    def first(self) -> Catalogue:
        """The one that decides into how many micro-batches a step is cut, and lends its shapes if those for k cannot hold it."""

    def __call__(self, samples: int, k: int) -> Catalogue:
        """The one for steps of `samples` in k micro-batches."""


def compose(
    source: np.ndarray, target: np.ndarray, world_size: int, budget: Budget, catalogues: Catalogues | None = None, at_least: int = 1
) -> list[Part]:
    """Cut a step into k micro-batches.

    source, target: lengths in tokens, one per sample of the step; target is all 0 where a row is one sequence. A budget of tokens needs
    catalogues that hold the longest of them, and is cut into `at_least` parts; a budget of rows cuts evenly in order of length.
    Returns k parts, most expensive first; some hold no samples when there are fewer samples than k.
    A sample longer than a token budget stands alone, padded to nothing.
    """
    if budget.tokens is None:
        return _by_rows(round_up(source), round_up(target), multiple(-(-len(source) // budget.limit), world_size))
    assert catalogues is not None
    first = LinedUp.of(source, target, budget, catalogues.first)
    k = multiple(max(at_least, first.fewest), world_size)
    catalogue = catalogues(len(source), k)
    of_k = first if catalogue is first.catalogue else LinedUp.of(source, target, budget, catalogue)
    if of_k.fewest > k:
        of_k = LinedUp.of(source, target, budget, catalogues.first.lent_to(catalogue))
    return of_k.cut(k)


def _by_rows(source: np.ndarray, target: np.ndarray, k: int) -> list[Part]:
    by_length = np.lexsort((-source, -(source + target)))
    parts = [by_length[part] for part in np.array_split(np.arange(len(source)), k)]
    empty = Shape(1, LENGTH_STEP, LENGTH_STEP if target.any() else 0)
    shapes = [Shape(len(p), int(source[p].max()), int(target[p].max())) if len(p) else empty for p in parts]
    return sorted(map(Part, parts, shapes), key=lambda part: -part.shape.cost)


@dataclass(frozen=True)
class LinedUp:
    """A step's samples in the lines that a catalogue asks for."""

    source: np.ndarray
    target: np.ndarray
    budget: Budget
    catalogue: Catalogue
    lines: list[_Line]

    @classmethod
    def of(cls, source: np.ndarray, target: np.ndarray, budget: Budget, catalogue: Catalogue) -> LinedUp:
        lines = [_Line.of(source, target, order, catalogue, budget.limit) for order in _orders(source, target, catalogue)]
        return cls(source, target, budget, catalogue, lines)

    @property
    def fewest(self) -> int:
        """Micro-batches that hold the step."""
        return min(line.fewest for line in self.lines)

    def cut(self, k: int) -> list[Part]:
        """The parts, as `compose` returns them; k is at least `fewest`."""
        cuts = [line.cut(k, self.catalogue) for line in self.lines if line.fewest <= k]
        runs = min(cuts, key=lambda cut: cut[0])[1]
        parts = [Part(samples, shape if shape.cost <= self.budget.limit else self._alone(samples, shape)) for samples, shape in runs]
        return sorted(parts, key=lambda part: -part.shape.cost)

    def _alone(self, samples: np.ndarray, shape: Shape) -> Shape:
        """A sample that no shape within the budget holds is padded to its own lengths; without one there is next to nothing to pad."""
        if not len(samples):
            return Shape(1, LENGTH_STEP, LENGTH_STEP if shape.target else 0)
        (sample,) = samples
        return Shape(1, int(round_up(self.source[sample])), int(round_up(self.target[sample])))


def _orders(source: np.ndarray, target: np.ndarray, catalogue: Catalogue) -> list[np.ndarray]:
    """Lines in which neighbours are alike: long targets first, then strips of falling source length, there and back in target length.

    Without a power, total length is tried as well: few micro-batches make few strips. So it is with foreign
    shapes: their lender may hold the step in that line alone.
    """
    strip = np.searchsorted(catalogue.edges, source)
    tail = target > catalogue.tail
    inner = np.where(tail, -source, np.where(strip % 2 == 0, -target, target))
    strips = np.lexsort((-source, inner, -np.where(tail, len(catalogue.edges), strip)))
    return [strips] if catalogue.power > 1 and catalogue.foreign is None else [strips, np.lexsort((-source, -(source + target)))]


@dataclass(frozen=True)
class _Line:
    """Samples in a row, and what each shape holds of them."""

    order: np.ndarray
    after: np.ndarray  # int32 [shapes, samples + 1]: where the longest run from a sample that a shape holds ends
    path: list[int]  # where the runs begin that hold all samples when each is as long as can be, and the end of the last

    @classmethod
    def of(cls, source: np.ndarray, target: np.ndarray, order: np.ndarray, catalogue: Catalogue, budget: int) -> _Line:
        """Beyond the budget a shape holds nothing, save one of one row a sample that no shape within the budget holds."""
        count, here, rows = len(order), np.arange(len(order), dtype=np.int32), catalogue.shapes[:, :1].astype(np.int32)
        pairs, pair = catalogue.pairs
        fits = (source[order] <= pairs[:, :1]) & (target[order] <= pairs[:, 1:])
        ends = np.minimum.accumulate(np.where(fits, np.int32(count), here)[:, ::-1], axis=1)[:, ::-1]
        after = np.full((len(rows), count + 1), count, np.int32)
        np.minimum(ends[pair], here + rows, out=after[:, :-1])
        if (over := catalogue.costs > budget).any():
            held = fits[pair[~over]].any(0)
            after[over, :-1] = here + ((rows[over] == 1) & fits[pair[over]] & ~held)
        reach, path = after.max(0).tolist(), [0]
        while path[-1] < count:
            assert reach[path[-1]] > path[-1], "the catalogue holds every sample"
            path.append(reach[path[-1]])
        return cls(order, after, path)

    @property
    def fewest(self) -> int:
        return max(1, len(self.path) - 1)

    def cut(self, k: int, catalogue: Catalogue) -> tuple[float, list[tuple[np.ndarray, Shape]]]:
        """(sum of the costs' powers, samples and shape of each run) of the least such sum over all cuts into k runs, at least `fewest`.

        Dynamic programming from the end; a run may be empty, and is then all padding. Cuts that are ahead of an even pace, or behind it,
        by more than some runs are left out where there are many samples: the work grows with the samples, not with samples × k.
        """
        powers = catalogue.powers(float(catalogue.costs.mean()))[:, None]
        end, slack = len(self.order), max(_SLACK_RUNS, _SLACK_SAMPLES / len(self.order))
        best = np.full((k + 1, end + 1), np.inf)
        while np.isinf(best[k, 0]):
            best[0, end] = 0.0
            for runs, (low, high) in enumerate(self._spans(k, slack)[1:], 1):
                best[runs, low : high + 1] = (powers + best[runs - 1][self.after[:, low : high + 1]]).min(0)
            slack *= 2
        sample, chosen = 0, []
        for runs in range(k, 0, -1):
            shape = int(np.argmin(powers[:, 0] + best[runs - 1][self.after[:, sample]]))
            chosen.append((self.order[sample : self.after[shape, sample]], Shape(*catalogue.shapes[shape].tolist())))
            sample = int(self.after[shape, sample])
        return float(best[k, 0]), chosen

    def _spans(self, k: int, slack: float) -> list[tuple[int, int]]:
        """For 0 .. k runs that are left, the first and last sample from which they may go on."""
        end, reach = len(self.order), self.after.max(0)
        first, last = [end], [0]
        for _ in range(k):
            first.append(int(np.searchsorted(reach, first[-1])))  # first[j]: the earliest sample from which j runs reach the end
            last.append(int(reach[last[-1]]))  # last[j]: how far j runs get
        pace = np.arange(k, -1, -1) * ((len(self.path) - 1) / k)
        low, high = (np.interp(pace + ahead, np.arange(len(self.path)), self.path) for ahead in (-slack, slack))
        return [(max(first[j], int(low[j])), min(last[k - j], int(high[j]))) for j in range(k + 1)]


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


def multiple(groups: int, world_size: int) -> int:
    """The smallest multiple of the world size that is at least `groups`, and at least one for each rank."""
    return max(1, -(-groups // world_size)) * world_size
