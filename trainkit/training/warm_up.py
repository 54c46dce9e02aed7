"""What is run before the first step, so that no step waits for a compiler or a capture, and a lack of memory shows at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import TYPE_CHECKING

from trainkit.data.batches import Shape
from trainkit.data.padding import MicroBatch
from trainkit.planning.plan import Plan

if TYPE_CHECKING:
    from trainkit.training.engine import Engine

Told = Callable[[int, int], None]  # the number of a shape that is begun, from 1, and how many there are
STEPS, SAMPLES = 256, 16_384  # that are looked at for their shapes, at most: composing them takes a second
CAPTURED = 64  # shapes at most, which a catalogue has; budgets of rows make any number
CAPTURED_FROM = 5  # uses on a rank: making a graph takes about as long as it saves in so many


def steps_looked_at(plan: Plan, first: int) -> int:
    """From step `first` on; 0 where nothing is made at a shape's first use, and with the optimizer's offload, where DeepSpeed would keep
    host memory for good that only accumulation needs."""
    if not (plan.compile_blocks or plan.cuda_graphs) or plan.offload_optimizer:
        return 0
    return max(0, min(STEPS, max(1, SAMPLES // plan.samples_per_step), plan.total_steps - first + 1))


def warm_ups(uses: Mapping[Shape, int], first: int, plan: Plan) -> list[tuple[Shape, bool]]:
    """The shapes to run, dearest first, and whether a CUDA graph is made of each: the same on all ranks.

    uses: of each shape in the steps that are looked at from step `first` on, over all ranks. The compiler makes one kernel for all sizes
    but 1, and another one where two of them are equal: of each such kind the dearest shape is run, and each with kernels of its own.
    """
    chosen, kinds = [], set()
    of_rank = (plan.total_steps - first + 1) / max(1, steps_looked_at(plan, first)) / plan.world_size
    often = sorted(uses, key=lambda shape: -uses[shape])[:CAPTURED] if plan.cuda_graphs else []
    for shape in sorted(uses, key=lambda shape: (-shape.cost, shape)):
        kind = tuple(size == 1 for size in shape), tuple(a == b for a, b in combinations(shape, 2))
        captured = shape in often and uses[shape] * of_rank >= CAPTURED_FROM
        own = shape in plan.compiled_shapes
        if captured or own or kind not in kinds:
            chosen.append((shape, captured))
        if not own:
            kinds.add(kind)
    return chosen


def warm_up(
    engine: Engine, uses: Mapping[Shape, int], first: int, blank: Callable[[Shape], MicroBatch], told: Told = lambda number, of: None
) -> None:
    """Run them, before step `first`; blank(shape) is a micro-batch of padding on the device. All ranks must call it."""
    chosen = warm_ups(uses, first, engine.plan)
    for number, (shape, captured) in enumerate(chosen, start=1):
        told(number, len(chosen))
        engine.warm_up(blank(shape), captured)
