"""Operators are built before the workers need them, and a build that was killed does not block later runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainkit.training import operators


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path


def test_what_is_not_built_or_was_broken_off_is_missing(extensions: Path) -> None:
    assert operators.missing(["cpu_adam"]) == ["cpu_adam"]
    (extensions / "cpu_adam/cpu_adam.so").touch()
    assert operators.missing(["cpu_adam"]) == []
    (extensions / "cpu_adam/lock").touch()
    assert operators.missing(["cpu_adam"]) == ["cpu_adam"]


def test_a_lock_that_nobody_works_behind_is_removed(extensions: Path) -> None:
    lock = extensions / "cpu_adam/lock"
    lock.touch()
    worker = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, cwd=lock.parent)
    try:
        operators.remove_stale_lock(lock.parent)
        assert lock.exists()
    finally:
        worker.communicate()
    operators.remove_stale_lock(lock.parent)
    assert not lock.exists()
    operators.remove_stale_lock(lock.parent)


def test_a_build_that_fails_says_why_in_its_log(extensions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\ncase $* in *.cpp*) echo 'Python.h: not found' >&2; exit 1;; esac\nexec g++ \"$@\"\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not operators.build_missing(["cpu_adam"], tmp_path / "log")
    assert "Python.h: not found" in (tmp_path / "log").read_text()


def test_what_is_built_is_not_built_again(extensions: Path, tmp_path: Path) -> None:
    (extensions / "cpu_adam/cpu_adam.so").touch()
    assert operators.build_missing(["cpu_adam"], tmp_path / "log")
    assert not (tmp_path / "log").exists()
