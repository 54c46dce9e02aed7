"""scripts/reproduce_reference_table on CPUs: a row is really trained, and its figures are read from what it left."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reference() -> Any:
    loader = SourceFileLoader("reproduce_reference_table", str(ROOT / "scripts/reproduce_reference_table"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = sys.modules[loader.name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_a_row_is_trained_on_a_cpu(reference: Any, tmp_path: Path) -> None:
    setting = reference.Setting(steps=7, runs=tmp_path, models=None, data=None, gpus=0, cpus=2)
    row = reference.PUBLISHED[0]
    assert (row.model, row.technique) == ("t5-small", "w/o deepspeed")
    outcome = reference.reproduce(row, setting)
    assert outcome.is_result, (tmp_path / f"{setting.name(row)}.log").read_text()
    run = outcome.run
    assert (run.technique, run.workers, run.precision, run.steps, run.samples_per_step) == ("no ZeRO", 1, "fp32", 7, 32)
    shown = next(line for line in reference.table({setting.name(row): outcome}, setting).splitlines() if "| t5-small | w/o" in line)
    assert f"{run.peak_gib:.3g}" in shown and "completed" in shown
    assert not (run.folder / "checkpoints").exists() and not (run.folder / "model").exists()
