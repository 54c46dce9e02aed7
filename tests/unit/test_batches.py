from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data import catalogue
from trainkit.data.batches import Budget, LinedUp, Part, Shape, compose, deal, round_up
from trainkit.data.catalogue import LENT, SHAPES, Catalogues
from trainkit.data.order import samples_of_step
from trainkit.data.packing import pack

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
    catalogues = Catalogues(source, target, samples, Budget(tokens=tokens))
    for first in range(0, len(source), samples):
        own, other = source[first : first + samples], target[first : first + samples]
        parts = compose(own, other, world, Budget(tokens=tokens), catalogues)
        assert len(parts) % world == 0 and len(catalogues(len(own), len(parts)).shapes) <= SHAPES
        assert np.array_equal(np.sort(np.concatenate([part.samples for part in parts])), np.arange(len(own)))
        for part in parts:
            assert len(part.samples) <= part.shape.rows
            assert part.shape.cost <= tokens or part.shape.rows == len(part.samples) == 1
            if len(part.samples):
                assert part.shape.source >= own[part.samples].max() and part.shape.target >= other[part.samples].max()
            if part.shape.cost > tokens:
                assert part.shape.cost < own[part.samples[0]] + other[part.samples[0]] + 16, "alone, padded to nothing"


def same(ours: list[Part], theirs: list[Part]) -> bool:
    return all(np.array_equal(a.samples, b.samples) and a.shape == b.shape for a, b in zip(ours, theirs, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS, samples=st.integers(1, 80), worlds=st.tuples(WORLDS, WORLDS), tokens=st.integers(64, 8192), one_sequence=st.booleans()
)
def test_layouts_with_equal_k_train_identical_micro_batches(
    lengths: list[tuple[int, int]], samples: int, worlds: tuple[int, int], tokens: int, one_sequence: bool
) -> None:
    """Each layout chooses its own shapes; the second meets the steps in another order."""
    source, target = arrays(lengths, one_sequence)
    budget, firsts = Budget(tokens=tokens), range(0, len(source), samples)
    cuts: list[dict[int, list[Part]]] = []
    for world, order in zip(worlds, (firsts, firsts[::-1]), strict=True):
        catalogues = Catalogues(source, target, samples, budget)
        steps = {first: (source[first : first + samples], target[first : first + samples]) for first in order}
        cuts.append({first: compose(*step, world, budget, catalogues) for first, step in steps.items()})
    for first in firsts:
        ours, theirs = (cut[first] for cut in cuts)
        assert len(ours) != len(theirs) or same(ours, theirs)


def test_one_worker_and_many_share_micro_batches_where_k_is_a_multiple_by_chance() -> None:
    """One worker needs 15 or 16 micro-batches; of those 2 workers can have 16, and 3 and 5 workers 15."""
    source, target = lognormal(8192)
    budget, worlds = Budget(tokens=2220), (1, 2, 3, 5)
    cuts = {}
    for world in worlds:
        catalogues = Catalogues(source, target, 512, budget)
        cuts[world] = [compose(source[i : i + 512], target[i : i + 512], world, budget, catalogues) for i in range(0, 8192, 512)]
    assert {len(cut) for cut in cuts[1]} == {15, 16}, "the budget is chosen so that the layouts differ in some steps"
    for world in worlds[1:]:
        equal = [(ours, theirs) for ours, theirs in zip(cuts[1], cuts[world], strict=True) if len(ours) == len(theirs)]
        assert 0 < len(equal) < 16 and all(same(*pair) for pair in equal)


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
    catalogues = Catalogues(source, target, 512, budget)
    loads, shapes = [], set()
    for first in range(0, len(source), 512):
        parts = compose(source[first : first + 512], target[first : first + 512], 8, budget, catalogues)
        costs = [part.shape.cost for part in parts]
        shapes |= {part.shape for part in parts}
        loads.append([sum(costs[index] for index in mine) for mine in deal(costs, 8)])
    assert len(costs) >= 16 and len(shapes) <= SHAPES
    assert np.mean([max(load) / np.mean(load) for load in loads]) <= 1.02


def test_a_step_that_its_catalogue_cannot_hold_borrows_few_shapes_of_the_first() -> None:
    source, target = lognormal(8192)
    budget, step = Budget(tokens=2200), slice(5632, 6144)  # for 18 workers; with the shapes for 18 it would take more
    catalogues = Catalogues(source, target, 512, budget)
    own = catalogues(512, 18)
    assert own is not catalogues.first and len(own.shapes) <= SHAPES - LENT
    assert LinedUp.of(source[step], target[step], budget, own).fewest > 18
    parts = compose(source[step], target[step], 18, budget, catalogues)
    assert np.array_equal(np.sort(np.concatenate([part.samples for part in parts])), np.arange(512))
    borrowed = {part.shape for part in parts} - {Shape(*shape) for shape in own.shapes.tolist()}
    assert len(parts) == 18 and 0 < len(borrowed) <= LENT


def test_shapes_are_borrowed_in_the_line_in_which_the_first_holds_the_step() -> None:
    """The first wants least padding and looks at two lines, the one for k wants equal costs and looks at one."""
    rng = np.random.default_rng(124)
    rows, sigma = int(rng.integers(200, 2500)), rng.choice([0.5, 0.8, 1.1])
    source = np.clip(rng.lognormal(3, sigma, rows).astype(int), 3, 400)
    target = np.clip(rng.lognormal(2.7, sigma, rows).astype(int), 2, 300)
    budget = Budget(tokens=716)
    catalogues = Catalogues(source, target, 32, budget)
    ids = samples_of_step(42, rows, 32, 15)
    first = LinedUp.of(source[ids], target[ids], budget, catalogues.first)
    assert [line.fewest for line in first.lines] == [11, 10] and catalogues.first.power == 1 < catalogues(32, 10).power
    assert LinedUp.of(source[ids], target[ids], budget, catalogues(32, 10)).fewest > 10
    parts = compose(source[ids], target[ids], 2, budget, catalogues)
    assert len(parts) == 10 and np.array_equal(np.sort(np.concatenate([part.samples for part in parts])), np.arange(32))


@pytest.mark.parametrize("k", [2, 4, 8])
def test_few_micro_batches_cost_the_same_where_the_budget_bounds_none(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro-batch for each rank: the dearest one is what a step takes."""
    rng, budget = np.random.default_rng(1), Budget(tokens=192 * 256 // k)
    source, target = np.clip(rng.gamma(8, 2.6, 20_000), 8, 70).astype(int), np.clip(rng.gamma(5, 3.3, 20_000), 5, 90).astype(int)
    steps = [slice(256 * step, 256 * (step + 1)) for step in range(20)]

    def costs() -> np.ndarray:
        catalogues = Catalogues(source, target, 256, budget)
        return np.array([[part.shape.cost for part in compose(source[rows], target[rows], k, budget, catalogues)] for rows in steps])

    even = costs()
    monkeypatch.setattr(catalogue, "LOOSE", np.inf)
    cheapest = costs()
    assert (even.max(1) / even.mean(1)).mean() < 1.08
    assert even.max(1).mean() < 0.93 * cheapest.max(1).mean() and even.sum() < 1.1 * cheapest.sum()


@pytest.mark.parametrize("rows", [1, 3, 512])
def test_rows_of_one_length_fill_their_micro_batches(rows: int) -> None:
    length = np.full(rows, 96)
    catalogues = Catalogues(length, length, 96, Budget(tokens=32 * 192))
    parts = compose(length[:96], length[:96], 2, Budget(tokens=32 * 192), catalogues)
    assert sum(len(part.samples) for part in parts) == min(rows, 96) and len(parts) == (2 if rows < 512 else 4)


def test_a_giant_row_stands_alone() -> None:
    source = np.array([20] * 63 + [5000])
    catalogues = Catalogues(source, np.zeros_like(source), 64, Budget(tokens=1024))
    parts = compose(source, np.zeros_like(source), 2, Budget(tokens=1024), catalogues)
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


def test_shapes_from_64_tokens_on_are_multiples_of_8() -> None:
    source, target = np.random.default_rng(3).integers(1, 700, (2, 3000))
    shapes = Catalogues(source, target, 64, Budget(tokens=8192))(64, 12).shapes[:, 1:]
    assert (shapes[shapes >= 64] % 8 == 0).all() and (shapes >= 64).any()


def test_a_cut_near_an_even_pace_is_as_good_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = lognormal(65_536)
    step, budget = (source[:8192], target[:8192]), Budget(tokens=2700)
    catalogues = Catalogues(source, target, 8192, budget)
    near = compose(*step, 1, budget, catalogues)
    began = time.process_time()
    compose(*step, 1, budget, catalogues)
    assert time.process_time() - began < 0.25, "8 ms on an idle core"
    monkeypatch.setattr("trainkit.data.batches._SLACK_SAMPLES", 1 << 40)
    of_all = compose(*step, 1, budget, catalogues)
    assert len(near) == len(of_all) > 100
    assert sum(part.shape.cost for part in near) <= 1.002 * sum(part.shape.cost for part in of_all)


def test_shapes_of_large_steps_are_chosen_on_a_part_of_them() -> None:
    source, target = lognormal(65_536)
    catalogues, began = Catalogues(source, target, 16_384, Budget(tokens=512)), time.process_time()
    parts = compose(source[:16_384], target[:16_384], 2, catalogues.budget, catalogues)
    assert time.process_time() - began < 10, "one second on an idle core"
    assert len(parts) > 1000 and (source + target)[:16_384].sum() / sum(part.shape.cost for part in parts) > 0.84
