"""The worker's end of the feed: asks the distributor ahead of need, pads, copies to the device, and hands over micro-batches.

`micro_batches(step)` is asked by step number, so a loop may start anywhere. A background thread does the work; how far it runs ahead is
bounded by bytes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from trainkit.data.arrays import Ragged
from trainkit.data.padding import Padding, StepBatch, moved, tensors
from trainkit.data.wire import WireCall
from trainkit.errors import TrainingError
from trainkit.units import MIB, format_seconds

AHEAD_BYTES = 64 * MIB  # of padded tensors that wait for use; at least one step
AHEAD_STEPS = 256
WAKE_BYTES = 1 * MIB  # of small steps that a waiting loop gets at once
CALL_BYTES = 4 * MIB  # of the rows of one answer: large enough to pay for the call, small enough to come soon
MOST_STEPS_PER_CALL = 256
CALLS_AHEAD = 2
NOTICE_SECONDS = 20.0  # a wait that is said
STUCK_SECONDS = 300.0  # a wait that ends the run, long before the collectives of the other ranks give up
_JOIN_SECONDS = 1.0

Answer = Callable[[], WireCall]


@dataclass(frozen=True)
class Source:
    """How a feed reaches the distributor. `ask(first, count)` starts a call for so many steps, of which the answer may hold only the first,
    and returns what waits for it.

    `rows` are the columns of all rows of the data, where this process sees them and the answers do not bring them.
    `doing` says what the distributor is working on; `say` tells the person who waits, and the empty text that the wait is over.
    """

    ask: Callable[[int, int], Answer]
    doing: Callable[[], str] = lambda: "is unknown"
    say: Callable[[str], None] = lambda text: None
    rows: Mapping[str, Ragged] | None = None


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
        assert 1 <= step <= self.last_step, f"step {step} of {self.last_step}"  # nobody would ever fetch it
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
                for left, wire in zip(range(answered)[::-1], call.unpack(self.source.rows), strict=True):
                    ahead.put(*copier.copied(self.padding.step(wire, pin=copier.pin)), wake=not left)
        except BaseException as error:  # it belongs to the loop, which asks next
            ahead.put(error, 0)


_Item = tuple[StepBatch, "torch.cuda.Event | None"] | BaseException


class _Ahead:
    """Steps that wait for the loop, bounded by their bytes and their number. One thread puts, one takes."""

    def __init__(self, most_bytes: int):
        self.most_bytes, self.waiting_bytes, self.closed = most_bytes, 0, False
        self.items: deque[tuple[_Item, int]] = deque()
        self.changed = threading.Condition()

    def put(self, item: _Item, num_bytes: int, wake: bool = True) -> None:
        """Waits until there is room; anything goes into an empty queue, nothing into a closed one.

        wake: a loop that waits, now; else with more, because to wake it for a small step takes longer than to pad the next one.
        """

        def room() -> bool:
            return not self.items or (self.waiting_bytes + num_bytes <= self.most_bytes and len(self.items) < AHEAD_STEPS)

        with self.changed:
            if not room():
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.closed or room())
            if not self.closed:
                self.items.append((item, num_bytes))
                self.waiting_bytes += num_bytes
                if wake or self.waiting_bytes >= WAKE_BYTES:
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
