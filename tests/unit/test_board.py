"""TensorBoard as its own server gives it out: tags, descriptions, the page of questions, hyperparameters, texts; no doubles."""

from __future__ import annotations

import importlib.util
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard import program
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from trainkit.training import tags
from trainkit.training.board import Story, TensorBoard, _hyperparameters
from trainkit.training.meters import StepRecord
from trainkit.training.rank_meters import RankNumbers
from trainkit.units import GIB

CONTRACT = {
    *("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss", "time/step_seconds", "time/data_wait_fraction"),
    *("throughput/samples_per_second", "throughput/tokens_per_second", "throughput/mfu"),
    *(f"memory/{name}_gib/rank_{rank}" for rank in (0, 1) for name in ("peak_allocated", "peak_reserved")),
}
TEXTS = {"plan": "```text\n2 workers\n```"}


def numbers(**changed: Any) -> RankNumbers:
    keys = dict.fromkeys(RankNumbers.__dataclass_fields__, 0) | {"tokens": 60, "padded_tokens": 80, "peak_bytes": 3 * GIB}
    return RankNumbers(**keys | {"gpu_utilization": 0.9, "gpu_watts": 400.0, "gpu_celsius": 50.0} | changed)


def record(step: int, **changed: Any) -> StepRecord:
    return StepRecord(**{
        "step": step, "epoch": 0, "loss": 1 / step, "grad_norm": 1.0, "lr": 0.1, "samples": 10, "tokens": 120, "padding_fraction": 0.25,
        "tokens_imbalance": 1.0, "seconds": 0.5, "data_wait_seconds": 0.1, "mfu": 0.4, "skipped_ranks": (), "stop": False, "save": False,
        "piece_seconds": {"forward": 0.1, "backward": 0.2, "optimizer": 0.05}, "non_finite_ranks": (), "step_hash": 0,
        "ranks": (numbers(), numbers(peak_bytes=4 * GIB)),
    } | changed)  # fmt: skip


def write(folder: Path, steps: range, use_gpu: bool = True, done: int = 0, workers: int = 2, **changed: Any) -> None:
    hyperparameters = {"zero": "zero3", "optimizer.lr": 0.1, "workers": workers}
    story = Story(
        use_gpu=use_gpu, done=done, hyperparameters=hyperparameters, texts=TEXTS, expected_peak_bytes=5 * GIB, worked_seconds=lambda: 10.0
    )
    board = TensorBoard(folder, story)
    for step in steps:
        board.step(record(step, **changed))
    board.evaluation(steps[-1], {"loss": 1.5, "exact_match": 0.5}, seconds=2.0)
    board.predictions(steps[-1], [{"source": "a | b", "predicted": "<x>", "expected": "c"}])
    board.checkpoint(steps[-1], 0.1)
    board.completed()
    board.close()


class Server:
    def __init__(self, folder: Path, load_fast: str):
        board = program.TensorBoard()
        board.configure(logdir=str(folder), port=0, load_fast=load_fast)
        self.url = board.launch()

    def get(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{self.url}data/plugin/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return json.load(answer)

    def points(self, run: str, tag: str) -> list[list[Any]]:
        """[seconds since 1970, step, value] of each; raises HTTPError for a curve that is not there."""
        return self.get(f"scalars/scalars?run={run}%2Ftensorboard&tag={tag.replace('/', '%2F')}")

    def wait_for(self, last_steps: Mapping[str, int]) -> None:
        """Until what each run wrote last is loaded, which goes on in the background."""
        deadline = time.monotonic() + 30
        for run, step in last_steps.items():
            while self.last_step(run) != step:
                assert time.monotonic() < deadline, f"{run} is not loaded"
                time.sleep(0.1)

    def last_step(self, run: str) -> int | None:
        try:
            return self.points(run, "time/checkpoint_stall_seconds")[-1][1]
        except urllib.error.HTTPError:
            return None


without_fast_loader = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard_data_server") is None, reason="tensorboard-data-server is not installed: no fast loader"
)


@pytest.fixture(scope="module", params=["false", pytest.param("true", marks=without_fast_loader)], ids=["slow-loader", "fast-loader"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    runs = tmp_path_factory.mktemp("runs")
    write(runs / "gpu" / "tensorboard", range(1, 6))
    write(runs / "gpu" / "tensorboard", range(4, 9), done=3, workers=1)  # resumed after step 3
    write(runs / "cpu" / "tensorboard", range(1, 3), use_gpu=False, mfu=None, loss=math.nan)
    server = Server(runs, load_fast=request.param)
    server.wait_for({"gpu": 8, "cpu": 2})
    yield server


def test_the_contract_is_served_and_every_curve_says_what_it_is(served: Server) -> None:
    found = served.get("scalars/tags")
    gpu, cpu = found["gpu/tensorboard"], found["cpu/tensorboard"]
    assert set(gpu) >= CONTRACT
    assert {"memory/peak_rss_gib/rank_0", "memory/peak_rss_gib/rank_1"} <= set(cpu)
    assert "throughput/mfu" not in cpu and not [tag for tag in cpu if tag.startswith(("gpu/", "memory/peak_allocated"))]
    assert all(facts["description"] for tag, facts in (gpu | cpu).items())
    assert "GiB" in gpu["memory/peak_allocated_gib/rank_1"]["description"]


def test_a_resumed_run_has_each_step_once(served: Server) -> None:
    points = served.points("gpu", "train/loss")
    assert [step for _, step, _ in points] == list(range(1, 9))
    assert [value for _, _, value in points] == pytest.approx([1 / step for step in range(1, 9)])


def test_a_nan_is_shown_as_a_nan(served: Server) -> None:
    points = served.points("cpu", "train/loss")
    assert [value for _, _, value in points] == ["NaN", "NaN"]


def test_values_are_those_of_the_record(served: Server) -> None:
    def last(tag: str) -> float:
        return served.points("gpu", tag)[-1][2]

    assert last("memory/peak_allocated_gib/rank_1") == 4.0 and last("memory/planned_peak_gib") == 5.0
    assert last("throughput/tokens_per_second") == last("throughput/tokens_per_second_smoothed") == 240.0
    assert last("time/backward_seconds") == pytest.approx(0.2) and last("throughput/goodput") == pytest.approx(5 * 0.5 / 10)


def test_the_page_asks_the_questions_first_and_every_chart_has_curves(served: Server) -> None:
    layout = served.get("custom_scalars/layout")
    assert [category["title"][0] for category in layout["category"]] == ["1", "2", "3", "4"]
    for category in layout["category"]:
        for chart in category["chart"]:
            for pattern in chart["multiline"]["tag"]:
                escaped = urllib.request.quote(pattern, safe="")
                found = [served.get(f"custom_scalars/scalars?run={run}%2Ftensorboard&tag={escaped}") for run in ("gpu", "cpu")]
                assert all(it["regex_valid"] for it in found) and any(it["tag_to_events"] for it in found), (chart["title"], pattern)


def test_runs_compare_by_their_hyperparameters(served: Server) -> None:
    experiment = served.get("hparams/experiment", {"experimentName": ""})
    assert {"zero", "optimizer.lr", "workers"} <= {info["name"] for info in experiment["hparamInfos"]}
    metrics = {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert {"train/loss", "eval/loss", "throughput/tokens_per_second_smoothed"} <= metrics


def test_a_metric_that_a_run_cannot_have_is_not_compared() -> None:
    def compared(story: Story) -> set[str]:
        experiment = _hyperparameters(story)[0].value[0].metadata.plugin_data.content
        return {info.name.tag for info in HParamsPluginData.FromString(experiment).experiment.metric_infos}

    assert "throughput/mfu" not in compared(Story(use_gpu=False))
    assert compared(Story(use_gpu=True, has_mfu=True, metrics=["f1"])) >= {"throughput/mfu", "eval/f1", "final/f1", "final/loss"}


def test_hyperparameters_are_those_that_a_run_went_on_with(served: Server) -> None:
    asked = {"experimentName": "", "allowedStatuses": ["STATUS_SUCCESS"], "colParams": [{"hparam": "workers"}], "sliceSize": 10}
    groups = served.get("hparams/session_groups", asked)["sessionGroups"]
    assert {group["name"]: group["hparams"]["workers"] for group in groups} == {"gpu/tensorboard": 1, "cpu/tensorboard": 2}


def test_the_plan_and_predictions_are_readable(served: Server) -> None:
    assert "2 workers" in served.get("text/text?run=gpu%2Ftensorboard&tag=plan%2Ftext_summary")[0]["text"]
    shown = served.get("text/text?run=gpu%2Ftensorboard&tag=predictions%2Ftext_summary")[-1]["text"]
    assert "a | b" in shown and "&lt;x&gt;" in shown and "<table>" in shown


def test_every_pattern_of_the_page_fits_a_tag_on_a_cpu_too() -> None:
    import re

    known = {tag for tag, _, _ in tags.scalars(record(1), use_gpu=False)} | set(tags.OTHER_TAGS)
    for category in tags.page(use_gpu=False).values():
        for _, patterns in category.values():
            assert all(any(re.fullmatch(pattern, tag) for tag in known) for pattern in patterns), patterns  # type: ignore[attr-defined]
