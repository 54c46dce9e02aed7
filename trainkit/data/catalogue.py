"""The few shapes of a run's micro-batches, chosen from the lengths in its data.

A bounded set of shapes lets compiled kernels and CUDA graphs be reused; a good one leaves little padding, and lets all micro-batches of a
step cost about the same, so that no rank waits. Trial steps are composed with a wide pool of shapes near the usual cost, the shapes that
are missed least are dropped until few are left, and their neighbours get a chance.

The world size does not enter. What does is k, the number of micro-batches of a whole step: many call for smaller shapes than few. All k
that the budget asks for share the first catalogue, which is all that one rank needs; the larger ones that are left to multiples of the
world size lie in bins with a catalogue each, to which the first lends some shapes for rare steps. A run uses those of its usual k, mostly
one or two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from trainkit.data.batches import Budget, Catalogue, LinedUp, Part, Shape
from trainkit.data.order import samples_of_step
from trainkit.planning.facts import LENGTH_STEP

SHAPES = 64  # of the first catalogue
LENT = 4  # the others have so many less: as many as WikiSQL's rare steps borrow from the first; other data may borrow more
ALIGNED_FROM = 64  # lengths from here on are multiples of LENGTH_STEP; for shorter ones that would take 4 to 12 % more tokens
FIRST, BIN = 1.04, 1.07  # ratios: where the first bin ends to the most micro-batches that a trial step needs, and of other bins' ends
EVEN_FROM = 16  # micro-batches; with fewer, equal costs take 2 to 5 % more padding, and are wanted where nothing else bounds the dearest:
LOOSE = 2.5  # a budget beyond so many times the cost without padding does not
EVEN_POWER = 96  # power × micro-batches: with many for each rank the sums even out by themselves
MOST_MICRO_BATCHES = 32  # of a trial step: larger steps are cut like smaller ones, in more time
TRIAL_SAMPLES, TRIAL_STEPS = 12_288, 160  # at most, enough to choose shapes by
EVEN_TRIALS = 640  # micro-batches, where rare shapes decide how even the ranks are
COMPARED = 1 << 23  # shapes × samples at most, where a wide pool is cut down
GRID = 12  # lengths of a strip, or of a column, in the pool
EVEN_LEVELS = (1.16, 1.08, 1.03, 0.99, 0.95, 0.91)  # costs in the pool, relative to the mean cost that a pilot finds
WIDE_LEVELS = tuple(1.7 / 1.07**power for power in range(16))
PILOT_LEVELS = tuple(1.02 * 1.06**power for power in range(12))  # relative to the cost without padding
Lengths = tuple[int, int]


class _Trial(NamedTuple):
    source: np.ndarray  # lengths of a step
    target: np.ndarray
    k: int  # into which it is cut, or more if it must


class Catalogues:
    """The catalogue for (samples of a step, k), chosen when first asked for, in 0.1 to 3 seconds; the same in every process."""

    def __init__(self, source: np.ndarray, target: np.ndarray, samples: int, budget: Budget, longest: Lengths = (0, 0)):
        """For steps of `samples` out of rows of these lengths, and smaller ones. Budget: of tokens.

        longest: source and target that some shape must hold, beyond what the rows have.
        """
        self.source, self.target, self.budget = np.asarray(source, np.int64), np.asarray(target, np.int64), budget
        self.longest = _aligned(max(longest[0], int(self.source.max()))), _aligned(max(longest[1], int(self.target.max())))
        self.samples = min(samples, len(self.source))
        needed = [_fewest(*step, budget.limit) for step in self._steps(self.samples, TRIAL_SAMPLES // self.samples)]
        self.least, self.most = min(needed), max(needed)
        self.made: dict[float, Catalogue] = {}

    @property
    def first(self) -> Catalogue:
        """For all numbers of micro-batches that the budget asks of whole steps."""
        return self(self.samples, self.least)

    def __call__(self, samples: int, k: int) -> Catalogue:
        low, high = self.least - 1.0, FIRST * self.most
        while k * self.samples > high * samples and high < self.samples:
            low, high = high, max(high + 1, BIN * high)
        if high not in self.made:
            self.made[high] = self._choose(low, min(high, self.samples))
        return self.made[high]

    def _choose(self, low: float, high: float) -> Catalogue:
        """For whole steps in more than `low` and at most `high` micro-batches. Of larger steps a part stands for the whole."""
        samples = math.ceil(self.samples * min(1.0, MOST_MICRO_BATCHES / high))
        share = samples / self.samples
        ks = list(range(math.floor(low * share) + 1, math.floor(high * share) + 1)) or [math.ceil(high * share)]
        aim = _Aim(self.source, self.target, self.longest, self.budget, samples, ks, 1, SHAPES if low < self.least else SHAPES - LENT)
        if high >= EVEN_FROM or (high >= 2 and self.budget.limit > LOOSE * aim.usual):
            aim = replace(aim, power=max(2, round(EVEN_POWER / high)))
        steps = self._steps(samples, EVEN_TRIALS // ks[-1] if aim.power > 1 else TRIAL_SAMPLES // samples)
        trials = [_Trial(*step, k) for step, k in zip(steps, itertools.cycle(ks), strict=False)]
        found = [_pruned(aim, _pool(aim, trials, strips), trials) for strips in aim.strip_counts]
        best = min(found, key=lambda pair: pair[0])
        return min(best, _pruned(aim, _neighbours(aim, best[1]), trials), key=lambda pair: pair[0])[1].catalogue

    def _steps(self, samples: int, wanted: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Lengths of the first whole steps of an order of their own: as many as wanted, at least 4, at most those of an epoch."""
        count = min(len(self.source) // samples, max(4, min(TRIAL_STEPS, wanted)))
        drawn = (samples_of_step(0, len(self.source), samples, step) for step in range(1, count + 1))
        return [(self.source[ids], self.target[ids]) for ids in drawn]


def _aligned(length: int) -> int:
    return length if length < ALIGNED_FROM else -(-length // LENGTH_STEP) * LENGTH_STEP


def _fewest(source: np.ndarray, target: np.ndarray, budget: int) -> int:
    """How many micro-batches hold a step: filled in order of length, or of target in strips of source, without rounding."""
    strips = math.ceil(math.sqrt((source + target).sum() / budget))
    strip = np.empty(len(source), int)
    strip[np.argsort(-source, kind="stable")] = np.arange(len(source)) * strips // len(source)
    lines = np.argsort(-(source + target), kind="stable"), np.lexsort((np.where(strip % 2 == 0, -target, target), strip))
    return min(_filled(zip(source[line].tolist(), target[line].tolist(), strict=True), budget) for line in lines)


def _filled(line: Iterable[Lengths], budget: int) -> int:
    groups = rows = longest_source = longest_target = 0
    for source, target in line:
        rows, longest_source, longest_target = rows + 1, max(longest_source, source), max(longest_target, target)
        if groups == 0 or rows * (longest_source + longest_target) > budget:
            groups, rows, longest_source, longest_target = groups + 1, 1, source, target
    return groups


@dataclass(frozen=True)
class _Aim:
    """What the shapes of a catalogue are for."""

    source: np.ndarray  # lengths of rows
    target: np.ndarray
    longest: Lengths
    budget: Budget
    samples: int  # of a trial step
    ks: Sequence[int]  # of trial steps, ascending
    power: int
    most: int  # shapes

    @property
    def k(self) -> int:
        return self.ks[len(self.ks) // 2]

    @property
    def usual(self) -> float:
        """Cost of a micro-batch without padding, the unit in which costs are compared."""
        return float((self.source.sum() + self.target.sum()) * self.samples / len(self.source) / self.k)

    @property
    def one_sequence(self) -> bool:
        return self.longest[1] == 0

    @property
    def strip_counts(self) -> list[int]:
        return [1] if self.one_sequence else sorted({round(math.sqrt(self.k)), round(1.5 * math.sqrt(self.k))})

    @property
    def levels(self) -> Sequence[float]:
        if self.power == 1:
            return WIDE_LEVELS
        return sorted({level * self.k / k for level in EVEN_LEVELS for k in (self.ks[0], self.k, self.ks[-1])})

    def shapes(self, level: float, factors: Sequence[float], pairs: Iterable[Lengths]) -> list[Shape]:
        """For every pair of lengths and every cost `level` × factor within the budget, as many rows as the cost pays for."""
        out = []
        for source, target in ((_aligned(source), _aligned(target)) for source, target in pairs):
            for factor in factors:
                cost = int(min(level * factor, self.budget.limit))
                rows = min(self.samples, max(1, cost // max(1, source + target)))
                room = min(cost // rows, self.longest[0]) if self.one_sequence else 0  # what the rows leave
                room -= room % LENGTH_STEP if room >= ALIGNED_FROM else 0
                out.append(Shape(rows, max(source, room), target))
        return out


@dataclass(frozen=True)
class _Pool:
    catalogue: Catalogue
    spare: np.ndarray  # bool per shape: kept for rare steps, whether the trials use it or not

    @classmethod
    def of(cls, shapes: list[Shape], spare: list[Shape], edges: tuple[int, ...], tail: int, power: int) -> _Pool:
        unique = np.unique(np.array(shapes + spare, np.int64), axis=0)
        kept = (unique[:, None] == np.array(spare, np.int64)).all(2).any(1)
        return cls(Catalogue(unique, edges, tail, power), kept)


def _composed(trial: _Trial, aim: _Aim, catalogue: Catalogue) -> list[Part]:
    step = LinedUp.of(trial.source, trial.target, aim.budget, catalogue)
    return step.cut(max(trial.k, step.fewest))


def _pool(aim: _Aim, trials: Sequence[_Trial], strips: int) -> _Pool:
    """Candidate shapes near the cost that a pilot finds."""
    edges = tuple(_quantised(aim.source, strips))
    tail = int(np.quantile(aim.target, 1 - 0.25 / aim.k))
    pairs = _pairs(aim, edges, tail)
    rows = max(1, min(-(-aim.samples // aim.ks[0]), aim.budget.limit // max(1, sum(aim.longest))))
    whole = [Shape(rows, *aim.longest)]  # k of these hold any step, if the budget allows it
    pilot = _Pool.of(aim.shapes(aim.usual, PILOT_LEVELS, pairs), whole, edges, tail, aim.power).catalogue
    level = float(np.mean([part.shape.cost for trial in trials[:4] for part in _composed(trial._replace(k=aim.k), aim, pilot)]))
    high = int(np.quantile(aim.source, 0.99)), min(tail, int(np.quantile(aim.target, 0.985)))
    spare = aim.shapes(level, (1, 1.25, 1.6, 2.1, 2.8), [aim.longest]) + aim.shapes(level, (1.1, 1.2, 1.35), [high]) + whole
    return _Pool.of(aim.shapes(level, aim.levels, pairs), spare, edges, tail, aim.power)


def _pairs(aim: _Aim, edges: tuple[int, ...], tail: int) -> list[Lengths]:
    """Pairs of lengths: for each strip its upper bound with targets that occur in it, and for long targets both."""
    if aim.one_sequence:
        return [aim.longest, *((top, 0) for top in _quantised(aim.source, 40))]
    pairs = [aim.longest]
    strip = np.where(aim.target > tail, len(edges), np.searchsorted(edges, aim.source))
    for index in np.unique(strip).tolist():
        inside, long = strip == index, index == len(edges)
        tops = _quantised(aim.source[inside], GRID // 2) if long else [edges[index]]
        pairs += [(top, other) for top in tops for other in _quantised(aim.target[inside], GRID // 2 if long else GRID)]
    if aim.power == 1:
        pairs += itertools.product(_quantised(aim.source, GRID), _quantised(aim.target, GRID))
    return pairs


def _neighbours(aim: _Aim, pool: _Pool) -> _Pool:
    """The shapes of a small pool, with a few rows more or less, and with the last length a little longer or shorter at the same cost."""
    shapes = [Shape(*shape) for shape in pool.catalogue.shapes.tolist()]
    spare = [shape for shape, kept in zip(shapes, pool.spare.tolist(), strict=True) if kept]
    out = list(shapes)
    for rows, source, target in shapes:
        for change in (-2, -1, 1, 2):
            out.append(Shape(rows + change * max(1, round(rows / 50)), source, target))
            longer = source + change * max(1, round(source / 50)) if aim.one_sequence else source
            other = 0 if aim.one_sequence else target + change
            pair = min(_aligned(longer), aim.longest[0]), min(_aligned(other), aim.longest[1])
            out.append(Shape(rows * (source + target) // max(1, sum(pair)), *pair))
    within = [shape for shape in out if min(shape[:2]) > 0 <= shape.target and (shape.cost <= aim.budget.limit or shape.rows == 1)]
    return _Pool.of(within, spare, pool.catalogue.edges, pool.catalogue.tail, aim.power)


def _pruned(aim: _Aim, pool: _Pool, trials: Sequence[_Trial]) -> tuple[float, _Pool]:
    """Drop the shapes that are missed least until `aim.most` are left: (sum of the costs' powers over the trials, what is left)."""
    while True:
        catalogue, count = pool.catalogue, len(pool.catalogue.shapes)
        some = trials[: max(4, COMPARED // (count * aim.samples))]
        used = [(trial, part) for trial in some for part in _composed(trial, aim, catalogue)]
        if count <= aim.most:
            return float(sum((part.shape.cost / aim.usual) ** aim.power for _, part in used)), pool
        runs = [(len(ids), trial.source[ids].max(), trial.target[ids].max()) for trial, (ids, *_) in used if len(ids)]
        keep = _missed(np.array(runs), pool, aim.usual, max(aim.most, count // 2))
        pool = _Pool(Catalogue(catalogue.shapes[keep], catalogue.edges, catalogue.tail, catalogue.power), pool.spare[keep])


def _missed(runs: np.ndarray, pool: _Pool, usual: float, left: int) -> np.ndarray:
    """Indices of the `left` shapes that stay: those go, some at a time, whose runs the others hold at the least further cost.

    runs: int64 [runs, 3], rows and longest lengths of each.
    """
    powers = pool.catalogue.powers(usual)
    never = 4 * powers.max()
    price = np.where((runs[:, None] <= pool.catalogue.shapes).all(2), powers, never)
    stays, each = np.ones(len(powers), bool), np.arange(len(runs))
    while (surplus := int(stays.sum()) - left) > 0:
        best = price.argmin(1)
        paid = price[each, best]
        price[each, best] = never
        further = np.bincount(best, price.min(1) - paid, minlength=len(powers))
        price[each, best] = paid
        further[pool.spare | ~stays] = np.inf
        gone = np.argsort(further, kind="stable")[: max(1, surplus // 8)]
        stays[gone], price[:, gone] = False, never
    return np.flatnonzero(stays)


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
