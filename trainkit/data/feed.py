"""The worker's end of the feed: asks the distributor ahead of need, pads, and hands over micro-batches as tensors.

`micro_batches(step)` is asked by step number, so a loop may start anywhere. Rows arrive ragged; padding is masked by position, never by
id. A rank without samples gets one row of one EOS whose labels are all -100.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from trainkit.data.batches import round_up
from trainkit.data.distributor import WireMicroBatch, WireStep
from trainkit.errors import TrainingError

IGNORED_LABEL = -100
STEPS_PER_CALL = 8
STUCK_SECONDS = 120.0


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of shape [rows, padded length] (labels of classification: [rows]), on the device of the feed."""

    index: int  # among the k micro-batches of the step, over all ranks
    sample_ids: np.ndarray
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    token_type_ids: torch.Tensor | None
    tokens: int  # real ones, padding not counted
    padded_tokens: int


@dataclass(frozen=True)
class StepBatch:
    """A rank's micro-batches of one optimizer step, and N, the labels that count in the whole step over all ranks."""

    step: int
    epoch: int
    samples: int
    label_tokens: int
    num_micro_batches: int
    micro_batches: list[MicroBatch]


class Feed:
    """Micro-batches of one rank. `fetch(first, count)` returns the wire steps first .. first + count - 1."""

    def __init__(
        self, fetch: Callable[[int, int], list[WireStep]], *, last_step: int, task: str, pad_id: int, eos_id: int, device: torch.device
    ):
        self.fetch, self.last_step = fetch, last_step
        self.pad = Padding(task, pad_id, eos_id)
        self.device = device
        self.waiting: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=2 * STEPS_PER_CALL)
        self.stopped = threading.Event()
        self.next_step: int | None = None
        self.thread: threading.Thread | None = None

    def micro_batches(self, step: int) -> StepBatch:
        """The micro-batches of optimizer step `step` (from 1), on the device. Raises TrainingError when the feed is stuck."""
        if step != self.next_step:
            self._start(step)
        try:
            batch = self.waiting.get(timeout=STUCK_SECONDS)
        except queue.Empty:
            raise TrainingError(f"step {step}: no data for {STUCK_SECONDS:.0f} s from the DataDistributor", step=step) from None
        if isinstance(batch, BaseException):
            raise batch
        self.next_step = step + 1
        return self._to_device(batch)

    def close(self) -> None:
        """End the background thread; what it has fetched is dropped."""
        self.stopped.set()
        while self.thread is not None and self.thread.is_alive():
            while not self.waiting.empty():
                self.waiting.get_nowait()
            self.thread.join(timeout=0.05)

    def _start(self, step: int) -> None:
        self.close()
        self.stopped.clear()
        self.waiting = queue.Queue(maxsize=2 * STEPS_PER_CALL)
        self.thread = threading.Thread(target=self._read_ahead, args=(step, self.waiting), name="feed", daemon=True)
        self.thread.start()

    def _read_ahead(self, step: int, waiting: queue.Queue[StepBatch | BaseException]) -> None:
        try:
            while step <= self.last_step and not self.stopped.is_set():
                for wire in self.fetch(step, min(STEPS_PER_CALL, self.last_step - step + 1)):
                    self._put(waiting, self.pad.step(wire, pin=self.device.type == "cuda"))
                step += STEPS_PER_CALL
        except BaseException as error:  # it belongs to the loop, which asks next
            self._put(waiting, error)

    def _put(self, waiting: queue.Queue[StepBatch | BaseException], item: StepBatch | BaseException) -> None:
        while not self.stopped.is_set():
            try:
                waiting.put(item, timeout=0.2)
            except queue.Full:
                continue
            return

    def _to_device(self, batch: StepBatch) -> StepBatch:
        if self.device.type == "cpu":
            return batch
        return StepBatch(**{**vars(batch), "micro_batches": [moved(micro, self.device) for micro in batch.micro_batches]})


@dataclass(frozen=True)
class Padding:
    """Ragged rows to rectangles."""

    task: str
    pad_id: int
    eos_id: int

    def step(self, wire: WireStep, pin: bool) -> StepBatch:
        micro_batches = [self.micro_batch(micro, pin) for micro in wire.micro_batches]
        return StepBatch(wire.step, wire.epoch, wire.samples, wire.label_tokens, wire.num_micro_batches, micro_batches)

    def micro_batch(self, wire: WireMicroBatch, pin: bool = False) -> MicroBatch:
        columns = wire.columns if len(wire.sample_ids) else self._no_samples(wire)
        values, lengths = columns["input_ids"]
        input_ids = rectangle(values, lengths, self.pad_id)
        mask = np.arange(input_ids.shape[1]) < lengths[:, None]
        labels, label_lengths = columns["labels"]
        label_rows = labels.astype(np.int64) if self.task == "classification" else rectangle(labels, label_lengths, IGNORED_LABEL)
        types = columns.get("token_type_ids")
        real = len(wire.sample_ids) > 0
        targets = self.task == "seq2seq"

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).pin_memory() if pin else torch.from_numpy(array)

        return MicroBatch(
            index=wire.index,
            sample_ids=wire.sample_ids,
            input_ids=tensor(input_ids),
            attention_mask=tensor(mask.astype(np.int64)),
            labels=tensor(label_rows),
            token_type_ids=None if types is None else tensor(rectangle(*types, 0)),
            tokens=int(real) * int(lengths.sum() + (label_lengths.sum() if targets else 0)),
            padded_tokens=input_ids.size + (label_rows.size if targets else 0),
        )

    def _no_samples(self, wire: WireMicroBatch) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        one = np.ones(1, dtype=np.int64)
        columns = {name: (np.zeros(1, dtype=np.int64), one) for name in wire.columns}
        return columns | {"input_ids": (one * self.eos_id, one), "labels": (one * IGNORED_LABEL, one)}


def rectangle(values: np.ndarray, lengths: np.ndarray, fill: int) -> np.ndarray:
    """Rows laid end to end become int64 [rows, longest length rounded up], short rows filled at the right."""
    out = np.full((len(lengths), int(round_up(lengths).max(initial=0))), fill, dtype=np.int64)
    out[np.arange(out.shape[1]) < lengths[:, None]] = values
    return out


def moved(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """The same micro-batch on a device."""
    tensors = {name: value.to(device, non_blocking=True) for name, value in vars(micro).items() if isinstance(value, torch.Tensor)}
    return MicroBatch(**{**vars(micro), **tensors})
