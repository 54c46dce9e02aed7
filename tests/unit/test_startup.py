from __future__ import annotations

import time
from pathlib import Path

import pytest

from trainkit.runs import startup
from trainkit.runs.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "run")


def test_pieces_take_from_the_end_of_the_one_before(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    startup.begin(folder, 100.0)
    for piece, at in ((startup.ROWS, 103.0), (startup.RAY, 110.5), (startup.ROWS, 112.5), (startup.WORKERS, 112.4)):  # two machines' clocks
        monkeypatch.setattr(time, "time", lambda at=at: at)
        startup.ended(folder, piece)
    assert startup.startup_seconds(folder) == pytest.approx({"rows and weights": 3.0 + 2.0, "Ray": 7.5, "workers": 0.0})


def test_a_new_attempt_counts_anew(folder: RunFolder) -> None:
    assert startup.startup_seconds(folder) == {}
    startup.begin(folder, 0.0)
    startup.ended(folder, startup.PLAN)
    startup.begin(folder, time.time())
    startup.ended(folder, startup.PLAN)
    assert startup.startup_seconds(folder)["plan"] < 10
