"""ZeRO stage 2 by whole blocks (by_blocks.py): of the gradients a rank keeps those of its partition.

Stages 1 and 2 of DeepSpeed lay the weights end to end and cut them into a partition for each rank, so the gradients of a block belong
mostly to one rank, to which they are reduced. The optimizer step is that of stage 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainkit.training.by_blocks import ByBlocks, Unit
from trainkit.training.cuda_graphs import Twin, places
from trainkit.training.flat_zero1 import own_weights, update_partitions


class FlatZero2(ByBlocks["_Unit"]):
    """A model's gradients in backward, and its optimizer step."""

    def __init__(self, model: torch.nn.Module, optimizer: Any, max_norm: float):
        """optimizer: DeepSpeed's of stage 2. max_norm: 0 does not clip."""
        self.optimizer, self.max_norm = optimizer, max_norm
        self.called = Twin(model)  # DeepSpeed's hooks reduce as soon as there is a gradient
        self.check_in_place = self.called.check_in_place
        twin_of = {own: self.called.parameters[name] for name, own in self.called.own.items()}
        weights, twins = optimizer.bit16_groups_flat, list(twin_of.values())
        flats = [torch.zeros_like(own_weights(optimizer, group)) for group in range(len(weights))]
        pieces = {
            twin: pieces_of(twin.numel(), group, first, flats[group].numel())
            for twin, (group, first) in zip(twins, places(twins, weights), strict=True)
        }

        def unit_of(parameters: Sequence[Any]) -> _Unit:
            return _Unit([twin_of.get(own, own) for own in parameters], pieces, flats, optimizer.dp_process_group)

        super().__init__(model, 2, unit_of, flats)

    def step(self) -> torch.Tensor:
        """AdamW on what was summed; returns the global norm of the gradients before clipping, in fp32."""
        return update_partitions(self.optimizer, self.flats, self.max_norm)


@dataclass(frozen=True)
class Piece:
    """Elements of a parameter whose gradient belongs to one rank."""

    first: int
    end: int
    owner: int
    group: int  # of the flat weights
    place: int  # of the first one in the owner's partition


def pieces_of(elements: int, group: int, first: int, partition: int) -> list[Piece]:
    """How partitions of so many elements cut a parameter that begins at element `first` of its group's flat weights."""
    cuts = [0, *range(partition - first % partition, elements, partition), elements]
    return [
        Piece(begin, end, (first + begin) // partition, group, (first + begin) % partition)
        for begin, end in itertools.pairwise(cuts)
        if end > begin
    ]


class _Unit(Unit):
    """Parameters whose gradients are reduced together, to each rank those that it owns."""

    def __init__(self, parameters: Sequence[Any], pieces: Mapping[Any, list[Piece]], flats: Sequence[torch.Tensor], ranks: Any):
        super().__init__(parameters)
        self.ranks, self.me = ranks, dist.get_rank(ranks)
        found = [(parameter, piece) for parameter in self.trained for piece in pieces[parameter]]
        self.of_owner = {owner: [pair for pair in found if pair[1].owner == owner] for owner in sorted({piece.owner for _, piece in found})}
        mine = [piece for _, piece in self.of_owner.get(self.me, ())]
        self.own = [flats[piece.group][piece.place : piece.place + piece.end - piece.first] for piece in mine]

    @torch.no_grad()
    def begin_sum(self) -> Callable[[], None]:
        sent = {owner: torch.cat([_of_gradient(*pair) for pair in pairs]) for owner, pairs in self.of_owner.items()}
        self.forget_gradients()
        several = dist.get_world_size(self.ranks) > 1
        works = [dist.reduce(part, group_dst=owner, group=self.ranks, async_op=True) for owner, part in sent.items() if several]

        def finish() -> None:
            for work in works:
                work.wait()
            if self.own:
                torch._foreach_add_(self.own, list(sent[self.me].split([place.numel() for place in self.own])))

        return finish


def _of_gradient(parameter: torch.nn.Parameter, piece: Piece) -> torch.Tensor:
    if parameter.grad is None:
        return torch.zeros(piece.end - piece.first, dtype=parameter.dtype, device=parameter.device)
    return parameter.grad.reshape(-1)[piece.first : piece.end]
