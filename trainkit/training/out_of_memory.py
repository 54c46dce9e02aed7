"""An allocation that failed, told as what it is: which rank, GPU or host, and where the bytes are, beside what the plan counted on."""

from __future__ import annotations

import psutil
import torch

from trainkit.errors import OutOfMemory, first_line
from trainkit.planning.memory import CATEGORIES
from trainkit.planning.plan import Plan
from trainkit.planning.revision import halved
from trainkit.units import format_bytes

_HOST = ("defaultcpuallocator", "cannot allocate memory", "bad_alloc", "can't allocate memory")
_GPU = (
    *("cuda error: out of memory", "cuda out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed"),
    *("cuda failure 2 'out of memory'", "cuda failure 'out of memory'"),  # NCCL's words
)


def device_without_memory(error: BaseException) -> str | None:
    """GPU or host, if that is what the error says; None for any other error."""
    words = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError) or any(part in words for part in _GPU):
        return "GPU"
    if isinstance(error, MemoryError) or any(part in words for part in _HOST):
        return "host"
    return None


def out_of_memory(
    error: BaseException, plan: Plan, device: torch.device, rank: int, step: int, piece: str, in_micro_batches: bool = True
) -> OutOfMemory | None:
    """What to tell of the error; None if it is of another kind.

    step: the one that was trained. piece: what the rank was doing. in_micro_batches: whether smaller ones would help.
    """
    where = device_without_memory(error)
    if where is None:
        return None
    planned = {} if plan.memory is None else plan.memory.device if where == "GPU" else plan.memory.host
    lines = [
        f"step {step}: rank {rank} ran out of {where} memory in {piece}: {first_line(error)}",
        f"  the plan: {_listed(planned)}",
        f"  measured: {_measured(where, device, sum(planned.values()))}",
        f"Write {_way_out(plan, where, in_micro_batches)}",
    ]
    return OutOfMemory("\n".join(lines), rank=rank, step=step, device=where, in_micro_batches=in_micro_batches)


def _listed(planned: dict[str, int]) -> str:
    if not planned:
        return "unknown"
    parts = ", ".join(f"{category} {format_bytes(planned[category])}" for category in CATEGORIES if planned.get(category))
    return f"{format_bytes(sum(planned.values()))} ({parts or 'nothing'})"


def _measured(where: str, device: torch.device, states: int) -> str:
    if where == "host":
        memory = psutil.virtual_memory()
        held = format_bytes(psutil.Process().memory_info().rss)
        return f"this process holds {held}, {format_bytes(memory.available)} of the host's {format_bytes(memory.total)} are free"
    if device.type != "cuda":
        return "unknown"
    peak, (free, total) = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)
    others = max(0, total - free - torch.cuda.memory_reserved(device))
    return (
        f"at its peak {format_bytes(peak)} of {format_bytes(total)}, so activations and temporary tensors had "
        f"{format_bytes(max(0, peak - states))}; {format_bytes(others)} are held by the driver and by other processes"
    )


def _way_out(plan: Plan, where: str, in_micro_batches: bool) -> str:
    smaller = halved(plan) if in_micro_batches else None
    graphs = "model.cuda_graphs: false, " if plan.cuda_graphs and where == "GPU" else ""
    selective = "selective (compiled blocks keep less) or " if plan.compile_blocks and not plan.selective_checkpointing else ""
    fewer = f"model.gradient_checkpointing: {selective}true"
    if smaller is None:
        return f"{graphs}{fewer}, shorter maximum lengths, or a ZeRO configuration with offload"
    key = "tokens_per_device" if plan.tokens_per_device else "samples_per_device"
    return (
        f"{graphs}batch.{key}: {smaller} (now {getattr(plan, key)}; the training stays the same), "
        f"train.halve_on_oom: true, which does that by itself, or {fewer}"
    )
