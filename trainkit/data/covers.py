"""Fewer shapes to run in than the catalogues have: each micro-batch is padded up to one that holds it, so that few CUDA graphs serve all.

A CUDA graph is worth its making only if it is used often, and one micro-batch without a graph holds up all ranks. Which samples stand
together is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainkit.data.batches import Shape

MAKING = 16  # micro-batches of the usual cost that run in the time in which a graph is made
MOST_PADDING = 1.05  # times all padded tokens, for all shapes together
MOST_WASTE = (1.5, 1.2, 1.1, 1.05)  # times its own cost: a micro-batch that would be padded to more runs in its own shape
MOST_JOINED = 128  # shapes, those that are used most: budgets of rows make thousands


@dataclass(frozen=True)
class Covers:
    """The shapes to run in. Without any, every micro-batch keeps its own."""

    shapes: tuple[Shape, ...] = ()
    most_waste: float = MOST_WASTE[0]

    def __call__(self, shape: Shape) -> Shape:
        """The cheapest that holds this shape, or the shape itself where none does without too much padding."""
        holding = [cover for cover in self.shapes if all(size <= room for size, room in zip(shape, cover, strict=True))]
        cheapest = min(holding, key=lambda cover: (cover.cost, cover), default=shape)
        return cheapest if cheapest.cost <= self.most_waste * shape.cost else shape


def choose_covers(uses: Mapping[Shape, int], repeats: float, most_tokens: int | None = None) -> Covers:
    """Join shapes as long as that costs less padding, over all ranks, than the making of a graph, and no more than MOST_PADDING allows.

    uses: how often each shape occurs in some steps. repeats: how many times as many steps a graph is to serve. No joint shape is dearer
    than the dearest of those, nor has it more padded tokens than `most_tokens`.
    """
    if not uses:
        return Covers()
    order = sorted(uses, key=lambda shape: (-uses[shape], shape))[:MOST_JOINED]
    shapes, counts = np.array(order, np.int64), np.array([uses[shape] for shape in order], np.float64)
    least, most, alone = _costs(shapes), max(shape.cost for shape in uses), float(counts @ _costs(shapes))
    most = most if most_tokens is None else min(most, most_tokens)
    making, padding = MAKING * alone / counts.sum() / repeats, (MOST_PADDING - 1) * alone
    while len(shapes) > 1:
        joint = np.maximum(shapes[:, None], shapes[None])
        costs, before = _costs(joint), counts * _costs(shapes)
        added = (counts[:, None] + counts[None]) * costs - before[:, None] - before[None]
        added[(costs > most) | (costs > MOST_WASTE[0] * np.minimum(least[:, None], least[None]))] = np.inf
        np.fill_diagonal(added, np.inf)
        one, other = divmod(int(added.argmin()), len(shapes))
        padding -= added[one, other]
        if added[one, other] >= making or padding < 0:
            break
        shapes[one], counts[one], least[one] = joint[one, other], counts[one] + counts[other], min(least[one], least[other])
        shapes, counts, least = np.delete(shapes, other, axis=0), np.delete(counts, other), np.delete(least, other)
    return _within_limit(tuple(Shape(*(int(size) for size in shape)) for shape in shapes), uses)


def _within_limit(shapes: tuple[Shape, ...], uses: Mapping[Shape, int]) -> Covers:
    """With so little waste that all shapes together keep to MOST_PADDING: those that were not joined may run in a joint one as well."""
    sizes, counts, joint = np.array(list(uses), np.int64), np.array(list(uses.values())), np.array(shapes, np.int64)
    holds = (sizes[:, None] <= joint[None]).all(-1)
    own, cheapest = _costs(sizes), np.where(holds, _costs(joint)[None], np.iinfo(np.int64).max).min(1)
    for waste in MOST_WASTE:
        padded = np.where(cheapest <= waste * own, cheapest, own)
        if counts @ padded <= MOST_PADDING * (counts @ own):
            break
    return Covers(shapes, waste)


def _costs(shapes: np.ndarray) -> np.ndarray:
    """Padded tokens, as Shape.cost."""
    return shapes[..., 0] * (shapes[..., 1] + shapes[..., 2])
