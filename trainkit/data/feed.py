"""The worker's end of the feed: asks the distributor ahead of need, pads, copies to the device, and hands over micro-batches.

`micro_batches(step)` is asked by step number, so a loop may start anywhere. A background thread does the work; how far it runs ahead is
bounded by bytes. Padding is masked by position, never by id. A row of padding, and all that a rank without samples gets, is one EOS whose
labels are all -100.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from trainkit.data.batches import Shape, round_up
from trainkit.data.wire import WireCall, WireMicroBatch, WireStep
from trainkit.errors import TrainingError
from trainkit.planning.flops import Work
from trainkit.units import MIB, format_seconds

IGNORED_LABEL = -100
AHEAD_BYTES = 64 * MIB  # of padded tensors that wait for use; at least one step
AHEAD_STEPS = 256
CALL_BYTES = 4 * MIB  # of one answer of the distributor: large enough to pay for the call, small enough to come soon
MOST_STEPS_PER_CALL = 256
CALLS_AHEAD = 2
NOTICE_SECONDS = 20.0  # a wait that is said
STUCK_SECONDS = 300.0  # a wait that ends the run, long before the collectives of the other ranks give up
_JOIN_SECONDS = 1.0

Answer = Callable[[], WireCall]


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


@dataclass(frozen=True)
class Source:
    """How a feed reaches the distributor. `ask(first, count)` starts a call for so many steps, of which the answer may hold only the first,
    and returns what waits for it.

    `doing` says what the distributor is working on; `say` tells the person who waits, and the empty text that the wait is over.
    """

    ask: Callable[[int, int], Answer]
    doing: Callable[[], str] = lambda: "is unknown"
    say: Callable[[str], None] = lambda text: None


class Feed:
    """Micro-batches of one rank for steps up to `last_step`."""

    def __init__(self, source: Source, padding: Padding, *, rank: int, last_step: int, device: torch.device):
        self.source, self.padding, self.rank, self.last_step, self.device = source, padding, rank, last_step, device
        self.ahead: _Ahead = _Ahead(AHEAD_BYTES)
        self.next_step: int | None = None
        self.thread: threading.Thread | None = None

    def begin(self, step: int) -> None:
        """Fetch from this step on, in the background: what comes first takes longest, and something else may be built meanwhile."""
        self.close()
        self.ahead = _Ahead(AHEAD_BYTES)
        self.thread = threading.Thread(target=self._read_ahead, args=(step, self.ahead), name="feed", daemon=True)
        self.thread.start()
        self.next_step = step

    def micro_batches(self, step: int) -> StepBatch:
        """The micro-batches of optimizer step `step` (from 1), on the device. Raises TrainingError when the feed is stuck."""
        if step != self.next_step:
            self.begin(step)
        item = self._waited(step)
        if isinstance(item, BaseException):
            self.next_step = None
            raise item
        self.next_step = step + 1
        batch, copied = item
        if copied is not None:
            _hand_over(batch, copied)
        return batch

    def close(self) -> None:
        """End the background thread; what it has fetched is dropped. A call that is under way is left to end by itself."""
        self.ahead.close()
        self.next_step = None
        if self.thread is not None:
            self.thread.join(_JOIN_SECONDS)  # what it pads now; Python must not end in the middle of it

    def _waited(self, step: int) -> _Item:
        waited, item = 0.0, self.ahead.take(NOTICE_SECONDS)
        while item is None:
            waited += NOTICE_SECONDS
            text = f"step {step}: rank {self.rank} has waited {format_seconds(waited)} for data; the DataDistributor {self.source.doing()}"
            if waited >= STUCK_SECONDS:
                raise TrainingError(text, step=step, rank=self.rank)
            self.source.say(text)
            item = self.ahead.take(NOTICE_SECONDS)
        if waited:
            self.source.say("")
        return item

    def _read_ahead(self, step: int, ahead: _Ahead) -> None:
        """Keep CALLS_AHEAD calls under way, growing to about CALL_BYTES each: the first asks for one step, which comes soonest."""
        asked: deque[tuple[int, int, Answer]] = deque()
        count, copier = 1, _Copier(self.device)
        try:
            while not ahead.closed:
                while len(asked) < CALLS_AHEAD and step <= self.last_step:
                    count = min(count, self.last_step - step + 1)
                    asked.append((step, count, self.source.ask(step, count)))
                    step += count
                if not asked:
                    return
                first, wanted, answer = asked.popleft()
                call = answer()
                answered = len(call.steps)
                if answered < wanted:  # they are larger than those before
                    asked.appendleft((first + answered, wanted - answered, self.source.ask(first + answered, wanted - answered)))
                count = max(1, min(4 * answered, MOST_STEPS_PER_CALL, CALL_BYTES * answered // max(1, call.num_bytes)))
                for wire in call.unpack():
                    ahead.put(*copier.copied(self.padding.step(wire, pin=copier.pin)))
        except BaseException as error:  # it belongs to the loop, which asks next
            ahead.put(error, 0)


_Item = tuple[StepBatch, "torch.cuda.Event | None"] | BaseException


class _Ahead:
    """Steps that wait for the loop, bounded by their bytes and their number. One thread puts, one takes."""

    def __init__(self, most_bytes: int):
        self.most_bytes, self.waiting_bytes, self.closed = most_bytes, 0, False
        self.items: deque[tuple[_Item, int]] = deque()
        self.changed = threading.Condition()

    def put(self, item: _Item, num_bytes: int) -> None:
        """Waits until there is room; anything goes into an empty queue, nothing into a closed one."""

        def room() -> bool:
            return not self.items or (self.waiting_bytes + num_bytes <= self.most_bytes and len(self.items) < AHEAD_STEPS)

        with self.changed:
            self.changed.wait_for(lambda: self.closed or room())
            if not self.closed:
                self.items.append((item, num_bytes))
                self.waiting_bytes += num_bytes
                self.changed.notify_all()

    def take(self, seconds: float) -> _Item | None:
        """The oldest item; None if there is none for so long."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.items, timeout=seconds):
                return None
            item, num_bytes = self.items.popleft()
            self.waiting_bytes -= num_bytes
            self.changed.notify_all()
            return item

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.items.clear()
            self.changed.notify_all()


class _Copier:
    """Copies to the device on a stream of its own, so that a step lies there when the loop asks for it."""

    def __init__(self, device: torch.device):
        self.device, self.pin = device, device.type == "cuda"
        if self.pin:
            torch.cuda.set_device(device)
            self.stream = torch.cuda.Stream(device)

    def copied(self, batch: StepBatch) -> tuple[_Item, int]:
        """(the batch on the device with what tells that it has arrived, its bytes)."""
        num_bytes = sum(tensor.nbytes for micro in batch.micro_batches for tensor in tensors(micro).values())
        if not self.pin:
            return (batch, None), num_bytes
        with torch.cuda.stream(self.stream):
            there = replace(batch, micro_batches=[moved(micro, self.device) for micro in batch.micro_batches])
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        return (there, arrived), num_bytes


def _hand_over(batch: StepBatch, arrived: torch.cuda.Event) -> None:
    """The loop's stream waits for the copies, without the host, and the allocator learns who uses them now."""
    current = torch.cuda.current_stream()
    current.wait_event(arrived)
    for micro in batch.micro_batches:
        for tensor in tensors(micro).values():
            tensor.record_stream(current)


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
        values, lengths = wire.columns["input_ids"]
        labels, label_lengths = wire.columns["labels"]
        targets = self.task == "seq2seq"
        real = _inside(lengths, (rows, source))
        input_ids, mask = _filled(real, values, self.pad_id, pin), _filled(real, 1, 0, pin)
        if rows > len(lengths):
            input_ids[len(lengths) :, 0], mask[len(lengths) :, 0] = self.eos_id, 1
        learned = real if self.task == "causal" else _inside(label_lengths, (rows, target if targets else 1))
        label_rows = _filled(learned, labels, IGNORED_LABEL, pin)
        types = wire.columns.get("token_type_ids")
        return MicroBatch(
            index=wire.index,
            sample_ids=wire.sample_ids,
            input_ids=input_ids,
            attention_mask=mask,
            labels=label_rows if self.task != "classification" else label_rows[:, 0].contiguous(),
            token_type_ids=None if types is None else _filled(real, types[0], 0, pin),
            work=_work(lengths, label_lengths if targets else None),
            padded_tokens=input_ids.numel() + (label_rows.numel() if targets else 0),
        )

    def blank(self, shape: Shape, columns: Iterable[str], packed: bool) -> MicroBatch:
        """Nothing but padding, on the CPU. columns: of the data. packed: whether its rows are sequences of several of the data's."""
        nothing = np.zeros(0, np.int64)
        rows = np.zeros(shape.rows, np.int64) if packed else None
        return self.micro_batch(WireMicroBatch(0, shape, nothing, dict.fromkeys(columns, (nothing, nothing)), rows))

    def _packed(self, wire: WireMicroBatch, packed: np.ndarray, pin: bool) -> MicroBatch:
        """Several rows in one sequence. Positions start anew with each row, and at the padding, so that attention keeps to its row.

        A row's first label is never learned: the token before it belongs to another row.
        """
        values, lengths = wire.columns["input_ids"]
        ends = np.cumsum(lengths, dtype=np.int64)
        labels = wire.columns["labels"][0].astype(np.int64)
        labels[ends - lengths] = IGNORED_LABEL
        positions = np.arange(len(values)) - np.repeat(ends - lengths, lengths)
        whole = np.diff(np.append(0, ends)[np.append(0, np.cumsum(packed, dtype=np.int64))])
        shape = wire.shape.rows, wire.shape.source
        real = _inside(whole, shape)
        position_ids = _filled(real, positions, 0, pin)
        position_ids.numpy()[~real] = (np.arange(shape[1]) - whole[:, None])[~real]
        return MicroBatch(
            index=wire.index,
            sample_ids=wire.sample_ids,
            input_ids=_filled(real, values, self.eos_id, pin),
            attention_mask=None,
            labels=_filled(real, labels, IGNORED_LABEL, pin),
            token_type_ids=None,
            work=_work(lengths),
            padded_tokens=shape[0] * shape[1],
            position_ids=position_ids,
        )


def _work(lengths: np.ndarray, label_lengths: np.ndarray | None = None) -> Work:
    source = lengths.astype(np.int64)
    target = np.zeros_like(source) if label_lengths is None else label_lengths.astype(np.int64)
    return Work(*(int(sums) for sums in (source.sum(), target.sum(), source @ source, target @ target, source @ target)))


def rectangle(values: np.ndarray, lengths: np.ndarray, fill: int) -> torch.Tensor:
    """Rows laid end to end become int64 [rows, longest length rounded up], filled at the right."""
    return _filled(_inside(lengths, (len(lengths), int(round_up(lengths).max(initial=0)))), values, fill)


def _inside(lengths: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Where a rectangle holds values: bool [rows, width]; rows beyond the lengths hold none."""
    inside = np.zeros(shape, dtype=bool)
    inside[: len(lengths)] = np.arange(shape[1]) < np.asarray(lengths)[:, None]
    return inside


def _filled(inside: np.ndarray, values: np.ndarray | int, fill: int, pin: bool = False) -> torch.Tensor:
    """int64: the values in order where they belong, `fill` elsewhere."""
    out = torch.full(inside.shape, fill, dtype=torch.int64, pin_memory=pin)
    if isinstance(values, np.ndarray) and len(values) == inside.size:  # rows of equal length
        out.numpy()[:] = values.reshape(inside.shape)
    else:
        out.numpy()[inside] = values
    return out
