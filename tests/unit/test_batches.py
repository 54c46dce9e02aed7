from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.batches import Budget, compose, deal, pack, round_up

LENGTHS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 200)), min_size=1, max_size=200)
ROWS = st.lists(st.integers(1, 256), min_size=1, max_size=150)
WORLDS = st.integers(1, 8)


@given(lengths=LENGTHS, world=WORLDS, tokens=st.integers(64, 8192))
def test_every_sample_once_within_the_budget_and_equally_many_micro_batches_a_rank(
    lengths: list[tuple[int, int]], world: int, tokens: int
) -> None:
    source, target = np.array(lengths).T
    parts = compose(source, target, world, Budget(tokens=tokens))
    assert len(parts) % world == 0
    assert np.array_equal(np.sort(np.concatenate([part.samples for part in parts])), np.arange(len(lengths)))
    for part in parts:
        assert len(part.samples) <= part.shape.rows
        assert part.shape.cost <= tokens or part.shape.rows == 1
        if len(part.samples):
            assert part.shape.source >= source[part.samples].max() and part.shape.target >= target[part.samples].max()


@given(lengths=LENGTHS, world=WORLDS, tokens=st.integers(64, 8192))
def test_k_is_the_smallest_multiple_that_fits_when_samples_fill_it_in_order_of_length(
    lengths: list[tuple[int, int]], world: int, tokens: int
) -> None:
    source, target = np.array(lengths).T
    alone = len(compose(source, target, 1, Budget(tokens=tokens)))
    assert len(compose(source, target, world, Budget(tokens=tokens))) == -(-alone // world) * world


@given(lengths=LENGTHS, tokens=st.integers(64, 8192), world=st.sampled_from([2, 4]))
def test_layouts_with_equal_k_train_identical_micro_batches(lengths: list[tuple[int, int]], tokens: int, world: int) -> None:
    source, target = np.array(lengths).T
    many = compose(source, target, world, Budget(tokens=tokens))
    one = compose(source, target, 1, Budget(tokens=tokens))
    if len(one) == len(many):
        assert all(np.array_equal(a.samples, b.samples) and a.shape == b.shape for a, b in zip(one, many, strict=True))


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


def test_ranks_carry_nearly_equal_cost() -> None:
    rng = np.random.default_rng(0)
    source, target = rng.lognormal(3.5, 0.6, 512).astype(int) + 1, rng.lognormal(3, 0.5, 512).astype(int) + 1
    costs = [part.shape.cost for part in compose(source, target, 2, Budget(tokens=2048))]
    loads = [sum(costs[index] for index in mine) for mine in deal(costs, 2)]
    assert len(costs) >= 16 and max(loads) / np.mean(loads) <= 1.03


@given(lengths=ROWS, world=WORLDS, longest=st.integers(256, 1024), tokens=st.integers(64, 8192))
def test_packed_sequences_hold_every_row_once_and_are_no_longer_than_asked(
    lengths: list[int], world: int, longest: int, tokens: int
) -> None:
    rows = np.array(lengths)
    parts = pack(rows, world, Budget(tokens=tokens), longest)
    assert len(parts) % world == 0 and len({part.shape for part in parts}) == 1
    assert np.array_equal(np.sort(np.concatenate([part.samples for part in parts])), np.arange(len(rows)))
    for part in parts:
        assert part.packed is not None and len(part.packed) == part.shape.rows and part.packed.sum() == len(part.samples)
        assert part.shape.source <= 1.04 * longest + 8 and (part.shape.cost <= max(tokens, 1.04 * longest + 8))
        ends = np.cumsum(part.packed)
        assert all(rows[part.samples[end - count : end]].sum() <= part.shape.source for count, end in zip(part.packed, ends, strict=True))


@pytest.mark.parametrize(("samples", "tokens"), [(64, 2048), (256, 4096), (1024, 16384)])
def test_packing_leaves_little_padding(samples: int, tokens: int) -> None:
    lengths = np.random.default_rng(1).lognormal(3.4, 0.7, samples).astype(int).clip(1, 512)
    parts = pack(lengths, 2, Budget(tokens=tokens), 512)
    assert lengths.sum() / sum(part.shape.cost for part in parts) >= 0.95


def test_lengths_are_rounded_up() -> None:
    assert round_up(np.array([0, 1, 8, 9])).tolist() == [0, 8, 8, 16]
