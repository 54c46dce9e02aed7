"""scripts/reproduce_reference_table: which runs the eight rows become, and that each end of a run is a row beside the published one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
from planted_runs import CPU, H200, plant

from trainkit.errors import Interrupted, NonFiniteError, OutOfMemory
from trainkit.recipe.reader import read_recipe

ROOT = Path(__file__).parents[2]
STEPS = [3.0 - step / 10 for step in range(8)]
REFUSED = "error: zero0 on 1 worker: the model states take 42.5 GiB per GPU\n"


def load() -> Any:
    loader = SourceFileLoader("reproduce_reference_table", str(ROOT / "scripts/reproduce_reference_table"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


reference = load()


def setting(runs: Path, gpus: int = 2, cpus: int = 16, steps: int = len(STEPS), models: Path | None = None) -> Any:
    return reference.Setting(steps, runs, models, None, gpus, cpus)


class Commands:
    """Stands for the commands: notes them, and leaves what `ends` says of a run's name. A number is a refusal with that exit code."""

    def __init__(self, ends: dict[str, Any], plan_code: int = 0):
        self.ends, self.plan_code, self.called = ends, plan_code, list[list[str]]()

    def __call__(self, arguments: Sequence[str], log: Path) -> int:
        self.called.append(list(arguments))
        if arguments[0] == "plan":
            return self.plan_code
        options = {arguments[i]: arguments[i + 1] for i in range(2, len(arguments) - 1) if arguments[i] in ("--runs", "--name")}
        name, runs = options["--name"], Path(options["--runs"])
        end = self.ends.get(name, {})
        if isinstance(end, int):
            log.write_text(f"the plan\n{REFUSED}the way out")
            return end
        overrides = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--set"]
        hardware = H200 if any("use_gpu: true" in override for override in overrides) else CPU
        folder = plant(runs, name, *overrides, recipe=Path(arguments[1]).stem, hardware=hardware, **{"losses": STEPS, **end}).path
        for made in ("model", "checkpoints", "tensorboard"):
            (folder / made).mkdir()
        return 130 if isinstance(end.get("error"), Interrupted) else 0

    def runs(self) -> list[str]:
        return [words[words.index("--name") + 1] for words in self.called if words[0] == "run"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Commands]:
    def install(ends: dict[str, Any] | None = None, plan_code: int = 0) -> Commands:
        installed = Commands(ends or {}, plan_code)
        monkeypatch.setattr(reference, "call", installed)
        return installed

    return install


def cells(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")][2:]


# What is run


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 8])
def test_each_row_is_a_shipped_recipe_with_the_published_batch(gpus: int, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    given = setting(tmp_path, gpus=gpus, cpus=4, models=tmp_path / "models" if gpus else None)
    for row in reference.PUBLISHED:
        recipe = read_recipe(ROOT / f"recipes/{row.recipe}.yaml", given.overrides(row))
        workers = recipe.scaling.num_workers
        assert workers == min(row.pods, gpus or 4) and recipe.scaling.use_gpu == (gpus > 0)
        assert recipe.batch.samples == 32 * workers and recipe.batch.samples_per_device == 32
        assert (recipe.model.precision, recipe.zero, recipe.train.max_steps, recipe.data.eval) == ("fp32", row.zero, len(STEPS), None)
        assert workers * (recipe.scaling.resources_per_worker or {})["CPU"] <= max(4, workers), "the machine has these CPUs"
        assert recipe.model.weights == "random"
        assert recipe.model.path == str(tmp_path / "models" / row.model if gpus else ROOT / "recipes/quickstart/model")


def test_with_gpus_the_models_come_from_the_hub() -> None:
    for row in reference.PUBLISHED:
        recipe = read_recipe(ROOT / f"recipes/{row.recipe}.yaml", setting(Path("runs")).overrides(row))
        assert (recipe.model.path, recipe.model.weights) == (f"google-t5/{row.model}", "pretrained")


def test_rows_that_come_to_the_same_share_a_run(tmp_path: Path, commands: Callable[..., Commands]) -> None:
    called = commands()
    assert reference.series(setting(tmp_path, gpus=2)) == 0
    assert len(called.runs()) == len(set(called.runs())) == 7, "ZeRO-1 of T5-large on 3 pods and on 2"
    assert len({setting(tmp_path, gpus=3).name(row) for row in reference.PUBLISHED}) == 8


# What is printed


def test_figures_follow_from_the_steps(tmp_path: Path, commands: Callable[..., Commands], capsys: pytest.CaptureFixture[str]) -> None:
    commands()
    assert reference.series(setting(tmp_path, gpus=3)) == 0
    printed = capsys.readouterr().out
    rows = cells(printed)
    assert [row[:6] for row in rows] == [
        [row.model, row.technique, str(row.pods), row.duration, str(row.epochs), row.vram] for row in reference.PUBLISHED
    ]
    assert rows[1][6:] == ["1", "64", "880", "2,641", "12", "completed"], "32 samples in 0.5 s, 56,344 rows, 3 epochs"
    assert rows[3][6:] == ["3", "192", "293", "880", "12", "completed"]
    assert "NVIDIA H200" in printed and "more pods" not in printed and "227.7 samples/s" in printed


def test_the_first_steps_are_not_counted() -> None:
    steps = [{"step": step, "samples": 32, "seconds": 100.0 if step <= reference.WARM_UP else 0.5} for step in range(1, 9)]
    assert reference.steady_rate(steps) == 64.0
    assert reference.steady_rate(steps[: reference.WARM_UP]) is None


def test_rows_that_do_not_fit_or_fail_stop_no_others(
    tmp_path: Path, commands: Callable[..., Commands], capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {
        "t5-large-zero0-1": {"losses": [], "error": OutOfMemory("rank 0: the GPU has no memory left")},
        "t5-large-zero1-2": {"error": NonFiniteError("step 3: the loss is NaN")},
        "t5-3b-zero0-1": 3,
    }
    called = commands(ends, plan_code=3)
    assert reference.series(setting(tmp_path)) == 1
    printed = capsys.readouterr().out
    rows = cells(printed)
    assert rows[1][6:] == ["1", "OOM", "OOM", "OOM", "OOM", "out of memory"] and rows[6][6:] == rows[1][6:]
    assert rows[3][6:] == rows[4][6:] and rows[3][-1] == "failed (NonFiniteError)"
    assert [row[-1] for row in rows].count("completed") == 4 and len(called.runs()) == 7
    assert "- t5-3b-zero0-1: zero0 on 1 worker: the model states take 42.5 GiB per GPU\n" in printed
    assert "- t5-large-zero1-2: failed: step 3: the loss is NaN\n" in printed
    assert "took the 2 GPUs that there are" in printed


def test_a_row_that_cannot_begin_for_another_reason_is_no_want_of_memory(
    tmp_path: Path, commands: Callable[..., Commands], capsys: pytest.CaptureFixture[str]
) -> None:
    commands({"t5-3b-zero0-1": 3}, plan_code=0)
    assert reference.series(setting(tmp_path)) == 1
    assert cells(capsys.readouterr().out)[6][6:] == ["1", "-", "-", "-", "-", "failed"]


def test_without_a_gpu_the_stand_in_claims_nothing(
    tmp_path: Path, commands: Callable[..., Commands], capsys: pytest.CaptureFixture[str]
) -> None:
    commands()
    assert reference.series(setting(tmp_path, gpus=0, cpus=2)) == 0
    printed = capsys.readouterr().out
    assert "NO GPU: every row trained the quickstart's small model" in printed and "resident memory" in printed
    assert all(row[8:10] == ["-", "-"] and row[7] != "-" for row in cells(printed)), "speed, and no seconds of T5"


# Stopping and going on


def test_what_has_ended_is_not_run_again_and_leaves_no_weights(
    tmp_path: Path, commands: Callable[..., Commands], capsys: pytest.CaptureFixture[str]
) -> None:
    commands({"t5-small-zero0-1": {"losses": [], "error": OutOfMemory("no memory left")}})
    assert reference.series(setting(tmp_path)) == 0
    first = capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*/*") if path.is_dir()} == {".ray", "tensorboard"}
    again = commands()
    assert reference.series(setting(tmp_path)) == 0
    assert again.called == [] and capsys.readouterr().out == first


def test_an_interrupted_series_goes_on(tmp_path: Path, commands: Callable[..., Commands], capsys: pytest.CaptureFixture[str]) -> None:
    commands({"t5-large-zero0-1": {"error": Interrupted("interrupted after step 8 of 9")}})
    assert reference.series(setting(tmp_path)) == 130
    printed = capsys.readouterr().out
    assert [row[-1] for row in cells(printed)] == ["completed", *["not run"] * 7] and "goes on from here" in printed
    called: list[list[str]] = []

    def resumed(arguments: Sequence[str], log: Path) -> int:
        called.append(list(arguments))
        raise KeyboardInterrupt

    reference.call = resumed
    assert reference.series(setting(tmp_path)) == 130
    assert len(called) == 1 and called[0][-3:] == ["--name", "t5-large-zero0-1", "--resume"]


@pytest.mark.parametrize("other", [{"steps": 9}, {"models": Path("small")}])
def test_runs_of_another_setting_are_not_mixed_in(
    other: dict[str, Any], tmp_path: Path, commands: Callable[..., Commands], capsys: pytest.CaptureFixture[str]
) -> None:
    commands()
    reference.series(setting(tmp_path))
    capsys.readouterr()
    assert reference.series(setting(tmp_path, **other)) == 2
    printed = capsys.readouterr()
    assert "is a run of 8 steps of google-t5/t5-small, and not of" in printed.err and "--runs" in printed.err


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        reference.main(["--steps", "5"])
    assert ended.value.code == 2 and "the first 5 are not measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    "gpus, options, message",
    [
        (0, ["--data", "nope"], "every row trains the quickstart's data. Name --models too, or neither"),
        (2, ["--data", "nope"], "--data nope: no such folder"),
        (2, ["--runs", "file"], "--runs file: cannot be a folder of runs: File exists. Name another"),
        (2, ["--runs", "file/runs"], "--runs file/runs: cannot be a folder of runs: Not a directory. Name another"),
        (0, ["--models", "nope"], "--models nope: no config.json in t5-small, t5-large, t5-3b"),
        (0, ["--models", "some"], "--models some: no config.json in t5-large, t5-3b"),
    ],
)
def test_what_no_row_could_run_with_is_told_at_once(
    gpus: int,
    options: list[str],
    message: str,
    commands: Callable[..., Commands],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    called = commands()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reference, "devices", lambda: (gpus, 4))
    Path("file").touch()
    Path("some/t5-small").mkdir(parents=True)
    Path("some/t5-small/config.json").touch()
    with pytest.raises(SystemExit) as ended:
        reference.main(options)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and message in printed.err and "Traceback" not in printed.err
    assert called.called == [] and printed.out == ""
