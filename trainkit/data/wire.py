"""What travels from the DataDistributor to a rank: ragged rows, all of a call end to end, in the smallest integer type that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainkit.data.batches import Shape


@dataclass(frozen=True)
class WireMicroBatch:
    """Rows of one micro-batch, ragged: `columns[name] = (values of all rows end to end, length of each row)`."""

    index: int  # among the k micro-batches of the step, over all ranks
    shape: Shape  # to be padded to
    sample_ids: np.ndarray
    columns: dict[str, tuple[np.ndarray, np.ndarray]]
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
    """The answer to one call: few arrays, because each costs a message more than its bytes do. `unpack` gives views of them."""

    first: int
    steps: np.ndarray  # int64 [steps, 5]: epoch, samples, label_tokens, k, micro-batches of this rank
    micro_batches: np.ndarray  # int64 [micro-batches, 5]: index, samples, and the shape's rows, source, target
    sample_ids: np.ndarray
    columns: dict[str, tuple[np.ndarray, np.ndarray]]
    packed: np.ndarray | None  # rows of every packed sequence; a micro-batch has shape.rows of them

    @property
    def num_bytes(self) -> int:
        return sum(values.nbytes + lengths.nbytes for values, lengths in self.columns.values()) + self.sample_ids.nbytes

    def unpack(self) -> list[WireStep]:
        micro_batches = iter(self._micro_batches())
        steps = []
        for step, (epoch, samples, label_tokens, k, mine) in enumerate(self.steps.tolist(), start=self.first):
            steps.append(WireStep(step, epoch, samples, label_tokens, k, [next(micro_batches) for _ in range(mine)]))
        return steps

    def samples_by_step(self) -> dict[int, int]:
        """Of this rank."""
        before = np.append(0, np.cumsum(self.micro_batches[:, 1]))
        ends = np.cumsum(self.steps[:, 4])
        return dict(enumerate((before[ends] - before[ends - self.steps[:, 4]]).tolist(), start=self.first))

    def _micro_batches(self) -> Iterator[WireMicroBatch]:
        row = sequence = 0
        value = dict.fromkeys(self.columns, 0)
        for index, samples, *shape in self.micro_batches.tolist():
            columns = {}
            for name, (values, lengths) in self.columns.items():
                own = lengths[row : row + samples]
                end = value[name] + int(own.sum())
                columns[name], value[name] = (values[value[name] : end], own), end
            packed = None if self.packed is None else self.packed[sequence : sequence + shape[0]]
            yield WireMicroBatch(index, Shape(*shape), self.sample_ids[row : row + samples], columns, packed)
            row, sequence = row + samples, sequence + shape[0]


def narrow(numbers: np.ndarray) -> np.ndarray:
    """Numbers from 0 in the smallest type that holds them."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
