"""The few shapes of a run's micro-batches, chosen once from the lengths in its data.

A bounded set of shapes lets compiled kernels and CUDA graphs be reused; a good one leaves little padding, and lets all micro-batches of a
step cost about the same, so that no rank waits. Trial steps are composed with a wide pool of shapes near the usual cost, the shapes that
are used least are dropped, and so on until few are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainkit.data.batches import Budget, Catalogue, compose
from trainkit.data.order import samples_of_step

SHAPES = 64
EVEN_FROM = 16  # with fewer micro-batches equal costs would cost too much padding: their plain sum is made least
TRIAL_SAMPLES = 12_288  # enough to choose shapes by, and seconds of work
EVEN_TRIALS = 640  # micro-batches, where rare shapes decide how even the ranks are
GRID = 12  # lengths of a strip, or of a column, in the pool
EVEN_LEVELS = (1.16, 1.08, 1.03, 0.99, 0.95, 0.91)  # costs in the pool, relative to the mean cost that a pilot finds
WIDE_LEVELS = tuple(1.7 / 1.07**power for power in range(16))
PILOT_LEVELS = tuple(1.02 * 1.06**power for power in range(12))  # relative to the cost without padding
Trial = tuple[np.ndarray, np.ndarray]  # source and target lengths of a step
Lengths = tuple[int, int]


def make_catalogue(
    source: np.ndarray, target: np.ndarray, samples: int, world_size: int, budget: Budget, longest: Lengths | None = None
) -> Catalogue:
    """The shapes for steps of `samples` out of rows of these lengths. Some seconds at most; the same for the same arguments.

    longest: source and target that some shape must hold, beyond what the rows have.
    """
    assert budget.tokens is not None
    source, target = np.asarray(source, np.int64), np.asarray(target, np.int64)
    samples = min(samples, len(source))
    most = np.maximum(longest or (0, 0), (source.max(), target.max()))
    k = _usual_micro_batches(_trials(source, target, samples, 4), world_size, budget.tokens)
    trials = _trials(source, target, samples, EVEN_TRIALS // k if k >= EVEN_FROM else TRIAL_SAMPLES // samples)
    lengths = _Lengths(source, target, (int(most[0]), int(most[1])), budget.tokens, k)
    found = [_pruned(_pool(lengths, trials, strips), trials) for strips in lengths.strip_counts]
    return min(found, key=lambda pair: pair[0])[1]


def _trials(source: np.ndarray, target: np.ndarray, samples: int, wanted: int) -> list[Trial]:
    """The first whole steps of an order of their own: as many as wanted, at least 4, at most those of an epoch."""
    steps = range(1, min(len(source) // samples, max(4, wanted)) + 1)
    return [(source[ids], target[ids]) for ids in (samples_of_step(0, len(source), samples, step) for step in steps)]


def _usual_micro_batches(trials: Sequence[Trial], world_size: int, budget: int) -> int:
    """The smallest multiple of the world size that holds most trial steps, filled in order of length without rounding."""
    needed = sorted(_fewest(source, target, budget) for source, target in trials)
    return -(-needed[len(needed) // 2] // world_size) * world_size


def _fewest(source: np.ndarray, target: np.ndarray, budget: int) -> int:
    order = np.argsort(-(source + target), kind="stable")
    groups = rows = longest_source = longest_target = 0
    for s, t in zip(source[order].tolist(), target[order].tolist(), strict=True):
        rows, longest_source, longest_target = rows + 1, max(longest_source, s), max(longest_target, t)
        if groups == 0 or rows * (longest_source + longest_target) > budget:
            groups, rows, longest_source, longest_target = groups + 1, 1, s, t
    return groups


@dataclass(frozen=True)
class _Lengths:
    """What the data, the budget and the usual number of micro-batches say."""

    source: np.ndarray
    target: np.ndarray
    longest: Lengths
    budget: int
    k: int

    @property
    def power(self) -> int:
        return 16 if self.k >= EVEN_FROM else 1

    @property
    def one_sequence(self) -> bool:
        return self.longest[1] == 0

    @property
    def strip_counts(self) -> list[int]:
        return [1] if self.one_sequence else sorted({round(math.sqrt(self.k)), round(1.5 * math.sqrt(self.k))})

    def shapes(self, level: float, factors: Sequence[float], pairs: Sequence[Lengths]) -> list[tuple[int, int, int]]:
        """For every pair of lengths and every cost `level` × factor within the budget, as many rows as the cost pays for."""
        out = []
        for source, target in pairs:
            for factor in factors:
                cost = int(min(level * factor, self.budget))
                rows = max(1, cost // max(1, source + target))
                stretched = max(source, min(cost // rows, self.longest[0])) if self.one_sequence else source  # what the rows leave
                out.append((rows, stretched, target))
        return out


@dataclass(frozen=True)
class _Pool:
    catalogue: Catalogue
    spare: np.ndarray  # bool per shape: kept for rare steps, whether the trials use it or not
    k: int
    budget: Budget
    usual: float  # cost of a micro-batch without padding, the unit in which costs are compared


def _pool(lengths: _Lengths, trials: Sequence[Trial], strips: int) -> _Pool:
    """Candidate shapes near the cost that a pilot finds."""
    edges = tuple(_quantised(lengths.source, strips))
    tail = int(np.quantile(lengths.target, 1 - 0.25 / lengths.k))
    budget, pairs = Budget(tokens=lengths.budget), _pairs(lengths, edges, tail)

    def made(shapes: Sequence[tuple[int, int, int]]) -> Catalogue:
        return Catalogue(np.unique(np.array(shapes, np.int64), axis=0), edges, tail, lengths.power)

    samples = len(trials[0][0])
    rows = max(1, min(-(-samples // lengths.k), lengths.budget // max(1, sum(lengths.longest))))
    whole = [(rows, *lengths.longest)]  # k of these hold any step, if the budget allows it
    usual = float((lengths.source + lengths.target).mean() * samples / lengths.k)
    pilot = made(lengths.shapes(usual, PILOT_LEVELS, pairs) + whole)
    costs = [part.shape.cost for source, target in trials[:4] for part in compose(source, target, lengths.k, budget, pilot)]
    level = float(np.mean(costs))
    high = (int(np.quantile(lengths.source, 0.99)), min(tail, int(np.quantile(lengths.target, 0.985))))
    spare = lengths.shapes(level, (1, 1.25, 1.6, 2.1, 2.8), [lengths.longest]) + lengths.shapes(level, (1.1, 1.2, 1.35), [high]) + whole
    levels = EVEN_LEVELS if lengths.power > 1 else WIDE_LEVELS
    catalogue = made(lengths.shapes(level, levels, pairs) + spare)
    return _Pool(catalogue, (catalogue.shapes[:, None] == np.array(spare)).all(2).any(1), lengths.k, budget, usual)


def _pairs(lengths: _Lengths, edges: tuple[int, ...], tail: int) -> list[Lengths]:
    """Pairs of lengths: for each strip its upper bound with targets that occur in it, and for long targets both."""
    if lengths.one_sequence:
        return [lengths.longest, *((top, 0) for top in _quantised(lengths.source, 40))]
    pairs = [lengths.longest]
    strip = np.where(lengths.target > tail, len(edges), np.searchsorted(edges, lengths.source))
    for index in np.unique(strip).tolist():
        inside, long = strip == index, index == len(edges)
        tops = _quantised(lengths.source[inside], GRID // 2) if long else [edges[index]]
        pairs += [(top, other) for top in tops for other in _quantised(lengths.target[inside], GRID // 2 if long else GRID)]
    if lengths.power == 1:
        pairs += [(top, other) for top in _quantised(lengths.source, GRID) for other in _quantised(lengths.target, GRID)]
    return pairs


def _pruned(pool: _Pool, trials: Sequence[Trial]) -> tuple[float, Catalogue]:
    """Drop the least used shapes, dear uses counting more, until SHAPES are left: (sum of powers over the trials, catalogue)."""
    catalogue, spare = pool.catalogue, pool.spare
    while True:
        number = {tuple(shape): index for index, shape in enumerate(catalogue.shapes.tolist())}
        parts = [part for source, target in trials for part in compose(source, target, pool.k, pool.budget, catalogue)]
        total = float(sum((part.shape.cost / pool.usual) ** catalogue.power for part in parts))
        if len(catalogue.shapes) <= SHAPES:
            return total, catalogue
        used = [number[part.shape] for part in parts if part.shape in number]
        weight = np.bincount(used, minlength=len(catalogue.shapes)) * (catalogue.costs / pool.usual) ** catalogue.power
        weight[spare] = np.inf
        keep = np.sort(np.argsort(-weight, kind="stable")[: max(SHAPES, int(0.85 * np.count_nonzero(weight)))])
        catalogue, spare = Catalogue(catalogue.shapes[keep], catalogue.edges, catalogue.tail, catalogue.power), spare[keep]


def _quantised(lengths: np.ndarray, levels: int) -> list[int]:
    """At most `levels` upper bounds, ascending, to which the lengths round up with the least padding (dynamic programming)."""
    values, counts = np.unique(lengths, return_counts=True)
    if len(values) > 300:
        values, counts = np.unique(np.quantile(lengths, np.linspace(0, 1, 300), method="higher"), return_counts=True)
    below, bound = np.concatenate([[0], np.cumsum(counts)]), np.concatenate([[0], values]).astype(np.int64)
    padded = np.where(np.tri(len(bound), k=-1, dtype=bool), (below[:, None] - below) * bound[:, None], 1 << 50)
    best, choices = np.full(len(bound), 1 << 50), []
    best[0] = 0
    for _ in range(min(levels, len(values))):
        choices.append((best + padded).argmin(1))
        best = (best + padded).min(1)
    bounds, end = [], len(values)
    for choice in reversed(choices):
        if end > 0:
            bounds.append(int(bound[end]))
            end = int(choice[end])
    return bounds[::-1]
