"""Sets and tokenizers of the hub: what is asked of it, and what is said, at once, when it is not there."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_tokenizers import recipe_of

from trainkit.cluster.decision import decide
from trainkit.data import hub, source
from trainkit.data.source import count_rows, load_rows
from trainkit.data.tokens import load_tokenizer
from trainkit.errors import DataError
from trainkit.planning.facts import DataFacts
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Recipe

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
Make = Callable[..., Recipe]


@pytest.fixture
def recipe(tmp_path: Path) -> Make:
    """A recipe with these keys under data."""
    return partial(recipe_of, "seq2seq", Path("no-such-owner/no-such-model"), tmp_path)


@pytest.fixture
def unreached(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub address where nothing answers, and the libraries' offline switches put back afterwards."""
    import huggingface_hub.constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub.hub_is_reached.cache_clear()
    yield
    hub.hub_is_reached.cache_clear()


@pytest.mark.usefixtures("unreached")
def test_a_hub_id_without_a_hub_says_so_at_once(recipe: Make) -> None:
    for read in (load_rows, count_rows):
        start = time.monotonic()
        with pytest.raises(DataError, match=r"data\.path: no-such-owner/no-such-set: .*hub is not reached") as caught:
            read(recipe(path="no-such-owner/no-such-set", train="train[:10]"))
        assert caught.value.hub is True
        assert time.monotonic() - start < 5


@pytest.mark.usefixtures("unreached")
def test_a_tokenizer_without_a_hub_says_so_at_once(recipe: Make) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"model\.path: no-such-owner/no-such-model: .*hub is not reached"):
        load_tokenizer(recipe(path="x"))
    assert time.monotonic() - start < 15, "most of it is the import of transformers"


@pytest.mark.usefixtures("unreached")
def test_a_local_set_uses_no_network(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *given: pytest.fail("connects"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: pytest.fail("looks up a host"))
    (tmp_path / "x.jsonl").write_text('{"q": 1}\n')
    (tmp_path / "x.csv").write_text("q\n1\n")
    for name in ("x.jsonl", "x.csv"):
        assert len(load_rows(recipe(path=str(tmp_path / name))).train) == 1


@pytest.mark.parametrize(("status", "reached"), [(200, True), (404, True), (405, True), (503, False)])
def test_any_answer_but_a_failure_is_a_hub(status: int, reached: bool) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *said: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert hub._answers(f"http://127.0.0.1:{server.server_port}") is reached


def hub_says(monkeypatch: pytest.MonkeyPatch, how: str, answer: Any) -> list[Any]:
    """Stand in for the hub: datasets' function `how` gives `answer` or raises it. Returns the calls."""
    calls = []

    def stand_in(*given: Any, **named: Any) -> Any:
        calls.append((given, named))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(source, "hub_is_reached", lambda: True)
    monkeypatch.setattr(datasets, how, stand_in)
    return calls


def test_name_revision_and_split_reach_the_hub(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub_says(monkeypatch, "load_dataset", datasets.Dataset.from_dict({"q": [1]}))
    load_rows(recipe(path="nyu-mll/glue", name="mrpc", revision="abc", train="train[:10%]", eval="test"))
    assert calls[0] == (("nyu-mll/glue", "mrpc"), {"revision": "abc", "split": "train[:10%]"})
    assert calls[1] == (("nyu-mll/glue", "mrpc"), {"revision": "abc", "split": "test"})


def test_the_hub_counts_without_downloading(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Builder:
        info = datasets.DatasetInfo(splits={"train": {"name": "train", "num_examples": 1000}, "test": {"name": "test", "num_examples": 50}})

    hub_says(monkeypatch, "load_dataset_builder", Builder)
    facts = count_rows(recipe(path="nyu-mll/glue", train="train[:10%]+test", eval="test[:5]"))
    assert (facts.train_rows, facts.eval_rows) == (150, 5)
    facts = count_rows(recipe(path="nyu-mll/glue", eval=0.1))
    assert (facts.train_rows, facts.eval_rows) == (900, 100)
    with pytest.raises(DataError, match=r"data\.eval: the data set has no split 'dev'; it has train, test"):
        count_rows(recipe(path="nyu-mll/glue", eval="dev"))
    with pytest.raises(DataError, match=r"data\.train: 'train\[9999:\]' of 1,000 rows"):
        count_rows(recipe(path="nyu-mll/glue", train="train[9999:]"))
    Builder.info = datasets.DatasetInfo()
    assert count_rows(recipe(path="nyu-mll/glue")).train_rows is None


def test_a_run_counts_the_rows_that_the_hub_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = read_recipe(QUICKSTART)
    told = decide(asked, QUICKSTART)
    monkeypatch.setattr(source, "count_rows", lambda recipe: DataFacts(None, None))
    untold = decide(asked, QUICKSTART)
    assert (untold.plan.rows, untold.plan.total_steps, untold.unknown) == (None, 0, ())
    assert untold.with_all_rows().plan == told.plan == told.with_all_rows().plan
    assert told.plan.total_steps > 0 and told.plan.eval_rows


def test_a_set_that_is_a_script_is_refused_with_the_way_out(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_says(monkeypatch, "load_dataset", RuntimeError("Dataset scripts are no longer supported, but found wikisql.py"))
    with pytest.raises(DataError, match=r"Salesforce/wikisql: this hub set is a script.*scripts/prepare_wikisql"):
        load_rows(recipe(path="Salesforce/wikisql"))


def test_a_set_with_script_in_its_name_is_none(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_says(monkeypatch, "load_dataset", ConnectionError("Couldn't reach 'someone/transcripts' on the Hub"))
    with pytest.raises(DataError, match="someone/transcripts: Couldn't reach"):
        load_rows(recipe(path="someone/transcripts"))


def test_what_the_hub_answers_is_passed_on(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_says(monkeypatch, "load_dataset", ValueError("Config name is missing.\nPlease pick one among: ['cola', 'mrpc']"))
    with pytest.raises(DataError, match=r"nyu-mll/glue: Config name is missing\. Please pick one among: \['cola', 'mrpc'\]"):
        load_rows(recipe(path="nyu-mll/glue"))
