"""What of CUDA graphs runs without CUDA; tests/gpu has the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.data.padding import MicroBatch
from trainkit.errors import CaptureError
from trainkit.planning.flops import Work
from trainkit.training.cuda_graphs import Graphs


def graphs_that_raise(error: Exception) -> Any:
    def capture(batch: MicroBatch) -> None:
        raise error

    return SimpleNamespace(device=torch.device("cuda"), made={}, capturable=True, _capture=capture)


@pytest.fixture
def batch() -> MicroBatch:
    ids = torch.ones(1, 2, dtype=torch.int64)
    return MicroBatch(0, np.zeros(1, np.int64), ids, ids, ids, None, Work(), 4)


def test_a_capture_that_fails_says_what_to_write(batch: MicroBatch) -> None:
    with pytest.raises(CaptureError, match=r"operation not permitted\. Write model.cuda_graphs: false"):
        Graphs.capture(graphs_that_raise(RuntimeError("operation\nnot permitted")), batch)


def test_want_of_memory_stays_what_it_is(batch: MicroBatch) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Graphs.capture(graphs_that_raise(torch.OutOfMemoryError("CUDA out of memory")), batch)


def test_graphs_are_let_go_of_before_nccl_ends() -> None:
    told: list[str] = []
    forward, backward = (SimpleNamespace(reset=lambda name=name: told.append(name)) for name in ("forward", "backward"))
    graphs: Any = SimpleNamespace(made={(): SimpleNamespace(forward=forward, backward=backward)}, capturable=True)
    Graphs.close(graphs)
    assert told == ["forward", "backward"] and not graphs.made and not graphs.capturable
