"""Who is named when a training stands still: the rank that has begun the fewest pieces of work."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.cluster.hangs import (
    BEAT_SECONDS,
    FIRST_STEP_SECONDS,
    HANG_SECONDS,
    NOTICE_SECONDS,
    PATIENCE,
    Heart,
    Sign,
    Stillness,
    Stillnesses,
    signs,
    standing,
)
from trainkit.runs.folder import RunFolder


class Group:
    """Ranks that move when they are told to, and a clock that runs with them."""

    def __init__(self, world_size: int, longest: float = 1.0):
        self.now = 0.0
        self.signs = [Sign(rank, 0, 1, 0, "forward", True, longest, "model.py:1 in forward", False) for rank in range(world_size)]
        self.seen = Stillnesses(world_size, lambda: self.signs, lambda: self.now)

    def moves(self, *ranks: int, silent: tuple[int, ...] = (), seconds: float = BEAT_SECONDS, **changes: object) -> Stillness | None:
        """So many seconds later these ranks have begun another piece of work, and all but `silent` have given a sign."""
        self.now += seconds
        for rank, sign in enumerate(self.signs):
            if rank in ranks:
                sign = replace(sign, pieces=sign.pieces + 1, step=sign.step + 1, **changes)
            self.signs[rank] = sign if rank in silent else replace(sign, beat=sign.beat + 1)
        return self.seen.look()

    def stands_still(self, seconds: float, silent: tuple[int, ...] = ()) -> Stillness | None:
        found = None
        for _ in range(int(seconds / BEAT_SECONDS) + 1):
            found = self.moves(silent=silent)
        return found


def warm(world_size: int) -> Group:
    """A group in the middle of its training."""
    group = Group(world_size)
    for _ in range(5):
        assert group.moves(*range(world_size)) is None
    return group


@given(world_size=st.integers(2, 8), data=st.data())
def test_the_rank_that_stays_behind_is_named_within_two_minutes(world_size: int, data: st.DataObject) -> None:
    culprit = data.draw(st.integers(0, world_size - 1))
    group, others = warm(world_size), [rank for rank in range(world_size) if rank != culprit]
    for _ in range(data.draw(st.integers(1, 3))):  # a GPU's host runs ahead of what it waits for
        group.moves(*others)
    assert group.stands_still(NOTICE_SECONDS - 10) is None
    notice = group.stands_still(15)
    assert notice is not None and not notice.hangs and notice.sign.rank == culprit and "model.py:1 in forward" in notice.text()
    found = group.stands_still(HANG_SECONDS - NOTICE_SECONDS)
    assert found is not None and found.hangs and found.seconds < 120
    assert (found.error().facts["rank"], found.error().facts["from_outside"]) == (culprit, False)
    assert f"rank {culprit} stands at" in found.error().message


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_process_that_gives_no_sign_is_named_wherever_it_stands(culprit: int) -> None:
    group = warm(3)
    group.moves(culprit, silent=(culprit,), in_step=False)
    found = group.stands_still(HANG_SECONDS, silent=(culprit,))
    assert found is not None and found.hangs and found.silent and found.sign.rank == culprit
    assert found.error().facts["from_outside"] and "gives no sign of life" in found.error().message


def test_of_ranks_in_the_same_piece_the_one_outside_of_a_collective_is_named() -> None:
    group = warm(3)
    group.signs = [replace(sign, waits=sign.rank != 1) for sign in group.signs]
    found = group.stands_still(HANG_SECONDS)
    assert found is not None and found.sign.rank == 1


def test_slow_steps_are_no_hang() -> None:
    group = Group(2, longest=HANG_SECONDS / 2)
    found = group.stands_still(PATIENCE * HANG_SECONDS / 2 - 10)
    assert found is not None and not found.hangs, "a run whose pieces take long is given longer"
    found = group.stands_still(20)
    assert found is not None and found.hangs


def test_the_first_step_warms_up() -> None:
    group = Group(2, longest=0.0)
    found = group.stands_still(FIRST_STEP_SECONDS - 10)
    assert found is not None and not found.hangs, "nothing is known yet"
    found = group.stands_still(20)
    assert found is not None and found.hangs


def test_a_heart_measures_the_pieces_of_steps_after_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    heart, longest = Heart(RunFolder.create(tmp_path, "it"), 0), []
    pieces = [
        *((0, "building", 90), (1, "forward", 60), (1, "update", 3), (2, "forward", 2), (2, "update", 5)),
        *((2, "exporting", 70), (3, "forward", 1), (3, "update", 0)),
    ]
    for step, piece, seconds in pieces:
        heart.begins(step, piece, in_step=piece in ("forward", "update"))
        longest.append(heart.place.longest)
        now += seconds
    assert longest == [0, 0, 0, 60, 3, 5, 60, 5], "the most of any piece after the first step, and of its own kind"


def test_an_export_takes_what_it_takes() -> None:
    group = warm(2)
    group.moves(0, 1, in_step=False, piece="exporting the model")
    found = group.stands_still(10 * HANG_SECONDS)
    assert found is not None and not found.hangs and "exporting the model" in found.text()


def test_a_long_evaluation_in_which_a_rank_is_silent_for_a_while_goes_on() -> None:
    group = warm(2)
    group.moves(0, 1, in_step=False, piece="evaluating")
    group.stands_still(5 * HANG_SECONDS)
    found = group.stands_still(NOTICE_SECONDS + 5, silent=(1,))
    assert found is not None and found.silent and not found.hangs and found.seconds < HANG_SECONDS
    found = group.stands_still(HANG_SECONDS, silent=(1,))
    assert found is not None and found.hangs and found.sign.rank == 1


def test_a_folder_that_stands_still_hangs_nobody() -> None:
    found = warm(2).stands_still(10 * HANG_SECONDS, silent=(0, 1))
    assert found is not None and not found.hangs


def test_a_machine_that_slept_forgives_its_ranks() -> None:
    group = warm(2)
    assert group.moves(seconds=10_000) is None
    assert group.moves(0, 1) is None


def test_nobody_is_named_before_all_have_spoken() -> None:
    group = Group(2)
    group.signs = group.signs[:1]
    assert group.stands_still(10 * HANG_SECONDS) is None


def test_a_heart_says_in_which_line_the_thread_stands(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "it")
    assert signs(folder, 2) == []
    heart = Heart(RunFolder(folder.path, folder.begin_attempt()), 1)
    heart.begins(7, "forward and backward of micro-batch 2 of 2")
    heart.start()
    while not (found := signs(folder, 2)):
        time.sleep(0.01)
    heart.stop()
    heart.thread.join()
    (sign,) = found
    assert (sign.rank, sign.step, sign.pieces, sign.piece, sign.in_step) == (1, 7, 1, "forward and backward of micro-batch 2 of 2", True)
    assert "/test_hangs.py:" in sign.line or "/mailbox.py:" in sign.line or "/hangs.py:" in sign.line
    assert heart.thread not in threading.enumerate()
    folder.sign_path(0).write_text("{torn")
    assert signs(folder, 2) == [sign] and 0 <= time.time() - folder.last_sign_seconds() < 60
    folder.begin_attempt()
    assert signs(folder, 2) == []
    heart._beat()
    assert signs(folder, 2) == [], "that was a rank of the attempt before"


def test_a_thread_stands_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys, "_current_frames")  # under torch's compiler a process dies of them
    waits = threading.Event()
    code = compile("def all_reduce(event):\n    event.wait()\n", "/site/torch/distributed/distributed_c10d.py", "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    threads = [threading.Thread(target=waits.wait), threading.Thread(target=lambda: names["all_reduce"](waits))]
    for thread in threads:
        thread.start()
    while not standing(threads[1].ident or 0)[1]:
        time.sleep(0.01)
    plain, collective = (standing(thread.ident or 0) for thread in threads)
    waits.set()
    for thread in threads:
        thread.join()
    assert plain[0].partition("/")[2].startswith("threading.py:") and not plain[1], "all of it is Python's own library"
    assert collective == ("distributed/distributed_c10d.py:2 in all_reduce", True)
    assert standing(threads[0].ident or 0) == ("an unknown line", False), "it has ended"
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    assert standing(threading.get_ident()) == ("an unknown line", False)
