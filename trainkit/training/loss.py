"""The sum of cross-entropies, without ever holding the logits of a whole micro-batch in fp32.

Logits of a vocabulary of 32,000 are the largest tensor of a step. F.cross_entropy on fp32 logits keeps a copy of them, their
log-softmax and its gradient, 14 bytes beside the 2 of a bf16 logit; here a chunk of rows at a time is fp32, and the gradient is written
where the logits lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from trainkit.data.feed import IGNORED_LABEL

CHUNK_ELEMENTS = 1 << 24  # 64 MiB in fp32: large enough to keep a GPU busy, small beside activations


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over the labels that are not -100 of log(sum(exp(logits))) - logits[label], in fp32.

    logits: [..., classes] in any floating type; its backward overwrites them with their gradient, so nothing else may need them then.
    labels: [...]. Returns a scalar.
    """
    total: torch.Tensor = _CrossEntropySum.apply(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    return total


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_sums = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        picked = torch.empty_like(log_sums)
        for rows in _chunks(logits):
            chunk = logits[rows].float()
            torch.logsumexp(chunk, -1, out=log_sums[rows])
            picked[rows] = chunk.gather(-1, labels[rows].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        ctx.save_for_backward(logits, labels, log_sums)
        return torch.where(labels == IGNORED_LABEL, 0.0, log_sums - picked).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """softmax(logits) - one_hot(label), times the loss's gradient; 0 for labels that do not count."""
        logits, labels, log_sums = ctx.saved_tensors
        classes = torch.arange(logits.shape[-1], device=logits.device)
        gradient, labels = logits.detach(), labels.unsqueeze(-1)
        for rows in _chunks(logits):
            softmax = (logits[rows].float() - log_sums[rows].unsqueeze(-1)).exp_()
            softmax = softmax.sub_((classes == labels[rows]).float()).mul_(gradients[0])
            gradient[rows] = softmax.masked_fill_(labels[rows] == IGNORED_LABEL, 0.0)
        return gradient, None


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return (slice(first, first + rows) for first in range(0, len(logits), rows))
