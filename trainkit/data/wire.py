"""What travels from the DataDistributor to a rank: which rows stand together, and the rows, unless the rank sees the arrays itself.

Rows travel ragged, all of a call end to end, in the smallest integer type that holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from trainkit.data.arrays import Ragged, Selection
from trainkit.data.batches import Shape
from trainkit.planning.flops import Work


@dataclass(frozen=True)
class WireMicroBatch:
    """Of one micro-batch: its rows, by column."""

    index: int  # among the k micro-batches of the step, over all ranks
    shape: Shape  # to be padded to
    sample_ids: np.ndarray
    columns: Mapping[str, Selection]
    work: Work  # of the real tokens
    packed: np.ndarray | None = None  # rows in each packed sequence


@dataclass(frozen=True)
class WireStep:
    """One rank's share of an optimizer step, and the numbers of the whole step."""

    step: int
    epoch: int  # from 0
    samples: int  # of the whole step
    label_tokens: int  # N: labels that count, of the whole step over all ranks
    num_micro_batches: int  # k, over all ranks
    micro_batches: list[WireMicroBatch]


@dataclass(frozen=True)
class WireCall:
    """The answer to one call: few arrays, because each costs a message more than its bytes do."""

    first: int
    steps: np.ndarray  # int64 [steps, 5]: epoch, samples, label_tokens, k, micro-batches of this rank
    micro_batches: np.ndarray  # int64 [micro-batches, 10]: index, samples, the shape's rows, source, target, the fields of Work
    sample_ids: np.ndarray
    columns: dict[str, tuple[np.ndarray, np.ndarray]] | None  # values of all rows end to end, and lengths; None: the rank reads them itself
    packed: np.ndarray | None  # rows of every packed sequence; a micro-batch has shape.rows of them
    num_bytes: int  # of the rows' values, whether they come with it or not

    def unpack(self, at_hand: Mapping[str, Ragged] | None = None) -> Iterator[WireStep]:
        """at_hand: the columns of all rows of the data, where they did not come with it. One step after the other: a thread that makes many
        small things at once keeps Python's lock from the loop."""
        micro_batches = self._micro_batches(at_hand)
        for step, (epoch, samples, label_tokens, k, mine) in enumerate(self.steps.tolist(), start=self.first):
            yield WireStep(step, epoch, samples, label_tokens, k, [next(micro_batches) for _ in range(mine)])

    def samples_by_step(self) -> dict[int, int]:
        """Of this rank."""
        before = np.append(0, np.cumsum(self.micro_batches[:, 1]))
        ends = np.cumsum(self.steps[:, 4])
        return dict(enumerate((before[ends] - before[ends - self.steps[:, 4]]).tolist(), start=self.first))

    def _micro_batches(self, at_hand: Mapping[str, Ragged] | None) -> Iterator[WireMicroBatch]:
        ids = self.sample_ids.astype(np.int64)
        if self.columns is None:
            assert at_hand is not None
            columns = {name: column.select(ids) for name, column in at_hand.items()}
        else:
            columns = {name: Selection.of(*column) for name, column in self.columns.items()}
        row = sequence = 0
        for index, samples, rows, source, target, *work in self.micro_batches.tolist():
            packed = None if self.packed is None else self.packed[sequence : sequence + rows]
            own = slice(row, row + samples)
            of_own = {name: column[own] for name, column in columns.items()}
            yield WireMicroBatch(index, Shape(rows, source, target), ids[own], of_own, Work(*work), packed)
            row, sequence = row + samples, sequence + rows


def narrow(numbers: np.ndarray) -> np.ndarray:
    """Numbers from 0 in the smallest type that holds them."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
