"""The scripts that make data: the quickstart's folder is what its script writes, and WikiSQL's archive becomes rows of words."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import transformers

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart"


def run(script: str, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)


def lines(file: Path) -> list[dict[str, str]]:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


@pytest.mark.parametrize("script", ["prepare_quickstart", "prepare_wikisql"])
def test_help_is_told_and_no_folder_made(script: str, tmp_path: Path) -> None:
    ended = run(script, "--help", cwd=tmp_path)
    assert ended.returncode != 0 and f"scripts/{script}" in ended.stderr and not list(tmp_path.iterdir())


# The quickstart


def test_the_quickstart_folder_is_what_its_script_writes(tmp_path: Path) -> None:
    assert run("prepare_quickstart", tmp_path).returncode == 0
    written = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert {name: (QUICKSTART / name).read_bytes() for name in written} == written
    assert len(written) == 5 and sum(map(len, written.values())) < 1_500_000


def test_no_held_out_question_is_trained_on() -> None:
    train, validation = lines(QUICKSTART / "train.jsonl"), lines(QUICKSTART / "validation.jsonl")
    assert (len(train), len(validation)) == (6000, 300)
    questions = [row["question"] for row in train + validation]
    assert len(set(questions)) == len(questions)
    assert all(row.keys() == {"question", "sql"} for row in train + validation)


def test_the_quickstart_asks_at_least_twenty_kinds_of_question() -> None:
    """A kind is the SQL with its names and numbers left out."""

    def kind(row: dict[str, str]) -> str:
        bare = re.sub(r"'\w+'|\b\d+\b|\b(?!name\b)[a-z]+\b", "_", row["sql"])
        return row["question"].split()[0] + " " + bare

    train, validation = ({kind(row) for row in lines(QUICKSTART / f"{split}.jsonl")} for split in ("train", "validation"))
    assert len(train) >= 20 and validation <= train


def test_the_quickstarts_tokenizer_and_shape_fit() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(QUICKSTART / "model")
    config = transformers.AutoConfig.from_pretrained(QUICKSTART / "model")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == config.vocab_size == 512
    assert (config.pad_token_id, config.eos_token_id, config.model_type) == (0, 1, "t5")
    for row in [*lines(QUICKSTART / "validation.jsonl"), {"question": "naïve 東京 \n", "sql": "{}"}]:
        for text in row.values():
            ids = tokenizer(text)["input_ids"]
            assert ids[-1] == 1 and 2 not in ids and tokenizer.decode(ids, skip_special_tokens=True) == text


# WikiSQL

HEADERS = {"1-1": ["Name", "Notes  (EN)"], "1-2": ["Year", "Goals"]}
QUESTIONS = {
    "train": [
        ("what notes?", "1-1", {"sel": 1, "agg": 0, "conds": []}, "SELECT Notes (EN) FROM table"),
        ("how many, süd?", "1-2", {"sel": 1, "agg": 3, "conds": [[0, 0, "1990"]]}, "SELECT COUNT Goals FROM table WHERE Year = 1990"),
    ],
    "dev": [
        ("and?", "1-2", {"sel": 0, "agg": 1, "conds": [[1, 1, 2], [0, 2, 3]]}, "SELECT MAX Year FROM table WHERE Goals > 2 AND Year < 3"),
    ],
    "test": [("op?", "1-1", {"sel": 0, "agg": 5, "conds": [[0, 3, " x "]]}, "SELECT AVG Name FROM table WHERE Name OP x")],
}  # fmt: skip


def archive(path: Path, without: str = "", headers: dict[str, list[str]] = HEADERS) -> Path:
    """An archive with the original's layout: questions come before their tables, and databases lie between."""
    with tarfile.open(path, "w:bz2") as tar:

        def add(name: str, rows: list[dict[str, Any]]) -> None:
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            info = tarfile.TarInfo(f"data/{name}")
            info.size = len(data)
            if name != without:
                tar.addfile(info, io.BytesIO(data))

        for split, questions in QUESTIONS.items():
            rows = [{"phase": 1, "question": asked, "table_id": table, "sql": sql} for asked, table, sql, _ in questions]
            add(f"{split}.jsonl", rows)
            add(f"{split}.db", [])
            add(f"{split}.tables.jsonl", [{"id": name, "header": header, "rows": [[1, 2]]} for name, header in headers.items()])
    return path


def test_wikisql_becomes_questions_and_sql_in_words(tmp_path: Path) -> None:
    done = run("prepare_wikisql", archive(tmp_path / "data.tar.bz2"), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for split, name in {"train": "train", "dev": "validation", "test": "test"}.items():
        wanted = [{"question": asked, "sql": sql} for asked, _, _, sql in QUESTIONS[split]]
        assert lines(tmp_path / "out" / f"{name}.jsonl.gz") == wanted
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_wikisql_comes_from_an_address_too(tmp_path: Path) -> None:
    done = run("prepare_wikisql", archive(tmp_path / "data.tar.bz2").as_uri(), tmp_path / "out")
    assert done.returncode == 0 and "train.jsonl.gz: 2 rows" in done.stdout


def test_the_same_archive_gives_the_same_bytes(tmp_path: Path) -> None:
    source = archive(tmp_path / "data.tar.bz2")
    first, second = (run("prepare_wikisql", source, tmp_path / name) for name in ("a", "b"))
    assert first.returncode == second.returncode == 0
    assert (tmp_path / "a" / "train.jsonl.gz").read_bytes() == (tmp_path / "b" / "train.jsonl.gz").read_bytes()


@pytest.mark.parametrize("case", ["missing", "no archive", "cut off", "other archive", "no table"])
def test_what_is_not_wikisqls_archive_is_said_in_one_line(tmp_path: Path, case: str) -> None:
    file = archive(tmp_path / "data.tar.bz2", "dev.jsonl" if case == "other archive" else "", {} if case == "no table" else HEADERS)
    if case == "missing":
        file.unlink()
    elif case == "no archive":
        file.write_text("no")
    elif case == "cut off":
        file.write_bytes(file.read_bytes()[:200])
    done = run("prepare_wikisql", file, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{file}: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out/*.gz"))
