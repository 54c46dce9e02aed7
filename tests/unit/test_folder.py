"""The run folder: names, numbering, whole files, steps, locks, errors."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from trainkit.errors import UsageError
from trainkit.runs import mailbox
from trainkit.runs.files import write_whole
from trainkit.runs.folder import RunFolder
from trainkit.runs.steps import StepLog, StepTail, keep_steps

HOLD_THE_LOCK = """
import sys, time
from trainkit.runs.folder import RunFolder
held = RunFolder(sys.argv[1]).lock("driver")
print("held", flush=True)
time.sleep(60)
"""


def line(number: int, loss: float = 0.5) -> str:
    return json.dumps(step(number, loss)) + "\n"


def step(number: int, loss: float = 0.5) -> dict[str, Any]:
    return {"step": number, "loss": loss, "samples": 8, "tokens": 99, "seconds": 0.5}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", "small")


def test_numbers_go_on_after_the_highest(tmp_path: Path) -> None:
    assert [RunFolder.create(tmp_path, "a").name for _ in range(2)] == ["a-1", "a-2"]
    (tmp_path / "a-9").mkdir()
    (tmp_path / "a-x").mkdir()
    (tmp_path / "b-20").mkdir()
    assert RunFolder.create(tmp_path, "a").name == "a-10"


def test_a_given_name_is_used_exactly_and_once(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, "stem", "mine").path == tmp_path / "mine"
    with pytest.raises(UsageError, match=r"this run exists.*--name"):
        RunFolder.create(tmp_path, "stem", "mine")


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "a b", "ä", "x" * 129, "a\n", ".."])
def test_names_that_leave_the_runs_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="run name"):
        RunFolder.create(tmp_path / "runs", "stem", name)
    assert not (tmp_path / "runs").exists()


def test_a_runs_folder_that_is_a_file_is_a_readable_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written: .*--runs"):
        RunFolder.create(tmp_path / "runs", "a")


def test_a_read_only_runs_folder_is_a_readable_error() -> None:
    with pytest.raises(UsageError, match=r"cannot be written: .*--runs"):
        RunFolder.create("/proc/runs", "a")


def test_a_full_disk_is_a_readable_error_and_leaves_no_part_of_a_file(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match=r"No space left on device.*--runs"):
        folder.write_plan({"world_size": 2})
    assert sorted(path.name for path in folder.path.iterdir()) == [".ray"]


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_whole(path, "old")
    seen = []
    monkeypatch.setattr("os.fsync", lambda descriptor: seen.append(path.read_text()))
    write_whole(path, "new")
    assert (seen, path.read_text()) == (["old"], "new")
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_read(folder: RunFolder) -> None:
    assert folder.read_summary() is None
    folder.write_summary({"status": "completed", "train_loss": math.inf})
    assert folder.read_summary() == {"status": "completed", "train_loss": math.inf}
    folder.write_recipe("name: a\n")
    folder.write_environment({"python": "3.11"})
    assert (folder.path / "recipe.yaml").read_text() == "name: a\n"
    assert json.loads((folder.path / "environment.json").read_text()) == {"python": "3.11"}


def test_a_step_can_be_read_at_once_and_nan_stays_nan(folder: RunFolder) -> None:
    log = StepLog(folder)
    log.append(step(1, math.nan))
    assert folder.steps_path.read_text().startswith('{"step": 1, "loss": NaN, ')
    assert math.isnan(folder.read_steps()[0]["loss"])
    log.close()
    log.close()


def test_a_line_cut_off_by_a_killed_process_is_left_out(folder: RunFolder) -> None:
    folder.steps_path.write_text(line(1) + line(2) + '{"ste')
    assert folder.read_steps() == [step(1), step(2)] and keep_steps(folder, 2) == []
    assert [path.name for path in folder.path.glob("steps.jsonl*")] == ["steps.jsonl"], "that is no damage"


def test_steps_that_no_checkpoint_kept_are_taken_out_and_others_stay_as_they_were(folder: RunFolder) -> None:
    folder.steps_path.write_text(line(1, math.nan) + line(2, 0.1) + line(3, 1e-09) + '{"ste')
    keep_steps(folder, 2)
    assert folder.steps_path.read_text() == line(1, math.nan) + line(2, 0.1)
    log = StepLog(folder)
    log.append(step(3))
    log.close()
    assert [step["step"] for step in folder.read_steps()] == [1, 2, 3]
    keep_steps(folder, 9)
    assert [step["step"] for step in folder.read_steps()] == [1, 2, 3]
    keep_steps(folder, 0)
    assert folder.steps_path.read_text() == ""


def test_a_damaged_line_takes_no_other_with_it_and_the_file_with_it_is_kept(folder: RunFolder) -> None:
    damaged = (line(1) + "\0\0\0\n" + line(3) + line(4)).encode() + b"\xff\n" + line(6).encode()
    folder.steps_path.write_bytes(damaged)
    told = keep_steps(folder, 4)
    assert told[:2] == ["steps.jsonl:2 is damaged and left out", "steps.jsonl:5 is damaged and left out"]
    assert told[2:] == [f"the file as it was is kept as {folder.path / 'steps.jsonl.damaged'}"]
    assert folder.steps_path.read_text() == line(1) + line(3) + line(4)
    assert (folder.path / "steps.jsonl.damaged").read_bytes() == damaged
    assert keep_steps(folder, 4) == []
    folder.steps_path.write_text("null\n" + line(3))
    assert keep_steps(folder, 4)[-1].endswith("steps.jsonl.damaged-2")
    assert (folder.path / "steps.jsonl.damaged").read_bytes() == damaged, "what was kept before stays"


def test_a_line_cut_off_by_a_killed_process_does_not_run_into_the_next_attempts_first(folder: RunFolder) -> None:
    folder.steps_path.write_text(line(1) + '{"ste')
    keep_steps(folder, 1)
    log = StepLog(folder)
    log.append(step(2))
    log.close()
    assert folder.read_steps() == [step(1), step(2)]


def test_a_run_without_steps_stays_without(folder: RunFolder) -> None:
    keep_steps(folder, 7)
    assert not folder.steps_path.exists()


def test_the_tail_gives_each_complete_line_once(folder: RunFolder) -> None:
    tail = StepTail(folder)
    assert list(tail.new_steps()) == []
    with folder.steps_path.open("a") as file:
        file.write(line(1) + line(2)[:9])
        file.flush()
        assert list(tail.new_steps()) == [step(1)]
        file.write(line(2)[9:] + line(3)[:9] + "\n" + line(4))
        file.flush()
        assert list(tail.new_steps()) == [step(2), step(4)], "a damaged line ends no run"
    assert list(tail.new_steps()) == []


def test_the_stop_file_reaches_another_object(folder: RunFolder) -> None:
    worker = RunFolder(str(folder.path), folder.begin_attempt())
    assert not worker.stop_requested()
    folder.request_stop()
    assert worker.stop_requested()


def test_the_phase_is_read_as_written(folder: RunFolder) -> None:
    assert folder.read_phase() == ""
    folder.begin_attempt()
    folder.write_phase("training")
    assert folder.read_phase() == "training"


def test_the_earliest_error_comes_first(folder: RunFolder) -> None:
    folder.begin_attempt()
    folder.write_error(1, 7, UsageError("the cause"), "Traceback ...")
    time.sleep(0.01)
    folder.write_error(0, 6, ConnectionError("peer closed"), "Traceback ...")
    first, second = folder.errors()
    assert (first.rank, first.step, first.kind, first.message) == (1, 7, "UsageError", "the cause")
    assert (second.rank, second.kind) == (0, "ConnectionError")
    assert folder.traceback_path(1).read_text() == "Traceback ..."


def test_an_attempt_without_steps_keeps_what_ranks_measured_before(folder: RunFolder) -> None:
    folder.write_ranks([{"peak_bytes": 3}])
    folder.begin_attempt(steps_left=False)
    assert folder.read_ranks() == [{"peak_bytes": 3}]
    folder.begin_attempt()
    assert folder.read_ranks() == []


def test_an_attempt_begins_without_what_the_one_before_left_for_the_driver(folder: RunFolder) -> None:
    folder.begin_attempt()
    folder.steps_path.write_text(line(1))
    folder.write_error(1, 7, UsageError("the cause"), "Traceback ...")
    folder.request_stop()
    folder.request_save()
    folder.write_phase("training")
    folder.write_summary({"status": "failed"})
    folder.begin_attempt()
    assert (folder.errors(), folder.read_phase(), folder.read_summary()) == ([], "", None)
    assert not folder.stop_requested() and not folder.save_requested()
    assert not folder.traceback_path(1).exists() and folder.read_steps() == [step(1)]
    folder.write_error(0, 1, UsageError("another"), "Traceback ...")
    assert [error.message for error in folder.errors()] == ["another"]


def test_a_late_rank_of_an_earlier_attempt_is_not_taken_for_one_of_this(folder: RunFolder) -> None:
    late = RunFolder(folder.path, folder.begin_attempt())
    worker = RunFolder(folder.path, folder.begin_attempt())
    late.write_error(1, 7, UsageError("of the attempt before"), "Traceback ...")
    late.write_phase("saving a checkpoint")
    late.write_note("of the attempt before")
    assert (folder.errors(), folder.read_phase(), folder.take_notes()) == ([], "", [])
    worker.write_error(1, 8, UsageError("of this one"), "Traceback of this one")
    assert [error.message for error in folder.errors()] == ["of this one"]
    assert folder.traceback_path(1).read_text() == "Traceback of this one"
    folder.request_save()
    folder.request_stop()
    late.begin_save()
    assert worker.save_requested() and not late.stop_requested()


def test_an_attempt_begins_where_nothing_can_be_removed(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network drive, where a file that a dying rank holds open stays."""
    folder.begin_attempt()
    folder.write_error(1, 7, UsageError("the cause"), "Traceback ...")

    def busy(*args: object, **options: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    for name in ("os.rmdir", "os.remove", "shutil.rmtree"):
        monkeypatch.setattr(name, busy)
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: busy() if path.exists() else unlink(path, missing_ok))
    assert folder.begin_attempt() == 2 and folder.errors() == []


def test_notes_are_read_once_each_and_none_is_lost(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks write while the driver reads; they say the same, and then something of their own."""
    attempt = folder.begin_attempt()
    ranks, read_text = [RunFolder(folder.path, attempt) for _ in range(2)], Path.read_text
    ranks[0].write_note("first")

    def read_meanwhile(path: Path, *args: Any) -> str:
        text = read_text(path, *args)
        if text == "first":
            for number, rank in enumerate(ranks):
                rank.write_note("first")
                rank.write_note(f"of rank {number}")
        return text

    monkeypatch.setattr(Path, "read_text", read_meanwhile)
    assert folder.take_notes() == ["first"]
    assert sorted(folder.take_notes()) == ["of rank 0", "of rank 1"]
    folder.begin_attempt()
    folder.write_note("first")
    assert folder.take_notes() == [], "said by this command"
    assert RunFolder(folder.path).take_notes() == ["first"]


def test_threads_that_write_the_same_file_leave_one_of_theirs(tmp_path: Path) -> None:
    path, texts = tmp_path / "phase", [str(number) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: [write_whole(path, text, durable=False) for _ in range(20)], texts))
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path]


def test_attempts_are_numbered_also_after_those_of_an_earlier_version(folder: RunFolder) -> None:
    assert [folder.begin_attempt(), folder.begin_attempt()] == [1, 2]
    (folder.ray / "attempt-2").mkdir()
    assert folder.begin_attempt() == 3
    (folder.ray / "attempt-4").mkdir()  # made by Ray, whose run of this name would be gone on with
    assert folder.begin_attempt() == 5 and folder.attempt_path.name == "workers-5"


def test_a_folder_that_lost_its_notes_can_begin_an_attempt(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "copied").begin_attempt() == 1


def test_a_lock_is_held_by_one_and_goes_with_its_process(folder: RunFolder) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD_THE_LOCK, str(folder.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another process works on this run"):
            folder.lock("driver", wait_seconds=0.2)
        folder.lock("rank-0").release()
    finally:
        other.kill()
        other.wait()
    folder.lock("driver", wait_seconds=5).release()


def test_a_folder_that_not_all_ranks_see_is_told_by_rank_and_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "_SHARED_SECONDS", 0.3)
    folder = RunFolder.create(tmp_path, "run")
    folder.write_plan({})
    folder.begin_attempt()
    seen = []
    folder.check_shared(rank=0, world_size=2, together=lambda: seen.append((folder.attempt_path / "probe-1").touch()))
    assert len(seen) == 1
    folder.begin_attempt()
    with pytest.raises(UsageError, match=r"rank 1 on \S+: it does not see in .* what rank 0 wrote there.*run\.storage_path"):
        folder.check_shared(rank=1, world_size=2, together=lambda: None)
    with pytest.raises(UsageError, match=r"rank 1 on .*does not see the run folder"):
        RunFolder(tmp_path / "elsewhere", 1).check_shared(rank=1, world_size=2, together=lambda: None)
