"""How large the micro-batches of a GPU should be that could hold larger ones.

Few large ones pad short rows to long ones; many small ones let a GPU wait for its kernels to begin. In between, a step takes the least
time: where that is depends on the lengths in the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

import numpy as np

from trainkit.data.arrays import TokenArrays
from trainkit.data.batches import Budget, Part, Shape, compose, deal
from trainkit.data.catalogue import Catalogues
from trainkit.data.order import samples_of_step
from trainkit.planning.plan import Plan
from trainkit.planning.revision import expected_seconds, with_budget

_ROWS = 65_536  # whose lengths are looked at
_STEPS, _SAMPLES = 16, 16_384  # at most, that are composed for each number of micro-batches
_FEWEST_SAMPLES = 1024  # in more steps where these are small: a longest row is among them
_GAIN = 1.03  # more micro-batches have to save as much: the estimate is not finer, and each shape wants a graph of its own
_HOPELESS = 1.05  # times the least time so far: still more micro-batches take still longer
_ROOM = 1.05  # for steps with longer rows than those that were composed


class Split(NamedTuple):
    tokens: int  # budget of a micro-batch, padded
    micro_batches: int  # of a worker in a step
    saves: float  # share of the time that the largest micro-batches take


def split_for_padding(plan: Plan, task: str, train: str) -> Plan:
    """The plan, with smaller micro-batches if it allows them and the rows in `train`, a folder of token arrays, ask for them."""
    if not plan.splits_for_padding or plan.flops is None or plan.tokens_per_device is None:
        return plan
    arrays = TokenArrays.open(train)
    rows = samples_of_step(0, arrays.rows, min(_ROWS, arrays.rows), 1)
    source = arrays.by_column["input_ids"].lengths(rows)
    target = arrays.by_column["labels"].lengths(rows) if task == "seq2seq" else np.zeros_like(source)
    split = least_time(
        source, target, plan.samples_per_step, plan.world_size, plan.tokens_per_device, lambda shape: expected_seconds(plan, shape)
    )
    return plan if split is None else with_budget(plan, *split)


def least_time(
    source: np.ndarray, target: np.ndarray, samples: int, world_size: int, most: int, seconds: Callable[[Shape], float]
) -> Split | None:
    """The split of a step into micro-batches with which the slowest worker needs the least time; None for the one into as few as fit.

    source, target: lengths of rows, of which a step has `samples`. most: padded tokens of a micro-batch. seconds: of one of a shape.
    """
    samples = min(samples, len(source))
    count = min(max(_STEPS, _FEWEST_SAMPLES // samples), max(2, _SAMPLES // samples), len(source) // samples)
    drawn = (samples_of_step(0, len(source), samples, step) for step in range(1, 1 + count))
    steps = [(source[ids], target[ids]) for ids in drawn]

    def composed(budget: Budget, catalogues: Catalogues | None, at_least: int = 1) -> tuple[float, list[list[Part]]]:
        cuts = [compose(*step, world_size, budget, catalogues, at_least) for step in steps]
        return fmean(_slowest(cut, world_size, seconds) for cut in cuts), cuts

    def unpadded(number: int) -> float:
        return number * seconds(Shape(max(1, samples // (number * world_size)), int(source.mean()), int(target.mean())))

    if composed(Budget(rows=-(-samples // world_size)), None)[0] <= _GAIN * unpadded(2):
        return None  # without a look for good shapes, which takes seconds
    budget = Budget(tokens=most)
    catalogues = Catalogues(source, target, samples, budget)
    longest, cuts = composed(budget, catalogues)  # with as few as fit
    fewest = number = _usual(cuts) // world_size  # of a worker
    least, best = longest, cuts
    while (number := max(number + 1, round(1.5 * number))) * world_size <= samples and _GAIN * unpadded(number) < least:
        time, cuts = composed(budget, catalogues, number * world_size)
        if _GAIN * time < least:
            least, best = time, cuts
        elif time > _HOPELESS * least:
            break
    largest = max((part.shape.cost for cut in best for part in cut if part.shape.cost <= most), default=most)
    tokens = min(most, math.ceil(_ROOM * largest))
    if least == longest or tokens == most:
        return None
    budget = Budget(tokens=tokens)
    time, cuts = composed(budget, Catalogues(source, target, samples, budget))
    number = _usual(cuts) // world_size
    return Split(tokens, number, 1 - time / longest) if number > fewest and _GAIN * time < longest else None


def _usual(cuts: list[list[Part]]) -> int:
    """Micro-batches of a step."""
    return sorted(len(cut) for cut in cuts)[len(cuts) // 2]


def _slowest(parts: list[Part], world_size: int, seconds: Callable[[Shape], float]) -> float:
    """Seconds of the worker with the most work."""
    shares = deal([part.shape.cost for part in parts], world_size)
    return max(sum(seconds(parts[index].shape) for index in share) for share in shares)
