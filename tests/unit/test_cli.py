"""The command: options, exit codes, one readable message for what a user can get wrong."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from trainkit import cli
from trainkit.errors import CapacityError, DataError, Interrupted, TrainingError, TrainkitError, UsageError

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "recipes/quickstart.yaml")


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)


def test_a_missing_recipe_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("run", "plan"):
        assert call(verb, "no_such.yaml") == 2
        shown = capsys.readouterr()
        assert "error:" in shown.err and "no_such.yaml" in shown.err and "Traceback" not in shown.err
        assert shown.out == ""


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"trainkit {metadata.version('trainkit')}\n"


@pytest.mark.parametrize("arguments, code", [(["--version"], 0), (["run", "no_such.yaml"], 2)])
def test_the_process_ends_with_the_code_after_all_was_said_and_what_was_left_for_its_end(arguments: list[str], code: int) -> None:
    program = "import atexit, sys; from trainkit import cli; atexit.register(print, 'the end'); cli.command(sys.argv[1:])"
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == code and ended.stdout.endswith("the end\n")
    assert (metadata.version("trainkit") in ended.stdout) if code == 0 else ("no_such.yaml" in ended.stderr)


def test_an_unknown_option_or_verb_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", QUICKSTART, "--reset") == 2
    assert call("fly") == 2
    assert call() in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_wrong_size_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", QUICKSTART, "--gpu-memory", "much") == 2
    assert "--gpu-memory: 'much' is not a size: write for example 80GiB" in capsys.readouterr().err


def test_the_memory_of_gpus_that_a_recipe_does_not_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", QUICKSTART, "--gpu-memory", "80GiB") == 2
    told = capsys.readouterr()
    assert "80 GiB is of no use: the recipe trains on the CPU. Write scaling.use_gpu: true" in told.err and told.out == ""


def test_a_wrong_key_in_set_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", QUICKSTART, "--set", "optimizer.learning=1") == 2
    assert "optimizer" in capsys.readouterr().err


@pytest.mark.parametrize("kind, code", [(UsageError, 2), (DataError, 2), (CapacityError, 3), (TrainingError, 4), (Interrupted, 130)])
def test_each_error_has_its_exit_code(
    kind: type[TrainkitError], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object) -> None:
        raise kind("what happened [and] where")

    monkeypatch.setattr("trainkit.cluster.decision.decide", fails)
    assert call("plan", QUICKSTART) == code
    assert capsys.readouterr().err.strip().removeprefix("error: ") == "what happened [and] where"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "no_such.yaml", "--debug") == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and "error:" in shown


def test_a_fault_of_trainkit_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: object) -> None:
        raise ZeroDivisionError("by [zero]\nhere")

    monkeypatch.setattr("trainkit.cluster.decision.decide", fails)
    assert call("plan", QUICKSTART) == 4
    said = "error: ZeroDivisionError: by [zero] here (a fault of trainkit; --debug shows the traceback)\n"
    assert capsys.readouterr().err == said
    assert call("plan", QUICKSTART, "--debug") == 4
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["{}/rows.jsonl", "{}/*.jsonl"])
def test_a_plan_finds_a_column_that_local_data_lacks(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    changes = {"data.path": path.format(tmp_path), "data.eval": "null", "data.source": "'{qestion}'", "data.target": "'{answer}'"}
    changes |= {"train.metrics": "[]", "train.metric_for_best_model": "null", "train.load_best_model_at_end": "false"}
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    assert call("plan", QUICKSTART, "--set", f"run.storage_path={tmp_path}/runs", *options) == 2
    assert "the data has no column 'qestion'; it has question, answer. Did you mean 'question'?" in capsys.readouterr().err


def test_runs_overrides_the_storage_path(tmp_path: Path) -> None:
    from trainkit import load_recipe

    folder = tmp_path / "a: folder"
    recipe = load_recipe(QUICKSTART, cli._with_runs(["train.max_steps=3"], folder))
    assert (recipe.run.storage_path, recipe.train.max_steps) == (str(folder), 3)
    strange = '/a\udce9\x7f"\\b'
    for written, meant in (("~/🚀 # 1", Path.home() / "🚀 # 1"), ("here", Path.cwd() / "here"), (strange, strange)):
        assert load_recipe(QUICKSTART, cli._with_runs([], Path(written))).run.storage_path == str(meant)


def test_the_quickstart_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", QUICKSTART) == 0
    shown = capsys.readouterr()
    assert "unknown" not in shown.out and shown.err == ""


def test_what_cannot_be_reached_is_printed_as_unknown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert call("plan", QUICKSTART, "--set", "model.path=nobody/no-such-model", "--set", "data.path=nobody/no-such-data") == 0
    shown = capsys.readouterr().out
    assert "unknown" in shown and "nobody/no-such-model" in shown and "nobody/no-such-data" in shown


@pytest.mark.parametrize(
    "options, message, code",
    [
        (["--set", "scaling.num_workers=500"], "500 workers", 3),
        (["--set", "scaling.use_gpu=true"], "scaling.use_gpu: false", 3),
        (["--name", "../x"], "run name '../x'", 2),
        (["--runs", "/proc/runs"], "cannot be written", 2),
        (["--name", "taken"], "this run exists", 2),
        (["--address", "127.0.0.1:9"], "nobody answers there: Connection refused", 2),
        (["--address", "ray://head:10001"], "write the head node as host:port", 2),
    ],
)
def test_a_run_that_cannot_start_says_so_before_anything_starts(
    options: list[str], message: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainkit.cluster.hardware.gpu_names", list)
    (tmp_path / "taken").mkdir()
    assert call("run", QUICKSTART, "--runs", str(tmp_path), *options) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert {path.name for path in tmp_path.iterdir()} <= {"taken", ".cache"}
