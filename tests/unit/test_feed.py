from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from trainkit.data.distributor import WireMicroBatch, WireStep
from trainkit.data.feed import Feed, Padding, rectangle
from trainkit.errors import DataError

CPU = torch.device("cpu")


def wire(ids: list[int], source: list[list[int]], target: list[list[int]], index: int = 0) -> WireMicroBatch:
    def ragged(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        flat = np.array([token for row in rows for token in row], dtype=np.uint8)
        return flat, np.array([len(row) for row in rows], dtype=np.int32)

    return WireMicroBatch(index, np.array(ids, dtype=np.int64), {"input_ids": ragged(source), "labels": ragged(target)})


def steps_upto(last: int, asked: list[tuple[int, int]] | None = None):  # type: ignore[no-untyped-def]
    def fetch(first: int, count: int) -> list[WireStep]:
        if asked is not None:
            asked.append((first, count))
        assert first + count - 1 <= last
        return [WireStep(step, 0, 1, 2, 1, [wire([step], [[step, 1]], [[step, 1]])]) for step in range(first, first + count)]

    return fetch


def feed_of(fetch, last: int) -> Feed:  # type: ignore[no-untyped-def]
    return Feed(fetch, last_step=last, task="seq2seq", pad_id=0, eos_id=1, device=CPU)


def test_padding_is_masked_by_position_never_by_id() -> None:
    """The pad id occurs inside a row (tokenizers whose pad is their EOS) and stays visible there."""
    batch = Padding("seq2seq", pad_id=0, eos_id=1).micro_batch(wire([4, 7], [[5, 0, 1], [6]], [[9, 1], [0, 0, 1]]))
    assert batch.input_ids.tolist()[0][:3] == [5, 0, 1] and batch.input_ids.shape == (2, 8)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[9, 1, -100, -100, -100, -100, -100, -100], [0, 0, 1, -100, -100, -100, -100, -100]]
    assert batch.tokens == 4 + 5 and batch.padded_tokens == 32


def test_a_rank_without_samples_gets_one_row_that_counts_nothing() -> None:
    empty = WireMicroBatch(
        1, np.empty(0, np.int64), {name: (np.empty(0, np.uint8), np.empty(0, np.int32)) for name in ("input_ids", "labels")}
    )
    for task in ("seq2seq", "causal", "classification"):
        batch = Padding(task, pad_id=0, eos_id=1).micro_batch(empty)
        assert batch.input_ids[0, 0] == 1 and batch.attention_mask.sum() == 1 and batch.tokens == 0
        assert set(batch.labels.flatten().tolist()) == {-100} and len(batch.sample_ids) == 0


def test_classification_labels_are_one_number_a_row() -> None:
    batch = Padding("classification", pad_id=0, eos_id=1).micro_batch(wire([0, 1], [[5], [6, 7]], [[2], [0]]))
    assert batch.labels.tolist() == [2, 0] and batch.tokens == 3


def test_rows_keep_their_values_whatever_their_lengths() -> None:
    out = rectangle(np.arange(10), np.array([0, 9, 1]), -1)
    assert out.shape == (3, 16) and out[1, :9].tolist() == list(range(9)) and out[2, 0] == 9 and (out[0] == -1).all()


def test_steps_come_in_order_read_ahead_and_never_past_the_end() -> None:
    asked: list[tuple[int, int]] = []
    feed = feed_of(steps_upto(11, asked), 11)
    assert [feed.micro_batches(step).micro_batches[0].input_ids[0, 0].item() for step in range(1, 12)] == list(range(1, 12))
    feed.close()
    assert asked == [(1, 8), (9, 3)]


def test_any_step_can_be_asked_for() -> None:
    feed = feed_of(steps_upto(20), 20)
    assert [feed.micro_batches(step).step for step in (7, 8, 2, 20)] == [7, 8, 2, 20]
    feed.close()


def test_an_error_of_the_distributor_reaches_the_loop() -> None:
    def fetch(first: int, count: int) -> list[WireStep]:
        raise DataError("row 3 cannot be read")

    feed = feed_of(fetch, 5)
    with pytest.raises(DataError, match="row 3"):
        feed.micro_batches(1)
    feed.close()


def test_a_feed_that_says_nothing_names_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainkit.data.feed.STUCK_SECONDS", 0.2)
    release = threading.Event()

    def fetch(first: int, count: int) -> list[WireStep]:
        release.wait(10)
        return []

    feed = feed_of(fetch, 5)
    with pytest.raises(Exception, match="step 3: no data for"):
        feed.micro_batches(3)
    release.set()
    feed.close()


def test_closing_ends_the_background_thread() -> None:
    feed = feed_of(steps_upto(1000), 1000)
    feed.micro_batches(1)
    feed.close()
    assert feed.thread is not None and not feed.thread.is_alive()
