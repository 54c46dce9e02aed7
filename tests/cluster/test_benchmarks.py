"""The benchmarks run, and say what they measured: trainkit and its peers on a small model and little data, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs_under_test import ROOT


def lines_of(command: list[str], seconds: float) -> list[str]:
    """What a benchmark prints."""
    ran = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.parametrize("case", ["ours", "ddp", "deepspeed", "hf", "hf-tuned", pytest.param("hf-compiled", marks=pytest.mark.slow)])
def test_a_case_prints_one_line_with_what_it_measured(case: str, tmp_path: Path) -> None:
    words = ["benchmarks/train.py", "recipes/quickstart.yaml", "--case", case, "--steps", "2", "--warm-up", "1"]
    rows = ["--set", "data.train=train[:512]", "--set", "data.eval=train[512:600]", "--set", "batch.samples=16"]
    evaluate = [] if case == "deepspeed" else ["--evaluate"]
    (line,) = [json.loads(line) for line in lines_of([*words, *rows, *evaluate], 200) if line.startswith('{"case"')]
    assert line["case"] == case and line["samples_a_step"] == 16 and line["workers"] == 1
    assert case == "deepspeed" or 3 < line["eval_loss"] < 7, "the first weights are at 7.4"
    assert case != "ours" or (len(line["losses"]) == 1 + 2 + 3 and line["losses"][0] > 7 > line["losses"][-1])
    assert line["samples_per_second"] == pytest.approx(16_000 / line["step_ms"], rel=0.05) and line["first_step_seconds"] > 0


def test_all_ways_to_feed_are_measured_on_both_workloads() -> None:
    lines = [json.loads(line) for line in lines_of(["benchmarks/feed.py", "--quick"], 200) if line.startswith('{"round"')]
    assert len({(line["workload"], line["feed"]) for line in lines}) == len(lines) == 2 * 6
    assert all(line["us"] > 0 and 0 < line["p50"] <= line["p99"] for line in lines)


def test_the_cost_of_the_meters_is_measured_by_turns() -> None:
    (line,) = [
        json.loads(line) for line in lines_of(["benchmarks/meters.py", "recipes/quickstart.yaml", "--steps", "5"], 200) if line[0] == "{"
    ]
    assert len(line["ratios"]) == 5 and min(line["step_ms"].values()) > 0


@pytest.mark.slow
def test_the_tables_of_batches_are_made() -> None:
    lines = [json.loads(line) for line in lines_of(["benchmarks/batches.py", "--quick"], 280) if line[:1] == "{"]
    assert any(line.get("method") == "trainkit" for line in lines) and sum("rows" in line for line in lines) == 3


def test_the_peer_with_ray_data_trains_with_every_worker() -> None:
    words = ["benchmarks/ray_data.py", "recipes/quickstart.yaml", "--workers", "2", "--steps", "2", "--warm-up", "1"]
    rows = ["--set", "data.train=train[:512]", "--set", "batch.samples=16"]
    (line,) = [json.loads(line) for line in lines_of([*words, *rows], 200) if line.startswith('{"case"')]
    assert line["case"] == "ray-data" and line["samples_a_step"] == 16 and line["workers"] == 2
    assert line["samples_per_second"] == pytest.approx(16_000 / line["step_ms"], rel=0.05) and line["first_step_seconds"] > 0
