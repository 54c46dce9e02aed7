"""The notebooks as they are shipped and as they run, and a run that a notebook starts, watches and interrupts.

Each notebook is executed once, and each test looks at all that it shows.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from executed import NOTEBOOKS, executed, machine_paths, outputs_of, path_of, texts_of
from jupyter_client.manager import start_new_kernel
from runs_under_test import ROOT, environment, waited_for

import trainkit
from trainkit.errors import UsageError
from trainkit.recipe.reader import recipe_to_yaml
from trainkit.runs import checkpoints


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_with_its_outputs_and_without_paths_of_a_machine(name: str) -> None:
    notebook = nbformat.read(path_of(name), as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "executed once, from the first cell to the last"
    assert any("image/png" in output.get("data", {}) for output in outputs_of(notebook))
    assert [output for output in outputs_of(notebook) if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert machine_paths(notebook) == set()


def test_a_path_of_a_machine_is_seen() -> None:
    output = nbformat.v4.new_output("stream", text="saved in /home/somebody/runs/it and ~/here and runs/it")
    cell = nbformat.v4.new_code_cell(outputs=[output])
    assert machine_paths(nbformat.v4.new_notebook(cells=[cell])) == {"/home/somebody/runs/it"}


def test_the_quickstart_notebook_trains_watches_and_predicts(tmp_path: Path) -> None:
    notebook = executed("quickstart", tmp_path)
    run = trainkit.open_run(tmp_path / "notebooks/runs/quickstart-1")
    assert (run.status, len(run.steps)) == ("completed", 100)
    assert run.steps["loss"].iloc[-1] < 1 < run.steps["loss"].iloc[0]
    assert run.evaluations.index.to_list() == [50, 100] and "exact_match" in run.evaluations
    words = "\n".join(texts_of(notebook))
    assert "with_: batch.sampels: unknown key (did you mean batch.samples?)" in words
    assert "100 steps = 1.06 epochs × 94 steps" in words and "100 steps of 100" in words
    pictures = [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) == 2, "the curves that were watched, replaced in place, and the plot"
    answer = run.predict("how many ships have crew above 20")
    assert answer.startswith("SELECT") and answer in words.replace("&gt;", ">")
    assert run.predict([{"question": "how many ships have crew above 20"}]) == [answer]
    assert machine_paths(notebook) == set()


def test_the_notebook_on_stages_shows_equal_losses(tmp_path: Path) -> None:
    notebook = executed("which_zero_stage", tmp_path)
    zero0, zero3 = (trainkit.open_run(tmp_path / f"notebooks/runs/tiny-zero{stage}-1") for stage in (0, 3))
    assert [run.summary["zero_stage"] for run in (zero0, zero3) if run.summary] == [0, 3]
    assert zero3.steps["loss"].to_list() == pytest.approx(zero0.steps["loss"].to_list(), rel=1e-6)
    assert zero3.steps["order"].to_list() == zero0.steps["order"].to_list()
    words = "\n".join(texts_of(notebook))
    assert "largest relative difference of a loss" in words and "what fits, per worker" in words
    assert machine_paths(notebook) == set()


class Kernel:
    """A Jupyter kernel as a notebook's front end uses it."""

    def __init__(self, folder: Path):
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder), env=environment())

    def run(self, code: str, press_stop_after: int | None = None) -> dict[str, int]:
        """How many messages of each kind a cell gave. The stop button is pressed once it has replaced so many outputs."""
        asked, seen = self.client.execute(code), Counter[str]()
        while True:
            message = self.client.get_iopub_msg(timeout=300)
            if message["parent_header"].get("msg_id") != asked:
                continue
            seen[message["msg_type"]] += 1
            assert message["msg_type"] != "error", message["content"]
            if message["content"].get("execution_state") == "idle":
                return seen
            if message["msg_type"] == "update_display_data" and seen["update_display_data"] == press_stop_after:
                self.manager.interrupt_kernel()

    def shut_down(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel()


START = """
import json, pathlib, trainkit
rows = [json.loads(line) for line in pathlib.Path("rows.jsonl").read_text("utf-8").splitlines()]
recipe = trainkit.load_recipe("recipe.yaml")
run = trainkit.train(recipe, data=rows, name="it")
"""


def test_a_run_outlives_the_stop_button_ends_with_the_kernel_goes_on_and_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = trainkit.load_recipe(ROOT / "recipes/quickstart.yaml").with_(
        {"train.max_steps": 100_000, "batch.samples": 8, "data.eval": None, "train.metrics": []}
    )
    Path("recipe.yaml").write_text(recipe_to_yaml(recipe))
    lines = (ROOT / "recipes/quickstart/train.jsonl").read_text("utf-8").splitlines()[:256]
    Path("rows.jsonl").write_text("\n".join(lines))
    kernel = Kernel(tmp_path)
    try:
        kernel.run(START)
        first = trainkit.open_run("runs/it")
        waited_for(lambda: len(first.steps) >= 2, seconds=200)
        seen = kernel.run("run.watch(0.1)", press_stop_after=4)
        assert seen["display_data"] == 2, "facts and curves, replaced in place"
        kernel.run("assert run.status == 'running'")
        assert first.status == "running"
    finally:
        kernel.shut_down()
    waited_for(lambda: first.status != "running")
    assert (first.status, checkpoints.complete(first.path)[0].step) == ("interrupted", len(first.steps))
    assert first.recipe.data.path.startswith(str(tmp_path / "runs/.cache/at_hand"))

    done = len(first.steps)
    run = trainkit.train("recipe.yaml", data=[json.loads(line) for line in lines], name="it", resume=True)
    assert run.status == "running" and run.plan.rows == 256
    waited_for(lambda: len(run.steps) >= done + 2, seconds=200)
    run.interrupt()
    run.wait(60)
    steps = len(run.steps)
    assert run.status == "interrupted" and checkpoints.complete(run.path)[0].step == steps > done
    assert f"going on from step {done}" in run.child.output() and f"interrupted after step {steps}" in repr(run)
    assert "\x1b" not in run.child.output(), "a kernel's wish for colours does not reach the log"
    with pytest.raises(UsageError, match="nothing to interrupt, the run is interrupted"):
        run.interrupt()
