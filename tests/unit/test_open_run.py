"""Run folders opened in Python: finished, unfinished and damaged ones; frames, pictures, and what is shown while a run is watched."""

from __future__ import annotations

import math
import re
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest

import trainkit
from trainkit.cluster.progress import Watch
from trainkit.errors import RecipeError, UsageError
from trainkit.recipe.reader import recipe_to_yaml
from trainkit.runs import watching
from trainkit.runs.folder import RunFolder
from trainkit.runs.opened import Run, _flat
from trainkit.runs.plot_run import NAMED_RANKS, run_picture
from trainkit.runs.steps import StepLog

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"
SUMMARY: dict[str, Any] = {"status": "completed", "steps": 3, "eval": {"step": 3, "loss": 0.5, "exact_match": 0.25}, "error": None}


def step(number: int, **changed: Any) -> dict[str, Any]:
    peaks = {"peak_memory_gib": [0.5, 0.25], "piece_seconds": {"forward": 0.25}, "mfu": None, "data_wait_seconds": 0.0}
    return {"step": number, "loss": 4.0 / number, "samples": 8, "tokens": 100 * number, "seconds": 0.5} | peaks | changed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Of a completed run of three steps, without curves and model."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create(tmp_path / "runs", "quickstart")
    recipe = trainkit.load_recipe(QUICKSTART)
    folder.write_recipe(recipe_to_yaml(recipe))
    folder.write_plan(trainkit.plan(recipe).to_json())
    folder.begin_attempt()
    write_steps(folder, step(1), step(2), step(3))
    folder.write_summary(SUMMARY)
    return folder


def write_steps(folder: RunFolder, *steps: dict[str, Any]) -> None:
    folder.steps_path.unlink(missing_ok=True)
    log = StepLog(folder)
    for one in steps:
        log.append(one)
    log.close()


# What lies there


def test_a_finished_run_is_there_as_frames(folder: RunFolder) -> None:
    run = trainkit.open_run("runs/quickstart-1")
    assert (run.status, run.name, run.path) == ("completed", "quickstart-1", folder.path)
    assert run.recipe == trainkit.load_recipe(QUICKSTART) and run.plan == trainkit.plan(QUICKSTART) and run.summary == SUMMARY
    assert run.steps.index.name == "step" and run.steps["loss"].to_list() == [4.0, 2.0, 4 / 3]
    assert run.steps[["peak_memory_gib/rank_0", "peak_memory_gib/rank_1"]].iloc[-1].to_list() == [0.5, 0.25]
    assert run.steps["piece_seconds/forward"].to_list() == [0.25] * 3
    assert run.evaluations.to_dict("index") == {3: {"loss": 0.5, "exact_match": 0.25}}, "without curves the last one"


def test_steps_that_are_added_are_seen_and_a_changed_frame_is_the_users_own(folder: RunFolder) -> None:
    run = trainkit.open_run(folder.path)
    changed = run.steps
    changed["loss"] = 0.0
    assert run.steps["loss"].iloc[0] == 4.0
    log = StepLog(folder)
    log.append(step(4, peak_memory_gib=[0.5]))
    log.close()
    assert run.steps.index.to_list() == [1, 2, 3, 4]
    assert math.isnan(run.steps["peak_memory_gib/rank_1"][4]), "an elastic run may go on with fewer ranks"


def test_evaluations_come_from_the_curves(folder: RunFolder) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder.path / "tensorboard"))
    for at, loss in [(1, 2.0), (2, 1.0)]:
        writer.add_scalar("eval/loss", loss, at)
        writer.add_scalar("train/loss", loss, at)
    writer.add_scalar("eval/exact_match", 0.5, 2)
    writer.close()
    found = trainkit.open_run(folder.path).evaluations
    assert found["loss"].to_dict() == {1: 2.0, 2: 1.0} and list(found.columns) == ["loss", "exact_match"]
    assert math.isnan(found["exact_match"][1]) and found.index.name == "step"


def test_the_status_is_that_of_the_lock_then_of_the_summary(folder: RunFolder) -> None:
    run = trainkit.open_run(folder.path)
    folder.write_phase("evaluating")
    with folder.lock("driver"):
        assert run.status == "running" and "running: evaluating" in repr(run)
        assert "exact match" not in repr(run), "until a resumed run has begun, the summary is that of its end before"
    (folder.path / "summary.json").unlink()
    assert run.status == "unfinished" and run.summary is None and run.evaluations.empty


def test_a_run_shows_where_it_stands_and_lies(folder: RunFolder) -> None:
    folder.write_summary(SUMMARY | {"status": "failed", "error": {"message": "rank 1 <died>"}})
    run = trainkit.open_run(folder.path)
    shown = re.sub(" +", " ", repr(run))
    for words in ("status failed", "trained 3 steps of 470", "loss 1.3333", "400 tokens/s", "0.50 and 0.25 GiB", "error rank 1 <died>",
                  "evaluation exact match 0.2500", "folder runs/quickstart-1", "tensorboard --logdir runs"):  # fmt: skip
        assert words in shown
    assert "rank 1 &lt;died&gt;" in run._repr_html_()


# What is damaged, or not there


def with_curves(folder: RunFolder) -> Path:
    """Three evaluations; the file of curves."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder.path / "tensorboard")) as writer:
        for number in (1, 2, 3):
            writer.add_scalar("eval/loss", 1 / number, number)
    (events,) = (folder.path / "tensorboard").iterdir()
    return events


@pytest.mark.filterwarnings("error")
def test_evaluations_come_out_of_the_curves(folder: RunFolder) -> None:
    with_curves(folder)
    assert trainkit.open_run(folder.path).evaluations["loss"].to_dict() == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3)}


@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: data[:-60] + b"\xff" * 60, lambda data: b"garbage" * 9])
def test_curves_that_cannot_be_read_to_their_end_are_warned_of(damage: Callable[[bytes], bytes], folder: RunFolder) -> None:
    events = with_curves(folder)
    events.write_bytes(damage(events.read_bytes()))
    run = trainkit.open_run(folder.path)
    with pytest.warns(UserWarning, match=rf"quickstart-1: {events.name} is damaged or cut off"):
        assert len(run.evaluations) < 3
    with folder.lock("driver"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.status == "running" and len(run.evaluations) < 3, "it may be in the middle of a record"


def test_a_damaged_line_is_warned_of_and_left_out(folder: RunFolder) -> None:
    lines = folder.steps_path.read_text().splitlines()
    for damaged in ('{"step": 2, "lo', "\x00\x00", "null"):
        folder.steps_path.write_text("\n".join([lines[0], damaged, lines[2]]) + "\n")
        with pytest.warns(UserWarning, match=r"quickstart-1: steps\.jsonl:2 is damaged and left out"):
            assert trainkit.open_run(folder.path).steps.index.to_list() == [1, 3]


@pytest.mark.filterwarnings("error")
def test_a_line_that_is_still_written_is_no_damage(folder: RunFolder) -> None:
    folder.steps_path.write_text(folder.steps_path.read_text() + '{"step": 4, "lo')
    assert trainkit.open_run(folder.path).steps.index.to_list() == [1, 2, 3]


def test_damaged_and_missing_files_give_one_readable_error_each_and_a_picture_of_the_rest(folder: RunFolder) -> None:
    run = trainkit.open_run(folder.path)
    (folder.path / "summary.json").write_text('{"status": ')
    with pytest.raises(UsageError, match=r"summary\.json: damaged: not JSON"):
        run.summary  # noqa: B018
    (folder.path / "plan.json").write_text('{"world_size": 2}')
    with pytest.raises(UsageError, match=r"plan\.json: of another version of trainkit"):
        run.plan  # noqa: B018
    shown = repr(run)
    assert "damaged plan" in shown and "summary.json: damaged" in shown and "3 steps" in shown
    (folder.path / "summary.json").write_text("[]")
    with pytest.raises(UsageError, match="no object in braces"):
        run.status  # noqa: B018
    (folder.path / "recipe.yaml").unlink()
    with pytest.raises(RecipeError, match="no such recipe"):
        run.recipe  # noqa: B018
    with pytest.raises(UsageError, match="no model/ lies here"):
        run.predict("anything")
    assert run.steps["loss"].iloc[-1] == 4 / 3


def test_a_run_that_has_not_begun_can_be_looked_at(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "early")
    folder.write_recipe(recipe_to_yaml(trainkit.load_recipe(QUICKSTART)))
    run = trainkit.open_run(folder.path)
    assert (run.status, run.plan, run.summary, len(run.steps), run.picture()) == ("unfinished", None, None, 0, None)
    assert list(run.steps.columns) == ["loss", "tokens", "seconds"] and "unfinished" in repr(run)
    with pytest.raises(UsageError, match="no step has been trained yet"):
        run.plot()


def test_what_is_no_run_folder_is_told_with_the_runs_that_are_near(folder: RunFolder, tmp_path: Path) -> None:
    for path in ("runs", "runs/quickstart-7"):
        with pytest.raises(UsageError, match=rf"^{path}: no run folder\. In runs lie the runs quickstart-1$"):
            trainkit.open_run(path)
    with pytest.raises(UsageError, match=r"^nowhere/at/all: no run folder$"):
        trainkit.open_run("nowhere/at/all")


@pytest.mark.parametrize("path", [None, "", ["runs"], 3])
def test_what_is_no_path_is_one_message(path: Any) -> None:
    with pytest.raises(UsageError, match=r"open_run\(.*\): name one run folder"):
        trainkit.open_run(path)


@pytest.mark.parametrize(
    "summary, message",
    [
        ({}, "it has no status"),
        (SUMMARY | {"eval": "y"}, 'eval is "y"'),
        (SUMMARY | {"eval": {"loss": "low"}}, "eval.loss is"),
        (SUMMARY | {"error": "e"}, 'error is "e"'),
    ],
)
def test_a_summary_of_another_kind_is_told_beside_the_rest(summary: dict[str, Any], message: str, folder: RunFolder) -> None:
    folder.write_summary(summary)
    run = trainkit.open_run(folder.path)
    assert "damaged" in repr(run) and message in repr(run) and "3 steps" in repr(run)
    for look in (lambda: run.status, lambda: run.summary, lambda: run.evaluations):
        with pytest.raises(UsageError, match=r"summary\.json: damaged.*Leave this run out"):
            look()


def test_a_plan_with_a_nonsensical_value_is_told_beside_the_rest(folder: RunFolder) -> None:
    folder.write_plan(folder.read_plan() | {"total_steps": None})
    assert "total_steps is null" in repr(trainkit.open_run(folder.path))


def test_the_peak_is_that_of_all_steps_with_as_many_workers_as_now(folder: RunFolder) -> None:
    peaks = ([9.0, 9.0, 9.0], [3.0, 0.25], [0.5, 4.0])
    write_steps(folder, *(step(number, peak_memory_gib=peak) for number, peak in enumerate(peaks, start=1)))
    assert "3.00 and 4.00 GiB, rank by rank" in repr(trainkit.open_run(folder.path))


# Pictures


def frame(*steps: dict[str, Any]) -> pandas.DataFrame:
    return pandas.DataFrame([_flat(one) for one in steps]).set_index("step")


def labels(axes: Any) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def test_a_picture_shows_loss_speed_and_every_ranks_memory(folder: RunFolder) -> None:
    loss, speed, memory = trainkit.open_run(folder.path).plot().axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[4.0, 2.0, 4 / 3], [0.5]]
    assert speed.lines[0].get_ydata().tolist() == [200.0, 400.0, 600.0]
    assert labels(loss) == ["training", "evaluation"] and labels(memory) == ["rank 0", "rank 1"]
    assert "resident" in memory.get_title() and memory.get_ylim()[0] == speed.get_ylim()[0] == 0
    assert trainkit.open_run(folder.path).plot()._repr_png_().startswith(b"\x89PNG")


def test_a_nan_is_shown_as_a_nan() -> None:
    loss, *_ = run_picture(frame(step(1), step(2, loss=math.nan), step(3, loss=math.inf))).axes
    assert [text.get_text().strip() for text in loss.texts] == ["nan", "inf"] and len(loss.lines) == 3


def test_on_a_gpu_the_plan_is_drawn_beside_the_peaks_and_many_ranks_are_drawn_alike() -> None:
    *_, memory = run_picture(frame(step(1)), planned_gib=0.75).axes
    assert labels(memory) == ["rank 0", "rank 1", "planned"] and "GPU" in memory.get_title()
    assert memory.lines[0].get_marker() == "o", "one step alone makes no line"
    *_, memory = run_picture(frame(step(1, peak_memory_gib=[0.5] * (NAMED_RANKS + 1)))).axes
    assert labels(memory) == [f"{NAMED_RANKS + 1} ranks"]


# Beside each other


def test_runs_are_compared_as_table_frame_and_picture(folder: RunFolder) -> None:
    other = RunFolder.create(folder.path.parent, "quickstart")
    shutil.copytree(folder.path, other.path, dirs_exist_ok=True)
    (other.path / "summary.json").unlink()
    totals = {"epochs": 0.1, "samples": 24, "tokens": 600, "train_loss": 2.5, "seconds": 1.5, "wall_seconds": 9.0, "mfu": None}
    totals |= {"samples_per_second": 16.0, "tokens_per_second": 400.0, "peak_memory_gib": [0.5, 0.25]}
    folder.write_summary(SUMMARY | totals)
    found = trainkit.compare(trainkit.open_run(folder.path), "runs/quickstart-2")
    assert found.frame["status"].to_dict() == {"quickstart-1": "completed", "quickstart-2": "unfinished"}
    assert found.frame.loc["quickstart-1", "eval_loss"] == 0.5 and found.frame["train_loss"].notna().all()
    assert "quickstart-2" in repr(found) and "no summary.json: it is still running" in repr(found)
    assert "<td" in found._repr_html_() and "unfinished" in found._repr_html_()
    assert found.plot()._repr_png_().startswith(b"\x89PNG")
    assert trainkit.compare("runs").frame.equals(found.frame)
    for named, message in ((["nowhere"], "no such run folder"), ([], "no run is named")):
        with pytest.raises(UsageError, match=message):
            trainkit.compare(*named)


# Watching


class Lived(Run):
    """A run that goes through these statuses, one a look."""

    def __init__(self, folder: RunFolder, *statuses: str):
        super().__init__(folder)
        self.statuses = list(statuses)

    @property
    def status(self) -> str:
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]


class Shown:
    """IPython's display: what stands in the cell now, and how often it was replaced."""

    def __init__(self) -> None:
        self.cell: list[Any] = []
        self.updates = 0

    def display(self, content: Any, display_id: bool) -> Shown.Handle:
        self.cell.append(content)
        return Shown.Handle(self, len(self.cell) - 1)

    class Handle:
        def __init__(self, shown: Shown, place: int):
            self.shown, self.place = shown, place

        def update(self, content: Any) -> None:
            self.shown.cell[self.place] = content
            self.shown.updates += 1


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shown]:
    import IPython.display

    shown = Shown()
    monkeypatch.setattr(IPython.display, "display", shown.display)
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: types.SimpleNamespace(kernel=True))
    yield shown


def test_in_a_notebook_facts_and_curves_are_replaced_in_place(folder: RunFolder, kernel: Shown) -> None:
    folder.steps_path.unlink()
    looks = iter([lambda: None, lambda: write_steps(folder, step(1)), lambda: write_steps(folder, step(1), step(2))])
    run = Lived(folder, "running", "running", "running", "running", "running", "running", "completed")
    watching.watch(run, 0.1, sleep=lambda seconds: next(looks)())
    facts, curves = kernel.cell
    assert "completed" in facts.data and "2 steps of 470" in facts.data
    assert curves.data.startswith(b"\x89PNG") and kernel.updates >= 3


def test_the_stop_button_ends_the_watching_alone(folder: RunFolder, kernel: Shown) -> None:
    def pressed(seconds: float) -> None:
        raise KeyboardInterrupt

    watching.watch(Lived(folder, "running"), 0.1, sleep=pressed)
    assert "stopped watching, and the run goes on" in kernel.cell[0].data


def test_outside_of_a_notebook_lines_are_printed(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert not watching.in_notebook()
    folder.write_phase("training")
    watching.watch(Lived(folder, "running", "running", "running", "completed"), 0.1, sleep=lambda seconds: None)
    printed = capsys.readouterr().out
    assert "step 3/470  loss 1.3333  500 tokens/s" in printed and "tensorboard --logdir runs" in printed
    assert "\x1b" not in printed


def test_the_lines_of_a_watched_run_have_the_numbers_of_the_command(folder: RunFolder) -> None:
    write_steps(folder, *(step(number) | {"seconds": 20.0 if number == 1 else 0.25, "mfu": 0.1 * number} for number in range(1, 6)))
    folder.write_phase("training")
    run = trainkit.open_run(folder.path)
    assert run.plan is not None
    watched, shown = watching.Lines()._view(run).words(), Watch(folder, run.plan.total_steps).look().words()
    assert watched == shown and "MFU 35.0 %" in shown and "1,400 tokens/s" in shown
    folder.clear_phase()
    assert watching.Lines()._view(run).words()[1:] == shown[:2], "until the command that goes on has begun: step and loss"


def test_a_pause_of_nothing_is_refused(folder: RunFolder) -> None:
    for every in (0, -1, math.nan):
        with pytest.raises(UsageError, match="write seconds above 0"):
            trainkit.open_run(folder.path).watch(every)
