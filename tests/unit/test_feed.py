from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from trainkit.data import feed as feeds
from trainkit.data.arrays import Selection
from trainkit.data.batches import Shape
from trainkit.data.feed import Feed, Source
from trainkit.data.padding import Padding, rectangle
from trainkit.data.wire import WireCall, WireMicroBatch
from trainkit.errors import DataError, TrainingError
from trainkit.planning.flops import Work

CPU = torch.device("cpu")
PADDING = Padding("seq2seq", pad_id=0, eos_id=1)


def selection(rows: list[list[int]]) -> Selection:
    return Selection.of(
        np.array([token for row in rows for token in row], dtype=np.uint8), np.array([len(row) for row in rows], dtype=np.uint8)
    )


def wire(source: list[list[int]], target: list[list[int]], shape: Shape, packed: list[int] | None = None) -> WireMicroBatch:
    columns = {"input_ids": selection(source), "labels": selection(target)}
    return WireMicroBatch(0, shape, np.arange(len(source)), columns, Work(9), None if packed is None else np.array(packed))


def call_of(first: int, count: int, width: int = 2) -> WireCall:
    """Steps of one micro-batch of one row, whose first token is the step."""
    steps = np.arange(first, first + count)
    tokens = np.repeat(steps, width).astype(np.uint16)
    lengths = np.full(count, width, dtype=np.uint16)
    return WireCall(
        first=first,
        steps=np.array([(0, 1, width, 1, 1)] * count),
        micro_batches=np.array([(0, 1, 1, 8, 8, *[0] * 5)] * count),
        sample_ids=steps,
        columns={"input_ids": (tokens, lengths), "labels": (tokens, lengths)},
        packed=None,
        num_bytes=2 * tokens.nbytes,
    )


def feed_of(ask: Callable[[int, int], Callable[[], WireCall]], last: int, **source: Callable[..., object]) -> Feed:
    return Feed(Source(ask, **source), PADDING, rank=3, last_step=last, device=CPU)  # type: ignore[arg-type]


def answering(last: int, asked: list[tuple[int, int]] | None = None) -> Callable[[int, int], Callable[[], WireCall]]:
    def ask(first: int, count: int) -> Callable[[], WireCall]:
        if asked is not None:
            asked.append((first, count))
        assert first + count - 1 <= last
        return lambda: call_of(first, count)

    return ask


def first_token(feed: Feed, step: int) -> int:
    return int(feed.micro_batches(step).micro_batches[0].input_ids[0, 0])


def test_padding_is_masked_by_position_never_by_id() -> None:
    """The pad id occurs inside a row (tokenizers whose pad is their EOS) and stays visible there."""
    batch = PADDING.micro_batch(wire([[5, 0, 1], [6]], [[9, 1], [0, 0, 1]], Shape(2, 4, 3)))
    assert batch.input_ids.tolist() == [[5, 0, 1, 0], [6, 0, 0, 0]]
    assert batch.attention_mask is not None and batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.labels.tolist() == [[9, 1, -100], [0, 0, 1]]
    assert batch.work == Work(9) and batch.padded_tokens == 2 * (4 + 3)


@pytest.mark.parametrize("task", ["seq2seq", "causal", "classification"])
@pytest.mark.parametrize("rows", [[], [[5, 6]]])
def test_rows_of_padding_are_one_eos_and_count_nothing(task: str, rows: list[list[int]]) -> None:
    labels = [[2]] * len(rows) if task == "classification" else rows
    batch = Padding(task, pad_id=0, eos_id=1).micro_batch(wire(rows, labels, Shape(3, 8, 8)))
    real = len(rows)
    assert batch.attention_mask is not None and batch.input_ids.shape == batch.attention_mask.shape == (3, 8)
    assert (batch.input_ids[real:, 0] == 1).all() and (batch.attention_mask[real:].sum(dim=1) == 1).all()
    assert set(batch.labels[real:].flatten().tolist()) == {-100} and len(batch.labels) == 3
    assert len(batch.sample_ids) == real


def test_classification_labels_are_one_number_a_row() -> None:
    batch = Padding("classification", pad_id=0, eos_id=1).micro_batch(wire([[5], [6, 7]], [[2], [0]], Shape(2, 8, 0)))
    assert batch.labels.tolist() == [2, 0]


def test_packed_rows_start_anew_and_learn_nothing_of_each_other() -> None:
    batch = Padding("causal", pad_id=0, eos_id=1).micro_batch(
        wire([[5, 6, 7], [8, 9], [4]], [[5, 6, 7], [8, 9], [4]], Shape(2, 6, 0), [2, 1])
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1], [4, 1, 1, 1, 1, 1]] and batch.attention_mask is None
    assert batch.position_ids is not None and batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, 9, -100], [-100] * 6]
    assert (batch.work, batch.padded_tokens) == (Work(9), 12)


def test_a_packed_micro_batch_may_have_empty_sequences() -> None:
    batch = Padding("causal", pad_id=0, eos_id=1).micro_batch(wire([[5, 6]], [[5, 6]], Shape(3, 2, 0), [0, 1, 0]))
    assert batch.input_ids.tolist() == [[1, 1], [5, 6], [1, 1]] and batch.labels.tolist() == [[-100, -100], [-100, 6], [-100, -100]]
    nothing = Padding("causal", pad_id=0, eos_id=1).micro_batch(wire([], [], Shape(1, 8, 0), [0]))
    assert nothing.labels.unique().tolist() == [-100]


@pytest.mark.parametrize(("task", "shape", "packed"), [("seq2seq", Shape(3, 8, 4), False), ("classification", Shape(3, 8, 0), False),
                                                       ("causal", Shape(3, 8, 0), False), ("causal", Shape(3, 8, 0), True)])  # fmt: skip
def test_a_blank_micro_batch_has_a_shape_and_nothing_to_learn(task: str, shape: Shape, packed: bool) -> None:
    blank = Padding(task, pad_id=0, eos_id=1).blank(shape, ("input_ids", "labels", "token_type_ids"), packed)
    assert blank.input_ids.shape == (3, 8) and blank.labels.unique().tolist() == [-100] and blank.work == Work()
    assert blank.labels.shape == {"seq2seq": (3, 4), "classification": (3,), "causal": (3, 8)}[task]
    assert (blank.position_ids is not None) == packed and (blank.attention_mask is None) == packed


def test_rows_keep_their_values_whatever_their_lengths() -> None:
    out = rectangle(np.arange(10), np.array([0, 9, 1]), -1)
    assert out.shape == (3, 16) and out[1, :9].tolist() == list(range(9)) and out[2, 0] == 9 and (out[0] == -1).all()


def test_steps_come_in_order_and_never_past_the_end() -> None:
    asked: list[tuple[int, int]] = []
    feed = feed_of(answering(2000, asked), 2000)
    assert [first_token(feed, step) for step in range(1, 2001)] == list(range(1, 2001))
    feed.close()
    assert asked[0] == (1, 1), "the first step comes as soon as it can"
    assert [step for first, count in asked for step in range(first, first + count)] == list(range(1, 2001))
    assert max(count for _, count in asked) == feeds.MOST_STEPS_PER_CALL, "small steps travel together"


def test_any_step_can_be_asked_for() -> None:
    feed = feed_of(answering(20), 20)
    assert [feed.micro_batches(step).step for step in (7, 8, 2, 20)] == [7, 8, 2, 20]
    feed.close()


def test_what_was_begun_is_not_asked_for_again() -> None:
    asked: list[tuple[int, int]] = []
    feed = feed_of(answering(30, asked), 30)
    feed.begin(7)
    thread = feed.thread
    assert first_token(feed, 7) == 7 and first_token(feed, 8) == 8 and feed.thread is thread
    assert [first for first, _ in asked] == sorted({first for first, _ in asked})
    feed.close()


def test_it_runs_ahead_by_bytes_not_by_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step here takes 3 × 8 int64 of tensors."""
    monkeypatch.setattr(feeds, "AHEAD_BYTES", 3 * 192)
    feed = feed_of(answering(1000), 1000)
    feed.micro_batches(1)
    deadline = threading.Event()
    deadline.wait(0.3)
    assert len(feed.ahead.items) == 3 and feed.ahead.waiting_bytes == 3 * 192
    monkeypatch.setattr(feeds, "AHEAD_BYTES", 10)
    assert first_token(feed, 500) == 500, "a step larger than the bound still comes, alone"
    deadline.wait(0.2)
    assert len(feed.ahead.items) == 1
    feed.close()


def test_large_steps_are_asked_for_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "CALL_BYTES", 10)
    asked: list[tuple[int, int]] = []
    feed = feed_of(answering(9, asked), 9)
    assert [first_token(feed, step) for step in range(1, 10)] == list(range(1, 10))
    assert {count for _, count in asked} == {1}


def test_an_error_of_the_distributor_reaches_the_loop() -> None:
    def ask(first: int, count: int) -> Callable[[], WireCall]:
        raise DataError("row 3 cannot be read")

    feed = feed_of(ask, 5)
    with pytest.raises(DataError, match="row 3"):
        feed.micro_batches(1)
    feed.close()


def test_a_wait_is_said_then_ends_the_run_and_closing_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(feeds, "STUCK_SECONDS", 0.3)
    release, said = threading.Event(), []

    def ask(first: int, count: int) -> Callable[[], WireCall]:
        def answer() -> WireCall:
            release.wait(30)
            return call_of(first, count)

        return answer

    feed = feed_of(ask, 5, doing=lambda: "is reading train step 3 for rank 3 for 9 s", say=said.append)
    with pytest.raises(TrainingError, match=r"step 3: rank 3 has waited 0\.3 s .* the DataDistributor is reading train step 3") as stuck:
        feed.micro_batches(3)
    assert stuck.value.facts == {"step": 3, "rank": 3} and len(said) == 2
    feed.close()
    assert feed.thread is not None and feed.thread.is_alive(), "the call is still under way, and nobody waits for it"
    release.set()
    feed.thread.join(timeout=5)
    assert not feed.thread.is_alive()


def test_a_wait_that_ends_is_said_to_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "NOTICE_SECONDS", 0.05)
    release, said = threading.Event(), []

    def ask(first: int, count: int) -> Callable[[], WireCall]:
        return lambda: (release.wait(30), call_of(first, count))[1]

    def say(text: str) -> None:
        said.append(text)
        release.set()

    feed = feed_of(ask, 2, say=say)
    assert first_token(feed, 1) == 1
    feed.close()
    assert said[0].startswith("step 1: rank 3 has waited") and said[-1] == ""


def test_small_steps_wake_a_waiting_loop_together_but_never_leave_it_asleep() -> None:
    waits = threading.Event()

    class Watched(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            waits.set()
            return super().wait(timeout)

    ahead, got = feeds._Ahead(most_bytes=100), []
    ahead.changed = Watched()
    loop = threading.Thread(target=lambda: got.append(ahead.take(30)))
    loop.start()
    assert waits.wait(10)
    ahead.put(ValueError("small"), 60, wake=False)
    loop.join(0.2)
    assert loop.is_alive(), "it waits for more"
    ahead.put(ValueError("finds no room"), 60, wake=False)
    loop.join(10)
    assert str(got[0]) == "small" and str(ahead.take(10)) == "finds no room"


def test_closing_ends_the_background_thread() -> None:
    feed = feed_of(answering(100_000), 100_000)
    feed.micro_batches(1)
    feed.close()
    assert feed.thread is not None
    feed.thread.join(timeout=5)
    assert not feed.thread.is_alive()
