"""The face for notebooks without a run: recipes made and changed in Python, plans shown, and what `train` says before it starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import psutil
import pytest

import trainkit
from trainkit import cli
from trainkit.data.at_hand import save_rows
from trainkit.errors import CapacityError, DataError, NonFiniteError, RecipeError, UsageError
from trainkit.planning.plan import Plan
from trainkit.recipe.schema import Recipe
from trainkit.runs import notebook
from trainkit.runs.child import Child
from trainkit.runs.files import Lock, is_locked
from trainkit.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes/quickstart.yaml"
ROWS = [{"question": f"how many ships have crew above {number}", "sql": f"SELECT {number}"} for number in range(40)]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    return trainkit.load_recipe(QUICKSTART)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunFolder, Path]]:
    """What `train` would have started: run folder and recipe file."""
    made: list[tuple[RunFolder, Path]] = []

    class NoChild:
        def __init__(self, folder: RunFolder, recipe: Path, address: str | None, starting: Lock):
            made.append((folder, recipe))
            starting.release()

    monkeypatch.setattr(notebook, "Child", NoChild)
    return made


def faults(make: Callable[[], object]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        make()
    return [str(fault) for fault in caught.value.faults]


# Names


def test_the_names_for_notebooks_are_these() -> None:
    assert trainkit.__all__ == ["Recipe", "compare", "load_recipe", "open_run", "plan", "train"]
    assert set(trainkit.__all__) <= set(dir(trainkit)) and all(callable(getattr(trainkit, name)) for name in trainkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        trainkit.__getattr__("trian")


# Recipes


def test_a_change_gives_the_recipe_that_set_gives(recipe: Recipe) -> None:
    changed = recipe.with_({"batch.samples": 32, "zero": "zero3", "data.eval": None, "train.metrics": ()})
    options = ["batch.samples=32", "zero=zero3", "data.eval=null", "train.metrics=[]"]
    assert changed == trainkit.load_recipe(QUICKSTART, options)
    assert recipe == trainkit.load_recipe(QUICKSTART), "the recipe itself stays"
    assert recipe.with_({}) == recipe


def test_a_wrong_change_is_told_with_the_nearest_spelling_and_all_at_once(recipe: Recipe) -> None:
    assert faults(lambda: recipe.with_({"batch.sampels": 32, "optimizer.lr": "2e-3", "zero": "zero4", "a..b": 1, "data.eval.x": 1})) == [
        'with_: a..b: write a key as "section.key"',
        "with_: data.eval.x: data.eval is a value, not a section",
        "with_: batch.sampels: unknown key (did you mean batch.samples?)",
        'with_: optimizer.lr: expected a number above 0, given the text "2e-3": write it without quotes',
        'with_: zero: "zero4" is neither a shipped configuration (zero0, zero1, zero2, zero3, zero2_offload, zero3_offload) nor a file'
        " (did you mean zero3?)",
    ]


def test_values_of_another_kind_are_told_in_one_sentence(recipe: Recipe) -> None:
    values: Any
    for values, words in [
        ("batch.samples=3", "not str 'batch.samples=3'"),
        (None, "not None"),
        (3, "not int '3'"),
        ([3], "not list '[3]'"),
    ]:
        for changed in (recipe.with_, lambda changes: trainkit.plan(recipe, changes)):
            with pytest.raises(UsageError, match=re.escape(words)) as caught:
                changed(values)
            assert caught.value.message.startswith('changes of a recipe: write a mapping such as {"batch.samples": 64}')
    for values, words in [(None, "not None"), (3, "not int '3'"), ([], "not list '[]'")]:
        for read in (trainkit.load_recipe, trainkit.plan, trainkit.train):
            with pytest.raises(UsageError, match=re.escape(f"recipe: write a file, a mapping of sections or a Recipe, {words}")):
                read(values)


def test_keys_that_do_not_fit_each_other_are_told(recipe: Recipe) -> None:
    (fault,) = faults(lambda: recipe.with_({"batch.samples_per_device": 8, "batch.tokens_per_device": 4096}))
    assert "stands together with batch.samples_per_device" in fault
    assert recipe.with_({"batch.samples_per_device": 8}).with_({"batch.samples": 32}).batch.samples_per_device == 8


def test_numbers_of_numpy_and_paths_are_as_plain_as_yamls(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    changed = recipe.with_({"optimizer.lr": np.float32(0.5), "batch.samples": np.int64(8), "data.path": Path("rows")})
    assert (type(changed.optimizer.lr), type(changed.batch.samples)) == (float, int)
    assert changed.data.path == str(tmp_path / "rows"), "relative to the working directory"
    assert changed.with_({"batch.samples": 4}).data.path == changed.data.path


def test_a_mapping_is_read_like_the_file_of_the_same_words(recipe: Recipe) -> None:
    values = {
        "name": "quickstart",
        "model": {"path": ROOT / "recipes/quickstart/model", "task": "seq2seq", "weights": "random", "precision": "fp32"},
        "data": {
            "path": os.path.relpath(ROOT / "recipes/quickstart"),
            "eval": "validation",
            "source": "{question}",
            "target": "{sql}",
            "max_source_length": 64,
            "max_target_length": 64,
        },
        "zero": "zero2",
        "batch": {"samples": 64},
        "optimizer": {"lr": 2e-3, "warmup_steps": 0.1},
        "train": {"epochs": 5, "eval_steps": 0.25, "metrics": ("exact_match",)},
        "scaling": {"num_workers": 2, "use_gpu": False, "resources_per_worker": {"CPU": 1}},
    }
    assert trainkit.load_recipe(values) == recipe
    del values["name"]
    assert trainkit.load_recipe(values, {"zero": "zero3"}) == recipe.with_({"name": "recipe", "zero": "zero3"})


def test_the_faults_of_a_mapping_come_at_once() -> None:
    found = faults(lambda: trainkit.load_recipe({"model": {"path": "m", "task": "seq2sec"}, "optimiser": {"lr": 1}, 3: 4}))
    assert found[0] == "recipe: the key 3 must be text"
    assert 'recipe: model.task: expected seq2seq, causal or classification, given "seq2sec" (did you mean seq2seq?)' in found
    assert "recipe: optimiser: unknown key (did you mean optimizer?)" in found
    assert any(fault.startswith("recipe: batch.samples: is missing") for fault in found)


def test_a_recipe_shows_what_differs_from_the_defaults(recipe: Recipe) -> None:
    changed = recipe.with_({"data.source": "<{question}>"})
    assert "samples: 64" in str(recipe) and "weight_decay" not in str(recipe)
    assert "&lt;{question}&gt;" in changed._repr_html_()


# Plans


def cells(html: str) -> list[str]:
    """Every word of the tables and paragraphs, in order."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).split()).split()


def test_a_plan_is_the_same_of_a_file_a_recipe_and_a_mapping(recipe: Recipe) -> None:
    plan = trainkit.plan(QUICKSTART, ["zero=zero3"])
    assert plan == trainkit.plan(recipe.with_({"zero": "zero3"})) == trainkit.plan(recipe, {"zero": "zero3"})
    assert plan == trainkit.plan(recipe.model_dump(), {"zero": "zero3"})
    assert (plan.total_steps, plan.world_size) == (470, 2)


def test_a_plan_shows_the_words_of_the_terminal(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["model.precision=bf16", "scaling.use_gpu=true"]
    with pytest.raises(SystemExit):
        cli.main(["plan", str(QUICKSTART), "--gpu-memory", "24GiB", "--set", options[0], "--set", options[1]])
    printed = capsys.readouterr().out
    plan = trainkit.plan(QUICKSTART, options, gpu_memory="24GiB")
    assert "what fits, per worker" in printed and "note: " in printed
    assert repr(plan).split() == printed.split() == cells(plan._repr_html_())


def test_a_plan_survives_its_json(recipe: Recipe) -> None:
    for plan in (trainkit.plan(recipe), trainkit.plan(recipe.with_({"scaling": {"num_workers": 2}}), gpu_memory="24GiB")):
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_what_a_plan_could_not_reach_is_in_its_notes(recipe: Recipe) -> None:
    plan = trainkit.plan(recipe.with_({"model.path": "nobody/model", "model.weights": "pretrained"}))
    assert plan.memory is None
    assert any(note.startswith("unknown: model.path: nobody/model") for note in plan.notes)
    with pytest.raises(UsageError, match="gpu_memory: 'much' is not a size"):
        trainkit.plan(recipe, gpu_memory="much")
    with pytest.raises(UsageError, match=r"80 GiB is of no use: the recipe trains on the CPU. Write scaling\.use_gpu: true"):
        trainkit.plan(recipe, gpu_memory="80GiB")


# Rows at hand


def test_rows_at_hand_are_written_once_by_their_content(tmp_path: Path) -> None:
    frame = pandas.DataFrame(ROWS)
    folder = save_rows(ROWS, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert save_rows(datasets.Dataset.from_list(ROWS), tmp_path) == save_rows(tuple(ROWS), tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert save_rows(ROWS[:-1], tmp_path) != folder
    formatted = datasets.Dataset.from_list(ROWS[:-2]).with_format("torch", columns=list(ROWS[0])[:1])
    assert datasets.load_from_disk(str(save_rows(formatted, tmp_path))).to_list() == ROWS[:-2]
    for rows in (folder, save_rows(frame, tmp_path)):
        assert datasets.load_from_disk(str(rows)).to_list() == ROWS
    splits = datasets.load_from_disk(str(save_rows({"train": frame, "validation": ROWS[:3]}, tmp_path)))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 40, "validation": 3}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"a": 1}, {"b": 2}], "data: row 1 lacks a and has b beside them, the columns of row 0 being a"),
        ([{"a": 1}, {"a": "x"}], "data: the rows cannot be made a table: Could not convert 'x'"),
        ([1, 2], "data: a list is no set of rows: give a datasets.Dataset, a pandas frame, a list of dicts"),
        ("rows.jsonl", "data: a str is no set of rows"),
        ({"train": [{"a": 1}], "validation": 3}, "data['validation']: a int is no set of rows"),
        ([], "data: there are no rows"),
        (pandas.DataFrame({"a": []}), "data: there are no rows"),
        ({"train": [{"a": 1}], "validation": []}, "data['validation']: there are no rows: leave this split out"),
        ({}, "data: a dict without splits"),
    ],
)
def test_what_is_no_set_of_rows_is_told(tmp_path: Path, rows: Any, words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)):
        save_rows(rows, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_rows_at_hand_needs_no_path(recipe: Recipe, started: list[tuple[RunFolder, Path]]) -> None:
    values = recipe.with_({"data.eval": 0.1}).model_dump(exclude={"data": {"path"}, "run": True})
    run = trainkit.train(values, data=ROWS, runs="here")
    path = Path(run.recipe.data.path)
    assert path.parent == Path("here/.cache/at_hand").absolute() and (run.plan.rows, run.plan.eval_rows) == (36, 4)
    again = trainkit.train(recipe.with_({"data.eval": 0.1}), data=pandas.DataFrame(ROWS).to_dict("records"), runs="here")
    assert Path(again.recipe.data.path) == path
    assert [folder.name for folder, _ in started] == ["quickstart-1", "quickstart-2"]


def test_rows_at_hand_and_a_file_to_train_on_are_one_too_many(recipe: Recipe, started: list[tuple[RunFolder, Path]]) -> None:
    with pytest.raises(UsageError, match=r"data\.train: .*train\.jsonl is a file, and data= brings rows of its own"):
        trainkit.train(recipe.with_({"data.train": ROOT / "recipes/quickstart/train.jsonl"}), data=ROWS)
    with pytest.raises(DataError, match=r"data\.eval: .* there is no 'validation'; write a held-out fraction such as 0\.1"):
        trainkit.train(recipe, data=ROWS)
    assert started == []


# Starting


def test_a_run_that_cannot_be_is_told_before_anything_starts(recipe: Recipe, tmp_path: Path, started: list[tuple[RunFolder, Path]]) -> None:
    RunFolder.create(tmp_path / "runs", "quickstart", "taken")
    for error, words, start in [
        (RecipeError, "unknown key", lambda: trainkit.train({**recipe.model_dump(), "modle": {}})),
        (RecipeError, "no such recipe", lambda: trainkit.train("recipe.yaml")),
        (DataError, "no such file or folder", lambda: trainkit.train(recipe.with_({"data.path": "rows/"}))),
        (DataError, "nobody/model", lambda: trainkit.train(recipe.with_({"model.path": "nobody/model", "model.weights": "pretrained"}))),
        (CapacityError, "999 workers × 1 CPU", lambda: trainkit.train(recipe.with_({"scaling.num_workers": 999}))),
        (UsageError, "this run exists", lambda: trainkit.train(recipe, name="taken")),
        (UsageError, "run name '../out'", lambda: trainkit.train(recipe, name="../out")),
        (UsageError, "no unfinished run", lambda: trainkit.train(recipe, resume=True)),
        (UsageError, "write the head node as host:port", lambda: trainkit.train(recipe, address="nowhere")),
    ]:
        with pytest.raises(error, match=re.escape(words)):
            start()
    assert started == [] and [path.name for path in (tmp_path / "runs").glob("[!.]*")] == ["taken"]


def test_a_started_run_has_its_folder_and_recipe_at_once(recipe: Recipe, started: list[tuple[RunFolder, Path]], tmp_path: Path) -> None:
    run = trainkit.train(recipe, name="mine")
    assert run.path == tmp_path / "runs/mine" and run.recipe == recipe
    (folder, asked) = started[0]
    assert trainkit.load_recipe(asked) == recipe and asked.parent == folder.ray
    again = trainkit.train(recipe.with_({"train.epochs": 6}), name="mine", resume=True)
    assert again.path == run.path and trainkit.load_recipe(asked).train.epochs == 6
    with pytest.raises(UsageError, match=r"optimizer\.lr: began with 0\.002, is now 0\.1"):
        trainkit.train(recipe.with_({"optimizer.lr": 0.1}), name="mine", resume=True)
    with folder.lock("driver"), pytest.raises(UsageError, match="another process works on this run"):
        trainkit.train(recipe, name="mine", resume=True)


# The child process


@pytest.fixture
def failed(tmp_path: Path) -> Child:
    """A command that ends before it has found its recipe."""
    folder = RunFolder.create(tmp_path, "it", "it")
    child = Child(folder, tmp_path / "nope.yaml", None, folder.lock("starting"))
    child.wait(60)
    return child


def test_a_failed_command_is_told_in_its_own_words(failed: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    error = failed.error(None)
    assert failed.status == "failed" and type(error) is UsageError
    assert re.fullmatch(r"\S*nope\.yaml: no such recipe", error.message)
    recorded = {"error": {"kind": "NonFiniteError", "message": error.message, "rank": 1, "step": 7}}
    named = failed.error(recorded)
    assert type(named) is NonFiniteError and named.facts == {"rank": 1, "step": 7}
    assert type(failed.error({"error": recorded["error"] | {"kind": "RecipeError"}})) is RecipeError
    assert type(failed.error({"error": {**recorded["error"], "message": "of an attempt before"}})) is UsageError
    assert "\x1b" not in failed.output()


def test_a_command_that_was_killed_says_so(failed: Child) -> None:
    failed.process.returncode = -9
    failed.log.write_text("starting the workers 0 s\n")
    failed._log_begins = 0
    error = failed.error(None)
    assert error is not None and error.exit_code == 4
    assert "the command ended with signal 9 and told no error" in error.message and "command.log" in error.message


@pytest.mark.parametrize(("code", "status"), [(0, "completed"), (130, "interrupted"), (-2, "interrupted"), (3, "failed"), (-9, "failed")])
def test_an_exit_code_is_a_status(failed: Child, code: int, status: str) -> None:
    failed.process.returncode = code
    assert failed.status == status
    assert (failed.error(None) is None) == (status != "failed")


def test_waiting_for_a_run_that_failed_raises_its_error(failed: Child, recipe: Recipe) -> None:
    run = notebook.StartedRun(RunFolder(failed.log.parents[1]), failed, trainkit.plan(recipe))
    with pytest.raises(UsageError, match="no such recipe"):
        run.wait()
    assert (run.status, run.plan.total_steps) == ("failed", 470)
    assert "no such recipe" in repr(run) and "command.log" in repr(run)
    with pytest.raises(UsageError, match="nothing to interrupt, the run is failed"):
        run.interrupt()


SLOW_TO_BEGIN = """
import time
from pathlib import Path
from trainkit.runs.folder import RunFolder
while not Path("begin").exists():
    time.sleep(0.02)
with RunFolder("runs/mine").lock("driver", wait_seconds=10):
    while not Path("end").exists():
        time.sleep(0.02)
"""
DEAF_AT_FIRST = """
import signal, time
from pathlib import Path
from trainkit.cluster.signals import Signals
both = {signal.SIGINT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, both)
with Signals() as signals, signals.softly(lambda: print("after this step", flush=True)):
    Path("deaf").touch()
    while not Path("hear").exists():
        time.sleep(0.02)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        Path("heard").touch()
        time.sleep(30)
    except KeyboardInterrupt:
        print("at once", flush=True)
"""


def commands_are(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the working directory, whatever their options."""
    command = Path("command").absolute()
    command.write_text(f"#!{sys.executable}\n{program}")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_that_is_starting_or_going_on_is_not_started_again(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    commands_are(SLOW_TO_BEGIN, monkeypatch)
    run = trainkit.train(recipe, name="mine")
    locks = {name: run.folder.ray / f"lock-{name}" for name in ("starting", "driver")}
    with pytest.raises(UsageError, match=r"another process works on this run \(lock-starting\)"):
        trainkit.train(recipe, name="mine", resume=True)
    Path("begin").touch()
    until(lambda: is_locked(locks["driver"]) and not is_locked(locks["starting"]))
    with pytest.raises(UsageError, match=r"another process works on this run \(lock-driver\)"):
        trainkit.train(recipe, name="mine", resume=True)
    Path("end").touch()
    run.wait(20)
    assert run.status == "completed"
    again = trainkit.train(recipe, name="mine", resume=True).wait(20)
    assert again.status == "completed"


def test_two_interrupts_in_a_row_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands_are(DEAF_AT_FIRST, monkeypatch)
    folder = RunFolder.create(tmp_path, "it", "it")
    child = Child(folder, QUICKSTART, None, folder.lock("starting"))
    until(Path("deaf").exists)
    child.interrupt()
    child.interrupt()
    Path("hear").touch()
    child.wait(10)
    assert child.output().split("\n") == ["", "after this step", "at once", ""]


KERNEL = """
import sys
from pathlib import Path
from trainkit.runs.child import Child
from trainkit.runs.folder import RunFolder
folder = RunFolder.create(sys.argv[1], "it", "it")
child = Child(folder, Path(sys.argv[2]), None, folder.lock("starting"))
print(child.process.pid, child.status)
"""


def test_a_command_ends_with_the_kernel_that_started_it(tmp_path: Path) -> None:
    kernel = subprocess.run(
        [sys.executable, "-c", KERNEL, tmp_path, QUICKSTART], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    pid, status = kernel.stdout.split()
    assert status == "running"
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
