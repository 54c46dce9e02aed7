"""Several one-sequence rows in each sequence of a micro-batch: how the rows of an optimizer step share them. Pure arithmetic on lengths."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from trainkit.data.batches import Budget, Part, Shape, multiple
from trainkit.planning.facts import LENGTH_STEP

_WELL_FILLED = 0.88  # share of real tokens from which on packed micro-batches stay equal


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
        k = multiple(-(-len(lengths) // budget.limit), world_size)
    else:
        k = multiple(-(-sequences // max(1, budget.limit // most)), world_size)
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
