"""What an optimizer holds, in the pieces in which ZeRO spreads it over the ranks: copied to the host, and put together again.

Only the copy makes training wait. The pieces travel among the ranks' writing threads, on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

WEIGHT = "weight"
STATES = (WEIGHT, "exp_avg", "exp_avg_sq")  # of a trained parameter, all fp32: the optimizer's own weight and AdamW's two moments
Tensors = dict[str, torch.Tensor]


class Piece(NamedTuple):
    """A part of one state of one trained parameter, as a rank holds it; an empty one where it holds nothing."""

    name: str  # of the parameter
    state: str  # one of STATES
    number: int  # of the parameter, in the model's order
    shape: torch.Size  # of the whole
    begin: int  # in the flattened whole
    values: torch.Tensor  # flat, fp32, where the optimizer keeps it


class HostMemory:
    """Memory for a rank's pieces, taken once and used by every save; beside a GPU page-locked, so that copies run at the bus's speed."""

    def __init__(self, numel: int, device: torch.device):
        self.values, self.beside_gpu = torch.empty(numel), device.type == "cuda"
        if self.beside_gpu:  # pin_memory=True would round up to a power of two; where a limit forbids the lock, copies are only slower
            torch.cuda.set_device(device)  # of this thread
            torch.cuda.cudart().cudaHostRegister(self.values.data_ptr(), self.values.nbytes, 0)

    def release(self) -> None:
        if self.beside_gpu:
            torch.cuda.cudart().cudaHostUnregister(self.values.data_ptr())

    def copied(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces with their values here. What was copied before is gone."""
        here, end = [], 0
        for piece in pieces:
            begin, end = end, end + piece.values.numel()
            place = self.values[begin:end]
            place.copy_(piece.values, non_blocking=True)
            here.append(piece._replace(values=place))
        if self.beside_gpu:
            torch.cuda.synchronize()
        return here


def joined(pieces: Sequence[Piece], group: dist.ProcessGroup | None) -> Tensors:
    """Whole tensors out of all ranks' pieces, "<parameter>/<state>", each on the rank that writes it: the parameter's number mod ranks.

    All ranks of the group call it with their pieces of the same states in the same order, on the CPU.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    mine = torch.tensor([(piece.begin, piece.values.numel()) for piece in pieces], dtype=torch.int64)
    spans = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(spans, mine, group=group)
    out: Tensors = {}
    for number, piece in enumerate(pieces):
        writer = piece.number % world_size
        if writer == rank:
            whole = torch.empty(piece.shape.numel())
            for other, (begin, numel) in enumerate(span[number].tolist() for span in spans):
                if other == rank:
                    whole[begin : begin + numel] = piece.values
                elif numel:
                    dist.recv(whole[begin : begin + numel], group=group, group_src=other)
            out[f"{piece.name}/{piece.state}"] = whole.view(piece.shape)
        elif piece.values.numel():
            dist.send(piece.values, group=group, group_dst=writer)
    return out


@dataclass(frozen=True)
class Held:
    """Bytes on the device of tensors that live as long as the engine, and of what CUDA graphs keep in their own memory."""

    parameters: int = 0
    optimizer: int = 0  # its states, fp32 weights included
    gradients: int = 0  # of a buffer that is kept from step to step
    activations: int = (
        0  # at most, that the forward of a CUDA graph left for its backward; beside the total, since its memory is not allocated
    )

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients


def storage_bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> Counter[str]:
    """Bytes by type of device; memory that several tensors share counts once, and what was seen before not at all."""
    found: Counter[str] = Counter()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[tensor.device.type] += storage.nbytes()
    return found
