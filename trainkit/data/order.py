"""Which sample comes when: pure arithmetic from (seed, rows, samples a step, step) to sample ids.

Each epoch visits every row once, in an order of its own. The order is a keyed permutation (a Feistel network over the smallest even
number of bits that holds the row count, walked until it lands inside), so that any position is computed by itself: no list of rows, no
state, and step n costs what step 1 costs. World size, micro-batch and ZeRO stage do not enter. Black and Rogaway, "Ciphers with
arbitrary finite domains" (2002), is the source of the cycle walk; the round function is splitmix64's finalizer.
"""

from __future__ import annotations

import functools

import numpy as np

_ROUNDS = 8
_BLOCK = 8192  # positions that are computed at once: 64 KiB of ids, less than a millisecond
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(values: np.ndarray | int) -> np.ndarray:
    """splitmix64's finalizer: 64-bit integers to 64-bit integers, one to one. Steele et al., "Fast splittable PRNGs" (2014)."""
    with np.errstate(over="ignore"):
        z = np.asarray(values, dtype=np.uint64) + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def combine(*numbers: int) -> int:
    """One 64-bit key of several integers; the order of the integers matters."""
    key = 0
    for number in numbers:
        key = int(mix64(key ^ int(mix64(number % 2**64))))
    return key


def permute(positions: np.ndarray, rows: int, key: int) -> np.ndarray:
    """The `key`-th order of range(rows), at the given positions. int64 in, int64 out, one to one.

    Raises ValueError for a position outside range(rows).
    """
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and (positions.min() < 0 or positions.max() >= rows):
        raise ValueError(f"positions must lie in 0..{rows - 1}")
    half = np.uint64(max(1, -(-(rows - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(combine(key, number)) for number in range(_ROUNDS)]
    out = _feistel(positions.astype(np.uint64), half, mask, keys)
    outside = np.flatnonzero(out >= rows)
    while outside.size:  # at most 3 of 4 land outside, so the walk is short
        out[outside] = _feistel(out[outside], half, mask, keys)
        outside = outside[out[outside] >= rows]
    return out.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, mask: np.uint64, keys: list[np.uint64]) -> np.ndarray:
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (mix64(right ^ key) & mask)
    return (left << half) | right


def steps_per_epoch(rows: int, samples_per_step: int) -> int:
    """Optimizer steps of one epoch; the last one may be smaller and is a real step."""
    return -(-rows // samples_per_step)


def epoch_of_step(rows: int, samples_per_step: int, step: int) -> tuple[int, int]:
    """(epoch from 0, first position in that epoch) of optimizer step `step`, counted from 1."""
    epoch, index = divmod(step - 1, steps_per_epoch(rows, samples_per_step))
    return epoch, index * samples_per_step


def samples_of_step(seed: int, rows: int, samples_per_step: int, step: int, shuffle: bool = True) -> np.ndarray:
    """Sample ids (int64, at most `samples_per_step`) of optimizer step `step`, counted from 1."""
    epoch, first = epoch_of_step(rows, samples_per_step, step)
    end = min(first + samples_per_step, rows)
    if not shuffle:
        return np.arange(first, end, dtype=np.int64)
    blocks = range(first // _BLOCK, -(-end // _BLOCK))
    order = np.concatenate([_block(rows, seed, epoch, number) for number in blocks])
    return order[first - blocks[0] * _BLOCK : end - blocks[0] * _BLOCK]


@functools.lru_cache(maxsize=64)
def _block(rows: int, seed: int, epoch: int, number: int) -> np.ndarray:
    """A block of an epoch's order, kept because steps share it: numpy's fixed costs make 32 positions as dear as thousands."""
    return permute(np.arange(number * _BLOCK, min((number + 1) * _BLOCK, rows)), rows, combine(seed, epoch))


def set_hash(sample_ids: np.ndarray) -> int:
    """64-bit hash of a set of sample ids: the sum of their mixes, so that parts hashed by different ranks add up (mod 2^64)."""
    return int(mix64(sample_ids).sum(dtype=np.uint64)) if len(sample_ids) else 0


def chain(order: str, step_hash: int) -> str:
    """The running hash after one more step: 16 hexadecimal digits; the first step starts from an empty string."""
    return f"{combine(int(order or '0', 16), step_hash % 2**64):016x}"
