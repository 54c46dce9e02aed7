"""Joint shapes: which there are, and which micro-batch runs in which."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.batches import Shape
from trainkit.data.covers import MAKING, MOST_JOINED, MOST_PADDING, MOST_WASTE, Covers, choose_covers

SHAPES = st.builds(Shape, st.integers(1, 60), st.integers(1, 90), st.integers(0, 40))
USES = st.dictionaries(SHAPES, st.integers(1, 200), min_size=1, max_size=12)


def holds(cover: Shape, shape: Shape) -> bool:
    return all(size <= room for size, room in zip(shape, cover, strict=True))


def padded(uses: dict[Shape, int], covers: Covers) -> int:
    return sum(count * covers(shape).cost for shape, count in uses.items())


@given(USES, st.floats(0.1, 1000), st.none() | st.integers(1, 5000))
def test_every_shape_runs_in_one_that_holds_it_without_much_padding(uses: dict[Shape, int], repeats: float, limit: int | None) -> None:
    covers, dearest = choose_covers(uses, repeats, limit), max(shape.cost for shape in uses)
    for shape in uses:
        cover = covers(shape)
        assert cover in covers.shapes and holds(cover, shape)
        assert cover.cost <= min(MOST_WASTE[0] * shape.cost, dearest)
        assert cover == shape or limit is None or cover.cost <= limit, "a row beyond the budget is joined with nothing"
    assert all(covers(cover) == cover for cover in covers.shapes)


@given(USES, st.floats(0.1, 1000))
def test_padding_costs_less_than_the_graphs_that_it_saves(uses: dict[Shape, int], repeats: float) -> None:
    covers = choose_covers(uses, repeats)
    alone = padded(uses, Covers())
    saved = (len(uses) - len(covers.shapes)) * MAKING * alone / sum(uses.values())
    assert 0 <= (padded(uses, covers) - alone) * repeats <= saved * (1 + 1e-9)
    assert padded(uses, covers) <= MOST_PADDING * alone * (1 + 1e-9)


@given(USES, SHAPES)
def test_a_shape_that_was_not_seen_runs_in_the_cheapest_that_holds_it_or_as_it_is(uses: dict[Shape, int], shape: Shape) -> None:
    covers = choose_covers(uses, 1.0)
    holding = [cover.cost for cover in covers.shapes if holds(cover, shape) and cover.cost <= covers.most_waste * shape.cost]
    assert covers(shape).cost == min(holding, default=shape.cost)
    assert covers(shape) == shape or covers(shape) in covers.shapes


def test_the_longer_the_run_the_more_graphs_are_worth_making() -> None:
    uses = {Shape(38, 27, 17): 79, Shape(39, 27, 17): 38, Shape(41, 27, 18): 12, Shape(18, 72, 44): 16, Shape(16, 72, 96): 1}
    numbers = [len(choose_covers(uses, repeats).shapes) for repeats in (0.1, 5, 50, 5000)]
    assert numbers == sorted(numbers) and numbers[0] < numbers[-1] == len(uses)


def test_nothing_to_choose_from() -> None:
    assert choose_covers({}, 1.0) == Covers() and Covers()(Shape(3, 4, 5)) == Shape(3, 4, 5)


def test_of_thousands_of_shapes_those_that_are_used_most_are_joined_and_the_rest_is_hardly_padded() -> None:
    often = {Shape(8, 100, 8 * target): 6 for target in range(1, MOST_JOINED + 1)}
    seldom = {Shape(8, source, 8 * target): 5 for source in range(60, 70) for target in range(1, MOST_JOINED + 1)}
    covers = choose_covers(often | seldom, 1000.0)
    assert 1 < len(covers.shapes) <= MOST_JOINED and covers.most_waste < MOST_WASTE[0]
    assert 1 < padded(often | seldom, covers) / padded(often | seldom, Covers()) <= MOST_PADDING
