"""scripts/results: every figure of its tables comes from a run folder, and only what stands between the marks is exchanged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from planted_runs import ENVIRONMENT, plant

from trainkit.errors import OutOfMemory
from trainkit.runs.compare import read_rows
from trainkit.runs.tables import COLUMNS

SCRIPT = Path(__file__).parents[2] / "scripts/results"
BEGIN, END = "<!-- made by scripts/results: begin -->", "<!-- made by scripts/results: end -->"


def results(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    plant(folder, "two", "scaling.num_workers=2")
    plant(folder, "one", "scaling.num_workers=1", "model.weights=random", losses=[], error=OutOfMemory("the GPU has no memory left"))
    changed = ENVIRONMENT | {"git_dirty": True, "gpus": []}
    plant(folder, "small", "model.path=/here/models/t5-small", recipe="t5_small_zero1", environment=changed)
    return folder


def test_each_recipe_has_a_table_with_the_figures_of_its_runs(runs: Path) -> None:
    done = results(runs)
    assert done.returncode == 0, done.stderr
    headers = {" ".join(column.header.split()): column for column in COLUMNS}
    large, small = done.stdout.split("## `")[1:]
    assert large.startswith("t5_large_zero1`") and small.startswith("t5_small_zero1`")
    for block, names in (large, ["one", "two"]), (small, ["small"]):
        header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if line.startswith("|")]
        assert [line[0] for line in lines] == names and len(header) > 12
        for line in lines:
            row = next(row for row in read_rows([runs])[0] if row.run == line[0])
            assert line == [headers[name].cell(row) for name in header]
    assert "OOM" in large and "OOM" not in small and "the GPU has no memory left" in large


def test_each_run_says_what_it_changed_and_where_it_ran(runs: Path) -> None:
    said = results(runs).stdout
    assert "- `two`: the recipe with `train.max_steps=3 scaling.num_workers=2`\n" in said
    assert "- `one`: the recipe with `model.weights=random train.max_steps=1 scaling.num_workers=1`\n" in said
    assert "model.path=models/t5-small" in said and "/here" not in said, "no folder of the machine"
    where = "16 CPUs, Python 3.12.3, torch 2.11.0+cu130, ray 2.60.0, deepspeed 0.19.8, transformers 5.17.0; commit 0123456"
    assert f"- `one`, `two`: on NVIDIA H200 × 2, {where}\n" in said
    assert f"- `small`: on {ENVIRONMENT['platform']}, {where} with uncommitted changes\n" in said


def test_what_is_not_known_of_the_commit_is_not_claimed(tmp_path: Path) -> None:
    plant(tmp_path, "older", environment={key: value for key, value in ENVIRONMENT.items() if key != "git_dirty"})
    plant(tmp_path, "installed", environment=ENVIRONMENT | {"git_commit": None, "git_dirty": None})
    said = results(tmp_path).stdout
    assert "transformers 5.17.0; commit 0123456, changes to it unknown\n" in said
    assert "transformers 5.17.0; trainkit 0.1.0, commit unknown\n" in said


@pytest.mark.parametrize(
    "recipe, changes, said",
    [
        ("llama_lora_zero2", ["model.lora=null"], "model.lora=null"),
        ("t5_small_zero1", ["model.lora={r: 4}"], "model.lora.r=4"),
    ],
)
def test_a_section_that_only_one_of_recipe_and_run_has_is_a_change(recipe: str, changes: list[str], said: str, tmp_path: Path) -> None:
    plant(tmp_path, "a", *changes, recipe=recipe)
    line = next(line for line in results(tmp_path).stdout.splitlines() if line.startswith("- `a`: the recipe"))
    assert said in line.replace("`", " ").split() and "absent" not in line


def test_a_key_that_the_run_does_not_have_is_a_change(tmp_path: Path) -> None:
    folder = plant(tmp_path, "a", recipe="t5_small_zero1")
    recipe = (folder.path / "recipe.yaml").read_text()
    (folder.path / "recipe.yaml").write_text("".join(line for line in recipe.splitlines(True) if "warmup_steps" not in line))
    assert "optimizer.warmup_steps=absent" in results(tmp_path).stdout


def test_a_reader_that_has_seen_enough_is_no_error(runs: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, SCRIPT, runs], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_was_left_out_is_told_beside_the_tables(runs: Path) -> None:
    (runs / "pictures").mkdir()
    assert results(runs).stderr == "pictures is no run folder and left out\n"


def test_only_what_stands_between_the_marks_is_exchanged(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    file.write_text(f"# Results\n\nBy hand.\n\n{BEGIN}\nold\n{END}\n\nAlso by hand.\n")
    assert results(runs, "--into", file).returncode == 0
    once = file.read_text()
    assert once.startswith(f"# Results\n\nBy hand.\n\n{BEGIN}\n") and once.endswith(f"{END}\n\nAlso by hand.\n")
    assert "old" not in once and "## `t5_large_zero1`" in once
    assert results(runs, "--into", file).returncode == 0 and file.read_text() == once


@pytest.mark.parametrize("text", ["# Results\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n", f"{BEGIN}\n{END}\n{END}\n"])
def test_a_file_without_its_marks_is_left_as_it_is(text: str, runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    file.write_text(text)
    done = results(runs, "--into", file)
    assert done.returncode == 1 and f"{file}: it needs these two lines" in done.stderr and BEGIN in done.stderr
    assert file.read_text() == text


@pytest.mark.parametrize(
    "case, message",
    [
        ("recipe", "there is no recipes/own.yaml"),
        ("environment", "has no environment.json"),
        ("version", "environment.json: damaged, or of another version of trainkit: it has no python. Leave this run out"),
    ],
)
def test_a_figure_without_its_recipe_or_place_is_refused(case: str, message: str, tmp_path: Path) -> None:
    environment = {"environment": None, "version": {"gpus": []}}.get(case, ENVIRONMENT)
    plant(tmp_path, "a", *(["name=own"] if case == "recipe" else []), environment=environment)
    done = results(tmp_path)
    assert done.returncode == 1 and message in done.stderr and done.stdout == "" and "Traceback" not in done.stderr


def test_a_file_that_is_not_there_is_one_message(runs: Path, tmp_path: Path) -> None:
    done = results(runs, "--into", tmp_path / "no.md")
    assert done.returncode == 1 and done.stderr.splitlines() == [f"error: {tmp_path}/no.md: No such file or directory"]
