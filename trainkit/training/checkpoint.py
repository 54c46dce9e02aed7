"""A training's state in files: layout-free and without pickles, so that any ZeRO stage and world size goes on from it, bit for bit.

Every rank writes its share of the whole tensors (parameter i belongs to rank i mod world size):

    states-<rank>-of-<world>.safetensors     "<parameter>/weight", "/exp_avg", "/exp_avg_sq": fp32, of the trained parameters
    frozen-<rank>-of-<world>.safetensors     parameters that are not trained, in the training precision: written once, then hard-linked
    buffers-0-of-<world>.safetensors         persistent buffers, if there are any
    random-<rank>-of-<world>.safetensors     random state of torch, CUDA, numpy and python, as integers
    state.json                               rank 0: step, epoch, order, evaluations, counters, layout, versions

Training stands still while each rank copies what it holds to the host. A thread puts the pieces together, among the ranks, and writes
(runs/checkpoints.py has the protocol).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainkit.data.padding import StepBatch
from trainkit.errors import TrainingError
from trainkit.runs import checkpoints
from trainkit.runs.checkpoints import Checkpoint, sha256
from trainkit.runs.files import linked
from trainkit.training.model import persistent_buffers
from trainkit.training.states import STATES, WEIGHT, HostMemory, Piece, Tensors, joined

if TYPE_CHECKING:
    from trainkit.training.engine import Engine

COMMIT_SECONDS = 1800.0  # that rank 0 waits for the files of the others
_STATE = "state.json"


class Saver:
    """One rank's checkpoints of one attempt. Every rank calls `save` at the same steps."""

    def __init__(self, run: Path, attempt: str, keep: int, committed: Callable[[int], None] = lambda step: None):
        """committed: told on rank 0, in the thread that writes, when the checkpoint of a step is complete."""
        self.run, self.attempt, self.keep, self.committed = run, attempt, keep, committed
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.talk = dist.new_group(backend="gloo")  # of the writing threads alone: training has its own
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None
        self.memory: Future[HostMemory] | None = None
        self.begun = False  # a checkpoint
        self.frozen: tuple[Path, str] | None = None  # the last checkpoint's file and its sha256: what is frozen does not change
        self.closed = Event()

    def prepare(self, engine: Engine) -> None:
        """Have the memory taken, in the background, that `save` copies to."""
        numel = len(STATES) * sum(piece.values.numel() for piece in engine.states.pieces() if piece.state == WEIGHT)
        self.memory = self.writer.submit(HostMemory, numel, engine.device)

    def save(self, engine: Engine, step: int, state: Mapping[str, Any], best: int | None) -> float:
        """Copy the state to the host and have it written; returns the seconds that training stood still.

        state: what `restore` shall give back. best: the step whose checkpoint stays.
        Raises TrainingError when the checkpoint before it could not be written.
        """
        began = time.perf_counter()
        self.wait()
        if self.memory is None:
            self.prepare(engine)
        assert self.memory is not None
        pieces = self.memory.result().copied(engine.states.pieces())
        files = {self._name("random"): random_state()}
        if self.rank == 0 and (buffers := persistent_buffers(engine.model)):
            files[self._name("buffers")] = {name: _on_host(buffer) for name, buffer in buffers.items()}
        if not self.begun:  # on all ranks alike: also on those whose share is empty
            files[self._name("frozen")] = {
                name: _on_host(tensor)
                for number, (name, tensor) in enumerate(engine.states.frozen())
                if number % self.world_size == self.rank
            }
        self.begun = True
        facts = {**state, "step": step, "world_size": self.world_size, "counters": engine.states.counters()}
        self.writing = self.writer.submit(self._write, checkpoints.checkpoint_path(self.run, step), pieces, files, facts, best)
        return time.perf_counter() - began

    def wait(self) -> None:
        """Until the last checkpoint is complete. Raises TrainingError when it could not be written."""
        writing, self.writing = self.writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"the checkpoint cannot be written: {error}. Make room or choose another folder with --runs") from error

    def check(self) -> None:
        """Raises TrainingError when the last checkpoint could not be written. Waits for nothing."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def close(self) -> None:
        """After `wait` nothing is left to do; without it, what is being written is given up as soon as the other ranks are waited for."""
        self.closed.set()
        self.writer.shutdown()
        if self.memory is not None and self.memory.exception() is None:
            self.memory.result().release()

    def _name(self, kind: str) -> str:
        return f"{kind}-{self.rank}-of-{self.world_size}.safetensors"

    def _write(self, folder: Path, pieces: Sequence[Piece], files: dict[str, Tensors], facts: Mapping[str, Any], best: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files[self._name("states")] = joined(pieces, self.talk)
        files = {name: tensors for name, tensors in files.items() if tensors}
        for name, tensors in files.items():
            save_file(tensors, folder / name)
        names, frozen = list(files), folder / self._name("frozen")
        if self.frozen is not None and self.frozen[0].name not in files:
            linked(self.frozen[0], frozen)
            names.append(frozen.name)
            if sha256(frozen) != self.frozen[1]:
                raise TrainingError(f"{frozen} is not what was written: the disk has changed it. Choose another folder with --runs")
        if frozen.name in names:
            self.frozen = frozen, sha256(frozen) if self.frozen is None else self.frozen[1]
        if self.rank == 0:
            (folder / _STATE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            names.append(_STATE)
        checkpoints.write_part(folder, self.attempt, self.rank, names)
        if self.rank == 0 and checkpoints.commit(
            folder, self.attempt, self.world_size, {"step": facts["step"]}, COMMIT_SECONDS, self.closed.is_set
        ):
            checkpoints.prune(self.run, self.keep, best, newest=facts["step"])
            self.committed(facts["step"])


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """state.json. Raises TrainingError if it cannot be read."""
    try:
        return json.loads((checkpoint.path / _STATE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{checkpoint.path}: {_STATE} cannot be read: {error}") from None


def restore(engine: Engine, checkpoint: Checkpoint, batch: StepBatch) -> None:
    """Bring a fresh engine to the checkpoint's state. All ranks call it. Raises TrainingError for files that are no such state."""
    state = read_state(checkpoint)
    with Tensorfiles(checkpoint, ("states-", "frozen-", "buffers-")) as files:
        engine.restore(lambda name, kind: files.read(f"{name}/{kind}"), state["counters"], batch)
        engine.states.restore_frozen(files.read)
    own = f"random-{dist.get_rank()}-of-{dist.get_world_size()}."
    with Tensorfiles(checkpoint, (own,)) as files:
        if files.file_of:  # of the same number of workers
            set_random_state({name: files.read(name) for name in files.file_of})


class Tensorfiles:
    """All tensors of the files whose names begin so, by name, read when asked for."""

    def __init__(self, checkpoint: Checkpoint, beginnings: Iterable[str]):
        self.checkpoint, self.beginnings, self.stack = checkpoint, tuple(beginnings), ExitStack()
        self.file_of: dict[str, Any] = {}

    def __enter__(self) -> Tensorfiles:
        for name in self.checkpoint.files:
            if name.startswith(self.beginnings):
                try:
                    file = self.stack.enter_context(safe_open(self.checkpoint.path / name, framework="pt"))
                except (OSError, SafetensorError) as error:
                    raise TrainingError(f"{self.checkpoint.path / name} cannot be read: {error}") from None
                self.file_of |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def read(self, name: str) -> torch.Tensor:
        if name not in self.file_of:
            raise TrainingError(f"{self.checkpoint.path} holds no {name}: it is of another model")
        return self.file_of[name].get_tensor(name)


def random_state() -> Tensors:
    """The state of all generators of this process, as integers."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert version == 3 and kind == "MT19937"
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: Tensors) -> None:
    """Of a CUDA generator only where there is one."""
    torch.set_rng_state(state["torch"])
    random.setstate((3, tuple(state["python"].tolist()), next(iter(state["python_gauss"].tolist()), None)))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, state["numpy_gauss"].item()))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
