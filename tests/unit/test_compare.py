"""`trainkit compare`: rows say what runs left, in every state that a run can be in, and bad input is told instead of repaired."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_runs import CPU, ROWS, plant
from rich.console import Console

from trainkit import cli
from trainkit.errors import CapacityError, DoesNotFit, Interrupted, NonFiniteError, OutOfMemory, TrainkitError, UsageError
from trainkit.recipe.zero import SHIPPED, read_zero
from trainkit.runs import compare, plot, tables
from trainkit.runs.compare import Row, read_row, read_rows
from trainkit.runs.folder import RunFolder
from trainkit.runs.reading import read_steps
from trainkit.runs.totals import totals
from trainkit.units import GIB

TWO = "scaling.num_workers=2"


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", *map(str, arguments)])
    return int(ended.value.code or 0)


def as_text(rows: list[Row], width: int = 1000, notes: tuple[str, ...] = ()) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as captured:
        console.print(tables.as_text(rows, notes, width))
    return captured.get()


def cells(row: Row) -> dict[str, str]:
    return {column.field: column.cell(row) for column in tables.COLUMNS}


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


# One row


def test_a_row_holds_what_the_run_left(tmp_path: Path) -> None:
    folder = plant(tmp_path, "fast", TWO, losses=[3.0, 2.0, 1.0], seconds=0.5, peak_gib=12.0, mfu=0.381)
    row = read_row(folder.path)
    assert (row.run, row.recipe, row.model, row.technique) == ("fast", "t5_large_zero1", "google-t5/t5-large", "ZeRO-1")
    assert (row.workers, row.device, row.precision, row.samples_per_step, row.steps) == (2, "NVIDIA H200", "bf16", 96, 3)
    assert (row.epochs, row.seconds, row.wall_seconds) == (round(3 * 96 / ROWS, 4), 1.5, 60.0)
    assert (row.samples_per_second, row.tokens_per_second, row.mfu) == (192.0, 6000.0, pytest.approx(0.381))
    assert (row.peak_gib, row.train_loss, row.eval_loss, row.status) == (12.0, 2.0, 0.5, "completed")
    assert row.curve == ((96.0, 3.0), (192.0, 2.0), (288.0, 1.0))
    assert row.notes == () and not row.out_of_memory and row.environment["git_dirty"] is False


def test_the_planned_peak_has_activations_where_the_plan_tells_them(tmp_path: Path) -> None:
    folder = plant(tmp_path, "a", TWO)
    memory = folder.read_plan()["memory"]
    assert read_row(folder.path).planned_gib == max(sum(memory["device"].values()), memory["device_at_step"]) / GIB
    change(folder.path / "plan.json", lambda plan: plan.update(expected_peak_bytes=20 * GIB))
    assert read_row(folder.path).planned_gib == 20.0
    change(folder.path / "plan.json", lambda plan: plan.update(expected_peak_bytes=None))
    assert read_row(folder.path).planned_gib == pytest.approx(8.93, abs=0.01)
    change(folder.path / "plan.json", lambda plan: plan.update(memory=None))
    assert read_row(folder.path).planned_gib is None


TECHNIQUES = {"zero0": "data parallel", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
TECHNIQUES |= {"zero2_offload": "ZeRO-2 + offload", "zero3_offload": "ZeRO-3 + offload"}


@pytest.mark.parametrize("zero", SHIPPED)
def test_each_shipped_configuration_has_its_name(zero: str) -> None:
    read = read_zero(zero)
    plan = {"zero_stage": read.stage, "offload_optimizer": read.offload_optimizer, "offload_param": read.offload_param, "world_size": 2}
    assert compare.technique(plan, lora=False) == TECHNIQUES[zero]
    assert compare.technique(plan, lora=True) == f"{TECHNIQUES[zero]}, LoRA"
    alone = compare.technique(plan | {"world_size": 1}, lora=False)
    assert alone == ("no ZeRO" if zero == "zero0" else TECHNIQUES[zero])


def test_half_an_offload_is_named() -> None:
    plan = {"zero_stage": 3, "offload_optimizer": True, "offload_param": False, "world_size": 2}
    assert compare.technique(plan, lora=False) == "ZeRO-3 + optimizer offload"
    assert compare.technique(plan | {"offload_optimizer": False, "offload_param": True}, lora=False) == "ZeRO-3 + parameter offload"


# Runs that did not end well


@pytest.mark.parametrize("losses", [[], [3.0, 2.0]])
@pytest.mark.parametrize("error", [OutOfMemory("rank 1: the GPU has no memory left"), DoesNotFit("zero0 on 1 worker: too much")])
def test_want_of_memory_is_a_result(tmp_path: Path, losses: list[float], error: TrainkitError) -> None:
    row = read_row(plant(tmp_path, "big", TWO, losses=losses, mfu=0.4, error=error).path)
    shown = cells(row)
    measured = ("seconds", "samples_per_second", "tokens_per_second", "mfu", "peak_gib", "train_loss", "eval_loss")
    assert {shown[name] for name in measured} == {"OOM"} and shown["status"] == "out of memory"
    assert float(shown["planned_gib"]) > 0 and row.steps == len(losses)
    in_csv = next(csv.DictReader(io.StringIO(tables.as_csv([row]))))
    assert {in_csv[name] for name in measured} == {""} and in_csv["status"] == "out of memory"
    assert row.notes == (f"big: failed: {error.message}",)


def test_too_few_gpus_are_no_want_of_memory(tmp_path: Path) -> None:
    row = read_row(plant(tmp_path, "a", TWO, losses=[], error=CapacityError("the cluster has 1 GPU")).path)
    assert cells(row)["status"] == "failed (CapacityError)" and "OOM" not in cells(row).values()


def test_what_a_stopped_run_reached_is_shown(tmp_path: Path) -> None:
    interrupted = plant(
        tmp_path, "stopped", TWO, "train.max_steps=30", error=Interrupted("interrupted after step 3 of 30; --resume goes on")
    )
    assert read_row(interrupted.path).notes == ("stopped: interrupted after step 3 of 30",)
    shown = cells(read_row(interrupted.path))
    assert (shown["steps"], shown["seconds"], shown["status"]) == ("3 of 30", "1.5", "interrupted")


def test_a_nan_is_shown_as_a_nan(tmp_path: Path) -> None:
    row = read_row(plant(tmp_path, "a", losses=[3.0, math.nan], error=NonFiniteError("step 2: the loss is NaN", step=2)).path)
    assert cells(row)["train_loss"] == "nan" and cells(row)["status"] == "failed (NonFiniteError)"
    assert math.isnan(row.curve[1][1])


@given(losses=st.lists(st.floats(0.1, 10), max_size=8), mfu=st.none() | st.floats(0.1, 0.6))
def test_an_unfinished_run_counts_as_its_summary_would(
    losses: list[float], mfu: float | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    runs = tmp_path_factory.mktemp("runs")
    unfinished, ended = (read_row(plant(runs, str(end), TWO, losses=losses, mfu=mfu, ended=end).path) for end in (False, True))
    assert (unfinished.status, ended.status) == ("unfinished", "completed") and "no summary.json" in unfinished.notes[0]
    for name in ("steps", "epochs", "samples_per_second", "tokens_per_second", "mfu", "peak_gib", "train_loss", "seconds", "curve"):
        assert getattr(unfinished, name) == getattr(ended, name), name


# Damage


@given(bad=st.integers(1, 6), junk=st.sampled_from(['{"step": 3, "lo', "", "null", "[1]", '{"step": 3}', "\x00\x00\x00", '{"step": "3"}']))
def test_a_damaged_line_is_named_and_only_it_is_left_out(bad: int, junk: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = plant(tmp_path_factory.mktemp("runs"), "a", TWO, losses=[6.0, 5.0, 4.0, 3.0, 2.0, 1.0], ended=False)
    whole = read_row(folder.path)
    lines = folder.steps_path.read_text().splitlines()
    lines[bad - 1] = junk
    folder.steps_path.write_text("".join(f"{line}\n" for line in lines))
    row = read_row(folder.path)
    assert row.notes[0] == f"a: steps.jsonl:{bad} is damaged and left out" and row.steps == (5 if bad == 6 else 6)
    assert RunFolder(folder.path).read_steps() == read_steps(folder.steps_path)[0], "the summary counts the same"
    assert row.curve == tuple(point for number, point in enumerate(whole.curve, start=1) if number != bad)


def test_bytes_that_are_no_text_are_a_damaged_line(tmp_path: Path) -> None:
    folder = plant(tmp_path, "a", ended=False)
    lines = folder.steps_path.read_bytes().splitlines(keepends=True)
    folder.steps_path.write_bytes(lines[0] + b"\xff\xfe\n" + lines[2])
    assert read_row(folder.path).notes[0] == "a: steps.jsonl:2 is damaged and left out"


def test_a_step_written_twice_is_named(tmp_path: Path) -> None:
    folder = plant(tmp_path, "a")
    lines = folder.steps_path.read_text().splitlines(keepends=True)
    folder.steps_path.write_text("".join([*lines, lines[1]]))
    assert read_row(folder.path).notes == ("a: steps.jsonl:4 holds step 2 after step 3 and is left out",)


def test_a_line_cut_off_by_a_kill_is_no_damage(tmp_path: Path) -> None:
    folder = plant(tmp_path, "a", ended=False)
    folder.steps_path.write_text(folder.steps_path.read_text() + '{"step": 4, "los')
    row = read_row(folder.path)
    assert row.steps == 3 and len(row.notes) == 1 and "no summary.json" in row.notes[0]


def test_lost_steps_of_an_ended_run_are_told(tmp_path: Path) -> None:
    folder = plant(tmp_path, "a")
    folder.steps_path.write_text("".join(folder.steps_path.read_text().splitlines(keepends=True)[:2]))
    assert read_row(folder.path).notes == ("a: steps.jsonl holds 2 steps of the 3 that were taken",)
    assert read_row(folder.path).steps == 3


def summary_of_another_kind(folder: RunFolder) -> None:
    change(folder.path / "summary.json", lambda summary: summary.pop("tokens_per_second"))


def said(file: str, **values: Any) -> Callable[[RunFolder], object]:
    return lambda folder: change(folder.path / f"{file}.json", lambda found: found.update(values))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder.path / "summary.json").write_text('{"status":'), "summary.json: damaged: not JSON"),
        (lambda folder: (folder.path / "plan.json").write_text("[]"), "plan.json: damaged: no object in braces"),
        (
            summary_of_another_kind,
            "summary.json: damaged, or of another version of trainkit: it has no tokens_per_second. Leave this run out",
        ),
        (lambda folder: (folder.path / "recipe.yaml").write_text("model: ["), "recipe.yaml"),
        (lambda folder: (folder.path / "recipe.yaml").write_text("model: {path: 5}"), "recipe.yaml: not as trainkit writes it"),
        (said("summary", steps="six"), 'steps is "six", and should be a valid integer. Leave this run out'),
        (said("summary", steps=True), "steps is true, and should be a valid integer"),
        (said("summary", seconds="fast"), 'seconds is "fast", and should be a valid number. Leave this run out'),
        (said("summary", status=3), "status is 3, and should be 'completed', 'failed' or 'interrupted'. Leave this run out"),
        (said("summary", eval="y"), 'eval is "y", and should be a valid dictionary'),
        (said("summary", peak_memory_gib=["lots"]), 'peak_memory_gib.0 is "lots", and should be a valid number'),
        (said("summary", error={"kind": 3, "message": "m"}), "error.kind is 3, and should be a valid string"),
        (said("plan", total_steps=None), "total_steps is null, and should be a valid integer. Leave this run out"),
        (said("plan", memory={"device": 3}), "memory.device is 3, and should be a valid dictionary"),
    ],
)
def test_a_damaged_file_is_one_message(
    damage: Callable[[RunFolder], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plant(tmp_path, "a")
    damage(folder)
    assert call(folder.path) == 2
    shown = capsys.readouterr()
    assert message in shown.err and str(folder.path) in shown.err and "Traceback" not in shown.err and shown.out == ""
    assert "fault of trainkit" not in shown.err


@pytest.mark.parametrize("value", [{"peak_memory_gib": "lots"}, {"mfu": "a"}, {"piece_seconds": [1]}, {"samples": True}, {"step": 2.0}])
def test_a_value_that_cannot_be_makes_a_damaged_line(value: dict[str, Any], tmp_path: Path) -> None:
    folder = plant(tmp_path, "a", TWO, ended=False)
    lines = folder.steps_path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | value)
    folder.steps_path.write_text("\n".join([*lines, ""]))
    assert read_row(folder.path).notes[0] == "a: steps.jsonl:2 is damaged and left out"


def test_a_damaged_run_hides_no_other_of_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("bad", "fine"):
        plant(tmp_path, name)
    said("summary", steps="six")(RunFolder(tmp_path / "bad"))
    told = (
        f'left out: {tmp_path}/bad/summary.json: damaged, or of another version of trainkit: steps is "six", and should be a valid integer'
    )
    for named in (tmp_path, tmp_path / "*"):
        rows, notes = read_rows([named])
        assert [row.run for row in rows] == ["fine"] and notes == [told]
        assert call(named) == 0 and "left out" in capsys.readouterr().out
    assert call(tmp_path, tmp_path / "bad") == 2 and call(tmp_path / "bad", tmp_path) == 2, "what is named itself stays an error"
    said("plan", total_steps=None)(RunFolder(tmp_path / "fine"))
    assert call(tmp_path) == 2, "no run is left"


def test_peaks_are_the_highest_of_all_processes_and_other_workers_are_told(tmp_path: Path) -> None:
    assert totals(steps_of([9.0, 1.0], [2.0, 3.0]), None)["peak_memory_gib"] == [9.0, 3.0]
    assert totals(steps_of([9.0, 9.0], [2.0], [5.0], [4.0]), None)["peak_memory_gib"] == [5.0]
    assert math.isnan(totals(steps_of([2.0], [math.nan], [3.0]), None)["peak_memory_gib"][0])
    assert totals([], None)["peak_memory_gib"] is None
    for ended in (True, False):
        folder = plant(tmp_path, f"ended-{ended}", TWO, losses=[3.0, 2.0, 1.0], ended=False)
        one, two, three = map(json.loads, folder.steps_path.read_text().splitlines())
        lines = [one | {"peak_memory_gib": [9.0]}, two | {"peak_memory_gib": [1.0, 7.0]}, three | {"peak_memory_gib": [1.0, 2.0]}]
        folder.steps_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        row = read_row(folder.path)
        assert row.peak_gib == 7.0
        assert row.notes[0] == (
            f"ended-{ended}: trained steps 1 to 1 with 1 worker, since then with 2 workers: "
            "rates and loss are of all, peak, technique and workers of the last"
        )


def steps_of(*peaks: list[float]) -> list[dict[str, Any]]:
    numbers = {"loss": 1.0, "samples": 8, "tokens": 99, "seconds": 0.5}
    return [{"step": number, "peak_memory_gib": peak, **numbers} for number, peak in enumerate(peaks, start=1)]


# Which runs are meant


@pytest.mark.parametrize(
    "named, message",
    [
        ("quick-1", "no such run folder (did you mean {runs}/quick-2?)"),
        ("empty", "no run folder (recipe.yaml and plan.json), and none in it"),
        ("notes.txt", "a file. Name run folders"),
        ("no-such-*", "no run folder matches"),
        ("", "'' is no folder. Name run folders"),
        ("**x", "no run folders can be looked for there: Invalid pattern"),
        ("x" * 300, "no run folders can be looked for there: File name too long"),
    ],
)
def test_what_is_no_run_is_one_message(named: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, "quick-2")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    assert call(tmp_path / named if named else named) == 2
    assert message.format(runs=tmp_path) in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("named", [[], [""], [["runs"]], [None]])
def test_what_names_no_folder_is_one_message(named: Any) -> None:
    with pytest.raises(UsageError, match="Name run folders, or folders of run folders"):
        read_rows(named)


def test_a_folder_of_runs_stands_for_its_runs(tmp_path: Path) -> None:
    for name in ("quick-10", "quick-2", "other"):
        plant(tmp_path, name)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "pictures").mkdir()
    rows, notes = read_rows([tmp_path])
    assert [row.run for row in rows] == ["other", "quick-2", "quick-10"]
    assert notes == ["pictures is no run folder and left out"]


@pytest.mark.parametrize("absolute", [True, False])
def test_a_glob_that_no_shell_has_expanded_is(absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("quick-10", "quick-2", "other"):
        plant(tmp_path / "runs", name)
    monkeypatch.chdir(tmp_path)
    rows, notes = read_rows([tmp_path / "runs/quick-*" if absolute else Path("runs/quick-*")])
    assert [row.run for row in rows] == ["quick-2", "quick-10"] and notes == []


def test_a_run_named_twice_is_shown_once_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, "a")
    monkeypatch.chdir(tmp_path / "a")
    rows, notes = read_rows([Path(), tmp_path / "a"])
    assert [row.run for row in rows] == ["a"] and notes == ["a is named twice and shown once"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for runs in ("here", "there"):
        plant(tmp_path / runs, "a")
    plant(tmp_path / "here", "b")
    assert [row.run for row in read_rows([tmp_path / "here", tmp_path / "there"])[0]] == ["here/a", "b", "there/a"]
    for machine in ("one", "two"):
        plant(tmp_path / machine / "here", "a")
    folders = [tmp_path / "one/here", tmp_path / "two/here", tmp_path / "there"]
    assert [row.run for row in read_rows(folders)[0]] == ["one/here/a", "two/here/a", "there/a"]


def test_losses_that_do_not_compare_are_told(tmp_path: Path) -> None:
    plant(tmp_path, "large")
    plant(tmp_path, "small", recipe="t5_small_zero1")
    plant(tmp_path, "part", "data.train=train[:200]")
    plant(tmp_path, "untested", "data.eval=null")
    assert read_rows([tmp_path / "large", tmp_path / "untested"])[1] == []
    (told,) = read_rows([tmp_path / "large", tmp_path / "small"])[1]
    assert told == "runs of different models (google-t5/t5-large, google-t5/t5-small): their losses do not compare"
    (told,) = read_rows([tmp_path / "large", tmp_path / "part"])[1]
    assert "different data" in told and "train[:200]" in told and "training losses" in told


def test_a_cpu_run_says_what_its_peak_is(tmp_path: Path) -> None:
    plant(tmp_path, "a", hardware=CPU)
    assert "resident memory" in read_rows([tmp_path])[1][0]


# Forms


@pytest.fixture
def several(tmp_path: Path) -> list[Row]:
    plant(tmp_path, "zero1-2-workers", TWO)
    plant(tmp_path, "zero3-2-workers", TWO, "zero=zero3", seconds=1.0, losses=[3.0, 2.5])
    plant(tmp_path, "one-worker", "scaling.num_workers=1", "zero=zero0", losses=[], error=OutOfMemory("the GPU has no memory left"))
    plant(tmp_path, "a-nan", TWO, losses=[3.0, math.nan], error=NonFiniteError("step 2: the loss is NaN"))
    plant(tmp_path, "going", TWO, losses=[3.0], ended=False)
    return read_rows([tmp_path])[0]


@pytest.mark.parametrize("width", [60, 80, 100, 140, 1000])
def test_text_fits_and_loses_no_cell(several: list[Row], width: int) -> None:
    text = as_text(several, width, ("a note",))
    assert all(len(line) <= width for line in text.splitlines())
    words = set(text.replace(", ", " ").split())
    for row in several:
        assert set(" ".join(cells(row).values()).split()) <= words, row.run
    assert "a note" in text and tables.LEGEND.split()[0] in words
    assert len([line for line in text.splitlines() if line.startswith("a-nan")]) > (0 if width > 140 else 1)


def test_what_all_runs_share_is_said_once(several: list[Row]) -> None:
    first = as_text(several).splitlines()[0]
    assert first == "all runs: model google-t5/t5-large, device NVIDIA H200, precision bf16, samples a step 96"
    assert as_text(several).count("google-t5/t5-large") == 1
    assert tables.as_markdown(several, []).splitlines()[0] == first
    assert "all runs" not in as_text(several[:1]) and "google-t5/t5-large" in as_text(several[:1])


def test_markdown_is_a_table_with_its_notes(several: list[Row]) -> None:
    lines = tables.as_markdown(several, ["a note"]).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(several) and len({line.count("|") for line in table}) == 1 and len({len(line) for line in table}) == 1
    assert set(table[1]) <= set("|-: ") and lines[-1] == "- a note"
    assert [line.split("|")[1].strip() for line in table[2:]] == [row.run for row in several]


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    assert tables.markdown_table(["a"], [["x|y\nz"]], [False]).splitlines()[2] == "| x\\|y z |"


def test_csv_gives_the_numbers_back(several: list[Row]) -> None:
    records = list(csv.DictReader(io.StringIO(tables.as_csv(several))))
    for row, record in zip(several, records, strict=True):
        for name, value in record.items():
            expected = {"status": tables.ended(row)}.get(name, getattr(row, name))
            if row.out_of_memory and name in ("seconds", "peak_gib"):
                expected = None
            assert value == ("" if expected is None else str(expected)), (row.run, name)


@pytest.mark.parametrize("number, written", [(None, "-"), (13090.7, "13,091"), (353.4, "353"), (69.24, "69.2"), (0.1139, "0.114")])
def test_numbers_keep_three_digits(number: float | None, written: str) -> None:
    assert tables.significant(number) == written


def test_the_command_prints_each_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, "a", ended=False)
    assert call(tmp_path) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out and "a: no summary.json" in printed.out and printed.err == ""
    assert call(tmp_path, "--format", "markdown") == 0
    assert "\n- a: no summary.json" in capsys.readouterr().out
    assert call(tmp_path, "--format", "csv") == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2 and printed.err.startswith("a: no summary.json"), "notes are no rows"
    assert call(tmp_path, "--format", "html") == 2
    assert call() == 2


# The picture


def test_the_picture_is_a_png_with_something_on_it(several: list[Row], tmp_path: Path) -> None:
    from matplotlib.image import imread

    file = tmp_path / "runs.PNG"
    plot.write_plot(several, file)
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(file)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800
    assert 0.5 < (pixels[..., :3].min(axis=-1) > 0.99).mean() < 0.98, "neither blank nor full"


def test_the_picture_shows_every_run_also_those_without_steps(several: list[Row]) -> None:
    losses, speed, memory = plot.figure(several).axes
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    expected = ["a-nan: failed (NonFiniteError)", "going: unfinished", "one-worker: out of memory, no steps"]
    assert labels == [*expected, "zero1-2-workers", "zero3-2-workers"]
    assert [tick.get_text() for tick in speed.get_yticklabels()] == [row.run for row in several]
    assert [text.get_text() for text in speed.texts] == [
        "OOM" if row.out_of_memory else tables.significant(row.samples_per_second) for row in several
    ]
    measured, planned = [patch.get_width() for patch in memory.patches][::2], [patch.get_width() for patch in memory.patches][1::2]
    assert measured == [0 if row.out_of_memory else row.peak_gib for row in several] and planned == [row.planned_gib for row in several]
    assert [text.get_text() for text in memory.texts].count("OOM") == 1


@pytest.mark.filterwarnings("error")
def test_names_are_shown_as_they_are_and_what_is_no_number_is_said(several: list[Row], tmp_path: Path) -> None:
    curve = ((8.0, 3.0), (16.0, math.nan), (24.0, math.nan), (32.0, 2.0), (40.0, math.inf), (48.0, 1.0))
    rows = [replace(several[-1], run=name, curve=curve, peak_gib=math.nan, samples_per_second=math.nan) for name in ("_base", "a$b$c")]
    drawn = plot.figure(rows)
    plot.write_plot(rows, tmp_path / "runs.png")
    losses, speed, memory = drawn.axes
    named = [*losses.get_legend().get_texts(), *speed.get_yticklabels()]
    assert [text.get_text() for text in named] == ["_base", "a$b$c"] * 2 and not any(text.get_parse_math() for text in named)
    assert [text.get_text().strip() for text in losses.texts] == ["nan", "inf"] * 2
    assert [text.xy[0] for text in losses.texts] == [16.0, 40.0] * 2
    assert [(text.get_text(), text.xy[0]) for text in speed.texts] == [("nan", 0.0)] * 2
    assert [(text.get_text(), text.xy[0]) for text in memory.texts][::2] == [("nan", 0.0)] * 2


def test_a_long_curve_is_smoothed_in_its_place() -> None:
    falling = [float(value) for value in range(100, 0, -1)]
    window = len(falling) // plot.SMOOTHED_PARTS
    means = plot._running_mean(falling, window)
    assert window == 2 and means[0] == 99.5 and len(means) == 99
    assert plot._running_mean([1.0, math.nan, 3.0], 1)[::2] == [1.0, 3.0]


@pytest.mark.parametrize("name, message", [("runs.pdf", "ends in .png"), ("no/such/runs.png", "cannot be written: No such file")])
def test_a_picture_that_cannot_be_is_one_message(name: str, message: str, several: list[Row], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        plot.write_plot(several, tmp_path / name)
