from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data.batches import Budget, compose, deal, pack, round_up
from trainkit.data.catalogue import SHAPES, make_catalogue

LENGTHS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 200)), min_size=1, max_size=200)
ROWS = st.lists(st.integers(1, 256), min_size=1, max_size=150)
WORLDS = st.integers(1, 8)


def arrays(lengths: list[tuple[int, int]], one_sequence: bool) -> tuple[np.ndarray, np.ndarray]:
    source, target = np.array(lengths).T
    return source, np.zeros_like(target) if one_sequence else target


@settings(max_examples=60)
@given(lengths=LENGTHS, samples=st.integers(1, 80), world=WORLDS, tokens=st.integers(64, 8192), one_sequence=st.booleans())
def test_every_sample_once_within_the_budget_and_equally_many_micro_batches_a_rank(
    lengths: list[tuple[int, int]], samples: int, world: int, tokens: int, one_sequence: bool
) -> None:
    source, target = arrays(lengths, one_sequence)
    catalogue = make_catalogue(source, target, samples, world, Budget(tokens=tokens))
    assert len(catalogue.shapes) <= SHAPES
    for first in range(0, len(source), samples):
        own, other = source[first : first + samples], target[first : first + samples]
        parts = compose(own, other, world, Budget(tokens=tokens), catalogue)
        assert len(parts) % world == 0
        assert np.array_equal(np.sort(np.concatenate([part.samples for part in parts])), np.arange(len(own)))
        for part in parts:
            assert len(part.samples) <= part.shape.rows
            assert part.shape.cost <= tokens or part.shape.rows == len(part.samples) == 1
            if len(part.samples):
                assert part.shape.source >= own[part.samples].max() and part.shape.target >= other[part.samples].max()
            if part.shape.cost > tokens:
                assert part.shape.cost < own[part.samples[0]] + other[part.samples[0]] + 16, "alone, padded to nothing"


@settings(max_examples=30)
@given(lengths=LENGTHS, tokens=st.integers(64, 8192), world=st.sampled_from([2, 4]))
def test_layouts_with_equal_k_train_identical_micro_batches(lengths: list[tuple[int, int]], tokens: int, world: int) -> None:
    source, target = np.array(lengths).T
    budget, samples = Budget(tokens=tokens), max(1, len(lengths) // 2)
    many, one = (make_catalogue(source, target, samples, size, budget) for size in (world, 1))
    steps = [(source[:samples], target[:samples]), (source[samples:], target[samples:])]
    cuts = [(compose(*step, world, budget, many), compose(*step, 1, budget, one)) for step in steps if len(step[0])]
    if len(cuts[0][0]) == len(cuts[0][1]) and np.array_equal(many.shapes, one.shapes):
        for ours, theirs in cuts:
            if len(ours) == len(theirs):
                assert all(np.array_equal(a.samples, b.samples) and a.shape == b.shape for a, b in zip(ours, theirs, strict=True))


def test_shapes_and_cuts_do_not_depend_on_the_layout_that_gives_the_same_k() -> None:
    source, target = lognormal(4096)
    budget, worlds = Budget(tokens=3900), (2, 4)
    catalogues = [make_catalogue(source, target, 512, world, budget) for world in worlds]
    cuts = [compose(source[:512], target[:512], world, budget, catalogue) for world, catalogue in zip(worlds, catalogues, strict=True)]
    assert len({len(cut) for cut in cuts}) == 1, "the budget is chosen so that they agree"
    assert all(np.array_equal(a.samples, b.samples) and a.shape == b.shape for cut in cuts[1:] for a, b in zip(cuts[0], cut, strict=True))


@given(lengths=LENGTHS, world=WORLDS, rows=st.integers(1, 64))
def test_a_budget_of_rows_is_kept(lengths: list[tuple[int, int]], world: int, rows: int) -> None:
    source, target = np.array(lengths).T
    sizes = [len(part.samples) for part in compose(source, target, world, Budget(rows=rows))]
    assert sum(sizes) == len(lengths) and max(sizes) <= rows
    assert len(sizes) == max(1, -(-len(lengths) // (rows * world))) * world


@given(turns=st.integers(1, 12), world=WORLDS)
def test_the_shares_of_the_ranks_are_the_whole(turns: int, world: int) -> None:
    shares = deal(list(range(turns * world, 0, -1)), world)
    assert {len(mine) for mine in shares} == {turns}
    assert sorted(index for mine in shares for index in mine) == list(range(turns * world))


def lognormal(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.lognormal(3.2, 0.5, rows).astype(int).clip(1, 96), rng.lognormal(2.8, 0.5, rows).astype(int).clip(1, 96)


def test_ranks_carry_nearly_equal_cost_in_few_shapes() -> None:
    source, target = lognormal(16_384)
    budget = Budget(tokens=2600)
    catalogue = make_catalogue(source, target, 512, 8, budget)
    loads, shapes = [], set()
    for first in range(0, len(source), 512):
        parts = compose(source[first : first + 512], target[first : first + 512], 8, budget, catalogue)
        costs = [part.shape.cost for part in parts]
        shapes |= {part.shape for part in parts}
        loads.append([sum(costs[index] for index in mine) for mine in deal(costs, 8)])
    assert len(costs) >= 16 and len(shapes) <= SHAPES
    assert np.mean([max(load) / np.mean(load) for load in loads]) <= 1.02


@pytest.mark.parametrize("rows", [1, 3, 512])
def test_rows_of_one_length_fill_their_micro_batches(rows: int) -> None:
    length = np.full(rows, 96)
    catalogue = make_catalogue(length, length, 96, 2, Budget(tokens=32 * 192))
    parts = compose(length[:96], length[:96], 2, Budget(tokens=32 * 192), catalogue)
    assert sum(len(part.samples) for part in parts) == min(rows, 96) and len(parts) == (2 if rows < 512 else 4)


def test_a_giant_row_stands_alone() -> None:
    source = np.array([20] * 63 + [5000])
    catalogue = make_catalogue(source, np.zeros_like(source), 64, 2, Budget(tokens=1024))
    parts = compose(source, np.zeros_like(source), 2, Budget(tokens=1024), catalogue)
    assert parts[0].samples.tolist() == [63] and parts[0].shape == (1, 5000, 0)
    assert all(part.shape.cost <= 1024 for part in parts[1:])


@given(lengths=ROWS, world=WORLDS, longest=st.integers(256, 1024), tokens=st.integers(64, 8192))
def test_packed_sequences_hold_every_row_once_and_are_no_longer_than_asked(
    lengths: list[int], world: int, longest: int, tokens: int
) -> None:
    rows = np.array(lengths)
    parts = pack(rows, world, Budget(tokens=tokens), longest)
    assert len(parts) % world == 0 and len({part.shape.source for part in parts}) == 1
    assert parts[0].shape.rows - parts[-1].shape.rows in (0, 1) and parts[-1].shape.rows > 0
    assert np.array_equal(np.sort(np.concatenate([part.samples for part in parts])), np.arange(len(rows)))
    for part in parts:
        assert part.packed is not None and len(part.packed) == part.shape.rows and part.packed.sum() == len(part.samples)
        assert part.shape.source <= 1.04 * longest + 8 and (part.shape.cost <= tokens or part.shape.rows == 1)
        ends = np.cumsum(part.packed)
        assert all(rows[part.samples[end - count : end]].sum() <= part.shape.source for count, end in zip(part.packed, ends, strict=True))


@pytest.mark.parametrize(("samples", "tokens"), [(64, 2048), (256, 4096), (1024, 16384)])
def test_packing_leaves_little_padding(samples: int, tokens: int) -> None:
    lengths = np.random.default_rng(1).lognormal(3.4, 0.7, samples).astype(int).clip(1, 512)
    parts = pack(lengths, 2, Budget(tokens=tokens), 512)
    assert lengths.sum() / sum(part.shape.cost for part in parts) >= 0.95


def test_long_rows_do_not_leave_all_sequences_half_empty() -> None:
    """61 sequences of 2,048 are needed for 14 micro-batches; 70 would be as long, because of one row."""
    lengths = np.array([2048] + [256] * 8 * 60)
    parts = pack(lengths, 2, Budget(tokens=5 * 2048), 2048)
    assert [part.shape for part in parts] == [(5, 2048, 0)] * 5 + [(4, 2048, 0)] * 9
    assert lengths.sum() / sum(part.shape.cost for part in parts) == 1.0


@pytest.mark.parametrize("rows", [100, 226, 400])
def test_rows_over_half_a_sequence_stay_within_the_budget(rows: int) -> None:
    """Each needs a sequence of its own, whatever their sum."""
    lengths = np.random.default_rng(9).integers(33, 47, rows)
    parts = pack(lengths, 1, Budget(tokens=141), 64)
    assert len(parts) == rows // 2 and all(part.shape.cost <= 141 for part in parts)
    with pytest.raises(ValueError, match="a row of 65 tokens is longer than a packed sequence of 63"):
        pack(np.array([65]), 1, Budget(tokens=141), 63)


def test_lengths_are_rounded_up() -> None:
    assert round_up(np.array([0, 1, 8, 9])).tolist() == [0, 8, 8, 16]
