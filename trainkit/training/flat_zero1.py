"""The optimizer step of ZeRO stage 1 on whole flat tensors: some tens of launches, which grow with the elements, not with the
number of parameters.

DeepSpeed's own walks over the parameters in Python at several places of each step, which for T5-large's 560 takes longer than forward and
backward do as CUDA graphs. What DeepSpeed has built stays in use: the flat weights, of which the parameters are views; this rank's fp32
partition of them; AdamW and its states. Only the way there is another one, over gradients that lie as the weights do: a reduce-scatter
(half of what an all-reduce moves), the norm, clipping, AdamW, an all-gather.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


class FlatZero1:
    """Between gradients that are summed on each rank and weights that are whole again on each."""

    def __init__(self, optimizer: Any, gradients: Sequence[torch.Tensor], max_norm: float):
        """optimizer: DeepSpeed's of stage 1. gradients: one for each of its flat weights, of the same shape. max_norm: 0 does not clip."""
        self.optimizer, self.gradients, self.max_norm = optimizer, gradients, max_norm
        self.reduced: list[torch.Tensor] = []

    def reduce(self) -> None:
        """Sum this rank's partition of the gradients over the ranks."""
        for group, gradient in enumerate(self.gradients):
            weights, ranks = own_weights(self.optimizer, group), self.optimizer.real_dp_process_group[group]
            if weights.shape == gradient.shape:  # one rank
                self.reduced.append(gradient)
                continue
            partition = torch.empty_like(weights)
            dist.reduce_scatter_tensor(partition, gradient, group=ranks)
            self.reduced.append(partition)

    def step(self) -> torch.Tensor:
        """AdamW on what was reduced; returns the global norm of the gradients before clipping, in fp32."""
        gradients, self.reduced = self.reduced, []
        return update_partitions(self.optimizer, gradients, self.max_norm)


def own_weights(optimizer: Any, group: int) -> torch.Tensor:
    """This rank's part of a group's flat weights, in the precision of forward; optimizer: DeepSpeed's of stage 1 or 2."""
    rank = dist.get_rank(optimizer.real_dp_process_group[group])
    weights: torch.Tensor = optimizer.parallel_partitioned_bit16_groups[group][rank].detach()
    return weights


def update_partitions(optimizer: Any, gradients: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor:
    """AdamW on this rank's partitions, after which all ranks have all weights; as `clip_and_update`, of stages 1 and 2."""
    masters = optimizer.single_partition_of_fp32_groups

    def write(group: int) -> None:
        weights = own_weights(optimizer, group)
        weights.copy_(masters[group].detach())
        whole = optimizer.bit16_groups_flat[group].detach()
        dist.all_gather_into_tensor(whole, weights, group=optimizer.real_dp_process_group[group])

    return clip_and_update(optimizer, masters, gradients, max_norm, write)


def clip_and_update(
    optimizer: Any, masters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], max_norm: float, write: Callable[[int], None]
) -> torch.Tensor:
    """AdamW on this rank's flat fp32 weights, one after the other; returns the global norm of the gradients before clipping, in fp32.

    optimizer: DeepSpeed's. masters, gradients: of each of its groups, of the same shape; gradients of the masters' type are overwritten.
    max_norm: 0 does not clip. write: carries a group's new weights to where forward sees them.
    """
    squares = squared_norm(gradients)
    dist.all_reduce(squares, group=optimizer.dp_process_group)
    norm = squares.sqrt().float()
    for group, (master, gradient) in enumerate(zip(masters, gradients, strict=True)):
        master.grad = clipped(gradient, norm, max_norm, master.dtype)
        optimizer._optimizer_step(group)
        master.grad = None
        write(group)
    return norm


def squared_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares in fp64, a scalar. In fp32 its last bits would tell the order in which a stage lays gradients, and clipping would
    carry them into the weights."""
    return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float64)).square().sum()


def clipped(gradient: torch.Tensor, norm: torch.Tensor, max_norm: float, dtype: torch.dtype) -> torch.Tensor:
    """The gradient in a type, as small as clipping to `max_norm` makes it; itself, overwritten, if it has that type. 0 does not clip."""
    if max_norm == 0:
        return gradient.to(dtype)
    smaller = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ and DeepSpeed do
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, smaller.view(1), out=out)  # a factor with a dimension has its say in the product's type
