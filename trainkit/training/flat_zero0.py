"""The optimizer step without ZeRO on gradients that lie end to end: no walk over the parameters that waits for the GPU at each of them.

DeepSpeed's own asks every gradient whether it is finite, and widens, scales and writes back one after the other: for T5-large's 560 some
7,000 launches. What it has built stays in use, the fp32 weights, AdamW and its states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from trainkit.training.cuda_graphs import FixedGradients
from trainkit.training.flat_zero1 import clipped, squared_norm


def fp32_weights(optimizer: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Of each parameter of a lower precision, in DeepSpeed's optimizer of stage 0."""
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {parameter: master for own, masters in groups for parameter, master in zip(own, masters, strict=True)}


class FlatZero0:
    """Between gradients that are summed on each rank and weights that are the same on all."""

    def __init__(self, optimizer: Any, gradients: FixedGradients, max_norm: float):
        """optimizer: DeepSpeed's of stage 0, which in fp32 is AdamW itself. max_norm: 0 does not clip."""
        (self.gradient,), self.max_norm = gradients.flats, max_norm
        own = list(gradients.twin.own.values())
        self.weights: list[torch.Tensor] = [weight.detach() for weight in own]
        if hasattr(optimizer, "fp32_groups"):
            master_of = fp32_weights(optimizer)
            self.adamw, self.masters = optimizer.optimizer, [master_of[weight] for weight in own]
        else:
            self.adamw, self.masters = optimizer, list[torch.Tensor](own)

    def reduce(self) -> None:
        """Sum the gradients over the ranks."""
        dist.all_reduce(self.gradient)

    def step(self) -> torch.Tensor:
        """AdamW on the sums; returns the norm of the gradients before clipping, in fp32."""
        norm = squared_norm([self.gradient]).sqrt().float()
        wide = clipped(self.gradient, norm, self.max_norm, self.masters[0].dtype)
        for master, gradient in zip(self.masters, wide.split([master.numel() for master in self.masters]), strict=True):
            master.grad = gradient.view_as(master)
        self.adamw.step()
        for master in self.masters:
            master.grad = None
        if self.masters[0].dtype != self.weights[0].dtype:
            torch._foreach_copy_(self.weights, [master.detach() for master in self.masters])
        return norm
