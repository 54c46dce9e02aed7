"""The file protocol of checkpoints: whatever a kill leaves, and whatever becomes of a file, a sound checkpoint is found."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.errors import TrainingError, UsageError
from trainkit.runs import checkpoints
from trainkit.runs.checkpoints import (
    Checkpoint,
    checkpoint_path,
    clear_incomplete,
    commit,
    complete,
    newest_sound,
    prune,
    set_aside,
    write_part,
)

RANKS = 2
STEPS = st.sets(st.integers(1, 2_000_000), min_size=1, max_size=8)


class Killed(BaseException):
    """As by SIGKILL."""


def shard(rank: int) -> str:
    return f"states-{rank}-of-{RANKS}.safetensors"


def content(step: int, rank: int) -> bytes:
    return f"what rank {rank} knew after step {step:06d}".encode() * 20


def save(run: Path, step: int, keep: int = 2, best: int | None = None) -> Checkpoint:
    """What the writers of all ranks do, one after the other."""
    folder = checkpoint_path(run, step)
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(RANKS):
        whole = content(step, rank)
        for piece in (whole[:100], whole):
            (folder / shard(rank)).write_bytes(piece)
        write_part(folder, "1", rank, [shard(rank)])
    commit(folder, "1", RANKS, {"step": step}, seconds=1)
    prune(run, keep, best, newest=step)
    return Checkpoint(folder)


def save_until(operations: int, run: Path, **how: Any) -> list[str]:
    """Save step 200, killed after so many operations on files: no later one is done, not those of a `finally` either."""
    done: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(done) >= operations:
                raise Killed
            done.append(name)
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (Path, "open")):
            patch.setattr(owner, name, counted(name, getattr(owner, name)))
        save(run, 200, **how)
    return done


def sound(run: Path) -> tuple[int | None, list[str]]:
    """Step of the newest checkpoint that holds, and what was told."""
    told: list[str] = []
    found = newest_sound(run, told.append)
    return (None if found is None else found.step), told


def damage(checkpoint: Checkpoint, **changes: Any) -> None:
    """Write something else into the manifest."""
    path = checkpoint.path / checkpoints.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with complete checkpoints of the steps 100 and 200."""
    save(tmp_path, 100)
    save(tmp_path, 200)
    return tmp_path


@pytest.mark.parametrize("rewritten", [False, True], ids=["new", "written again over a torn one"])
@pytest.mark.parametrize(("keep", "best"), [(1, None), (2, None), (1, 50)])
def test_a_save_killed_anywhere_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path: Path, keep: int, best: int | None, rewritten: bool
) -> None:
    def begin(name: str) -> Path:
        run = tmp_path / name
        for step in (50, 100):
            save(run, step)
        if rewritten:
            (save(run, 200, keep=3).path / shard(1)).write_bytes(b"torn")
        return run

    operations = save_until(1_000_000, begin("never"), keep=keep, best=best)
    assert {"fsync", "replace", "unlink", "open"} | ({"rmdir"} if keep == 1 else set()) <= set(operations)
    found = []
    for count in range(len(operations)):
        run = begin(str(count))
        with pytest.raises(Killed):
            save_until(count, run, keep=keep, best=best)
        clear_incomplete(run)
        step, told = sound(run)
        assert step in (100, 200) and (rewritten or not told)
        found.append(step)
        newest = Checkpoint(checkpoint_path(run, step))
        assert all((newest.path / shard(rank)).read_bytes() == content(step, rank) for rank in range(RANKS))
        assert len(complete(run)) == len(list((run / "checkpoints").iterdir()))
        for it in () if rewritten else complete(run):
            it.check()  # nothing that was removed by halves looks whole
        save(run, 200, keep, best)  # and the run goes on
        assert sound(run) == (200, [])
    assert found == sorted(found) and set(found) == {100, 200}


def test_without_a_manifest_nothing_is_complete_and_only_that_is_cleared(run: Path) -> None:
    (checkpoint_path(run, 200) / checkpoints.MANIFEST).unlink()
    (run / "checkpoints" / "notes").mkdir()
    assert [it.step for it in complete(run)] == [100]
    clear_incomplete(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["notes", "step-000100"]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    clear_incomplete(tmp_path)
    prune(tmp_path, 1)
    assert (complete(tmp_path), sound(tmp_path)) == ([], (None, []))


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def renamed(path: Path) -> None:
    path.rename(path.with_name("states-7-of-8.safetensors"))


def stale(path: Path) -> None:
    """A file of the same size, of another step."""
    path.write_bytes(content(100, 1))


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("harm", "why"),
    [(torn, "has 679 bytes, the manifest says 680"), (renamed, "is missing"), (Path.unlink, "is missing"),
     (stale, "its sha256 differs"), (linked, "is missing"), (replaced_by_a_folder, "is missing")],
)  # fmt: skip
def test_a_file_that_is_not_what_was_written_is_named_and_the_older_checkpoint_taken(
    run: Path, harm: Callable[[Path], None], why: str
) -> None:
    newest = complete(run)[0]
    newest.check()
    harm(newest.path / shard(1))
    with pytest.raises(UsageError) as caught:
        newest.check()
    assert str(newest.path) in caught.value.message and f"{shard(1)} {why}" in caught.value.message.replace("is not what was written: ", "")
    assert sound(run) == (100, [caught.value.message])
    assert [it.step for it in complete(run)] == [200, 100]  # left as it is


def test_checkpoints_that_do_not_hold_make_room_for_those_saved_anew(run: Path) -> None:
    steps = [it.step for it in complete(run)]
    aside = set_aside(run, after=steps[-1])
    assert [it.step for it in complete(run)] == steps[-1:] and len(aside) == len(steps) - 1 > 0
    assert all(path.is_dir() and path.name.startswith("broken-step-") for path in aside)
    clear_incomplete(run)
    assert all(path.is_dir() for path in aside), "a person may want to look at them"


def test_a_checkpoint_that_was_renamed_or_is_a_link_is_not_taken(run: Path) -> None:
    newest, *others = complete(run)
    newest.path.rename(checkpoint_path(run, newest.step + 5))
    checkpoint_path(run, newest.step + 7).symlink_to(others[0].path)
    told: list[str] = []
    found = newest_sound(run, told.append)
    assert found is not None and found.step == others[0].step
    (text,) = told
    assert f"it is that of step {newest.step}: its folder was renamed" in text


def test_two_files_that_changed_places_are_found(run: Path) -> None:
    one, other = (checkpoint_path(run, 200) / shard(rank) for rank in range(RANKS))
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)
    with pytest.raises(UsageError, match=shard(0)):
        complete(run)[0].check()
    assert sound(run)[0] == 100


def test_a_disk_that_gives_a_file_back_no_more_is_a_broken_checkpoint_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path, real: Callable[[Path], str] = checkpoints.sha256) -> str:
        if path == checkpoint_path(run, 200) / shard(1):
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoints, "sha256", failing)
    step, (told,) = sound(run)
    assert step == 100 and f"{shard(1)} cannot be read: Input/output error" in told


def test_if_no_checkpoint_holds_each_is_told_of_the_newest_first(run: Path) -> None:
    for step in (100, 200):
        torn(checkpoint_path(run, step) / shard(0))
    found, told = sound(run)
    assert found is None
    assert [str(checkpoint_path(run, step)) in line for step, line in zip((200, 100), told, strict=True)] == [True, True]


FILES = {"a.json": {"bytes": 1, "sha256": "0"}}


@pytest.mark.parametrize(
    "text",
    ["", "no json", "\udcff", "[" * 100_000, "[]", "null", "7", '"files"', "{}", '{"files": {}, "facts": {}}',
     '{"files": [], "facts": {}}', '{"files": "", "facts": {}}', '{"files": 0, "facts": {}}', '{"files": null, "facts": {}}',
     '{"files": ["a.json"], "facts": {}}', '{"files": {"a.json": 7}, "facts": {}}', '{"files": {"a.json": {"bytes": 1}}, "facts": {}}',
     '{"files": {"a.json": {"sha256": "0"}}, "facts": {}}', '{"files": {"a.json": {"bytes": "1", "sha256": "0"}}, "facts": {}}',
     json.dumps({"files": FILES}), json.dumps({"facts": {}}), json.dumps({"files": FILES, "facts": []})],
)  # fmt: skip
def test_a_manifest_that_is_none_is_a_broken_checkpoint(run: Path, text: str) -> None:
    (checkpoint_path(run, 200) / checkpoints.MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match="its manifest cannot be read"):
        complete(run)[0].check()
    step, (told,) = sound(run)
    assert step == 100 and "step-000200: this checkpoint cannot be used: its manifest cannot be read" in told


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "../step-000100/manifest.json", "..", ".", "", "a/b", ".part-1-0.json", "a\n"])
def test_a_manifest_cannot_name_a_file_outside_its_folder(run: Path, name: str) -> None:
    (checkpoint_path(run, 200).parent / "x").write_text("x")
    damage(complete(run)[0], files={name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(UsageError, match="which is no file of a checkpoint"):
        complete(run)[0].check()
    assert sound(run)[0] == 100


def test_a_name_too_long_for_the_system_is_a_broken_checkpoint(run: Path) -> None:
    damage(complete(run)[0], files={"x" * 5000: {"bytes": 1, "sha256": "0"}})
    step, (told,) = sound(run)
    assert step == 100 and "cannot be read: File name too long" in told


def test_a_checkpoint_says_what_it_holds(run: Path) -> None:
    newest = complete(run)[0]
    assert (newest.step, newest.facts, sorted(newest.files)) == (200, {"step": 200}, [shard(0), shard(1)])
    assert newest.files[shard(0)] == {"bytes": 680, "sha256": checkpoints.sha256(newest.path / shard(0))}
    assert sorted(path.name for path in newest.path.iterdir()) == ["manifest.json", shard(0), shard(1)]
    with pytest.raises(UsageError, match="it has no manifest"):
        _ = Checkpoint(checkpoint_path(run, 300)).facts


def with_steps(run: Path, steps: set[int]) -> None:
    for step in steps:
        checkpoint_path(run, step).mkdir(parents=True)
        (checkpoint_path(run, step) / checkpoints.MANIFEST).write_text("{}")


@given(steps=STEPS, keep=st.integers(0, 9), data=st.data())
def test_the_newest_and_the_best_stay_and_never_none(steps: set[int], keep: int, data: st.DataObject) -> None:
    best = data.draw(st.none() | st.sampled_from(sorted(steps)) | st.integers(1, 100))
    with tempfile.TemporaryDirectory() as folder:
        with_steps(Path(folder), steps)
        prune(Path(folder), keep, best)
        left = {Checkpoint(path).step for path in (Path(folder) / "checkpoints").iterdir()}
        assert left == {it.step for it in complete(Path(folder))}
    assert left == set(sorted(steps)[-max(1, keep) :]) | (steps & {best}) != set()


@given(steps=STEPS, keep=st.integers(1, 3), data=st.data())
def test_a_checkpoint_after_the_one_just_saved_takes_no_ones_place(steps: set[int], keep: int, data: st.DataObject) -> None:
    """It was there when the run went on from an earlier one: it does not hold."""
    saved = data.draw(st.sampled_from(sorted(steps)))
    with tempfile.TemporaryDirectory() as folder:
        with_steps(Path(folder), steps)
        prune(Path(folder), keep, newest=saved)
        left = {it.step for it in complete(Path(folder))}
    before = [step for step in sorted(steps) if step <= saved]
    assert left == steps - set(before) | set(before[-keep:])


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_rank_that_does_not_come_is_named_and_nothing_is_complete(tmp_path: Path, missing: int) -> None:
    folder = checkpoint_path(tmp_path, 7)
    folder.mkdir(parents=True)
    for rank in {0, 1, 2} - {missing}:
        write_part(folder, "2", rank, [])
    write_part(folder, "1", missing, [])  # of an attempt before
    with pytest.raises(TrainingError, match=rf"rank {missing} has not written its part.*run\.storage_path") as caught:
        commit(folder, "2", 3, {}, seconds=0.1)
    assert caught.value.facts == {"rank": missing} and not complete(tmp_path)


def test_the_manifest_waits_for_the_last_rank(tmp_path: Path) -> None:
    folder = checkpoint_path(tmp_path, 7)
    folder.mkdir(parents=True)
    for rank in range(RANKS):
        (folder / shard(rank)).write_bytes(content(7, rank))
    write_part(folder, "1", 0, [shard(0)])
    committing = threading.Thread(target=commit, args=(folder, "1", RANKS, {"step": 7}, 30))
    committing.start()
    committing.join(0.2)
    assert committing.is_alive() and not complete(tmp_path)
    write_part(folder, "1", 1, [shard(1)])
    committing.join(30)
    assert sound(tmp_path) == (7, [])
