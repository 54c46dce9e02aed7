"""The tensors of a step's micro-batches, and how ragged rows become them.

Padding is masked by position, never by id. A row of padding, and all that a rank without samples gets, is one EOS whose labels are all
-100.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from trainkit.data.arrays import IGNORED_LABEL, Selection
from trainkit.data.batches import Shape, round_up
from trainkit.data.wire import WireMicroBatch, WireStep
from trainkit.planning.flops import Work


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of shape [rows, padded length] (labels of classification: [rows]), on the device of the feed.

    Packed sequences have position_ids, which start anew with each row in them, and no attention_mask.
    """

    index: int  # among the k micro-batches of the step, over all ranks
    sample_ids: np.ndarray
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    token_type_ids: torch.Tensor | None
    work: Work  # of the real tokens
    padded_tokens: int
    position_ids: torch.Tensor | None = None


@dataclass(frozen=True)
class StepBatch:
    """A rank's micro-batches of one optimizer step, and N, the labels that count in the whole step over all ranks."""

    step: int
    epoch: int
    samples: int
    label_tokens: int
    num_micro_batches: int
    micro_batches: list[MicroBatch]


class StepFeed(Protocol):
    def micro_batches(self, step: int) -> StepBatch: ...


def tensors(micro: MicroBatch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(micro).items() if isinstance(value, torch.Tensor)}


def moved(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """The same micro-batch on a device."""
    return replace(micro, **{name: value.to(device, non_blocking=True) for name, value in tensors(micro).items()})  # type: ignore[arg-type]


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
        if wire.packed is not None:
            return self._packed(wire, wire.packed, pin)
        rows, source, target = wire.shape
        targets = self.task == "seq2seq"
        lengths, label_lengths = (wire.columns[name].lengths for name in ("input_ids", "labels"))
        empty = _outside(lengths, (rows, source))
        unlearned = empty if self.task == "causal" else _outside(label_lengths, (rows, target if targets else 1))
        input_ids, mask = _filled(wire.columns["input_ids"], empty, self.pad_id, pin), _new(empty.shape, pin)
        np.logical_not(empty, out=mask.numpy())
        if rows > len(lengths):
            input_ids[len(lengths) :, 0], mask[len(lengths) :, 0] = self.eos_id, 1
        label_rows = _filled(wire.columns["labels"], unlearned, IGNORED_LABEL, pin)
        return MicroBatch(
            index=wire.index,
            sample_ids=wire.sample_ids,
            input_ids=input_ids,
            attention_mask=mask,
            labels=label_rows if self.task != "classification" else label_rows[:, 0].contiguous(),
            token_type_ids=_filled(wire.columns["token_type_ids"], empty, 0, pin) if "token_type_ids" in wire.columns else None,
            work=wire.work,
            padded_tokens=input_ids.numel() + (label_rows.numel() if targets else 0),
        )

    def blank(self, shape: Shape, columns: Iterable[str], packed: bool) -> MicroBatch:
        """Nothing but padding, on the CPU. columns: of the data. packed: whether its rows are sequences of several of the data's."""
        nothing = np.zeros(0, np.int64)
        sequences = np.zeros(shape.rows, np.int64) if packed else None
        return self.micro_batch(
            WireMicroBatch(0, shape, nothing, dict.fromkeys(columns, Selection.of(nothing, nothing)), Work(), sequences)
        )

    def _packed(self, wire: WireMicroBatch, packed: np.ndarray, pin: bool) -> MicroBatch:
        """Several rows in one sequence. Positions start anew with each row, and at the padding, so that attention keeps to its row.

        A row's first label is never learned: the token before it belongs to another row.
        """
        values, lengths = wire.columns["input_ids"].gather(), wire.columns["input_ids"].lengths
        ends = np.cumsum(lengths, dtype=np.int64)
        labels = wire.columns["labels"].gather().astype(np.int64)
        labels[ends - lengths] = IGNORED_LABEL
        positions = np.arange(len(values)) - np.repeat(ends - lengths, lengths)
        whole = np.diff(np.append(0, ends)[np.append(0, np.cumsum(packed, dtype=np.int64))])
        shape = wire.shape.rows, wire.shape.source
        empty = _outside(whole, shape)
        position_ids = _rectangle(positions, whole, empty, 0, pin)
        position_ids.numpy()[empty] = (np.arange(shape[1]) - whole[:, None])[empty]
        return MicroBatch(
            index=wire.index,
            sample_ids=wire.sample_ids,
            input_ids=_rectangle(values, whole, empty, self.eos_id, pin),
            attention_mask=None,
            labels=_rectangle(labels, whole, empty, IGNORED_LABEL, pin),
            token_type_ids=None,
            work=wire.work,
            padded_tokens=shape[0] * shape[1],
            position_ids=position_ids,
        )


def rectangle(values: np.ndarray, lengths: np.ndarray, fill: int) -> torch.Tensor:
    """Rows laid end to end become int64 [rows, longest length rounded up], filled at the right."""
    return _rectangle(values, lengths, _outside(lengths, (len(lengths), int(round_up(lengths).max(initial=0)))), fill)


def _rectangle(values: np.ndarray, lengths: np.ndarray, outside: np.ndarray, fill: int, pin: bool = False) -> torch.Tensor:
    return _filled(Selection.of(values, lengths), outside, fill, pin)


def _outside(lengths: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Where a rectangle holds no values: bool [rows, width]; rows beyond the lengths hold none."""
    of_every_row = np.zeros((shape[0], 1), np.int32)  # compared in half the time of int64
    of_every_row[: len(lengths), 0] = lengths
    outside: np.ndarray = np.arange(shape[1], dtype=np.int32) >= of_every_row
    return outside


def _filled(column: Selection, outside: np.ndarray, fill: int, pin: bool) -> torch.Tensor:
    """int64: the values of the rows, `fill` where none belong."""
    out = _new(outside.shape, pin)
    values = out.numpy()
    values[: len(column)] = column.windows(outside.shape[1])
    np.copyto(values, fill, where=outside)
    return out


def _new(shape: tuple[int, ...], pin: bool) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, pin_memory=pin)
