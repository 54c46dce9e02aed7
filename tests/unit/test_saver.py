"""Checkpoints of a stub engine in one process: what is frozen is written once, and watched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainkit.errors import TrainingError
from trainkit.runs.checkpoints import complete
from trainkit.training.checkpoint import Saver, Tensorfiles
from trainkit.training.states import STATES, Piece


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """One trained and one frozen parameter; counts how often the frozen one is asked for."""

    device = torch.device("cpu")
    model = torch.nn.Linear(2, 2)

    def __init__(self) -> None:
        self.states, self.asked = self, 0

    def pieces(self) -> Iterator[Piece]:
        for number, state in enumerate(STATES):
            yield Piece("trained", state, 0, torch.Size([2, 3]), 0, torch.full((6,), float(number)))

    def frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.asked += 1
        yield "base", torch.arange(4.0)

    def counters(self) -> dict[str, float]:
        return {"optimizer_steps": 1.0}


def saved(run: Path, steps: int, engine: Any) -> Saver:
    saver = Saver(run, "1", keep=9)
    for step in range(1, steps + 1):
        saver.save(engine, step, {}, None)
        saver.wait()
    return saver


def test_what_is_frozen_is_copied_once_and_stands_in_every_checkpoint(tmp_path: Path) -> None:
    engine = Engine()
    saved(tmp_path, 3, engine).close()
    assert engine.asked == 1
    found = complete(tmp_path)
    assert [it.step for it in found] == [3, 2, 1]
    for it in found:
        it.check()
        with Tensorfiles(it, ("states-", "frozen-")) as files:
            assert torch.equal(files.read("base"), torch.arange(4.0))
            assert torch.equal(files.read("trained/exp_avg"), torch.ones(2, 3))
    assert len({(it.path / "frozen-0-of-1.safetensors").stat().st_ino for it in found}) == 1


@pytest.mark.parametrize("what", ["changed", "gone"])
def test_frozen_weights_that_the_disk_has_changed_are_not_taken_for_sound(tmp_path: Path, what: str) -> None:
    saver = saved(tmp_path, 1, Engine())
    file = complete(tmp_path)[0].path / "frozen-0-of-1.safetensors"
    if what == "changed":
        file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    else:
        file.unlink()
    saver.save(Engine(), 2, {}, None)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"not what was written|cannot be written"):
        saver.wait()
    saver.close()
    assert [it.step for it in complete(tmp_path)] == [1]
