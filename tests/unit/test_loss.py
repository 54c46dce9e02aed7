"""The sum of cross-entropies: torch's numbers and gradients, in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trainkit.training import loss
from trainkit.training.loss import cross_entropy_sum


def torchs_own(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")


def gradient(sum_loss: Any, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    total = sum_loss(leaf * 1, labels)
    (total * 0.3).backward()
    assert leaf.grad is not None
    return total.detach(), leaf.grad


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(2, 33), st.integers(1, 400), st.booleans(), st.integers(0, 2**31))
def test_it_is_torchs_number_and_gradient_in_any_chunks(rows: int, length: int, classes: int, chunk: int, half: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 10 * torch.randn(rows, length, classes, generator=generator)
    labels = torch.randint(-2, classes, (rows, length), generator=generator)
    labels[labels < 0] = -100
    logits = logits.bfloat16() if half else logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_ELEMENTS", chunk)
        total, ours = gradient(cross_entropy_sum, logits, labels)
    expected, theirs = gradient(torchs_own, logits, labels)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-4)
    assert ours.dtype == logits.dtype and torch.allclose(ours, theirs, rtol=1e-2 if half else 1e-4, atol=1e-6)


def test_labels_that_do_not_count_hide_even_what_is_not_a_number() -> None:
    logits, labels = torch.zeros(3, 4), torch.tensor([1, -100, 2])
    logits[1] = torch.nan
    total, found = gradient(cross_entropy_sum, logits, labels)
    assert total.isfinite() and found.isfinite().all() and not found[1].any()
    logits[0] = torch.nan
    assert gradient(cross_entropy_sum, logits, labels)[0].isnan(), "and one that counts shows it"


class Largest(TorchDispatchMode):
    """The most elements of an fp32 tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        return result


def test_the_logits_are_never_whole_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 1000)
    logits, labels = torch.randn(64, 100).bfloat16(), torch.randint(0, 100, (64,))
    with Largest() as ours:
        gradient(cross_entropy_sum, logits, labels)
    with Largest() as theirs:
        gradient(torchs_own, logits, labels)
    assert ours.elements == 1000 and theirs.elements == 6400


def test_the_gradient_lies_where_the_logits_were() -> None:
    leaf = torch.randn(8, 16).requires_grad_()
    logits = leaf * 1
    place = logits.data_ptr()
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    places: list[int] = []
    cross_entropy_sum(logits, torch.arange(8)).backward()
    assert places == [place]
