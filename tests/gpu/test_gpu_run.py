"""Whole runs on all GPUs there are: trained by CUDA graphs, evaluated, saved and exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900), pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
ROOT = Path(__file__).parents[2]
STEPS = 40


def run(runs: Path, name: str, *options: str) -> tuple[dict[str, Any], list[float]]:
    """(summary.json, the steps' losses) of a completed run."""
    sets = [f"scaling.num_workers={torch.cuda.device_count()}", "scaling.use_gpu=true", "model.compile=false", "model.cuda_graphs=true",
            "train.epochs=null", f"train.max_steps={STEPS}", "train.eval_steps=20", "train.save_steps=20"]  # fmt: skip
    command = [sys.executable, "-m", "trainkit.run", str(ROOT / "recipes/quickstart.yaml"), "--runs", str(runs), "--name", name, *options]
    command += [part for override in sets for part in ("--set", override)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    steps = [json.loads(line) for line in (runs / name / "steps.jsonl").read_text().splitlines()]
    return json.loads((runs / name / "summary.json").read_text()), [step["loss"] for step in steps]


def test_stages_train_evaluate_and_export_the_same(tmp_path: Path) -> None:
    results = {stage: run(tmp_path, stage, "--set", f"zero={stage}") for stage in ("zero1", "zero2", "zero3")}
    for stage, (summary, losses) in results.items():
        print(stage, summary["startup_seconds"], summary["wall_seconds"], summary["seconds"])
        assert summary["status"] == "completed" and len(losses) == STEPS
        exported = (tmp_path / stage / "model/model.safetensors").stat().st_mtime
        ended = (tmp_path / stage / "summary.json").stat().st_mtime
        assert ended - exported < 20, "a graph that holds a call of NCCL keeps Ray waiting for 30 s"
        assert summary["eval"]["loss"] == pytest.approx(results["zero1"][0]["eval"]["loss"], rel=1e-4)
        assert np.allclose(losses, results["zero1"][1], rtol=1e-4, atol=0)
