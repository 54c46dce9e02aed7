"""The benchmarks of training steps run, and say what they measured: trainkit and its peers on a small model, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs_under_test import ROOT


@pytest.mark.parametrize("case", ["ours", "ddp", "deepspeed", "hf", "hf-tuned"])
def test_a_case_prints_one_line_with_what_it_measured(case: str, tmp_path: Path) -> None:
    words = ["benchmarks/train.py", "recipes/quickstart.yaml", "--case", case, "--steps", "2", "--warm-up", "1"]
    rows = ["--evaluate", "--set", "data.train=train[:512]", "--set", "data.eval=train[512:600]", "--set", "batch.samples=16"]
    ran = subprocess.run([sys.executable, *words, *rows], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr
    (line,) = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"case"')]
    assert line["case"] == case and line["samples_a_step"] == 16 and line["workers"] == 1
    assert case == "deepspeed" or 3 < line["eval_loss"] < 7, "the first weights are at 7.4"
    assert case != "ours" or (len(line["losses"]) == 1 + 2 + 3 and line["losses"][0] > 7 > line["losses"][-1])
    assert line["samples_per_second"] == pytest.approx(16_000 / line["step_ms"], rel=0.05) and line["first_step_seconds"] > 0
