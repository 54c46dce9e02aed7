"""What a run sets in the environment gives way to what the user has set, also on the nodes of a joined cluster."""

from __future__ import annotations

import os

import pytest

from trainkit.cluster.session import environment, job_environment


def test_the_users_value_goes_to_the_cluster_and_ours_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with environment(settings):
        sent = job_environment(settings)
    assert (sent["OMP_NUM_THREADS"], sent["TOKENIZERS_PARALLELISM"]) == ("7", "false")
    assert os.environ["OMP_NUM_THREADS"] == "7" and "TOKENIZERS_PARALLELISM" not in os.environ


def test_each_node_keeps_its_own_path() -> None:
    assert job_environment({})["PATH"].endswith(":${PATH}")
