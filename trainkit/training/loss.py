"""The sum of cross-entropies, without ever holding the logits of a whole micro-batch in fp32.

Logits of a vocabulary of 32,000 are the largest tensor of a step. F.cross_entropy on fp32 logits keeps a copy of them, their
log-softmax and its gradient, 14 bytes beside the 2 of a bf16 logit; here the gradient is written where the logits lie, and what is fp32
is a chunk of rows at a time, or, compiled, what a kernel holds in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trainkit.data.arrays import IGNORED_LABEL

CHUNK_ELEMENTS = 1 << 24  # 64 MiB in fp32: large enough to keep a GPU busy, small beside activations


def log_sums_and_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row, in fp32: log(sum(exp(logits))), and that less logits[label], or 0 where the label does not count."""
    wide = logits.float()
    log_sums = torch.logsumexp(wide, -1)
    picked = wide.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return log_sums, torch.where(labels == IGNORED_LABEL, 0.0, log_sums - picked)


def write_gradient(logits: torch.Tensor, labels: torch.Tensor, log_sums: torch.Tensor, weight: torch.Tensor) -> None:
    """Over the logits: weight × (softmax(logits) - one_hot(label)); 0 for labels that do not count."""
    classes = torch.arange(logits.shape[-1], device=logits.device)
    softmax = torch.exp(logits.float() - log_sums.unsqueeze(-1))
    gradient = (softmax - (classes == labels.unsqueeze(-1)).float()) * weight
    logits.copy_(torch.where(labels.unsqueeze(-1) == IGNORED_LABEL, 0.0, gradient))


def _log_sums_and_losses_in_chunks(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_sums = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    losses = torch.empty_like(log_sums)
    for rows in _chunks(logits):
        log_sums[rows], losses[rows] = log_sums_and_losses(logits[rows], labels[rows])
    return log_sums, losses


def _write_gradient_in_chunks(logits: torch.Tensor, labels: torch.Tensor, log_sums: torch.Tensor, weight: torch.Tensor) -> None:
    for rows in _chunks(logits):
        write_gradient(logits[rows], labels[rows], log_sums[rows], weight)


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return (slice(first, first + rows) for first in range(0, len(logits), rows))


@dataclass(frozen=True)
class Kernels:
    """The two passes over the logits; who compiles gives others with the same results."""

    forward: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


IN_CHUNKS = Kernels(_log_sums_and_losses_in_chunks, _write_gradient_in_chunks)


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor, kernels: Kernels = IN_CHUNKS) -> torch.Tensor:
    """Sum over the labels that are not -100 of log(sum(exp(logits))) - logits[label], in fp32.

    logits: [..., classes] in any floating type; its backward overwrites them with their gradient, so nothing else may need them then.
    labels: [...]. Returns a scalar.
    """
    total: torch.Tensor = _CrossEntropySum.apply(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), kernels)
    return total


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        log_sums, losses = kernels.forward(logits, labels)
        ctx.save_for_backward(logits, labels, log_sums)
        ctx.kernels = kernels
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, labels, log_sums = ctx.saved_tensors
        gradient = logits.detach()
        ctx.kernels.backward(gradient, labels, log_sums, gradients[0])
        return gradient, None, None
