"""What changes a plan after it was made: the data's first micro-batches, and what failed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from trainkit.planning.flops import Work
from trainkit.planning.plan import Plan
from trainkit.planning.speed import micro_batch_seconds
from trainkit.recipe.schema import Recipe
from trainkit.units import format_seconds

Rectangle = tuple[int, int, int]  # rows, source and target of a micro-batch, padded
COMPILED_SHAPES = 2  # at most, of which each has kernels of its own: those for any sizes take as long to compile as those for two
COMPILED_FROM_SECONDS = 240  # of a run's work in those kernels: a compiler takes away a fifth to two fifths, and takes about a minute
GRAPHS_MEMORY = 1.4  # safety factor on the estimate of activations, which is twice what they took where it was measured; half of it in the
# optimizer step, where the backward's are gone


def with_micro_batches(plan: Plan, recipe: Recipe, uses: Collection[tuple[Rectangle, int]], steps: int, left: int) -> Plan:
    """The plan once the data is known: its peak on a GPU, and whether compiling and CUDA graphs pay, unless the recipe asks for them.

    uses: rows, source and target of each shape of micro-batches, and how often it occurs in so many steps, over all ranks.
    left: steps that are still to be trained. Micro-batches that are not captured need memory of their own beside the CUDA graphs': where
    both may not fit, there are none. With graphs a compiler saves work, not launches: a run that has too little of it would wait longer
    for the compiler than it gains. One that knows all sizes makes faster kernels in less time: it is told them where there are few shapes.
    """
    largest = max(rows * (source + target) for (rows, source, target), _ in uses) if uses else 0
    accumulation = max(1, round(sum(count for _, count in uses) / steps / plan.world_size)) if uses else plan.accumulation
    plan = replace(
        plan, largest_micro_batch_tokens=largest, accumulation=accumulation, micro_batches_per_step=accumulation * plan.world_size
    )  # fmt: skip
    if plan.memory is None or plan.activation_bytes_per_token is None or not plan.use_gpu:
        return plan
    activations = largest * plan.activation_bytes_per_token
    states, at_step = sum(plan.memory.device.values()), plan.memory.device_at_step
    beside = max(states + GRAPHS_MEMORY * activations, at_step + GRAPHS_MEMORY / 2 * activations)
    notes = list(plan.notes)
    if plan.cuda_graphs and plan.device_memory is not None and beside > plan.device_memory:
        both = "micro-batches that are not captured need memory of their own beside the CUDA graphs'"
        if recipe.model.cuda_graphs is None:
            plan = without_graphs(plan, both)
            notes.append(f"no CUDA graphs: {both}")
        else:
            notes.append(f"{both}: both may not fit")
    memory, compiles = plan.memory, plan.compile_blocks
    assert memory is not None
    asked = recipe.model.compile is not None or plan.selective_checkpointing
    if compiles and plan.cuda_graphs and not asked and plan.flops is not None and plan.peak_flops is not None:
        seconds = sum(count * expected_seconds(plan, shape) for shape, count in uses) / steps * left / plan.world_size
        compiles = seconds >= COMPILED_FROM_SECONDS
        if not compiles:
            notes.append(f"blocks are not compiled: about {format_seconds(seconds)} of work, less than what would pay for the compiler")
    has_room = plan.device_memory is None or memory.device_at_start <= plan.device_memory  # else it is built on the host
    return replace(
        plan,
        expected_activation_bytes=activations,
        expected_peak_bytes=max(sum(memory.device.values()) + activations, memory.device_at_step, has_room * memory.device_at_start),
        compile_blocks=compiles,
        compiled_shapes=tuple(sorted((*shape,) for shape, _ in uses)) if compiles and len(uses) <= COMPILED_SHAPES else (),
        notes=tuple(notes),
    )


def expected_seconds(plan: Plan, shape: Rectangle) -> float:
    """About what forward and backward of such a micro-batch take on one GPU, in torch's own kernels. The plan's FLOPs are known."""
    rows, source, target = shape
    assert plan.flops is not None
    return micro_batch_seconds(
        plan.flops.of(_work(*shape)), rows * (source + target), plan.num_layers, plan.cuda_graphs, plan.peak_flops
    )  # fmt: skip


def with_budget(plan: Plan, tokens: int, micro_batches: int, saves: float) -> Plan:
    """The plan with smaller micro-batches: the budget of one, how many a worker has in a step then, and the share of time that it saves."""
    note = (
        f"tokens_per_device: {tokens:,}, which makes {micro_batches} micro-batches per worker: by an estimate {saves:.0%} less time in "
        "forward and backward than with as large ones as fit, because less of them is padding"
    )
    return replace(plan, tokens_per_device=tokens, notes=(*plan.notes, note))


def split_budget(plan: Plan) -> int | None:
    """The budget that the rows' lengths led to, for attempts that go on with the same micro-batches; None without one."""
    return plan.tokens_per_device if plan.splits_for_padding and plan.largest_micro_batch_tokens is not None else None


def without_graphs(plan: Plan, why: str) -> Plan:
    """The same plan with forward, backward and the optimizer step as DeepSpeed does them."""
    if not plan.flat:
        return plan
    memory, fits = plan.memory_as_deepspeed, plan.fits
    if memory is not None:
        device, host = memory.device_total, memory.host_total
        fits = tuple(replace(fit, device=device, host=host) if fit.name == plan.zero_name else fit for fit in fits)
    return replace(plan, flat=False, cuda_graphs=False, no_graphs=why, memory=memory, memory_as_deepspeed=None, fits=fits)


def _work(rows: int, source: int, target: int) -> Work:
    return Work(rows * source, rows * target, rows * source**2, rows * target**2, rows * source * target)


def halved(plan: Plan) -> int | None:
    """Half a budget of micro-batches, in its own unit: of the largest one that is trained, since a budget may be more than there is to
    train. The same global batch is cut into more then. None where a micro-batch is one row, of full length for a budget of tokens."""
    rows_per_worker = -(-plan.samples_per_step // plan.world_size)
    if plan.samples_per_device is not None:
        return min(plan.samples_per_device, rows_per_worker) // 2 or None
    if plan.tokens_per_device is None or plan.accumulation >= rows_per_worker:
        return None
    return min(plan.tokens_per_device, plan.largest_micro_batch_tokens or plan.tokens_per_device) // 2 or None
