"""Which shapes run before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trainkit.data.batches import Shape
from trainkit.planning.facts import DataFacts, Hardware
from trainkit.planning.planner import Plan, make_plan
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.zero import read_zero
from trainkit.training.warm_up import STEPS, steps_looked_at, warm_up, warm_ups

RECIPE = Path(__file__).parents[2] / "recipes/t5_large_zero1.yaml"
OFTEN, SELDOM, DEAREST, SQUARE, ONE_ROW = Shape(40, 20, 16), Shape(41, 20, 16), Shape(20, 72, 96), Shape(10, 24, 24), Shape(1, 90, 30)
USES = {OFTEN: 100, SELDOM: 1, DEAREST: 1, SQUARE: 1, ONE_ROW: 1}


@pytest.fixture
def plan() -> Plan:
    recipe = read_recipe(RECIPE, ["train.max_steps=1000", "batch.samples=64", "scaling.num_workers=2"])
    planned = make_plan(recipe, read_zero("zero1"), None, DataFacts(6400, None), Hardware("cuda", "GPU", None))
    return replace(planned, compile_blocks=True, cuda_graphs=True)


def test_each_kind_runs_once_and_what_comes_often_is_captured(plan: Plan) -> None:
    expected = [(DEAREST, False), (OFTEN, True), (SQUARE, False), (ONE_ROW, False)]
    assert warm_ups(USES, 1, plan) == expected, "dearest first"
    assert warm_ups(USES | {OFTEN: 5}, 980, plan) == expected[:1] + expected[2:], "three uses on each rank are left"
    assert warm_ups(USES, 1, replace(plan, cuda_graphs=False)) == expected[:1] + expected[2:]


def test_where_few_shapes_are_compiled_for_their_sizes_the_most_used_are(plan: Plan) -> None:
    exact = replace(plan, compile_exact=True)
    assert warm_ups({OFTEN: 100, SQUARE: 1}, 1, exact) == [(OFTEN, True), (SQUARE, False)]
    assert warm_ups({OFTEN: 100, SQUARE: 90, DEAREST: 80, ONE_ROW: 1}, 1, exact) == [(DEAREST, True), (OFTEN, True), (SQUARE, True)]


def test_how_many_steps_are_looked_at(plan: Plan) -> None:
    assert steps_looked_at(plan, 1) == STEPS and steps_looked_at(plan, 990) == 11 and steps_looked_at(plan, 1001) == 0
    assert steps_looked_at(replace(plan, samples_per_step=4096), 1) == 4
    assert steps_looked_at(replace(plan, compile_blocks=False), 1) == STEPS, "graphs alone are made for shapes, too"
    assert steps_looked_at(replace(plan, compile_blocks=False, cuda_graphs=False), 1) == 0


class Engine:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.ran = plan, list[tuple[Shape, bool]]()

    def warm_up(self, batch: Shape, capture: bool) -> None:
        self.ran.append((batch, capture))


def test_it_tells_how_far_it_is(plan: Plan) -> None:
    engine, told = Engine(plan), list[tuple[int, int]]()
    warm_up(engine, USES, 1, lambda shape: shape, lambda number, of: told.append((number, of)))  # type: ignore[arg-type,return-value]
    assert engine.ran == warm_ups(USES, 1, plan) and told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_only_the_most_used_are_compiled_and_nothing_once_it_is_done(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, allowed = Engine(replace(plan, compile_exact=True)), list[bool]()
    monkeypatch.setattr("trainkit.training.warm_up.let_compile", allowed.append)
    warm_up(engine, {OFTEN: 100, SQUARE: 90, DEAREST: 80}, 1, lambda shape: shape)  # type: ignore[arg-type,return-value]
    assert [shape for shape, _ in engine.ran] == [DEAREST, OFTEN, SQUARE] and allowed == [False, True, True, False]
    allowed.clear()
    warm_up(Engine(plan), USES, 1, lambda shape: shape)  # type: ignore[arg-type,return-value]
    assert allowed == []
