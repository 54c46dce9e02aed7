"""Copies of checkpoints elsewhere: whatever a kill leaves there, what is found is whole, and a run goes on from it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from test_checkpoint_files import Killed, content, save, shard, sound, torn

from trainkit.cluster.resume import run_to_resume
from trainkit.errors import RecipeError, UsageError
from trainkit.recipe.reader import read_recipe, recipe_to_yaml
from trainkit.runs.checkpoints import MANIFEST, Checkpoint, checkpoint_path, complete
from trainkit.runs.copies import RunCopy, fault_of
from trainkit.runs.copying import Copier, make_again, newest, runs_at
from trainkit.runs.folder import RunFolder
from trainkit.runs.steps import keep_steps

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
KEY = "run.copy_checkpoints_to"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return begun(tmp_path / "runs")


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield f"file://{tmp_path}/copies" if request.param == "file" else "memory://bucket/copies"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def begun(storage: Path, seconds: float = 1.25) -> RunFolder:
    """A run of 300 steps, of which each took so long."""
    folder = RunFolder.create(storage, "it", "it")
    folder.write_recipe(recipe_to_yaml(read_recipe(QUICKSTART, [f"run.storage_path={storage}"])))
    folder.write_plan({"tokens_per_device": 4096})
    folder.steps_path.write_text(
        "".join(json.dumps({"step": step, "loss": 1.0, "samples": 8, "tokens": 99, "seconds": seconds}) + "\n" for step in range(1, 301))
    )
    return folder


def copied(url: str, folder: RunFolder, *steps: int) -> RunCopy:
    """Save and copy these, and keep them all."""
    copy = RunCopy(url, folder.name)
    for step in steps:
        assert copy.upload(folder.path, save(folder.path, step, keep=9))
    return copy


def harm(copy: RunCopy, step: int, name: str = shard(1)) -> None:
    path = copy._at("checkpoints", f"step-{step:06d}", name)
    copy.fs.pipe_file(path, copy.fs.cat_file(path)[:-1])


def until(operations: int, work: Callable[[], object]) -> list[str]:
    """Do it on file://, killed in the middle of the operation of that number, of which half is done."""
    done: list[str] = []

    def counted(owner: Any, name: str) -> Callable[..., Any]:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) <= operations:
                return real(*args, **kwargs)
            if name in ("put_file", "get_file"):
                source, target = Path(args[1]), Path(args[2])
                target.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
            if name == "rm":
                next(path for path in sorted(Path(args[1]).rglob("*")) if path.is_file()).unlink()
            raise Killed

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("put_file", "get_file", "mv", "rm", "rm_file", "makedirs"):
            patch.setattr(LocalFileSystem, name, counted(LocalFileSystem, name))
        patch.setattr(Path, "rename", counted(Path, "rename"))
        patch.setattr(Path, "replace", counted(Path, "replace"))
        work()
    return done


# -- there and back --------------------------------------------------------------------------------------------------------------------


def test_a_copy_holds_what_the_run_goes_on_with(folder: RunFolder, url: str, tmp_path: Path) -> None:
    (folder.path / ".best-50" / "base").mkdir(parents=True)
    (folder.path / ".best-50" / "base" / "config.json").write_text("{}")
    copy = copied(url, folder, 100, 200)
    assert copy.steps() == [200, 100] and runs_at(url) == {"it"}
    shutil.rmtree(folder.path)
    assert make_again(url, folder.path)
    told: list[str] = []
    found = newest(url, folder.path, None, told.append)
    assert found is not None and found.step == 200 and told == [f"the checkpoint of step 200 comes from {url}/it"]
    found.check()
    assert sorted(path.name for path in found.path.iterdir()) == [MANIFEST, shard(0), shard(1)]
    assert [step["step"] for step in folder.read_steps()] == list(range(1, 301))
    assert (folder.path / ".best-50" / "base" / "config.json").read_text() == "{}"
    assert folder.read_plan() == {"tokens_per_device": 4096} and not list((folder.path / ".ray").iterdir())


def test_upload_killed_anywhere_leaves_nothing_that_looks_whole_and_is_not(tmp_path: Path) -> None:
    def begin(name: str) -> tuple[RunFolder, RunCopy]:
        folder = begun(tmp_path / name)
        (folder.path / ".best-50").mkdir()
        (folder.path / ".best-50" / "config.json").write_text("{}")
        url = f"file://{tmp_path}/copies-{name}"
        copied(url, folder, 50, 100, 200)
        manifest = save(folder.path, 200, keep=2).path / MANIFEST  # trained once more, from 100 on
        manifest.write_text(manifest.read_text().replace('"step": 200', '"step": 200, "again": true'))
        return folder, RunCopy(url, "it")

    def work(folder: RunFolder, copy: RunCopy) -> None:
        copy.upload(folder.path, complete(folder.path)[0])
        copy.prune(folder.path, {it.step for it in complete(folder.path)})

    undisturbed = begin("never")
    operations = until(1_000_000, lambda: work(*undisturbed))
    assert {"put_file", "mv", "rm_file", "rm", "makedirs"} <= set(operations)
    seen = set()
    for count in range(len(operations)):
        folder, copy = begin(str(count))
        with pytest.raises(Killed):
            until(count, lambda folder=folder, copy=copy: work(folder, copy))
        steps = copy.steps()
        other = begun(tmp_path / f"other-{count}")
        for step in steps:
            fetched = copy.fetch(other.path, step)
            assert all((fetched.path / shard(rank)).read_bytes() == content(step, rank) for rank in range(2))
        copy.fetch_rest(other.path, "steps.jsonl", "plan.json", "recipe.yaml")
        assert len(other.read_steps()) == 300 and other.read_plan()
        seen.add((*steps, *(() if 200 not in steps else complete(other.path)[0].facts)))
        work(folder, copy)  # and the next one goes well
        assert copy.steps() == [200, 100] and "again" in copy.fetch(other.path, 200).facts
        assert not [name for name in copy.names("checkpoints") if name not in ("step-000100", "step-000200")]
    assert seen == {(200, 100, 50, "step"), (100, 50), (200, 100, 50, "step", "again"), (200, 100, "step", "again")}


def test_fetching_killed_anywhere_leaves_no_checkpoint_that_looks_whole_and_no_folder_that_looks_like_a_run(tmp_path: Path) -> None:
    folder = begun(tmp_path / "runs")
    url = f"file://{tmp_path}/copies"
    copied(url, folder, 100, 200)
    shutil.rmtree(folder.path)

    def work() -> None:
        if not (folder.path / "recipe.yaml").exists():
            assert make_again(url, folder.path)
        newest(url, folder.path, None, lambda text: None)

    operations = until(1_000_000, work)
    assert {"get_file", "rename", "replace"} <= set(operations)
    for count in range(len(operations)):
        shutil.rmtree(folder.path)
        with pytest.raises(Killed):
            until(count, work)
        if (folder.path / "recipe.yaml").exists():
            assert len(folder.read_steps()) == 300 and folder.read_plan()
        for it in complete(folder.path):
            it.check()
        work()
        assert sound(folder.path) == (200, [])


def test_a_torn_copy_is_told_of_and_the_one_before_it_taken(folder: RunFolder, url: str) -> None:
    harm(copied(url, folder, 100, 200, 300), 300)
    shutil.rmtree(folder.path / "checkpoints")
    told: list[str] = []
    found = newest(url, folder.path, None, told.append)
    assert found == Checkpoint(checkpoint_path(folder.path, 200)) and len(complete(folder.path)) == 1
    why = f"this checkpoint cannot be used: {shard(1)} has 679 bytes, the manifest says 680"
    assert told == [f"{url}/it/checkpoints/step-000300: {why}", f"the checkpoint of step 200 comes from {url}/it"]


def test_if_no_copy_holds_and_there_is_nothing_else_that_is_an_error(folder: RunFolder, url: str) -> None:
    harm(copied(url, folder, 100), 100)
    local = complete(folder.path)[0]
    assert newest(url, folder.path, local, lambda text: None) == local
    with pytest.raises(UsageError, match="none of the copied checkpoints can be used"):
        newest(url, folder.path, None, lambda text: None)


def test_the_newer_one_is_taken_here_or_there(folder: RunFolder, url: str) -> None:
    copy = copied(url, folder, 100, 200)
    save(folder.path, 300, keep=9)
    told: list[str] = []
    for step in (300, 200):
        local = Checkpoint(checkpoint_path(folder.path, step))
        assert newest(url, folder.path, local, told.append) == local and not told
    torn(checkpoint_path(folder.path, 200) / shard(0))
    found = newest(url, folder.path, Checkpoint(checkpoint_path(folder.path, 100)), told.append)
    assert found is not None and found.step == 200 and told == [f"the checkpoint of step 200 comes from {copy.url}"]
    found.check()


def test_a_copy_that_cannot_be_reached_stops_only_who_has_nothing_else(
    folder: RunFolder, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied(url, folder, 100)

    def away(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the network is away")

    monkeypatch.setattr(type(copy.fs), "ls", away)
    local, told = complete(folder.path)[0], []
    assert newest(url, folder.path, local, told.append) == local
    assert told == [f"{KEY}: {url} cannot be read: RuntimeError: the network is away. Going on with what lies in the run folder"]
    for ask in (lambda: newest(url, folder.path, None, print), lambda: runs_at(url), lambda: make_again(url, folder.path)):
        with pytest.raises(UsageError, match="the network is away"):
            ask()


def test_the_copy_of_another_run_of_this_name_is_not_taken(folder: RunFolder, url: str, tmp_path: Path) -> None:
    copied(url, folder, 100)
    other = begun(tmp_path / "elsewhere", seconds=1.26)
    for local in (None, save(other.path, 50), save(other.path, 200)):
        with pytest.raises(UsageError, match="the copy of another run of this name: write another URL"):
            newest(url, other.path, local, print)
    assert RunFolder.create(tmp_path / "elsewhere", "some", elsewhere={"some-7", "it", "notes"}).name == "some-8"


def test_where_nothing_was_copied_nothing_is_found(folder: RunFolder, url: str, tmp_path: Path) -> None:
    assert (runs_at(url), newest(url, folder.path, None, print), make_again(url, tmp_path / "lost")) == (set(), None, False)
    assert not (tmp_path / "lost").exists()


def test_a_name_in_a_copy_cannot_leave_the_folder(folder: RunFolder, url: str) -> None:
    copy = copied(url, folder, 100)
    with pytest.raises(UsageError, match="leaves its folder"):
        copy._get(".best-1/../../x", folder.path / "x")
    path = copy._at("checkpoints", "step-000100", MANIFEST)
    copy.fs.pipe_file(path, copy.fs.cat_file(path).replace(shard(1).encode(), b"../../recipe.yaml"))
    with pytest.raises(UsageError, match="which is no file of a checkpoint"):
        copy.fetch(folder.path, 100)


def test_a_lost_run_folder_is_made_again_by_its_name(folder: RunFolder, url: str) -> None:
    storage = folder.path.parent
    recipe = read_recipe(QUICKSTART, [f"run.storage_path={storage}"])
    here = recipe.model_copy(update={"run": recipe.run.model_copy(update={"copy_checkpoints_to": url})})
    copied(url, folder, 100)
    shutil.rmtree(storage)
    with pytest.raises(UsageError, match="is no run folder"):
        run_to_resume(recipe, QUICKSTART, "it")
    with pytest.raises(UsageError, match="is no run folder"):
        run_to_resume(here, QUICKSTART, "other")
    again = run_to_resume(here, QUICKSTART, "it")
    assert again.path == folder.path and len(again.read_steps()) == 300 and not complete(again.path)
    keep_steps(again, 100)
    assert [step["step"] for step in again.read_steps()] == list(range(1, 101))


def test_the_copy_keeps_the_checkpoints_that_the_run_keeps(folder: RunFolder, url: str) -> None:
    for name in (".best-50", ".best-150"):
        (folder.path / name).mkdir()
        (folder.path / name / "config.json").write_text("{}")
    copied(url, folder, 50, 100, 150, 200)
    copy = RunCopy(url, "it")
    copy.fs.rm_file(copy._at("checkpoints", "step-000100", MANIFEST))  # a removal that was killed
    copy.fs.pipe_file(copy._at("checkpoints", "notes"), b"of a person")
    shutil.rmtree(folder.path / ".best-50")
    copy.prune(folder.path, {150, 200})
    assert copy.names("checkpoints") == {"notes", "step-000150", "step-000200"}
    assert copy.names() == {".best-150", "steps.jsonl", "plan.json", "recipe.yaml", "checkpoints"}


# -- while training goes on ------------------------------------------------------------------------------------------------------------


class Slow:
    """Lets a copy wait in the middle of its files, and fail."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.begun, self.go_on, self.fails, self.real = threading.Event(), threading.Event(), False, MemoryFileSystem.put_file
        patch.setattr(MemoryFileSystem, "put_file", lambda *args, **kwargs: self.put(*args, **kwargs))

    def put(self, *args: Any, **kwargs: Any) -> Any:
        self.begun.set()
        assert self.go_on.wait(30)
        if self.fails:
            raise RuntimeError("the bucket is full")
        return self.real(*args, **kwargs)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    yield Slow(monkeypatch)
    MemoryFileSystem.store.clear()


def test_a_slow_copy_is_followed_by_the_newest_and_survives_the_removal_of_what_it_copies(folder: RunFolder, slow: Slow) -> None:
    folder.begin_attempt()
    copier = Copier(folder, "memory://bucket")
    for step in (100, 150, 200):
        save(folder.path, step, keep=1)
        copier.offer(step)
        assert slow.begun.wait(30)
    assert [it.step for it in complete(folder.path)] == [200] and not copier.ended(0.01)
    copy, seen = RunCopy("memory://bucket", "it"), []
    uploaded = RunCopy.upload

    def upload(self: RunCopy, *args: Any) -> bool:
        seen.append(args[1].step)
        return uploaded(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCopy, "upload", upload)
        slow.go_on.set()
        assert copier.ended(30)
    assert seen == [200] and copy.steps() == [200] and copier.outcome() == {"step": 200, "error": None}
    copy.fetch(folder.path, 200).check()
    assert folder.take_notes() == []


def test_a_copy_that_fails_is_told_once_and_tried_again(folder: RunFolder, slow: Slow) -> None:
    folder.begin_attempt()
    copier = Copier(folder, "memory://bucket")
    slow.fails = True
    slow.go_on.set()
    for step in (100, 150):
        save(folder.path, step)
        copier.offer(step)
    assert copier.ended(30)
    (note,) = folder.take_notes()
    assert "is not copied: RuntimeError: the bucket is full. Training goes on, and the next one is tried" in note
    assert copier.outcome() == {
        "step": None,
        "error": "memory://bucket/it: the copy lacks the checkpoint of step 150: RuntimeError: the bucket is full",
    }
    folder.begin_attempt()
    again = Copier(folder, "memory://bucket")
    again.offer(150)
    while not folder.take_notes():
        assert again.thread.is_alive()
    slow.fails = False
    again.offer(150)
    assert again.ended(30) and again.outcome() == {"step": 150, "error": None} and folder.take_notes() == []


def test_a_copy_is_given_up_when_the_process_ends(folder: RunFolder, slow: Slow) -> None:
    folder.begin_attempt()
    copier = Copier(folder, "memory://bucket")
    save(folder.path, 100)
    copier.offer(100)
    assert slow.begun.wait(30)
    copier.close()
    slow.go_on.set()
    copier.thread.join(30)
    assert not copier.thread.is_alive() and RunCopy("memory://bucket", "it").steps() == []


def test_what_lies_there_already_is_not_copied_again(folder: RunFolder, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copied(url, folder, 100)
    monkeypatch.setattr(type(copy.fs), "put_file", None)
    assert RunCopy(url, "it").upload(folder.path, complete(folder.path)[0])


# -- what may be written in a recipe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["s3://bucket/folder", "gs://bucket", "file:///mnt/folder", "abfs://container@account.dfs.core.windows.net/folder",
            "sftp://me@host/folder", "hf://datasets/me/runs", "hdfs://host:9000/folder"]
)  # fmt: skip
def test_a_url_is_taken_also_where_its_package_is_not_installed(url: str) -> None:
    assert fault_of(url) is None
    assert read_recipe(QUICKSTART, [f"{KEY}={url}"]).run.copy_checkpoints_to == url


@pytest.mark.parametrize(
    ("url", "why"),
    [("s4://bucket", "fsspec knows no s4://, but s3, gs, abfs"), ("/mnt/folder", "is no URL of a folder: write for example s3://"),
     ("file://relative/folder", "is no URL of a folder"), ("s3://", "is no URL of a folder"), ("", "is no URL of a folder"),
     ("simplecache::s3://bucket", "fsspec knows no simplecache::s3://"), ("s3://me:hidden@bucket/folder", "holds a password or a query"),
     ("s3://me:hid/den@bucket", "holds a password"), ("https://host/folder?token=hidden", "holds a password or a query")],
)  # fmt: skip
def test_a_url_that_cannot_be_one_is_a_fault_of_the_recipe_and_its_secrets_are_not_shown(url: str, why: str, tmp_path: Path) -> None:
    written = tmp_path / "recipe.yaml"
    written.write_text(QUICKSTART.read_text() + f"\nrun: {{copy_checkpoints_to: {json.dumps(url)}}}\n")
    for ask in (lambda: read_recipe(QUICKSTART, [f"{KEY}={json.dumps(url)}"]), lambda: read_recipe(written)):
        with pytest.raises(RecipeError) as caught:
            ask()
        assert f"{KEY}: {why}" in str(caught.value) and "hid" not in str(caught.value)


def test_a_package_that_is_missing_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known_implementations, "s3", {"class": "s3fs_of_nobody.S3", "err": "Install s3fs to access S3"})
    for ask in (lambda: runs_at("s3://bucket"), lambda: newest("s3://bucket", tmp_path, Checkpoint(tmp_path / "step-000001"), print)):
        with pytest.raises(UsageError, match=rf"{KEY}: Install s3fs to access S3: pip install s3fs_of_nobody"):
            ask()
