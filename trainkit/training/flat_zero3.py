"""ZeRO stage 3 by whole blocks, with nothing in forward and backward that waits for Python, so that CUDA graphs can hold them.

DeepSpeed gathers and releases module by module, in hooks that count in Python and wait for events, so a GPU waits for Python. Here each of
the model's repeated blocks is a unit: one launch gathers its parameters before its forward, and again before its backward, and one sums its
gradients over the ranks as soon as the backward of the unit before it begins. What is in no block (embeddings, last norms, a head) stays
whole. What DeepSpeed has built stays in use: the shards of parameters and gradients, the fp32 weights, AdamW and its states.

Which collectives run, and in which order, depends on the model alone: ranks may have other shapes, and one may run as it is while another
replays a graph.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager  # many collectives as one launch: torch has no public name for it

from trainkit.errors import TrainingError
from trainkit.training.blocks import parameters_of_blocks
from trainkit.training.flat_zero1 import clip_and_update

ALIGNMENT = 64  # elements: matrix units want rows that begin at multiples of 16 bytes


class FlatZero3:
    """A model's parameters and gradients between steps, in forward and in backward, and its optimizer step."""

    def __init__(self, model: torch.nn.Module, optimizer: Any, max_norm: float):
        """optimizer: DeepSpeed's of stage 3, whose hooks are taken out. max_norm: 0 does not clip."""
        if os.environ.setdefault("NCCL_GRAPH_REGISTER", "0") != "0":
            raise TrainingError(
                "NCCL_GRAPH_REGISTER has all ranks talk while a CUDA graph is captured, and under ZeRO-3 one rank may capture alone. "
                "Take it out of the environment, or write model.cuda_graphs: false"
            )
        self.optimizer, self.max_norm = optimizer, max_norm
        _take_out_hooks(optimizer)
        places, blocks = self._gradient_places(), parameters_of_blocks(model)
        inside = {parameter for _, parameters in blocks for parameter in parameters}
        self.rest = _Unit([parameter for parameter in model.parameters() if parameter not in inside], places)
        self.units = []
        for block, parameters in blocks:
            unit = _Unit(parameters, places)
            block.register_forward_pre_hook(functools.partial(self._before_forward, unit), with_kwargs=True)
            block.register_forward_hook(functools.partial(self._after_forward, unit))
            self.units.append(unit)
        self.flats = (optimizer.grad_partitions_flat_buffer,)
        self.taken = False
        self.in_backward: _Unit | None = None
        self.rest.gather()

    def begin(self) -> None:
        """Before a micro-batch; the gradients of a step's first one begin at zero. What an error left half done is let go of; what it had
        summed stays."""
        for unit in (self.rest, *self.units):
            unit.forget_gradients()
        for unit in self.units:
            unit.release()
            unit.awaits_backward = False
        self.in_backward = None
        if self.taken:
            self.flats[0].zero_()
            self.taken = False

    def watched(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, whose backward has the gradients summed, those of what is in no block at its end."""
        if loss.requires_grad:
            loss.register_hook(lambda gradient: torch.autograd.Variable._execution_engine.queue_callback(self._end_backward))
        return loss

    def settle(self) -> None:
        """Nothing is prefetched."""

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

    def reduce(self) -> None:
        """Nothing is left to do at a step's end."""

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

    def _gradient_places(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Of each trained parameter, where this rank's shard of its gradient is summed."""
        parameters = [parameter for group in self.optimizer.fp16_groups for parameter in group]
        sizes = [parameter.partition_numel() for parameter in parameters]
        return dict(zip(parameters, self.optimizer.grad_partitions_flat_buffer.split(sizes), strict=True))

    def _before_forward(self, unit: _Unit, block: torch.nn.Module, inputs: Any, named_inputs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            if unit.awaits_backward:
                raise TrainingError(
                    "a block of this model runs twice in a forward, which CUDA graphs under ZeRO-3 do not know. "
                    "Write model.cuda_graphs: false"
                )
            given = list(_tensors((*inputs, *named_inputs.values())))
            unit.given = {id(tensor): tensor._version for tensor in given}
            unit.expects_backward = bool(unit.trained) or (bool(unit.parameters) and any(t.requires_grad for t in given))
        unit.gather()

    def _after_forward(self, unit: _Unit, block: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        if torch.is_grad_enabled():
            found = list(_tensors(outputs))
            for tensor in found:
                if tensor.requires_grad and unit.given.get(id(tensor)) != tensor._version:  # what is handed through is another block's
                    tensor.register_hook(lambda gradient: self._before_backward(unit))
                    unit.awaits_backward = True
            if unit.expects_backward and not found:
                raise TrainingError(
                    f"a block of this model returns a {type(outputs).__name__}, in which CUDA graphs under ZeRO-3 find no tensors. "
                    "Write model.cuda_graphs: false"
                )
        unit.release()

    def _before_backward(self, unit: _Unit) -> None:
        if unit.awaits_backward:  # it has one hook for each of its outputs
            unit.awaits_backward = False
            self._close()
            unit.gather()
            self.in_backward = unit

    def _close(self) -> None:
        """The unit whose backward was the last is done: the autograd engine runs what came about later in forward first."""
        if self.in_backward is not None:
            self.in_backward.sum_gradients()
            self.in_backward.release()
            self.in_backward = None

    def _end_backward(self) -> None:
        self._close()
        self.rest.sum_gradients()
        if any(parameter.grad is not None for unit in self.units for parameter in unit.parameters):
            raise TrainingError(
                "a gradient of this model comes after the backward of its block, which CUDA graphs under ZeRO-3 do not know. "
                "Write model.cuda_graphs: false"
            )


class _Unit:
    """Parameters that are gathered and released together. Their memory is one storage that is there or not: what autograd has saved of
    them, views of whichever kind, is there again when it is."""

    def __init__(self, parameters: list[Any], gradient_places: dict[torch.nn.Parameter, torch.Tensor]):
        """parameters: of ZeRO-3, so with DeepSpeed's ds_tensor, the shard of this rank, ds_shape and ds_process_group."""
        self.parameters, self.shards = parameters, [parameter.ds_tensor for parameter in parameters]
        self.trained = [(p, gradient_places[p]) for p in parameters if p.requires_grad]
        self.addresses = [shard.data_ptr() for shard in self.shards]
        self.awaits_backward = self.expects_backward = False
        self.given: dict[int, int] = {}  # tensors that came into forward, and how often they had been written to
        self.slots: list[torch.Tensor] = []
        self.wholes: list[torch.Tensor] = []
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
    def gather(self) -> None:
        if not self.parameters:
            return
        if self.flat.untyped_storage().nbytes() == 0:
            self.flat.untyped_storage().resize_(self.num_bytes)
        with _coalescing_manager(self.group):
            for slot, shard in zip(self.slots, self.shards, strict=True):
                dist.all_gather_into_tensor(slot, shard.detach(), group=self.group)
        for parameter, whole in zip(self.parameters, self.wholes, strict=True):
            parameter.data, parameter.ds_status = whole, self.status.AVAILABLE

    def release(self) -> None:
        if self.parameters and self.flat.untyped_storage().nbytes() > 0:
            for parameter in self.parameters:
                parameter.data, parameter.ds_status = self.absent, self.status.NOT_AVAILABLE
            self.flat.untyped_storage().resize_(0)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Over ranks, added to the shards'; a parameter without one counts as zero, since all ranks take part for all of them."""
        if not self.trained:
            return
        sums = [torch.empty_like(place) for _, place in self.trained]
        with _coalescing_manager(self.group):
            for (parameter, _), total in zip(self.trained, sums, strict=True):
                dist.reduce_scatter_tensor(total, self._padded(parameter), group=self.group)
        torch._foreach_add_([place for _, place in self.trained], sums)
        self.forget_gradients()

    def forget_gradients(self) -> None:
        for parameter, _ in self.trained:
            parameter.grad = None

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


def _tensors(values: Any) -> Iterable[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
