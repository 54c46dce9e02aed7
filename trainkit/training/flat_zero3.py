"""ZeRO stage 3 by whole blocks (by_blocks.py): parameters are whole only while their block is at work, or is the next.

What is in no block stays whole. What DeepSpeed has built stays in use: the shards of parameters and gradients, the fp32 weights, AdamW and
its states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager  # many collectives as one launch: torch has no public name for it

from trainkit.training.by_blocks import ByBlocks, Unit
from trainkit.training.flat_zero1 import clip_and_update

ALIGNMENT = 64  # elements: matrix units want rows that begin at multiples of 16 bytes


class FlatZero3(ByBlocks["_Unit"]):
    """A model's parameters and gradients between steps, in forward and in backward, and its optimizer step."""

    def __init__(self, model: torch.nn.Module, optimizer: Any, max_norm: float):
        """optimizer: DeepSpeed's of stage 3, whose hooks are taken out. max_norm: 0 does not clip."""
        self.optimizer, self.max_norm, self.called = optimizer, max_norm, model
        _take_out_hooks(optimizer)
        gradients = _gradient_places(optimizer)
        super().__init__(model, 3, lambda parameters: _Unit(parameters, gradients), (optimizer.grad_partitions_flat_buffer,))
        self.rest.gather()

    def settle(self) -> None:
        """What is gathered ahead is not what is read: those are the shards."""

    @contextlib.contextmanager
    def whole(self, parameter: Any) -> Iterator[torch.Tensor]:
        """One parameter in memory of its own. All ranks must call it."""
        shard, group = parameter.ds_tensor, parameter.ds_process_group
        flat = torch.empty(shard.numel() * dist.get_world_size(group), dtype=shard.dtype, device=shard.device)
        dist.all_gather_into_tensor(flat, shard.detach(), group=group)
        yield flat[: parameter.ds_numel].view(parameter.ds_shape)

    @torch.no_grad()
    def write(self, parameter: Any, value: torch.Tensor) -> None:
        """This rank's shard of one parameter, from the whole value."""
        shard = parameter.ds_tensor
        mine = value.flatten()[dist.get_rank(parameter.ds_process_group) * shard.numel() :][: shard.numel()]
        shard[: mine.numel()].copy_(mine)

    def written(self) -> None:
        """What is in no block follows its shards. All ranks must call it."""
        self.rest.gather()

    def check_in_place(self) -> None:
        """Whoever moves a shard elsewhere would leave the graphs behind."""
        moved = sum(unit.moved for unit in (self.rest, *self.units))
        assert not moved, f"{moved} shards were moved"

    def step(self) -> torch.Tensor:
        """AdamW on what was summed; returns the global norm of the gradients before clipping, in fp32."""
        masters = self.optimizer.fp32_partitioned_groups_flat
        sizes = [master.numel() for master in masters]
        gradients = self.flats[0].split(sizes)
        shards = self.optimizer.fp16_partitioned_groups_flat

        def write(group: int) -> None:
            shards[group].copy_(masters[group].detach())

        norm = clip_and_update(self.optimizer, masters, gradients, self.max_norm, write)
        self.rest.gather()
        return norm


def _gradient_places(optimizer: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Of each trained parameter, where this rank's shard of its gradient is summed."""
    parameters = [parameter for group in optimizer.fp16_groups for parameter in group]
    sizes = [parameter.partition_numel() for parameter in parameters]
    return dict(zip(parameters, optimizer.grad_partitions_flat_buffer.split(sizes), strict=True))


class _Unit(Unit):
    """Parameters that are gathered and released together. Their memory is one storage that is there or not: what autograd has saved of
    them, views of whichever kind, is there again when it is."""

    def __init__(self, parameters: Sequence[Any], gradient_places: Mapping[torch.nn.Parameter, torch.Tensor]):
        """parameters: of ZeRO-3, so with DeepSpeed's ds_tensor, the shard of this rank, ds_shape and ds_process_group."""
        super().__init__(parameters)
        self.shards = [parameter.ds_tensor for parameter in parameters]
        self.places = [gradient_places[parameter] for parameter in self.trained]
        self.addresses = [shard.data_ptr() for shard in self.shards]
        self.slots: list[torch.Tensor] = []
        self.wholes: list[torch.Tensor] = []
        self.arriving: Any = None  # the collective that gathers them, until they are there
        if parameters:
            self.group, self.status = parameters[0].ds_process_group, type(parameters[0].ds_status)  # DeepSpeed's kinds of status
            self.world_size = dist.get_world_size(self.group)
            room = [-(-shard.numel() * self.world_size // ALIGNMENT) * ALIGNMENT for shard in self.shards]
            self.flat = torch.empty(sum(room), dtype=self.shards[0].dtype, device=self.shards[0].device)
            slots = zip(self.flat.split(room), self.shards, strict=True)
            self.slots = [slot[: shard.numel() * self.world_size] for slot, shard in slots]
            self.wholes = [slot[: p.ds_numel].view(p.ds_shape) for slot, p in zip(self.slots, parameters, strict=True)]
            self.absent = torch.empty(0, dtype=self.flat.dtype, device=self.flat.device)
            self.num_bytes = self.flat.untyped_storage().nbytes()
            self.flat.untyped_storage().resize_(0)

    @property
    def moved(self) -> int:
        return sum(shard.data_ptr() != address for shard, address in zip(self.shards, self.addresses, strict=True))

    @torch.no_grad()
    def begin_gather(self) -> None:
        if not self.parameters or self.arriving is not None:
            return
        if self.flat.untyped_storage().nbytes() == 0:
            self.flat.untyped_storage().resize_(self.num_bytes)
        with _coalescing_manager(self.group, async_ops=True) as self.arriving:
            for slot, shard in zip(self.slots, self.shards, strict=True):
                dist.all_gather_into_tensor(slot, shard.detach(), group=self.group)

    def gather(self) -> None:
        self.begin_gather()
        self._arrive()
        for parameter, whole in zip(self.parameters, self.wholes, strict=True):
            parameter.data, parameter.ds_status = whole, self.status.AVAILABLE

    def release(self) -> None:
        self._arrive()
        if self.parameters and self.flat.untyped_storage().nbytes() > 0:
            for parameter in self.parameters:
                parameter.data, parameter.ds_status = self.absent, self.status.NOT_AVAILABLE
            self.flat.untyped_storage().resize_(0)

    @torch.no_grad()
    def begin_sum(self) -> Callable[[], None]:
        if not self.trained:
            return lambda: None
        sent = [self._padded(parameter) for parameter in self.trained]
        self.forget_gradients()
        sums = [torch.empty_like(place) for place in self.places]
        with _coalescing_manager(self.group, async_ops=True) as work:
            for total, part in zip(sums, sent, strict=True):
                dist.reduce_scatter_tensor(total, part, group=self.group)

        def finish() -> None:
            work.wait()
            torch._foreach_add_(self.places, sums)

        return finish

    def _arrive(self) -> None:
        if self.arriving is not None:
            self.arriving.wait()
            self.arriving = None

    def _padded(self, parameter: Any) -> torch.Tensor:
        """The gradient, flat, as long as the shards of all ranks."""
        length = parameter.ds_tensor.numel() * self.world_size
        if parameter.grad is None:
            return torch.zeros(length, dtype=parameter.dtype, device=parameter.device)
        flat = parameter.grad.reshape(-1)
        return flat if len(flat) == length else torch.nn.functional.pad(flat, (0, length - len(flat)))


def _take_out_hooks(optimizer: Any) -> None:
    """DeepSpeed's, that gather and release around every module and reduce when a gradient is there; and the memory that they reduce in."""
    optimizer.parameter_offload.destroy()
    for hook in (*optimizer._grad_acc_hooks, *optimizer._leaf_module_hooks):
        hook.remove()
    for bucket in optimizer.ipg_buckets.values():
        bucket.buffer = None
