"""environment.json names the commit that trainkit ran from, and whether the checkout was that commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from trainkit.cluster import hardware


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that trainkit seems to run from."""
    module = tmp_path / "trainkit/cluster/hardware.py"
    module.parent.mkdir(parents=True)
    module.touch()
    monkeypatch.setattr(hardware, "__file__", str(module))
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkout_names_its_commit_and_whether_it_was_changed(checkout: Path) -> None:
    git(checkout, "init")
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "all")
    found = hardware.environment()
    assert (found["git_commit"], found["git_dirty"]) == (git(checkout, "rev-parse", "HEAD"), False)
    (checkout / "trainkit/new.py").touch()
    assert hardware.environment()["git_dirty"] is True, "a new module is part of what ran"


@pytest.mark.parametrize("broken", [True, False])
def test_without_a_commit_nothing_is_claimed(checkout: Path, broken: bool) -> None:
    if broken:
        (checkout / ".git").write_text("gitdir: /nowhere\n")
    found = hardware.environment()
    assert found["git_commit"] is None and found["git_dirty"] is None
