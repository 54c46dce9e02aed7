from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.order import chain, combine, permute, samples_of_step, set_hash, steps_per_epoch

ROWS = st.integers(1, 3000)


@given(rows=ROWS, key=st.integers(0, 2**64 - 1))
def test_an_order_holds_every_row_once(rows: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(rows), rows, key)), np.arange(rows))


@given(rows=st.integers(1, 10**9), key=st.integers(0, 2**64 - 1), data=st.data())
def test_a_position_is_computed_by_itself_at_any_size(rows: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20, unique=True)))
    together = permute(positions, rows, key)
    assert len(set(together.tolist())) == len(positions) and together.min() >= 0 and together.max() < rows
    assert together.tolist() == [int(permute(np.array([position]), rows, key)[0]) for position in positions]


@given(rows=ROWS, samples=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_the_steps_of_an_epoch_hold_every_row_once(rows: int, samples: int, seed: int) -> None:
    steps = steps_per_epoch(rows, samples)
    for first in (1, steps + 1):
        ids = np.concatenate([samples_of_step(seed, rows, samples, step) for step in range(first, first + steps)])
        assert np.array_equal(np.sort(ids), np.arange(rows))


def test_epochs_and_seeds_differ_in_order() -> None:
    orders = [tuple(samples_of_step(seed, 500, 500, step)) for seed in (1, 2) for step in (1, 2)]
    assert len(set(orders)) == 4


def test_an_order_is_mixed() -> None:
    """Rank correlation of position and sample id stays within four standard deviations of chance, at several sizes."""
    for rows in (1000, 4097, 70_000):
        order = permute(np.arange(rows), rows, combine(7, 0))
        assert abs(np.corrcoef(np.arange(rows), order)[0, 1]) < 4 / np.sqrt(rows)


def test_evaluation_takes_rows_as_they_lie() -> None:
    assert samples_of_step(1, 10, 4, 3, shuffle=False).tolist() == [8, 9]


@given(ids=st.lists(st.integers(0, 2**40), min_size=2, max_size=50, unique=True), data=st.data())
def test_hashes_of_parts_add_up_and_a_missing_sample_shows(ids: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(ids)))
    whole = set_hash(np.array(ids))
    assert (set_hash(np.array(ids[:cut], dtype=np.int64)) + set_hash(np.array(ids[cut:], dtype=np.int64))) % 2**64 == whole
    assert set_hash(np.array(ids[1:])) != whole
    assert chain("", whole) != chain(chain("", whole), whole)


def test_positions_outside_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.9"):
        permute(np.array([10]), 10, 0)


@pytest.mark.parametrize("rows", [1, 8191, 8192, 8193, 20_000])
@pytest.mark.parametrize("samples", [1, 96, 8192, 10_000])
def test_a_step_is_its_slice_of_the_epochs_order(rows: int, samples: int) -> None:
    """Steps are cut from cached blocks of the order; where the blocks end must not show."""
    steps = steps_per_epoch(rows, samples)
    whole = permute(np.arange(rows), rows, combine(5, 1))
    for index in {0, 1, steps // 2, steps - 1} & set(range(steps)):
        assert np.array_equal(samples_of_step(5, rows, samples, steps + index + 1), whole[index * samples : (index + 1) * samples])
