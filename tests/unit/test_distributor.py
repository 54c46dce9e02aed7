"""The DataDistributor as the plain class it is."""

from __future__ import annotations

import json
import multiprocessing
import threading
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainkit.data.arrays import TokenArrays, Writer, ragged
from trainkit.data.batches import Budget
from trainkit.data.catalogue import SHAPES
from trainkit.data.distributor import DataDistributor, Feeding
from trainkit.data.handed import Handed, table
from trainkit.data.padding import Padding, tensors
from trainkit.data.wire import WireStep
from trainkit.planning.flops import Work

TOKENS = Budget(tokens=600)


def feeding_of(folder: Path, rows: int, longest: int = 40, **more: object) -> Feeding:
    """Random rows, seq2seq unless said otherwise; a row's first token is its number."""
    rng = np.random.default_rng(rows)
    source = [[row, *rng.integers(3, 400, rng.integers(0, longest)).tolist()] for row in range(rows)]
    target = [rng.integers(3, 400, rng.integers(1, longest)).tolist() for _ in range(rows)] if more.get("task") != "causal" else source
    with Writer(folder) as writer:
        writer.append({"input_ids": ragged(source), "labels": ragged(target)}, np.array([len(row) for row in target]))
        writer.finish(truncated={})
    return replace(Feeding(str(folder), "seq2seq", 7, 16, 1, TOKENS, shuffle=True), **more)  # type: ignore[arg-type]


def steps_of(feeding: Feeding, step: int) -> list[WireStep]:
    distributor = DataDistributor({"train": feeding})
    return [next(distributor.steps("train", step, 1, rank).unpack()) for rank in range(feeding.world_size)]


def ids_of(ranks: list[WireStep]) -> list[int]:
    return sorted(int(row) for rank in ranks for micro in rank.micro_batches for row in micro.sample_ids)


@pytest.mark.parametrize("budget", [TOKENS, Budget(rows=3)])
@pytest.mark.parametrize("pack_length", [None, 128])
def test_the_samples_of_a_step_do_not_depend_on_the_layout(tmp_path: Path, budget: Budget, pack_length: int | None) -> None:
    task = "seq2seq" if pack_length is None else "causal"
    plain = feeding_of(tmp_path / "a", 75, task=task, budget=budget, pack_length=pack_length)
    for step in (1, 2, 5, 6):
        layouts = [steps_of(replace(plain, world_size=world), step) for world in (1, 2, 4)]
        assert len({tuple(ids_of(ranks)) for ranks in layouts}) == 1
        for ranks in layouts:
            assert len({(rank.label_tokens, rank.samples, rank.num_micro_batches, len(rank.micro_batches)) for rank in ranks}) == 1
            assert ranks[0].samples == len(ids_of(ranks)) == (11 if step == 5 else 16) and ranks[0].epoch == (step - 1) // 5
            indices = sorted(micro.index for rank in ranks for micro in rank.micro_batches)
            assert indices == list(range(ranks[0].num_micro_batches))


def test_every_row_arrives_once_an_epoch_with_its_tokens(tmp_path: Path) -> None:
    feeding = feeding_of(tmp_path / "a", 75, world_size=2)
    arrays, distributor, seen = TokenArrays.open(feeding.folder), DataDistributor({"train": feeding}), []
    for rank in range(2):
        for step in distributor.steps("train", 1, 5, rank).unpack():
            for micro in step.micro_batches:
                seen += micro.sample_ids.tolist()
                for name, column in micro.columns.items():
                    assert column.gather().tolist() == [int(token) for row in micro.sample_ids for token in arrays.by_column[name].row(row)]
                    assert column.lengths.tolist() == [len(arrays.by_column[name].row(row)) for row in micro.sample_ids]
    assert sorted(seen) == list(range(75))


@pytest.mark.parametrize(("task", "pack_length"), [("seq2seq", None), ("causal", None), ("causal", 128), ("classification", None)])
def test_work_is_of_real_tokens_and_targets_count_where_they_are_a_stream_of_their_own(
    tmp_path: Path, task: str, pack_length: int | None
) -> None:
    feeding, num_empty = feeding_of(tmp_path / "a", 66, task=task, pack_length=pack_length, world_size=4), 0
    for rank in range(4):
        for step in DataDistributor({"train": feeding}).steps("train", 1, 5, rank).unpack():  # the fifth has two samples for four ranks
            for micro in step.micro_batches:
                source, target = (micro.columns[name].lengths.tolist() for name in ("input_ids", "labels"))
                pairs = zip(source, target if task == "seq2seq" else [0] * len(target), strict=True)
                assert micro.work == sum((Work(s, t, s * s, t * t, s * t) for s, t in pairs), Work())
                num_empty += micro.work == Work() and not source
    assert num_empty >= 2


@pytest.mark.parametrize(("rows", "world"), [(1, 4), (3, 8), (5, 2), (20, 16)])
def test_fewer_samples_than_ranks_leave_ranks_without_samples(tmp_path: Path, rows: int, world: int) -> None:
    ranks = steps_of(feeding_of(tmp_path / "a", rows, world_size=world), 1)
    assert ids_of(ranks) == list(range(rows)) if rows <= 16 else len(ids_of(ranks)) == 16
    assert {len(rank.micro_batches) for rank in ranks} == {ranks[0].num_micro_batches // world}


def test_an_epoch_smaller_than_a_step_is_a_step(tmp_path: Path) -> None:
    feeding = feeding_of(tmp_path / "a", 5)
    for step in (1, 2, 3):
        (rank,) = steps_of(feeding, step)
        assert (rank.epoch, rank.samples, ids_of([rank])) == (step - 1, 5, [0, 1, 2, 3, 4])


def test_all_splits_share_few_shapes_that_hold_their_longest_rows(tmp_path: Path) -> None:
    train = feeding_of(tmp_path / "a", 300, world_size=2)
    long = feeding_of(tmp_path / "b", 90, longest=150, world_size=2, shuffle=False)
    distributor, shapes = DataDistributor({"train": train, "eval": long}), set()
    for split, count in (("train", 19), ("eval", 6)):
        for rank in range(2):
            steps = distributor.steps(split, 1, count, rank).unpack()
            shapes |= {micro.shape for step in steps for micro in step.micro_batches if micro.shape.cost <= 600}
    assert len(shapes) <= SHAPES


def test_the_wire_is_narrow_and_unpadded(tmp_path: Path) -> None:
    call = DataDistributor({"train": feeding_of(tmp_path / "a", 75)}).steps("train", 1, 4, 0)
    values, lengths = call.columns["input_ids"]
    assert (values.dtype, lengths.dtype, call.sample_ids.dtype) == (np.uint16, np.uint8, np.uint8)
    assert len(values) == lengths.sum() and len(lengths) == 64


@pytest.mark.parametrize("pack_length", [None, 128])
def test_rows_at_hand_make_the_batches_that_travelling_ones_make(tmp_path: Path, pack_length: int | None) -> None:
    task = "seq2seq" if pack_length is None else "causal"
    feeding = feeding_of(tmp_path / "a", 75, task=task, pack_length=pack_length, world_size=2)
    distributor, arrays = DataDistributor({"train": feeding}), TokenArrays.open(feeding.folder)
    padding = Padding(task, pad_id=0, eos_id=1)
    for rank in range(2):
        travelling, at_hand = (distributor.steps("train", 1, 5, rank, with_rows=with_rows) for with_rows in (True, False))
        assert at_hand.columns is None and at_hand.num_bytes == travelling.num_bytes > 0
        for one, other in zip(travelling.unpack(), at_hand.unpack(arrays.by_column), strict=True):
            one, other = padding.step(one, pin=False), padding.step(other, pin=False)
            assert one.label_tokens == other.label_tokens and len(one.micro_batches) == len(other.micro_batches) > 0
            for mine, theirs in zip(one.micro_batches, other.micro_batches, strict=True):
                assert mine.index == theirs.index and mine.sample_ids.tolist() == theirs.sample_ids.tolist() and mine.work == theirs.work
                assert tensors(mine).keys() == tensors(theirs).keys()
                assert all(torch.equal(tensor, tensors(theirs)[name]) for name, tensor in tensors(mine).items())


def test_a_call_ends_at_the_same_step_whether_its_rows_travel_or_not(tmp_path: Path) -> None:
    distributor = DataDistributor({"train": feeding_of(tmp_path / "a", 75)})
    calls = [distributor.steps("train", 1, 5, 0, most_bytes=2500, with_rows=with_rows) for with_rows in (True, False)]
    assert 1 < len(calls[0].steps) < 5 and np.array_equal(calls[0].steps, calls[1].steps)


def _peak_of_feeding(feeding: Feeding) -> int:
    distributor = DataDistributor({"train": feeding})
    tracemalloc.start()
    for step in (1, 2000, 5859):
        assert len(distributor.steps("train", step, 1, 0).sample_ids) > 100
        call = distributor.steps("train", step, 1, 0, with_rows=False)
        rows = next(call.unpack(TokenArrays.open(Path(feeding.folder)).by_column))
        assert len(Padding("causal", 0, 1).step(rows, pin=False).micro_batches) > 0
    return tracemalloc.get_traced_memory()[1]


def test_feeding_many_rows_needs_no_memory_for_them(tmp_path: Path) -> None:
    """Three million short rows: 24 MB of offsets on disk, and what a call takes does not grow with them."""
    rows = 3_000_000
    for name, kind, count in (
        ("input_ids.values", np.uint8, 4 * rows),
        ("labels.values", np.uint8, 4 * rows),
        ("label_tokens", np.int32, rows),
    ):
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", mode="w+", dtype=kind, shape=(count,)).flush()
    for name in ("input_ids", "labels"):
        np.save(tmp_path / f"{name}.offsets.npy", np.arange(rows + 1, dtype=np.int64) * 4)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    manifest = {"rows": rows, "columns": ["input_ids", "labels"], "bytes": sizes, "crc32": dict.fromkeys(sizes, 0)}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"longest": {"input_ids": 4, "labels": 4}}))
    feeding = Feeding(str(tmp_path), "causal", 0, 512, 2, Budget(tokens=1024), shuffle=True)
    with multiprocessing.get_context("spawn").Pool(1) as alone:  # memory is measured of a whole process, whatever threads it has
        assert alone.apply(_peak_of_feeding, [feeding]) < 4 * 2**20


def test_a_stuck_call_is_named_while_others_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributor, reading, release = DataDistributor({"train": feeding_of(tmp_path / "a", 75)}), threading.Event(), threading.Event()
    pack = DataDistributor._pack

    def slow(self: DataDistributor, split: str, first: int, count: int, rank: int, *options: object) -> object:
        if first == 3:
            reading.set()
            release.wait(10)
        return pack(self, split, first, count, rank, *options)  # type: ignore[arg-type]

    monkeypatch.setattr(DataDistributor, "_pack", slow)
    stuck = threading.Thread(target=distributor.steps, args=("train", 3, 1, 0))
    stuck.start()
    reading.wait(10)
    assert distributor.doing().startswith("reading train step 3 for rank 0 for")
    distributor.steps("train", 1, 1, 0)
    release.set()
    stuck.join()
    assert distributor.doing() == "idle" and distributor.get_progress(0)["steps"] == 2


def test_steps_that_are_asked_for_once_more_are_counted_once(tmp_path: Path) -> None:
    distributor = DataDistributor({"train": feeding_of(tmp_path / "a", 75, world_size=2)})
    for first, count in ((5, 4), (1, 4), (3, 4), (1, 8)):  # calls that are answered in another order, a restarted rank
        distributor.steps("train", first, count, 0)
    distributor.steps("train", 1, 3, 1)
    ahead, behind = distributor.get_progress(0), distributor.get_progress(1)
    assert (ahead["steps"], ahead["last_step"], ahead["steps_behind"], ahead["slowest_rank"]) == (8, 8, 0, 1)
    assert (behind["steps"], behind["last_step"], behind["steps_behind"], behind["slowest_rank"]) == (3, 3, 5, 1)
    mine = [steps_of(distributor.feedings["train"], step)[0] for step in range(1, 9)]
    assert ahead["samples"] == sum(len(micro.sample_ids) for step in mine for micro in step.micro_batches)
    distributor.steps("train", 501, 2, 0)
    resumed = distributor.get_progress(0)
    assert (resumed["steps"], resumed["last_step"]) == (10, 502)


def test_a_rank_that_was_handed_nothing_is_behind_all_others(tmp_path: Path) -> None:
    distributor = DataDistributor({"train": feeding_of(tmp_path / "a", 75, world_size=2)})
    distributor.steps("train", 1, 4, 0)
    assert distributor.get_progress(1) == {
        "rank": 1, "steps": 0, "last_step": 0, "samples": 0, "samples_per_second": 0.0, "steps_behind": 4, "slowest_rank": 1
    }  # fmt: skip


def test_who_is_behind_is_said_only_when_somebody_is(tmp_path: Path) -> None:
    distributor = DataDistributor({"train": feeding_of(tmp_path / "a", 75, world_size=2)})
    distributor.steps("train", 1, 4, 0)
    distributor.steps("train", 1, 4, 1)
    assert distributor.doing() == "idle"
    distributor.steps("train", 5, 4, 0)
    assert distributor.doing() == "idle; rank 1 is furthest behind: it was handed train steps up to 4, others up to 8"


def test_the_table_of_the_ranks_names_the_slowest() -> None:
    one = Handed(samples=1920, pieces=[range(1, 121)], since=0.0, last=10.0)
    lines = table({1: replace(one, pieces=[range(1, 119)], samples=1888), 0: one}).splitlines()
    assert [line.split() for line in lines[1:]] == [["0", "120", "1,920", "0"], ["1", "118", "1,888", "2", "slowest"]]
    assert table({0: one, 1: replace(one, last=11.0)}).splitlines()[2].endswith("slowest"), "of those equally far, who took longest"
    assert "slowest" not in table({0: one})


@pytest.mark.parametrize("world", [1, 3])
def test_one_giant_row_arrives_whole_and_alone(tmp_path: Path, world: int) -> None:
    lengths = [20] * 15 + [5000] + [20] * 16
    with Writer(tmp_path / "a") as writer:
        rows = [[3] * length for length in lengths]
        writer.append({"input_ids": ragged(rows), "labels": ragged(rows)}, np.array(lengths))
        writer.finish()
    feeding = Feeding(str(tmp_path / "a"), "causal", 0, 16, world, Budget(tokens=512), shuffle=True)
    ranks = [rank for step in (1, 2) for rank in steps_of(feeding, step)]
    (giant,) = [micro for rank in ranks for micro in rank.micro_batches if 15 in micro.sample_ids]
    assert ids_of(ranks) == list(range(32)) and giant.sample_ids.tolist() == [15] and giant.columns["input_ids"].lengths.tolist() == [5000]
    assert all(micro.shape.cost <= 512 for rank in ranks for micro in rank.micro_batches if micro is not giant)


def test_a_call_ends_at_its_bytes_with_at_least_one_step(tmp_path: Path) -> None:
    distributor = DataDistributor({"train": feeding_of(tmp_path / "a", 75)})
    whole = distributor.steps("train", 1, 4, 0)
    for most, steps in ((1, 1), (whole.num_bytes, 4)):
        call = distributor.steps("train", 1, 4, 0, most)
        assert len(call.steps) == steps and np.array_equal(call.sample_ids, whole.sample_ids[: len(call.sample_ids)])
    assert len(distributor.steps("train", 3, 4, 0, 1).sample_ids) == len(distributor.steps("train", 3, 1, 0).sample_ids)


def test_ready_rows_longer_than_a_packed_sequence_make_it_longer(tmp_path: Path) -> None:
    with Writer(tmp_path / "a") as writer:
        rows = [[3] * 700, [4] * 20, [5] * 30]
        writer.append({"input_ids": ragged(rows), "labels": ragged(rows)}, np.array([700, 20, 30]))
        writer.finish()
    feeding = Feeding(str(tmp_path / "a"), "causal", 0, 3, 1, Budget(tokens=4096), shuffle=False, pack_length=512)
    (step,) = DataDistributor({"train": feeding}).steps("train", 1, 1, 0).unpack()
    assert sorted(step.micro_batches[0].sample_ids.tolist()) == [0, 1, 2] and step.micro_batches[0].shape.source >= 700


@pytest.mark.parametrize("budget", [TOKENS, Budget(rows=4)])
def test_joined_shapes_are_fewer_and_hold_the_same_samples(tmp_path: Path, budget: Budget) -> None:
    """Whichever step is asked for first, and with any workers, wherever these leave k as it is."""
    feeding = feeding_of(tmp_path / "a", 200, budget=budget)
    alone, joined, shared = (
        DataDistributor({"train": replace(feeding, joined=joins, world_size=world)}) for joins, world in ((False, 1), (True, 1), (True, 2))
    )
    shared.shapes("train", 9, 1)
    equal = 0
    for step in range(1, 27):
        (ids, parts), (same_ids, padded), (_, of_shared) = (each.composed("train", step) for each in (alone, joined, shared))
        assert ids.tolist() == same_ids.tolist()
        costs = [part.shape.cost for part in padded]
        assert costs == sorted(costs, reverse=True) and (budget.tokens is None or max(costs) <= budget.tokens)
        shape_of = {tuple(part.samples.tolist()): part.shape for part in parts}
        for part in padded:
            own = shape_of[tuple(part.samples.tolist())]
            assert all(size <= room for size, room in zip(own, part.shape, strict=True))
        if len(padded) == len(of_shared):
            equal += 1
            assert [(part.shape, part.samples.tolist()) for part in of_shared] == [(part.shape, part.samples.tolist()) for part in padded]
    assert equal > 5 and len(joined.shapes("train", 1, 12)) < len(alone.shapes("train", 1, 12))


def test_the_shapes_of_the_steps_ahead_are_counted_over_all_ranks(tmp_path: Path) -> None:
    feeding = feeding_of(tmp_path / "a", 75)
    distributor = DataDistributor({"train": feeding})
    for first, count in ((1, 32), (7, 3)):
        ahead = [micro.shape for step in range(first, first + count) for rank in steps_of(feeding, step) for micro in rank.micro_batches]
        assert distributor.shapes("train", first, count) == Counter(ahead)


def test_a_step_is_composed_once_for_all_ranks(tmp_path: Path) -> None:
    distributor = DataDistributor({"train": feeding_of(tmp_path / "a", 75, world_size=4)})
    for rank in range(4):
        distributor.steps("train", 1, 300, rank)
    assert distributor.composed.cache_info().misses == 300
