"""What is done after a failure: when it starts again, and when it would only fail again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.cluster.faults import Allowed, Failure, Verdict
from trainkit.cluster.faults import decide as decide_on
from trainkit.errors import (
    CapacityError,
    CaptureError,
    DataError,
    ExportMismatch,
    Fault,
    Interrupted,
    NonFiniteError,
    OutOfMemory,
    PlanMismatch,
    RecipeError,
    TrainingError,
    TrainkitError,
    UsageError,
)

MANY = 1_000_000


def decide(failures: Sequence[Failure], max_failures: int, halve: bool = False, shrink: bool = False) -> Verdict:
    return decide_on(failures, Allowed(max_failures, halve, shrink))


def own(ended_at: int, message: str = "a bug", began_at: int = 0, kind: str = "TrainingError") -> Failure:
    return Failure(kind, message, from_outside=False, final=False, began_at=began_at, ended_at=ended_at)


def outside(ended_at: int, began_at: int = 0) -> Failure:
    return Failure("TrainingError", "the process of rank 1 ended", from_outside=True, final=False, began_at=began_at, ended_at=ended_at)


STEPS = st.integers(0, 20)
FAILURES = st.lists(
    st.builds(Failure, st.sampled_from(["TrainingError", "DataError"]), st.sampled_from(["a", "b\nc", ""]), st.booleans(), st.booleans(),
              STEPS, STEPS),
    min_size=1,
)  # fmt: skip
OUTSIDE = st.lists(st.builds(outside, STEPS, STEPS), min_size=1)


def restarts(coming: Sequence[Failure], max_failures: int) -> int:
    """Of a command whose attempts fail so, one after the other."""
    for count in range(len(coming)):
        if not decide(coming[: count + 1], max_failures).again:
            return count
    return len(coming)


@given(coming=FAILURES, max_failures=st.integers(0, 5))
def test_a_command_never_restarts_more_often_than_the_recipe_allows(coming: list[Failure], max_failures: int) -> None:
    assert restarts(coming, max_failures) <= max_failures


@given(coming=OUTSIDE, max_failures=st.integers(0, 5))
def test_what_ended_from_outside_restarts_as_often_as_allowed_wherever_it_ends(coming: list[Failure], max_failures: int) -> None:
    assert restarts(coming, max_failures) == min(len(coming), max_failures)


@given(before=FAILURES, from_outside=st.booleans(), ended_at=STEPS)
def test_an_error_that_would_come_again_stops(before: list[Failure], from_outside: bool, ended_at: int) -> None:
    verdict = decide([*before, Failure("NonFiniteError", "NaN", from_outside, True, 0, ended_at)], MANY)
    assert (verdict.again, verdict.why) == (False, "the same would happen again")


@given(before=FAILURES, began_at=STEPS, message=st.text())
def test_an_own_error_before_the_first_step_stops(before: list[Failure], began_at: int, message: str) -> None:
    verdict = decide([*before, own(began_at, message, began_at)], MANY)
    assert (verdict.again, verdict.why) == (False, "it failed before its first step")


def test_a_record_of_steps_that_lost_its_end_does_not_make_an_attempt_look_as_if_it_trained() -> None:
    """A machine that lost its power keeps the checkpoint, and perhaps not the last lines of steps.jsonl."""
    assert not decide([own(90, began_at=100)], MANY).again


@given(between=FAILURES, ended_at=st.integers(11, 20))
def test_the_same_own_error_at_the_same_step_stops_whatever_came_between(between: list[Failure], ended_at: int) -> None:
    first, again = own(ended_at), own(ended_at, "a bug\nwith another traceback", began_at=10)
    assert decide([first], MANY).again
    verdict = decide([first, *between, again], MANY)
    assert (verdict.again, verdict.why) == (False, f"the same error after step {ended_at} twice")


def test_which_rank_was_first_and_how_many_bytes_were_free_makes_no_other_error() -> None:
    words = "rank {} failed after step 9: OutOfMemoryError: {} GiB free"
    assert not decide([own(9, words.format(0, 1.25)), own(9, words.format(1, 1.5))], MANY).again


@pytest.mark.parametrize("other", [own(8), own(9, "another bug"), own(9, kind="OtherError")])
def test_another_error_or_another_step_is_tried_again(other: Failure) -> None:
    assert decide([own(9), other], MANY).again


def test_a_restart_says_how_many_are_left_and_the_last_names_the_key() -> None:
    assert decide([outside(3)], 2).why == "restart 1 of at most 2"
    assert decide([outside(3)] * 3, 2).why == "run.max_failures: 2"
    assert not decide([outside(3)], 0).again


@pytest.mark.parametrize(
    "kind", [NonFiniteError, OutOfMemory, PlanMismatch, ExportMismatch, UsageError, DataError, CapacityError, Interrupted]
)
def test_what_is_wrong_by_itself_is_final(kind: type[TrainkitError]) -> None:
    failure = Failure.of(kind("so it is", from_outside=True, step=7), 5, 9)
    assert failure == Failure(kind.__name__, "so it is", from_outside=True, final=True, began_at=5, ended_at=9)
    assert not decide([failure], MANY).again


def test_a_wrong_recipe_is_final() -> None:
    failure = Failure.of(RecipeError(faults=(Fault("r.yaml", 3, "train.seed", "no number"),)), 0, 0)
    assert (failure.kind, failure.message, failure.final) == ("RecipeError", "r.yaml:3: train.seed: no number", True)


@pytest.mark.parametrize("from_outside", [True, False])
def test_a_training_error_is_tried_again_and_says_whether_it_came_from_outside(from_outside: bool) -> None:
    failure = Failure.of(TrainingError("the process of rank 1 ended", rank=1, step=9, from_outside=from_outside), 5, 9)
    assert failure == Failure("TrainingError", "the process of rank 1 ended", from_outside, final=False, began_at=5, ended_at=9)
    assert decide([failure], 1).again


def test_every_error_of_the_package_is_decided_on() -> None:
    """A class added to the tree is tried again only as a TrainingError, never by chance."""
    waiting, tried_again = [TrainkitError], set()
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if not Failure.of(kind("so it is"), 0, 1).final:
            tried_again.add(kind)
    assert tried_again == {TrainingError}


OUT_OF_MEMORY = Failure.of(OutOfMemory("step 1: rank 0 ran out of GPU memory", rank=0, step=1, device="GPU"), 0, 0)
NO_PLACE = Failure.of(CapacityError("2 workers found no place in time", no_place=True), 8, 8)


def test_out_of_memory_is_tried_again_with_half_the_budget_alone_and_even_before_the_first_step() -> None:
    assert not decide([OUT_OF_MEMORY], MANY).again
    verdict = decide([OUT_OF_MEMORY], 2, halve=True)
    assert verdict.again and verdict.halve and not verdict.shrink and "half the micro-batch budget" in verdict.why
    assert not decide([OUT_OF_MEMORY] * 3, 2, halve=True).again


def test_an_elastic_run_shrinks_when_its_workers_find_no_place_and_no_other_does() -> None:
    assert not decide([NO_PLACE], MANY).again
    verdict = decide([outside(8), NO_PLACE], 1, shrink=True)
    assert verdict.again and verdict.shrink and not verdict.halve
    assert not decide([outside(8), NO_PLACE, outside(9)], 1).again
    assert decide([outside(8), NO_PLACE, outside(9)], 2).why == "restart 2 of at most 2"


def test_graphs_that_nobody_asked_for_are_given_up_where_they_may_have_failed() -> None:
    failed = CaptureError("no CUDA graph can be made of forward and backward: operation not permitted")
    full, host = OutOfMemory("rank 0 ran out of GPU memory", device="GPU"), OutOfMemory("want of host memory", device="host")
    assert not decide([Failure.of(failed, 0, 0)], MANY).again, "the recipe asks for them"
    for error in (failed, full):
        failure = Failure.of(error, 0, 0, graphs=True)
        verdict = decide([failure], 0, halve=True)
        assert verdict.again and verdict.ungraph and not verdict.halve and verdict.why == "going on without CUDA graphs"
        assert decide([failure, OUT_OF_MEMORY], 1, halve=True).halve, "it counts for nothing"
    assert Failure.of(TrainingError("a bug, or graphs"), 4, 4, graphs=True).of_graphs, "no step was done"
    assert Failure.of(TrainingError("a bug, or sums by blocks"), 4, 4, flat=True).of_graphs
    assert not Failure.of(OutOfMemory("no memory", rank=0, step=1, device="GPU"), 0, 0, flat=True).of_graphs, "there are none to give up"
    assert not Failure.of(TrainingError("a bug"), 4, 5, graphs=True).of_graphs and not Failure.of(host, 0, 0, graphs=True).of_graphs


@given(before=FAILURES, halve=st.booleans(), shrink=st.booleans())
def test_nothing_is_halved_or_shrunk_for_any_other_failure(before: list[Failure], halve: bool, shrink: bool) -> None:
    verdict = decide(before, MANY, halve, shrink)
    assert (verdict.halve, verdict.shrink) == (False, False)
