"""Imports go down only, each outside library has its owners, and the plan loads neither ray nor deepspeed."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OWNERS = {
    "yaml": ["recipe/reader.py"],
    "deepspeed": ["training/engine.py", "training/engine_states.py", "training/operators.py"],
    "ray": ["cluster/", "data/distributor.py", "inference/predict.py", "inference/serve.py"],
    "torch.utils.tensorboard": ["training/board.py"],
    "accelerate": ["training/model.py"],
    "typer": ["cli.py"],
    "fsspec": ["runs/copies.py"],
    "matplotlib": ["runs/picture.py", "runs/plot.py", "runs/plot_run.py"],
}
PLAN = """
from trainkit.cli import main
try:
    main(["plan", "recipes/quickstart.yaml"])
except SystemExit as end:
    assert end.code == 0
"""
NO_TORCH = ["planning/", "recipe/", "runs/", "errors.py", "units.py"]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def foreign_imports(package: Path) -> list[str]:
    """`file imports library` wherever a file is none of the library's owners."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        for module in imports(path):
            for library, owners in OWNERS.items():
                if f"{module}.".startswith(f"{library}.") and not name.startswith(tuple(owners)):
                    found.append(f"{name} imports {module}")
            if module.split(".")[0] == "torch" and name.startswith(tuple(NO_TORCH)):
                found.append(f"{name} imports {module}")
    return found


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([program, "--no-cache"], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "trainkit", tmp_path / "trainkit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_go_down_only(copy: Path) -> None:
    checked = lint_imports(copy)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_an_upward_import_is_caught(copy: Path) -> None:
    with (copy / "trainkit/planning/facts.py").open("a") as file:
        file.write("\nfrom trainkit.cluster import capacity\n")
    checked = lint_imports(copy)
    assert checked.returncode != 0
    assert "trainkit.planning.facts -> trainkit.cluster.capacity" in checked.stdout


def test_each_outside_library_has_its_owners() -> None:
    assert foreign_imports(ROOT / "trainkit") == []


def test_a_foreign_import_is_caught(copy: Path) -> None:
    with (copy / "trainkit/planning/facts.py").open("a") as file:
        file.write("\ndef late():\n    import ray.train\n    from torch import nn\n")
    assert foreign_imports(copy / "trainkit") == ["planning/facts.py imports ray.train", "planning/facts.py imports torch"]


def loaded_after(code: str, *libraries: str) -> list[str]:
    """Which of the libraries are in sys.modules after `code` ran in a process of its own."""
    code += f"\nimport json, sys; print(json.dumps([name for name in {libraries!r} if name in sys.modules]))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_importing_trainkit_loads_nothing_heavy() -> None:
    heavy = ("torch", "ray", "deepspeed", "transformers", "datasets", "pydantic")
    assert loaded_after("import trainkit", *heavy) == []
    assert loaded_after("import trainkit.cli, trainkit.planning.planner; trainkit.load_recipe", *heavy[:-1]) == []
    assert loaded_after("import torch", "torch", "ray") == ["torch"], "the check can fail"


def test_the_plan_loads_neither_ray_nor_deepspeed() -> None:
    assert loaded_after(PLAN, "ray", "deepspeed") == []


def test_comparing_runs_loads_no_library_of_training_and_no_pictures() -> None:
    assert loaded_after("import trainkit.runs.compare, trainkit.runs.tables, trainkit.runs.plot", "torch", "ray", "matplotlib") == []


def test_a_wheel_has_every_package_and_the_shipped_zero_configurations(tmp_path: Path) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "trainkit").rglob("__init__.py")}
    elsewhere = settings["package-dir"]
    assert set(settings["packages"]) == packages | set(elsewhere)
    for package in settings["packages"]:  # as the wheel lays them out
        folder = ROOT / elsewhere.get(package, package.replace(".", "/"))
        (tmp_path / package.replace(".", "/")).mkdir()
        for pattern in ("*.py", *settings["package-data"].get(package, ())):
            for path in folder.glob(pattern):
                shutil.copy(path, tmp_path / package.replace(".", "/"))
    asked = "from trainkit.recipe.zero import FOLDER, SHIPPED, read_zero; print(FOLDER, *(read_zero(name).stage for name in SHIPPED))"
    command = [sys.executable, "-c", asked]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True).stdout.split()
    assert told == [str(tmp_path / "trainkit/zero_configs"), "0", "1", "2", "3", "2", "3"]


def test_asking_for_muon_loads_no_compiler() -> None:
    """DeepSpeed does at every start of an engine; the way around it leaves the environment as it was."""
    code = (
        "import os, sys, trainkit.training.engine as engine; engine._import_muon(); "
        "assert 'deepspeed.runtime.zero.muon.muon_optimizer' in sys.modules and 'torch._inductor.compile_fx' not in sys.modules; "
        "print(os.environ.get('TORCHDYNAMO_DISABLE'))"
    )
    for given in ({}, {"TORCHDYNAMO_DISABLE": "0"}):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == given.get("TORCHDYNAMO_DISABLE", "None")
