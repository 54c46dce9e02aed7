"""What the README names exists: paths, verbs, options, recipes, ZeRO configurations, Python names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import trainkit
from trainkit import cli
from trainkit.runs.notebook import StartedRun

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def test_every_path_exists() -> None:
    named = set(re.findall(r"\b(?:recipes|scripts|zero_configs|trainkit|notebooks)/[\w./-]*\w", README)) | set(
        re.findall(r"\]\(([^)#:]+)\)", README)
    )
    assert len(named) > 8
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_verb_is_in_the_table_and_every_named_verb_exists() -> None:
    table = set(re.findall(r"^\| `trainkit (\w+)", README, re.MULTILINE))
    assert table == set(cli.VERBS)
    assert set(re.findall(r"^trainkit (\w+)", README, re.MULTILINE)) <= table


def test_every_option_exists() -> None:
    source = (ROOT / "trainkit/cli.py").read_text("utf-8")
    named = set(re.findall(r"--[a-z][\w-]*", README)) - {"--logdir"}
    assert len(named) > 5
    assert [option for option in sorted(named) if f'"{option}"' not in source] == []


def test_every_zero_configuration_is_in_the_table() -> None:
    table = set(re.findall(r"^\| `(zero\w+)`", README, re.MULTILINE))
    assert table == {path.stem for path in (ROOT / "zero_configs").glob("*.json")}


def test_the_python_in_the_readme_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to `train` it is run; what is asked of a run exists."""
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    names = re.findall(r"^from trainkit import (.*)$", block, re.MULTILINE)[0].split(", ")
    assert set(names) <= set(trainkit.__all__)
    monkeypatch.chdir(ROOT)
    before, _, _ = block.partition("run = train(")
    scope: dict[str, Any] = {}
    exec(before, scope)
    assert (scope["recipe"].zero, scope["plan"](scope["recipe"]).total_steps) == ("zero3", 100)
    asked = set(re.findall(r"\brun\.(\w+)", block))
    assert len(asked) > 6 and asked <= set(dir(StartedRun))


def test_the_recipe_in_the_readme_is_read(tmp_path: Path) -> None:
    (tmp_path / "readme.yaml").write_text(re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[0])
    (tmp_path / "wikisql").mkdir()
    recipe = trainkit.load_recipe(tmp_path / "readme.yaml")
    assert (recipe.batch.samples, recipe.scaling.num_workers, recipe.zero) == (96, 3, "zero3")
