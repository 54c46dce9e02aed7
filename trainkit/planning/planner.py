"""From wish to plan: batch arithmetic, steps, the DeepSpeed JSON and the bytes it takes. Everything later only follows the plan.

The world size, micro-batches and accumulation are computed here and nowhere else. Facts that could not be read leave their numbers
unknown: 0 for numbers that training counts with, None for the rest; such a plan can be printed and not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainkit.errors import DoesNotFit, Fault, RecipeError
from trainkit.planning.deepspeed_config import resolve
from trainkit.planning.facts import DEFAULT_LENGTH, LENGTH_STEP, DataFacts, Hardware, ModelFacts
from trainkit.planning.flops import peak_flops, training_flops
from trainkit.planning.memory import (
    BIASED_ATTENTION,
    CATEGORIES,
    Memory,
    activation_bytes_per_token,
    model_state_bytes,
)
from trainkit.planning.plan import Fit, Plan
from trainkit.planning.speed import (
    compiles_blocks,
    decides_on_host,
    splits_for_padding,
    what_keeps_deepspeeds_step,
    what_keeps_graphs_away,
)
from trainkit.recipe.schema import Recipe
from trainkit.recipe.zero import SHIPPED, ZeroConfig, read_zero
from trainkit.units import format_bytes

CPU_TOKENS = 4096
ACTIVATION_SHARE = 0.8  # of what the model states leave free: the rest is the allocator's, the kernels' and the communicator's
FASTEST = "zero1"  # of the shipped configurations, where it fits (benchmarks/RESULTS.md)


@dataclass(frozen=True)
class _Steps:
    rows: int | None
    steps_per_epoch: int | None
    last_step_samples: int | None
    total_steps: int
    epochs: float | None
    warmup_steps: int


def make_plan(
    recipe: Recipe, zero: ZeroConfig, model: ModelFacts | None, data: DataFacts, hardware: Hardware, most: int | None = None
) -> Plan:
    """most: no larger budget of a micro-batch than this, in tokens, or in rows where the recipe counts rows.

    Raises RecipeError for a precision that the model cannot take, DoesNotFit if the model states exceed the device's memory.
    """
    check_precision(recipe, model, hardware)
    world_size = _world_size(recipe)
    ds_config = resolve(recipe, zero, model, world_size, hardware)
    memory = plain = None if model is None else model_state_bytes(model, zero, world_size, recipe.model.precision, ds_config)
    not_flat = what_keeps_deepspeeds_step(recipe, zero, ds_config, hardware)
    no_graphs = not_flat or what_keeps_graphs_away(recipe, model)
    flat = not_flat is None and not decides_on_host(model)
    if model is not None and flat:
        memory = model_state_bytes(model, zero, world_size, recipe.model.precision, ds_config, flat=True)
        if _exceeds(memory, hardware):
            no_graphs, flat = f"with them the model states take {format_bytes(memory.device_total)} per GPU", False
            memory = plain
    if no_graphs is not None and recipe.model.cuda_graphs:
        raise RecipeError(faults=(Fault(recipe.name, None, "model.cuda_graphs", f"cannot be true here: {no_graphs}. Write false"),))
    fits = shipped_fits(recipe, model, hardware) if hardware.memory_bytes is not None else ()
    _check_capacity(zero, memory, fits, world_size, hardware)
    steps = _steps(recipe, data)
    _check_steps(recipe, steps)
    batch = _batch(recipe, model, memory, world_size, hardware, most)
    return Plan(
        recipe_name=recipe.name,
        world_size=world_size,
        use_gpu=recipe.scaling.use_gpu,
        zero_stage=zero.stage,
        offload_optimizer=zero.offload_optimizer,
        offload_param=zero.offload_param,
        precision=recipe.model.precision,
        samples_per_step=recipe.batch.samples,
        tokens_per_device=batch.tokens,
        samples_per_device=batch.rows,
        rows=steps.rows,
        eval_rows=data.eval_rows,
        steps_per_epoch=steps.steps_per_epoch,
        last_step_samples=steps.last_step_samples,
        total_steps=steps.total_steps,
        epochs=steps.epochs,
        warmup_steps=steps.warmup_steps,
        eval_every=0 if recipe.data.eval is None else _every(recipe.train.eval_steps, steps),
        evaluates=recipe.data.eval is not None,
        save_every=_every(recipe.train.save_steps, steps),
        micro_batches_per_step=batch.micro_batches,
        accumulation=batch.micro_batches // world_size,
        ds_config=ds_config,
        memory=memory,
        memory_as_deepspeed=plain if flat else None,
        attention=None if model is None else model.attn_implementation,
        compile_blocks=compiles_blocks(recipe, zero),
        selective_checkpointing=recipe.model.gradient_checkpointing == "selective",
        flat=flat,
        cuda_graphs=no_graphs is None,
        no_graphs=no_graphs,
        notes=(
            *_notes(recipe, zero, ds_config, batch, hardware, model is not None),
            *_never_reached(recipe, steps),
            *_faster_stage(zero, fits, hardware),
        ),
        zero_name=zero.name,
        device_name=hardware.name,
        device_memory=hardware.memory_bytes,
        fits=fits,
        splits_for_padding=most is None and splits_for_padding(recipe, zero, model, world_size, hardware),
        num_layers=0 if model is None else model.num_layers,
        activation_bytes_per_token=None if model is None else _bytes_per_token(recipe, model),
        flops=None if model is None else training_flops(model),
        peak_flops=peak_flops(hardware.name, recipe.model.precision),
    )


def row_tokens(recipe: Recipe) -> int:
    """Padded tokens of a row at its full length."""
    data = recipe.data
    lengths = (data.max_source_length, data.max_target_length) if recipe.model.task == "seq2seq" else (data.max_length,)
    return sum(-(-(length or DEFAULT_LENGTH) // LENGTH_STEP) * LENGTH_STEP for length in lengths)


def micro_batches(samples: int, rows_per_micro_batch: int, world_size: int) -> int:
    """k: the smallest multiple of the world size that holds the step's rows."""
    return -(-samples // (rows_per_micro_batch * world_size)) * world_size


def shipped_fits(recipe: Recipe, model: ModelFacts | None, hardware: Hardware) -> tuple[Fit, ...]:
    """The shipped ZeRO configurations for this recipe's workers, precision and lengths."""
    return () if model is None else tuple(_fit(recipe, read_zero(name), model, hardware) for name in SHIPPED)


def _fit(recipe: Recipe, zero: ZeroConfig, model: ModelFacts, hardware: Hardware) -> Fit:
    world_size, precision = _world_size(recipe), recipe.model.precision
    ds_config = resolve(recipe, zero, model, world_size, hardware)
    memory = model_state_bytes(model, zero, world_size, precision, ds_config)
    if what_keeps_deepspeeds_step(recipe, zero, ds_config, hardware) is None and not decides_on_host(model):
        flat = model_state_bytes(model, zero, world_size, precision, ds_config, flat=True)
        memory = memory if _exceeds(flat, hardware) else flat
    row = row_tokens(recipe) * _bytes_per_token(recipe, model)
    room = None if hardware.memory_bytes is None else _room(hardware.memory_bytes, memory)
    return Fit(zero.name, memory.device_total, memory.host_total, row, None if room is None else row <= room)


def _exceeds(memory: Memory, hardware: Hardware) -> bool:
    return hardware.memory_bytes is not None and memory.device_total > hardware.memory_bytes


def _world_size(recipe: Recipe) -> int:
    """Of an elastic recipe, the most."""
    workers = recipe.scaling.num_workers
    return workers if isinstance(workers, int) else workers[-1]


def check_precision(recipe: Recipe, model: ModelFacts | None, hardware: Hardware) -> None:
    """Raises RecipeError for a precision that the model or the device cannot take."""
    biased = model is not None and model.model_type in BIASED_ATTENTION
    message = None
    if recipe.model.precision == "fp16" and model is not None and biased:
        message = (
            f"fp16 does not train {model.model_type}: the output of its wo layers passes 65,504, the largest fp16 number, and becomes inf, "
            f"then NaN. Write model.precision: {'bf16 (or fp32)' if hardware.has_bf16 else 'fp32'}"
        )
    elif recipe.model.precision == "bf16" and not hardware.has_bf16:
        message = f"{hardware.name} has no bf16, as GPUs have from compute capability 8.0 on. "
        message += f"Write model.precision: {'fp32' if biased else 'fp16 (or fp32)'}"
    if message is not None:
        raise RecipeError(faults=(Fault(recipe.name, None, "model.precision", message),))


def _check_steps(recipe: Recipe, steps: _Steps) -> None:
    """What would begin or end behind the last step."""
    total, profile = steps.total_steps, recipe.train.profile
    if profile is not None and 0 < total < profile.start:
        message = f"step {profile.start} is traced first, and the run has {total:,} steps. Write a smaller one"
        raise RecipeError(faults=(Fault(recipe.name, None, "train.profile.start", message),))
    if 0 < total < steps.warmup_steps:
        message = f"{steps.warmup_steps:,} steps of warm-up do not end within the run's {total:,}. Write fewer, or a share below 1"
        raise RecipeError(faults=(Fault(recipe.name, None, "optimizer.warmup_steps", message),))


def _check_capacity(zero: ZeroConfig, memory: Memory | None, fits: tuple[Fit, ...], world_size: int, hardware: Hardware) -> None:
    if memory is None or hardware.memory_bytes is None or not _exceeds(memory, hardware):
        return
    parts = ", ".join(f"{category} {format_bytes(memory.device[category])}" for category in CATEGORIES)
    fitting = [f"{fit.name} ({format_bytes(fit.device)} per GPU, {format_bytes(fit.host)} host)" for fit in fits if fit.fits]
    way_out = "No shipped ZeRO configuration fits: raise scaling.num_workers, or train with model.lora"
    if fitting:
        way_out = f"Write zero: {' or '.join(fitting)}"
    raise DoesNotFit(
        f"{zero.name} on {world_size} worker{'s' if world_size > 1 else ''}: the model states take {format_bytes(memory.device_total)} "
        f"per GPU ({parts}; in the optimizer step {format_bytes(memory.device_at_step)}), "
        f"and {hardware.name} has {format_bytes(hardware.memory_bytes)}. {way_out}",
        device=dict(memory.device),
        memory_bytes=hardware.memory_bytes,
        fitting=tuple(fit.name for fit in fits if fit.fits),
    )


def _steps(recipe: Recipe, data: DataFacts) -> _Steps:
    rows, samples, train = data.train_rows, recipe.batch.samples, recipe.train
    per_epoch = -(-rows // samples) if rows else None
    last = rows - (per_epoch - 1) * samples if rows and per_epoch else None
    total = train.max_steps or (train.epochs or 0) * (per_epoch or 0)
    epochs = total / per_epoch if per_epoch else None if train.max_steps else train.epochs
    warmup = recipe.optimizer.warmup_steps
    return _Steps(rows, per_epoch, last, total, epochs, warmup if isinstance(warmup, int) else round(warmup * total))


def _never_reached(recipe: Recipe, steps: _Steps) -> tuple[str, ...]:
    """Intervals that are longer than the run."""
    intervals = {"train.save_steps": recipe.train.save_steps}
    if recipe.data.eval is not None:
        intervals["train.eval_steps"] = recipe.train.eval_steps
    longer = [key for key, every in intervals.items() if isinstance(every, int) and 0 < steps.total_steps < every]
    return (f"{' and '.join(longer)}: more than the run's {steps.total_steps:,} steps, so only at the end",) if longer else ()


def _every(every: str | int | float, steps: _Steps) -> int:
    """Optimizer steps between two evaluations or saves; 0 where that is unknown."""
    if every == "epoch":
        return steps.steps_per_epoch or 0
    if isinstance(every, int):
        return every
    return max(1, round(float(every) * steps.total_steps)) if steps.total_steps else 0


@dataclass(frozen=True)
class _Batch:
    micro_batches: int
    tokens: int | None = None  # budgets of one micro-batch
    rows: int | None = None
    notes: tuple[str, ...] = ()


def _batch(
    recipe: Recipe, model: ModelFacts | None, memory: Memory | None, world_size: int, hardware: Hardware, most: int | None
) -> _Batch:
    samples, wish, cost = recipe.batch.samples, recipe.batch.tokens_per_device, row_tokens(recipe)
    if recipe.batch.samples_per_device is not None:
        rows = min(recipe.batch.samples_per_device, most or recipe.batch.samples_per_device)
        return _Batch(micro_batches(samples, rows, world_size), rows=rows)
    batch = _auto(recipe, model, memory, world_size, hardware) if wish == "auto" else _Batch(0, wish)
    tokens, notes = batch.tokens or 0, batch.notes
    if most is not None and most < tokens:
        tokens = most
        notes += (f"tokens_per_device: {tokens:,} at most, by what this run has done so far",)
    if tokens < cost:
        notes += (f"a row of full length has {cost:,} tokens, more than tokens_per_device: it makes a micro-batch of its own",)
    return _Batch(micro_batches(samples, max(1, tokens // cost), world_size), tokens, notes=notes)


def _auto(recipe: Recipe, model: ModelFacts | None, memory: Memory | None, world_size: int, hardware: Hardware) -> _Batch:
    """One micro-batch per worker, split until its activations fit; a fixed budget on a CPU, which has no memory of its own to fill."""
    samples, cost = recipe.batch.samples, row_tokens(recipe)
    share = -(-samples // world_size)
    if hardware.device == "cpu":
        tokens = max(CPU_TOKENS, cost)
        return _Batch(micro_batches(samples, tokens // cost, world_size), tokens)
    if model is None or memory is None or hardware.memory_bytes is None:
        unknown = "the model" if model is None else "the GPU's memory"
        note = f"tokens_per_device: {unknown} is not known, so one micro-batch per worker is assumed"
        note += "" if model is None else "; trainkit plan --gpu-memory 80GiB plans for a GPU that is elsewhere"
        return _Batch(world_size, share * cost, notes=(note,))
    per_token = _bytes_per_token(recipe, model)
    room = _room(hardware.memory_bytes, memory)
    k = micro_batches(samples, min(share, max(1, int(room // (per_token * cost)))), world_size)
    tokens = -(-samples // k) * cost
    note = f"tokens_per_device: {tokens:,} tokens × {format_bytes(per_token)} of activations at most, into {format_bytes(room)}"
    if tokens * per_token > room:
        note += ": one row alone may not fit; shorten max lengths or write model.gradient_checkpointing: true"
    return _Batch(k, tokens, notes=(note,))


def _bytes_per_token(recipe: Recipe, model: ModelFacts) -> int:
    return activation_bytes_per_token(model, recipe.model.precision, recipe.model.gradient_checkpointing, row_tokens(recipe))


def _room(memory_bytes: int, memory: Memory) -> int:
    """For activations; inside the optimizer step there are none, so only the bytes of the backward pass are taken off."""
    return max(0, int(ACTIVATION_SHARE * (memory_bytes - sum(memory.device.values())))) if memory.device_total <= memory_bytes else 0


def _faster_stage(zero: ZeroConfig, fits: tuple[Fit, ...], hardware: Hardware) -> tuple[str, ...]:
    """Stage 3 and offload pay for memory with time, which a model can save whose states leave half of it free without them."""
    saves_memory = zero.stage == 3 or zero.offload_optimizer
    if not saves_memory or not any(fit.name == FASTEST and fit.fits and 2 * fit.device <= (hardware.memory_bytes or 0) for fit in fits):
        return ()
    return (f"{FASTEST} leaves half of the memory free here, and takes less time a step than {zero.name}, which pays for memory with it",)


def _notes(recipe: Recipe, zero: ZeroConfig, ds_config: dict[str, Any], batch: _Batch, hardware: Hardware, sized: bool) -> tuple[str, ...]:
    notes = list(batch.notes)
    if recipe.batch.samples < _world_size(recipe):
        notes.append(f"{recipe.batch.samples} samples a step for {_world_size(recipe)} workers: some train an empty micro-batch")
    if zero.json.get("zero_optimization", {}).get("round_robin_gradients"):
        notes.append(f"round_robin_gradients of {zero.name} is false here: with it DeepSpeed mixes up the parameters' states (LOG.md)")
    if zero.unused:
        notes.append(f"not used from {zero.name}: {', '.join(zero.unused)}")
    section = zero.json.get("zero_optimization", {})
    known = {key.removeprefix("stage3_") for key in ds_config["zero_optimization"]}
    left = [key for key, value in section.items() if value == "auto" and key.removeprefix("stage3_") not in known]
    if left and sized:
        notes.append(f"auto in {zero.name}, and left to DeepSpeed: {', '.join(left)}")
    pinned = [part for part in ("offload_optimizer", "offload_param") if (section.get(part) or {}).get("pin_memory") is True]
    if hardware.device == "cpu" and pinned:
        notes.append(f"pin_memory of {' and '.join(pinned)} is false on a CPU: memory is pinned for copies to a GPU")
    return tuple(notes)
