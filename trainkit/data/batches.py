"""How the samples of one optimizer step become micro-batches: pure arithmetic on lengths.

k, the number of micro-batches of a step, is the smallest multiple of the world size with which all fit the budget. Which samples stand
together is a function of (lengths, k, budget, catalogue) alone; a rank takes its share of the k. So layouts with equal k train identical
micro-batches, whatever their world size and accumulation. The shapes come from a catalogue of at most 64 (catalogue.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_WELL_FILLED = 0.88  # share of real tokens from which on packed micro-batches stay equal
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


@dataclass(frozen=True)
class Catalogue:
    """The shapes that micro-batches may have, and how samples are put in line for them."""

    shapes: np.ndarray  # int64 [shapes, 3]: rows, source, target
    edges: tuple[int, ...]  # upper bounds of the strips of source length, ascending
    tail: int  # targets longer than this make a strip of their own
    power: int  # of the costs whose sum is made least, a power of two: a high one wants little padding and equal costs alike

    @property
    def costs(self) -> np.ndarray:
        return self.shapes[:, 0] * (self.shapes[:, 1] + self.shapes[:, 2])


def compose(source: np.ndarray, target: np.ndarray, world_size: int, budget: Budget, catalogue: Catalogue | None = None) -> list[Part]:
    """Cut a step into k micro-batches.

    source, target: lengths in tokens, one per sample of the step; target is all 0 where a row is one sequence. A budget of tokens needs a
    catalogue that holds the longest of them; a budget of rows cuts evenly in order of length.
    Returns k parts, most expensive first; some hold no samples when there are fewer samples than k.
    A sample longer than a token budget stands alone, padded to nothing.
    """
    if budget.tokens is None:
        return _by_rows(round_up(source), round_up(target), _multiple(-(-len(source) // budget.limit), world_size))
    assert catalogue is not None
    lines = [_Line.of(source, target, order, catalogue, budget.tokens) for order in _orders(source, target, catalogue)]
    k = min(_multiple(line.fewest, world_size) for line in lines)
    cuts = [cut for line in lines if (cut := line.cut(k, catalogue)) is not None]
    parts = [Part(*part) for part in min(cuts, key=lambda cut: cut[0])[1]]
    alone = [_alone(part, source, target) if part.shape.cost > budget.tokens else part for part in parts]
    return sorted(alone, key=lambda part: -part.shape.cost)


def _by_rows(source: np.ndarray, target: np.ndarray, k: int) -> list[Part]:
    by_length = np.lexsort((-source, -(source + target)))
    parts = [by_length[part] for part in np.array_split(np.arange(len(source)), k)]
    shapes = [Shape(len(p), int(source[p].max()), int(target[p].max())) if len(p) else Shape(1, LENGTH_STEP, LENGTH_STEP) for p in parts]
    return sorted(map(Part, parts, shapes), key=lambda part: -part.shape.cost)


def _alone(part: Part, source: np.ndarray, target: np.ndarray) -> Part:
    """A sample that no shape within the budget holds is padded to its own lengths; without one there is next to nothing to pad."""
    if not len(part.samples):
        return Part(part.samples, Shape(1, LENGTH_STEP, LENGTH_STEP if part.shape.target else 0))
    (sample,) = part.samples
    return Part(part.samples, Shape(1, int(round_up(source[sample])), int(round_up(target[sample]))))


def _orders(source: np.ndarray, target: np.ndarray, catalogue: Catalogue) -> list[np.ndarray]:
    """Lines in which neighbours are alike: long targets first, then strips of falling source length, there and back in target length.

    Without a power, total length is tried as well: few micro-batches make few strips.
    """
    strip = np.searchsorted(catalogue.edges, source)
    tail = target > catalogue.tail
    inner = np.where(tail, -source, np.where(strip % 2 == 0, -target, target))
    strips = np.lexsort((-source, inner, -np.where(tail, len(catalogue.edges), strip)))
    return [strips] if catalogue.power > 1 else [strips, np.lexsort((-source, -(source + target)))]


@dataclass(frozen=True)
class _Line:
    """Samples in a row, and what each shape holds of them."""

    order: np.ndarray
    after: np.ndarray  # [samples + 1, shapes]: where the longest run from a sample that a shape holds ends

    @classmethod
    def of(cls, source: np.ndarray, target: np.ndarray, order: np.ndarray, catalogue: Catalogue, budget: int) -> _Line:
        """Beyond the budget a shape holds nothing, save one of one row a sample that no shape within the budget holds."""
        rows, longest_source, longest_target = catalogue.shapes.T
        count, here = len(order), np.arange(len(order))[:, None]
        fits = (source[order][:, None] <= longest_source) & (target[order][:, None] <= longest_target)
        over = catalogue.costs > budget
        fits &= ~over | ((rows == 1) & ~(fits & ~over).any(1, keepdims=True))
        ends = np.minimum.accumulate(np.where(fits, count, here)[::-1], axis=0)[::-1]
        return cls(order, np.vstack([np.minimum(ends, here + rows), np.full((1, len(rows)), count)]))

    @property
    def fewest(self) -> int:
        """Runs that hold all samples when each is as long as can be."""
        reach, position, runs = self.after.max(1), 0, 0
        while position < len(self.order):
            assert reach[position] > position, "the catalogue holds every sample"
            position, runs = int(reach[position]), runs + 1
        return max(1, runs)

    def cut(self, k: int, catalogue: Catalogue) -> tuple[float, list[tuple[np.ndarray, Shape]]] | None:
        """(sum of the costs' powers, samples and shape of each run) of the least such sum over all cuts into k runs; None if none fit.

        Dynamic programming from the end; a run may be empty, and is then all padding.
        """
        end, powers = len(self.order), (catalogue.costs / catalogue.costs.mean()) ** catalogue.power
        reach, first, last = self.after.max(1), [end], [0]
        for _ in range(k):
            first.append(int(np.searchsorted(reach, first[-1])))  # first[j]: the earliest sample from which j runs reach the end
            last.append(int(reach[last[-1]]))  # last[j]: how far j runs get
        if first[k] > 0:
            return None
        best = np.full((k + 1, end + 1), np.inf)
        best[0, end] = 0.0
        for runs in range(1, k + 1):
            span = slice(first[runs], last[k - runs] + 1)
            best[runs, span] = (powers + best[runs - 1][self.after[span]]).min(1)
        sample, chosen = 0, []
        for runs in range(k, 0, -1):
            shape = int(np.argmin(powers + best[runs - 1][self.after[sample]]))
            chosen.append((self.order[sample : self.after[sample, shape]], Shape(*catalogue.shapes[shape].tolist())))
            sample = int(self.after[sample, shape])
        return float(best[k, 0]), chosen


def pack(lengths: np.ndarray, world_size: int, budget: Budget, longest: int) -> list[Part]:
    """Cut a step of one-sequence rows into k micro-batches of equal shape, several rows packed into each sequence.

    longest: most tokens of a packed sequence; no row may be longer (ValueError). k is the smallest multiple of the world size with which
    sequences of that length fit the budget (of tokens; of samples, on average over the micro-batches). Rows go longest first into the
    emptiest sequence (LPT; Graham, "Bounds on multiprocessing timing anomalies", 1969), so all are about equally full, and they are as long
    as the fullest.
    Where a few long rows keep the others from being full, some micro-batches have a sequence less: no rank waits longer for that.
    """
    most = int(_coarser(np.array([longest]))[0])
    if lengths.max(initial=0) > most:
        raise ValueError(f"a row of {lengths.max()} tokens is longer than a packed sequence of {longest}")
    sequences = _sequences_needed(lengths, most)
    if budget.tokens is None:
        k = _multiple(-(-len(lengths) // budget.limit), world_size)
    else:
        k = _multiple(-(-sequences // max(1, budget.limit // most)), world_size)
    filled = _filled(lengths, -(-sequences // k) * k)
    length = _fullest(lengths, filled)
    fewer = max(k, _sequences_needed(lengths, length)) if lengths.sum() < _WELL_FILLED * len(filled) * length else len(filled)
    if fewer < len(filled):
        filled = _filled(lengths, fewer)
        length = _fullest(lengths, filled)
    fewest, more = divmod(len(filled), k)
    parts, first = [], 0
    for rows in [fewest + 1] * more + [fewest] * (k - more):
        own = filled[first : first + rows]
        parts.append(Part(np.concatenate(own), Shape(rows, length, 0), np.array([len(part) for part in own])))
        first += rows
    return parts


def _fullest(lengths: np.ndarray, filled: Sequence[np.ndarray]) -> int:
    return int(_coarser(np.array([max(int(lengths[part].sum()) for part in filled)]))[0])


def _sequences_needed(lengths: np.ndarray, most: int) -> int:
    """How many sequences LPT needs so that none is longer than `most`; no row is. Never more than rows."""

    def fits(sequences: int) -> bool:
        return max(int(lengths[part].sum()) for part in _filled(lengths, sequences) if len(part)) <= most

    least = max(1, -(-int(lengths.sum()) // most), int((2 * lengths > most).sum()))  # of rows over a half, each has its own
    if fits(least):
        return least
    below, enough = least, min(len(lengths), least + max(1, least // 50))
    while not fits(enough):
        below, enough = enough, min(len(lengths), 2 * enough - least + 1)
    while enough - below > 1:
        middle = (below + enough) // 2
        below, enough = (below, middle) if fits(middle) else (middle, enough)
    return enough


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
