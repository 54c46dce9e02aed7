"""Random state goes through a checkpoint bit for bit; a pickle in a checkpoint is refused unread."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trainkit.errors import TrainingError
from trainkit.runs import checkpoints
from trainkit.runs.checkpoints import Checkpoint
from trainkit.training.checkpoint import Tensorfiles, random_state, set_random_state

DRAW_IN_ANOTHER_PROCESS = """
import random, sys
import numpy as np, torch
from safetensors.torch import load_file
from trainkit.training.checkpoint import set_random_state
set_random_state(load_file(sys.argv[1]))
print([random.gauss(0, 1), random.random()], np.random.standard_normal(3).tolist(), torch.randn(3).tolist())
"""


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    """Other tests draw as if these had not been."""
    python, numpy, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torchs)


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def draw() -> list[Any]:
    """Values of every generator; an odd number of normal ones leaves one in the cache of each."""
    return [
        *([random.gauss(0, 1) for _ in range(3)], random.random(), random.randrange(2**62)),
        *(np.random.standard_normal(3).tolist(), np.random.rand(), np.random.permutation(9).tolist()),
        *(torch.randn(3).tolist(), torch.rand(1).item(), torch.randperm(9).tolist()),
    ]


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_drawn_after_a_checkpoint_is_what_would_have_been_drawn(tmp_path: Path, cached: bool) -> None:
    seed(1)
    if cached:
        draw()
    state = random_state()
    assert len(state["python_gauss"]) == cached and state["numpy"][-1] == cached
    save_file(state, tmp_path / "random.safetensors")
    expected = [draw() for _ in range(300)]  # more words than a generator holds
    seed(2)
    draw()
    set_random_state(load_file(tmp_path / "random.safetensors"))
    assert [draw() for _ in range(300)] == expected


def test_looking_at_the_state_draws_nothing() -> None:
    seed(1)
    expected = draw()
    seed(1)
    random_state()
    assert draw() == expected


def test_another_process_goes_on_from_it(tmp_path: Path) -> None:
    seed(1)
    draw()
    save_file(random_state(), tmp_path / "random.safetensors")
    expected = f"{[random.gauss(0, 1), random.random()]} {np.random.standard_normal(3).tolist()} {torch.randn(3).tolist()}\n"
    command = [sys.executable, "-c", DRAW_IN_ANOTHER_PROCESS, str(tmp_path / "random.safetensors")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == expected


class Planted:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def committed(folder: Path, *names: str) -> Checkpoint:
    checkpoints.write_part(folder, "1", 0, names)
    checkpoints.commit(folder, "1", 1, {"step": 1}, seconds=1)
    return Checkpoint(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = checkpoints.checkpoint_path(tmp_path, 1)
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("by_torch", [False, True])
def test_a_pickle_is_refused_and_its_code_does_not_run(folder: Path, tmp_path: Path, by_torch: bool) -> None:
    marker, path = tmp_path / "the code has run", folder / "states-0-of-1.safetensors"
    if by_torch:
        torch.save(Planted(marker), path)
    else:
        path.write_bytes(pickle.dumps(Planted(marker)))
    checkpoint = committed(folder, path.name)
    checkpoint.check()  # it is what was written
    with pytest.raises(TrainingError, match=r"states-0-of-1\.safetensors cannot be read"), Tensorfiles(checkpoint, ("states",)):
        pass
    assert not marker.exists()
    if not by_torch:
        pickle.loads(path.read_bytes())
        assert marker.exists()  # it would have


def test_tensors_are_found_in_whatever_file_they_lie(folder: Path) -> None:
    for rank, name in enumerate(("a/weight", "b/weight")):
        save_file({name: torch.full((2,), float(rank))}, folder / f"states-{rank}-of-2.safetensors")
    save_file({"c": torch.zeros(1)}, folder / "frozen-0-of-2.safetensors")
    save_file({"not in the manifest": torch.zeros(1)}, folder / "states-0-of-1.safetensors")
    checkpoint = committed(folder, "states-0-of-2.safetensors", "states-1-of-2.safetensors", "frozen-0-of-2.safetensors")
    with Tensorfiles(checkpoint, ("states",)) as files:
        assert (files.read("a/weight").tolist(), files.read("b/weight").tolist()) == ([0, 0], [1, 1])
        for missing in ("c", "not in the manifest"):
            with pytest.raises(TrainingError, match=rf"holds no {missing}: it is of another model"):
                files.read(missing)


@pytest.mark.parametrize("harm", ["torn", "missing"])
def test_a_file_that_is_no_tensors_is_a_readable_error(folder: Path, harm: str) -> None:
    path = folder / "states-0-of-1.safetensors"
    save_file({"a/weight": torch.zeros(9)}, path)
    checkpoint = committed(folder, path.name)
    if harm == "torn":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(TrainingError, match=r"states-0-of-1\.safetensors cannot be read"), Tensorfiles(checkpoint, ("states",)):
        pass
    assert json.loads((folder / checkpoints.MANIFEST).read_text())["facts"] == {"step": 1}
