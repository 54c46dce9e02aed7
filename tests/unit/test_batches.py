from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.batches import Budget, compose, round_up, share

LENGTHS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 200)), min_size=1, max_size=200)
WORLDS = st.integers(1, 8)


def cost(source: np.ndarray, target: np.ndarray, part: np.ndarray) -> int:
    return len(part) * int(round_up(source[part]).max() + round_up(target[part]).max()) if len(part) else 0


@given(lengths=LENGTHS, world=WORLDS, tokens=st.integers(64, 8192))
def test_every_sample_once_within_the_budget_and_equally_many_micro_batches_a_rank(
    lengths: list[tuple[int, int]], world: int, tokens: int
) -> None:
    source, target = np.array(lengths).T
    parts = compose(source, target, world, Budget(tokens=tokens))
    assert len(parts) % world == 0
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(lengths)))
    assert all(len(part) == 1 or cost(source, target, part) <= tokens for part in parts if len(part))


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
        assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


@given(lengths=LENGTHS, world=WORLDS, rows=st.integers(1, 64))
def test_a_budget_of_rows_cuts_evenly(lengths: list[tuple[int, int]], world: int, rows: int) -> None:
    source, target = np.array(lengths).T
    sizes = [len(part) for part in compose(source, target, world, Budget(rows=rows))]
    assert sum(sizes) == len(lengths) and max(sizes) <= rows and max(sizes) - min(sizes) <= 1
    assert len(sizes) == max(1, -(-len(lengths) // (rows * world))) * world


@given(turns=st.integers(1, 12), world=WORLDS)
def test_the_shares_of_the_ranks_are_the_whole(turns: int, world: int) -> None:
    shares = [share(turns * world, rank, world) for rank in range(world)]
    assert {len(mine) for mine in shares} == {turns}
    assert sorted(index for mine in shares for index in mine) == list(range(turns * world))


def test_ranks_carry_nearly_equal_cost() -> None:
    rng = np.random.default_rng(0)
    source, target = rng.lognormal(3.5, 0.6, 512).astype(int) + 1, rng.lognormal(3, 0.5, 512).astype(int) + 1
    parts = compose(source, target, 2, Budget(tokens=2048))
    loads = [sum(cost(source, target, parts[index]) for index in share(len(parts), rank, 2)) for rank in range(2)]
    assert len(parts) >= 16 and max(loads) / np.mean(loads) < 1.05
