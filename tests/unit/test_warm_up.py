"""Which shapes run before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trainkit.data.batches import Shape
from trainkit.planning.facts import DataFacts, Hardware
from trainkit.planning.plan import Plan
from trainkit.planning.planner import make_plan
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


def test_what_has_kernels_of_its_own_is_run_beside_the_dearest_of_each_kind_of_the_others(plan: Plan) -> None:
    own = replace(plan, compiled_shapes=(OFTEN, SELDOM), cuda_graphs=False)
    assert warm_ups(USES, 1, own) == [(DEAREST, False), (SELDOM, False), (OFTEN, False), (SQUARE, False), (ONE_ROW, False)]
    assert warm_ups({OFTEN: 9}, 1, own) == [(OFTEN, False)]


def test_how_many_steps_are_looked_at(plan: Plan) -> None:
    assert steps_looked_at(plan, 1) == STEPS and steps_looked_at(plan, 990) == 11 and steps_looked_at(plan, 1001) == 0
    assert steps_looked_at(replace(plan, samples_per_step=4096), 1) == 4
    assert steps_looked_at(replace(plan, compile_blocks=False), 1) == STEPS, "graphs alone are made for shapes, too"
    assert steps_looked_at(replace(plan, compile_blocks=False, cuda_graphs=False), 1) == 0


def test_it_tells_how_far_it_is(plan: Plan) -> None:
    class Engine:
        def __init__(self) -> None:
            self.plan, self.ran = plan, list[tuple[Shape, bool]]()

        def warm_up(self, batch: Shape, capture: bool) -> None:
            self.ran.append((batch, capture))

    engine, told = Engine(), list[tuple[int, int]]()
    warm_up(engine, USES, 1, lambda shape: shape, lambda number, of: told.append((number, of)))  # type: ignore[arg-type,return-value]
    assert engine.ran == warm_ups(USES, 1, plan) and told == [(1, 4), (2, 4), (3, 4), (4, 4)]
