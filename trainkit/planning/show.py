"""The plan as text: the equations behind its numbers, the bytes, and what was decided for the user. Printed before anything starts."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainkit.planning.memory import CATEGORIES, Memory
from trainkit.planning.plan import Fit, Plan
from trainkit.planning.speed import UNUSED_WHEN_FLAT
from trainkit.units import format_bytes, format_count

UNKNOWN = "unknown"


def plan_text(plan: Plan) -> RenderableType:
    """For `console.print`; plain lines of at most about 100 characters in a pipe."""
    parts: list[RenderableType] = [Text(f"plan {plan.recipe_name}", style="bold"), _facts(plan)]
    parts.append(Text("memory unknown", style="yellow") if plan.memory is None else _memory(plan, plan.memory))
    if plan.fits:
        parts.append(_fits(plan.fits))
    elif plan.use_gpu and plan.device_memory is None:
        parts.append(Text("  what fits: unknown, as the GPU's memory is; --gpu-memory 80GiB plans for such a GPU", style="yellow"))
    parts += [Text(f"note: {note}", style="yellow") for note in plan.notes]
    return Group(*parts)


def batch_equation(plan: Plan) -> str:
    """96 samples a step = 3 workers × 1 micro-batch × about 32 rows; a budget of tokens cuts by their lengths, not by their number."""
    workers, samples = _count(plan.world_size, "worker"), _count(plan.samples_per_step, "sample")
    if not plan.micro_batches_per_step:
        return f"{samples} a step = {workers} × {UNKNOWN}"
    rows = -(-plan.samples_per_step // plan.micro_batches_per_step)
    bound = "about" if plan.samples_per_device is None else "at most"
    return f"{samples} a step = {workers} × {_count(plan.accumulation, 'micro-batch', 'es')} × {bound} {_count(rows, 'row')}"


def step_equation(plan: Plan) -> str:
    """1,761 steps = 3 epochs × 587 steps; the last step of an epoch has 88 samples"""
    if not plan.total_steps:
        return f"{UNKNOWN} steps = {UNKNOWN if plan.epochs is None else f'{plan.epochs:g}'} epochs × {UNKNOWN} steps"
    steps = _count(plan.total_steps, "step")
    if plan.steps_per_epoch is None or plan.epochs is None:
        return f"{steps}; the steps of an epoch are {UNKNOWN}"
    epochs = f"{plan.epochs:g}" if plan.epochs == int(plan.epochs) else f"{plan.epochs:.3g}"
    equation = f"{steps} = {epochs} epoch{'' if plan.epochs == 1 else 's'} × {_count(plan.steps_per_epoch, 'step')}"
    if plan.last_step_samples not in (None, plan.samples_per_step):
        equation += f"; the last step of an epoch has {_count(plan.last_step_samples or 0, 'sample')}"
    return equation


def _facts(plan: Plan) -> Table:
    rows = {
        "batch": batch_equation(plan),
        "budget": _budget(plan),
        "steps": step_equation(plan),
        "optimizer": _optimizer(plan),
        "schedule": _schedule(plan),
        "data": f"{_number(plan.rows)} rows to train on" + (f", {plan.eval_rows:,} to evaluate" if plan.eval_rows else ""),
        "device": _device(plan),
        "ZeRO": _zero(plan),
        "speed": _speed(plan),
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(f"  {name}", style="dim"), Text(value))
    return table


def _budget(plan: Plan) -> str:
    if plan.samples_per_device is not None:
        return f"{_count(plan.samples_per_device, 'row')} in a micro-batch at most"
    less = "; fewer if the rows' lengths say that this is faster" if plan.splits_for_padding and not plan.largest_micro_batch_tokens else ""
    return f"{_number(plan.tokens_per_device)} tokens in a micro-batch at most, padding included{less}"


def _optimizer(plan: Plan) -> str:
    """Its values and the clipping, as DeepSpeed gets them."""
    optimizer: dict[str, Any] = plan.ds_config["optimizer"]
    params = optimizer["params"]
    betas = ", ".join(f"{beta:g}" for beta in params["betas"])
    most = plan.ds_config["gradient_clipping"]  # 0: none
    return (
        f"{optimizer['type']}, lr {params['lr']:g}, betas {betas}, eps {params['eps']:g}, weight decay {params['weight_decay']:g}, "
        f"gradients {f'clipped at {most:g}' if most else 'not clipped'}"
    )


def _schedule(plan: Plan) -> str:
    every = _count(plan.eval_every, "step") if plan.eval_every else f"{UNKNOWN} steps"
    warm_up = _count(plan.warmup_steps, "warm-up step") if plan.total_steps else f"{UNKNOWN} warm-up steps"
    return f"{warm_up}, {f'evaluation every {every}' if plan.evaluates else 'no evaluation'}"


def _device(plan: Plan) -> str:
    memory = "" if plan.device_memory is None else f" of {format_bytes(plan.device_memory)}"
    return f"{plan.world_size} × {plan.device_name}{memory}, {plan.precision}"


def _speed(plan: Plan) -> str:
    why = f": {plan.no_graphs}" if plan.no_graphs is not None and plan.use_gpu else ""
    graphs = "CUDA graphs" if plan.cuda_graphs else f"no CUDA graphs{why}"
    selective = ", selective checkpointing" if plan.selective_checkpointing else ""
    return f"attention {plan.attention or UNKNOWN}, blocks {'compiled' if plan.compile_blocks else 'as they are'}{selective}, {graphs}"


def _zero(plan: Plan) -> str:
    offload = [name for name, on in (("optimizer", plan.offload_optimizer), ("parameters", plan.offload_param)) if on]
    section: dict[str, Any] = plan.ds_config["zero_optimization"]
    idle = UNUSED_WHEN_FLAT if plan.flat else ()
    sizes, unused = list[str](), list[str]()
    for key, value in (section | {key: value for key, value in plan.ds_config.items() if key in idle}).items():
        if key.removeprefix("stage3_") in idle:
            unused.append(key if isinstance(value, bool) else f"{key} {format_count(value) if value == int(value) else format(value, 'g')}")
        elif key != "stage" and type(value) in (int, float):
            sizes.append(f"{key} {format_count(value)}")
    if unused:
        sizes.append(f"not used on flat tensors: {', '.join(unused)}")
    text = f"{plan.zero_name}: stage {plan.zero_stage}" + (f", {' and '.join(offload)} on the host" if offload else "")
    return "\n".join([text, *sizes])


def _memory(plan: Plan, memory: Memory) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("  memory per worker", style="dim")
    for name in ("device", "host"):
        table.add_column(name, justify="right")
    for category in CATEGORIES:
        table.add_row(f"  {category}", format_bytes(memory.device.get(category, 0)), format_bytes(memory.host.get(category, 0)))
    table.add_row("  in the optimizer step", format_bytes(memory.device_at_step), "")
    table.add_row("  at most", format_bytes(memory.device_total), format_bytes(memory.host_total), style="bold")
    if memory.device_at_start > memory.device_total:
        table.add_row("  for a moment while it is built, if there is room", format_bytes(memory.device_at_start), "")
    return table


def _fits(fits: tuple[Fit, ...]) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("  what fits, per worker", style="dim")
    for name in ("device", "host", "one row", ""):
        table.add_column(name, justify="right")
    for fit in fits:
        verdict = UNKNOWN if fit.fits is None else "fits" if fit.fits else "does not fit"
        table.add_row(f"  {fit.name}", format_bytes(fit.device), format_bytes(fit.host), format_bytes(fit.row), verdict)
    return table


def _number(number: int | None) -> str:
    return UNKNOWN if number is None else f"{number:,}"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"
