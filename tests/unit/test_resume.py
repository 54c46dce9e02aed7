"""Which run goes on, and what of its recipe may change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from trainkit.cluster.driver import _Run
from trainkit.cluster.opening import opened
from trainkit.cluster.preparing import Preparation
from trainkit.cluster.resume import LAYOUT, check_unfinished, kept_budget, resumed_recipe, run_to_resume, untraced
from trainkit.data.tokens import Prepared
from trainkit.errors import DataError, UsageError
from trainkit.recipe.reader import read_recipe, recipe_to_yaml
from trainkit.recipe.schema import Profile, Recipe
from trainkit.runs.checkpoints import Checkpoint
from trainkit.runs.folder import RunFolder

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
BEST = "train.metric_for_best_model=loss"  # which early stopping asks for
BUDGET = 4096  # that the plan chose
CHANGES = {  # of each key of the layout
    "name": "name=other",
    "scaling": "scaling.num_workers=3",
    "zero": "zero=zero3",
    "run": "run.max_failures=7",
    "batch.tokens_per_device": "batch.tokens_per_device=777",
    "batch.samples_per_device": "batch.samples_per_device=8",
    "model.gradient_checkpointing": "model.gradient_checkpointing=true",
    "model.compile": "model.compile=false",
    "model.cuda_graphs": "model.cuda_graphs=true",
    "train.max_steps": "train.max_steps=1000",
    "train.epochs": "train.epochs=9",
    "train.eval_steps": "train.eval_steps=0.5",
    "train.save_steps": "train.save_steps=10",
    "train.save_total_limit": "train.save_total_limit=1",
    "train.early_stopping_patience": "train.early_stopping_patience=3",
    "train.halve_on_oom": "train.halve_on_oom=true",
    "train.deterministic": "train.deterministic=true",
    "train.profile": "train.profile={start: 2}",
}


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def asked(storage: Path, *overrides: str) -> Recipe:
    return read_recipe(QUICKSTART, [f"run.storage_path={storage}", BEST, *overrides])


def begun(recipe: Recipe, name: str | None = None, age: int = 0, budget: int | None = BUDGET) -> RunFolder:
    """A run of it, begun `age` seconds ago and killed."""
    folder = RunFolder.create(recipe.run.storage_path, recipe.name, name)
    folder.write_recipe(recipe_to_yaml(recipe))
    folder.write_plan({"tokens_per_device": budget})
    written = folder.path / "recipe.yaml"
    now = written.stat().st_mtime
    os.utime(written, (now - age, now - age))
    return folder


def completed(folder: RunFolder, steps: int = 470, **facts: Any) -> RunFolder:
    folder.write_summary({"status": "completed", "steps": steps, **facts})
    return folder


def leaves(mapping: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


# -- which run -------------------------------------------------------------------------------------------------------------------------


def test_a_name_names_the_run_whatever_its_recipe_is_called_and_whether_it_ended(storage: Path) -> None:
    recipe = asked(storage)
    completed(begun(asked(storage, "name=other"), "mine"))
    begun(recipe)
    assert run_to_resume(recipe, QUICKSTART, "mine").path == storage / "mine"


@pytest.mark.parametrize("name", ["../runs/mine", "/etc", "a/b", "..", "", ".hidden", "mine/"])
def test_a_name_that_is_a_path_is_refused(storage: Path, name: str) -> None:
    begun(asked(storage), "mine")
    with pytest.raises(UsageError, match="run name"):
        run_to_resume(asked(storage), QUICKSTART, name)


def test_a_name_of_no_run_is_refused(storage: Path) -> None:
    (storage / "empty").mkdir(parents=True)
    for name in ("empty", "nowhere"):
        with pytest.raises(UsageError, match=rf"{storage / name} is no run folder\. Without --resume"):
            run_to_resume(asked(storage), QUICKSTART, name)


def test_a_run_folders_own_recipe_names_its_run(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(asked(storage), age=100)
    begun(asked(storage))
    path = folder.path / "recipe.yaml"
    elsewhere = read_recipe(path, [f"run.storage_path={tmp_path / 'elsewhere'}"])
    assert run_to_resume(elsewhere, path, None).path == folder.path
    monkeypatch.chdir(folder.path)
    assert run_to_resume(elsewhere, Path("recipe.yaml"), None).path == folder.path


def test_a_run_that_ended_before_its_plan_is_not_taken_for_another(storage: Path) -> None:
    begun(asked(storage), age=100)
    early = begun(asked(storage))
    (early.path / "plan.json").unlink()
    assert run_to_resume(asked(storage), early.path / "recipe.yaml", None).path == early.path


def test_a_run_that_was_copied_without_what_is_hidden_goes_on_where_it_lies_now(storage: Path, tmp_path: Path) -> None:
    folder = begun(asked(storage, "scaling.use_gpu=false"))
    moved = RunFolder(tmp_path / "elsewhere" / "mine")
    moved.path.parent.mkdir()
    folder.path.replace(moved.path)
    storage.rmdir()
    shutil.rmtree(moved.ray)
    path = moved.path / "recipe.yaml"
    opening = opened(read_recipe(path), path, None, True, None, lambda plan: None)
    assert opening.folder().path == moved.path
    assert opening.wish.run.storage_path == opening.recipe.run.storage_path == str(moved.path.parent)
    assert not storage.exists()
    with opening.folder().lock("driver"):
        assert moved.ray.is_dir()


def test_a_name_wins_over_the_folder_of_the_recipe(storage: Path) -> None:
    folder, other = begun(asked(storage)), begun(asked(storage))
    assert run_to_resume(asked(storage), folder.path / "recipe.yaml", other.name).path == other.path


def test_a_recipe_that_is_called_recipe_and_lies_in_no_run_is_one_as_any_other(storage: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(QUICKSTART.read_text())
    recipe = read_recipe(path, [f"run.storage_path={storage}"])
    folder = begun(recipe)
    assert run_to_resume(recipe, path, None).path == folder.path


def test_without_a_name_the_newest_unfinished_run_of_the_recipes_name_goes_on(storage: Path) -> None:
    recipe = asked(storage)
    begun(recipe, age=300)
    failed, interrupted = begun(recipe, "named", age=100), begun(recipe, age=200)
    failed.write_summary({"status": "failed", "steps": 470})
    interrupted.write_summary({"status": "interrupted", "steps": 9})
    completed(begun(recipe))
    begun(asked(storage, "name=quickstart-2"))
    (storage / ".cache").mkdir()
    (storage / "quickstart-99").mkdir()
    (storage / "a-file").write_text("")
    assert run_to_resume(recipe, QUICKSTART, None).path == failed.path


def test_if_no_run_of_the_recipe_is_unfinished_that_is_said(storage: Path) -> None:
    with pytest.raises(UsageError, match=rf"no unfinished run of quickstart lies in {storage}\. Name one with --name"):
        run_to_resume(asked(storage), QUICKSTART, None)
    completed(begun(asked(storage)))
    begun(asked(storage, "name=other"))
    with pytest.raises(UsageError, match="no unfinished run of quickstart"):
        run_to_resume(asked(storage), QUICKSTART, None)


def test_another_run_whose_recipe_is_read_no_more_does_not_stand_in_the_way(storage: Path) -> None:
    folder = begun(asked(storage), age=100)
    of_another_version = begun(asked(storage, "name=other"))
    of_another_version.write_recipe("name: other\nmodel: {size: huge}\n")
    (of_another_version.path / "summary.json").write_text('{"status": "comp')
    assert run_to_resume(asked(storage), QUICKSTART, None).path == folder.path
    begun(asked(storage, "name=third"))
    (storage / "third-1" / "summary.json").write_text("{}")
    assert run_to_resume(asked(storage), QUICKSTART, None).path == folder.path


@pytest.mark.parametrize("name", ["summary.json", "plan.json"])
def test_a_damaged_file_of_its_own_is_one_message(storage: Path, name: str) -> None:
    folder = begun(asked(storage))
    (folder.path / name).write_text('{"status": "comp')
    with pytest.raises(UsageError, match=rf"{folder.path / name}: damaged: not JSON"):
        kept_budget(run_to_resume(asked(storage), QUICKSTART, None), asked(storage))


# -- its recipe ------------------------------------------------------------------------------------------------------------------------


def test_there_is_a_change_for_each_key_of_the_layout() -> None:
    assert set(CHANGES) == set(LAYOUT)


@pytest.mark.parametrize("key", LAYOUT)
def test_the_layout_may_change(storage: Path, key: str) -> None:
    recipe = asked(storage, CHANGES[key])
    assert recipe != asked(storage)
    found = resumed_recipe(begun(asked(storage)), recipe)
    assert found == recipe


def test_all_of_the_layout_may_change_at_once(storage: Path) -> None:
    together = [change for key, change in CHANGES.items() if key != "batch.samples_per_device"]
    recipe = asked(storage, *together)
    assert resumed_recipe(begun(asked(storage)), recipe) == recipe


def test_every_key_that_is_no_layout_is_held(storage: Path) -> None:
    """Also one that the schema gets tomorrow: until it is called layout, it defines the training."""
    recipe = asked(storage)
    folder, free = begun(recipe), set()
    for path in leaves(recipe.model_dump(mode="json")):
        changed: Any = "something else"
        for length in range(len(path) - 1, 0, -1):
            section: Any = recipe
            for part in path[:length]:
                section = section[part] if isinstance(section, dict) else getattr(section, part)
            changed = section | {path[length]: changed} if isinstance(section, dict) else section.model_copy(update={path[length]: changed})
        try:
            resumed_recipe(folder, recipe.model_copy(update={path[0]: changed}))
        except UsageError as error:
            assert f"{'.'.join(path)}: began with" in error.message and "is now something else" in error.message
        else:
            free.add(".".join(path))
    layout = {key for key in free if key.split(".")[0] in ("scaling", "run", "zero", "name")}
    assert free - layout == {key for key in LAYOUT if "." in key}
    assert len(layout) == 1 + 1 + len(recipe.run.model_dump()) + len(list(leaves(recipe.scaling.model_dump())))


@pytest.mark.parametrize(
    ("change", "told"),
    [("model.path=google-t5/t5-small", "is now google-t5/t5-small"), ("data.path=someone/rows", "is now someone/rows"),
     ("data.source='ask: {question}'", "began with {question}, is now ask: {question}"),
     ("data.eval=0.1", "began with validation, is now 0.1"), ("train.seed=7", "began with 42, is now 7"),
     ("batch.samples=32", "began with 64, is now 32"), ("optimizer.lr=0.1", "began with 0.002, is now 0.1"),
     ("optimizer.betas=[0.9, 0.95]", "began with [0.9, 0.999], is now [0.9, 0.95]"),
     ("optimizer.warmup_steps=10", "began with 0.1, is now 10"), ("model.precision=bf16", "began with fp32, is now bf16"),
     ("train.metrics=[]", "began with ['exact_match'], is now []")],
)  # fmt: skip
def test_what_defines_the_training_may_not_change(storage: Path, change: str, told: str) -> None:
    key = change.partition("=")[0]
    with pytest.raises(UsageError) as caught:
        resumed_recipe(begun(asked(storage)), asked(storage, change))
    (line,) = caught.value.message.splitlines()[1:-1]
    assert line.startswith(f"  {key}: began with ") and line.endswith(told)
    assert "Write them as they were, or begin a new run without --resume" in caught.value.message


def test_all_that_changed_is_named_at_once_and_the_layout_is_not(storage: Path) -> None:
    recipe = asked(storage, "train.seed=7", "optimizer.lr=0.1", "batch.samples=32", "scaling.num_workers=3", "train.epochs=9")
    with pytest.raises(UsageError) as caught:
        resumed_recipe(begun(asked(storage)), recipe)
    keys = [line.partition(":")[0].strip() for line in caught.value.message.splitlines()[1:-1]]
    assert keys == ["batch.samples", "optimizer.lr", "train.seed"]


def test_matrices_that_were_not_there_are_another_training(storage: Path) -> None:
    with_lora = asked(storage, "model.lora={r: 4}", "model.weights=pretrained")
    with pytest.raises(UsageError, match=r"model\.lora\.r: began with 4, is now None"):
        resumed_recipe(begun(with_lora), asked(storage, "model.weights=pretrained"))
    with pytest.raises(UsageError, match=r"model\.lora\.r: began with None, is now 4"):
        resumed_recipe(begun(asked(storage, "model.weights=pretrained")), with_lora)


def test_the_budget_that_the_plan_chose_stays(storage: Path) -> None:
    """Also under another layout, which then trains the same micro-batches; unless it is asked for, or the run is elastic."""
    folder = begun(asked(storage))
    assert kept_budget(folder, asked(storage, "train.epochs=9", "zero=zero3", "scaling.num_workers=1")) == BUDGET
    assert kept_budget(folder, asked(storage, "batch.tokens_per_device=777")) is None
    assert kept_budget(folder, asked(storage, "batch.samples_per_device=7")) is None
    assert kept_budget(folder, asked(storage, "scaling.num_workers=[1, 2]")) is None
    assert kept_budget(begun(asked(storage), budget=None), asked(storage)) is None
    folder.write_plan({"tokens_per_device": BUDGET, "splits_for_padding": True, "largest_micro_batch_tokens": None})
    assert kept_budget(folder, asked(storage)) is None, "killed before it knew the rows' lengths"
    folder.write_plan({"tokens_per_device": BUDGET, "splits_for_padding": True, "largest_micro_batch_tokens": 700})
    assert kept_budget(folder, asked(storage)) == BUDGET
    (folder.path / "plan.json").unlink()
    assert kept_budget(folder, asked(storage)) is None


def test_graphs_that_failed_stay_away_unless_they_are_asked_for(storage: Path) -> None:
    folder = begun(asked(storage))
    folder.append_failure({"kind": "OutOfMemory", "of_graphs": True})
    assert resumed_recipe(folder, asked(storage)).model.cuda_graphs is None
    folder.append_failure({"kind": "CaptureError", "of_graphs": True})
    assert resumed_recipe(folder, asked(storage)).model.cuda_graphs is False
    assert resumed_recipe(folder, asked(storage, "model.cuda_graphs=true")).model.cuda_graphs is True


@pytest.mark.parametrize("change", ["scaling.num_workers=1", "zero=zero1", "model.gradient_checkpointing=true"])
def test_another_layout_gets_a_budget_of_its_own(storage: Path, change: str) -> None:
    assert resumed_recipe(begun(asked(storage)), asked(storage, change)).batch.tokens_per_device == "auto"


@pytest.mark.parametrize("change", ["batch.tokens_per_device=777", "batch.samples_per_device=8"])
def test_a_budget_that_is_asked_for_wins(storage: Path, change: str) -> None:
    recipe = asked(storage, change)
    assert resumed_recipe(begun(asked(storage)), recipe) == recipe


def test_a_plan_that_chose_no_budget_leaves_it_to_the_next(storage: Path) -> None:
    folder = begun(asked(storage, "batch.samples_per_device=8"), budget=None)
    assert resumed_recipe(folder, asked(storage)) == asked(storage)


def test_a_run_killed_before_its_plan_was_written_can_go_on(storage: Path) -> None:
    folder = begun(asked(storage), "mine")
    (folder.path / "plan.json").unlink()
    found = run_to_resume(asked(storage), QUICKSTART, "mine")
    assert resumed_recipe(found, asked(storage)) == asked(storage)


# -- whether there is something to do --------------------------------------------------------------------------------------------------


def test_a_complete_run_goes_on_only_for_more_steps(storage: Path) -> None:
    folder = completed(begun(asked(storage)), steps=1470)
    check_unfinished(folder, 1471)
    for total in (1470, 940):
        with pytest.raises(UsageError, match=r"is complete after 1,470 steps: raise train\.max_steps or train\.epochs"):
            check_unfinished(folder, total)


def test_a_run_that_stopped_early_is_complete(storage: Path) -> None:
    with pytest.raises(UsageError, match="is complete after 94 steps: it stopped early"):
        check_unfinished(completed(begun(asked(storage)), steps=94, stopped_early=True), 470)
    check_unfinished(completed(begun(asked(storage)), steps=94, stopped_early=False), 470)


@pytest.mark.parametrize("status", ["failed", "interrupted", None])
def test_a_run_that_did_not_complete_goes_on_even_after_its_last_step(storage: Path, status: str | None) -> None:
    folder = begun(asked(storage))
    if status is not None:
        folder.write_summary({"status": status, "steps": 470})
    check_unfinished(folder, 470)


def test_a_run_does_not_go_on_over_rows_that_changed_under_the_same_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "it" / "checkpoints" / "step-000004")
    checkpoint.path.mkdir(parents=True)
    (checkpoint.path / "state.json").write_text('{"data": "key-of-the-old-rows"}')

    def check(rows: Prepared, checkpoint: Checkpoint | None) -> None:
        Preparation(asked(tmp_path), RunFolder(tmp_path / "it"), None, False, MagicMock(), MagicMock(), print, rows).check_rows(checkpoint)

    check(Prepared(train="tokens/key-of-the-old-rows", eval=None, label_names=None), checkpoint)
    changed = Prepared(train="tokens/key-of-the-new-rows", eval=None, label_names=None)
    check(changed, None)
    with pytest.raises(DataError, match=r"data\.train: .*it was begun with other rows or another tokenizer.*begin a new run"):
        check(changed, checkpoint)


def test_a_trace_of_steps_that_are_done_is_told_to_be_missing() -> None:
    window = Profile(start=3, steps=3)
    assert untraced(None, 9) is untraced(window, 0) is untraced(window, 2) is None
    for done, told in ((3, "are traced from step 4 on"), (4, "are traced from step 5 on"), (5, "are not traced"), (1000, "are not traced")):
        assert told in (untraced(window, done) or "")
    assert untraced(window, 1000) == "train.profile: going on from step 1,000, steps 3 to 5 are not traced. Write a start after 1,000"


def test_a_resumed_run_tells_of_a_window_that_lies_behind_it(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    recipe = asked(storage, "train.profile={start: 2, steps: 1}")
    monkeypatch.setattr("trainkit.cluster.driver.launch", lambda *args: {"status": "completed"})
    run = MagicMock(recipe=recipe, folder=begun(recipe), failures=[], verbose=False, plan=SimpleNamespace(total_steps=470))
    run._say = lambda text, style: said.append(text)
    run.worked.began = 0.0
    run.folder.begin_attempt()
    for checkpoint in (Checkpoint(storage / "step-000001"), Checkpoint(storage / "step-000004")):
        _Run._attempt(run, checkpoint)
    assert [text for text in said if "train.profile" in text] == [untraced(recipe.train.profile, 4)]
