"""Evaluation: the loss is token-exact over the set, and metrics do not depend on batches, padding or ranks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from trainkit.data.arrays import TokenArrays, Writer, ragged
from trainkit.data.padding import MicroBatch, StepBatch
from trainkit.inference import evaluate, predict
from trainkit.inference.evaluate import Rank, evaluate_loss, evaluate_metrics
from trainkit.inference.predict import batches
from trainkit.planning.flops import Work
from trainkit.training.tasks import TASKS

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
NAMES = ["no", "yes", "maybe"]


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(3, 64))]  # a word's number is its id
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def model_of() -> Any:
    """Tiny models whose random weights are large enough to answer differently to different prompts."""
    torch.manual_seed(0)
    t5 = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0, dropout_rate=0.5
    )
    configs = {
        "seq2seq": t5,
        "causal": transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, bos_token_id=None, eos_token_id=1, initializer_range=0.5),
        "classification": transformers.BertConfig(**SHAPE, initializer_range=0.5, num_labels=3, hidden_dropout_prob=0.5),
    }
    made = {task: TASKS[task].auto_class.from_config(config).train() for task, config in configs.items()}
    return made.__getitem__


def arrays_of(folder: Path, task: str, rows: int = 23) -> TokenArrays:
    """Rows of 1 to 12 words, so that every batch is padded; causal rows are a prompt and a labelled completion."""
    rng = np.random.default_rng(3)
    ids = [rng.integers(3, 64, rng.integers(1, 13)).tolist() for _ in range(rows)]
    targets = [[*rng.integers(3, 64, rng.integers(1, 4)).tolist(), 1] for _ in range(rows)]
    types, classes = [[i % 2 for i in range(len(row))] for row in ids], [[number % 3] for number in range(rows)]
    prompted = {
        "input_ids": [a + b for a, b in zip(ids, targets, strict=True)],
        "labels": [[-100] * len(a) + b for a, b in zip(ids, targets, strict=True)],
    }
    columns = {
        "seq2seq": {"input_ids": ids, "labels": targets},
        "causal": prompted,
        "classification": {"input_ids": ids, "labels": classes, "token_type_ids": types},
    }[task]
    with Writer(folder) as writer:
        writer.append({name: ragged(column) for name, column in columns.items()}, np.ones(rows, np.int32))
        writer.finish()
    return TokenArrays.open(folder)


def measured(model: Any, task: str, arrays: TokenArrays, tokenizer: Any, metrics: list[str], rank: int = 0, world_size: int = 1) -> Any:
    names = NAMES if task == "classification" else None
    where = Rank(rank, world_size, CPU)
    return evaluate_metrics(
        model, metrics=metrics, task=task, arrays=arrays, tokenizer=tokenizer, label_names=names, where=where, max_new_tokens=5
    )


def slow_answers(model: Any, task: str, arrays: TokenArrays) -> list[Any]:
    """Row by row, token by token, without padding or cache."""
    model.eval()
    answers: list[Any] = []
    with torch.no_grad():
        for row in range(arrays.rows):
            ids = torch.tensor(arrays.by_column["input_ids"].row(row).astype(np.int64))[None]
            if task == "classification":
                types = torch.tensor(arrays.by_column["token_type_ids"].row(row).astype(np.int64))[None]
                answers.append(int(model(input_ids=ids, token_type_ids=types).logits.argmax()))
                continue
            prompt = (
                ids[:, : int((arrays.by_column["labels"].row(row) == -100).sum())]
                if task == "causal"
                else torch.zeros(1, 1, dtype=torch.long)
            )
            out, start = prompt, prompt.shape[1]
            while out.shape[1] < start + 5 and (out.shape[1] == start or out[0, -1] != 1):
                more = {"input_ids": out} if task == "causal" else {"input_ids": ids, "decoder_input_ids": out}
                out = torch.cat([out, model(**more).logits[:, -1:].argmax(-1)], dim=1)
            answers.append(out[0, start:].tolist())
    model.train()
    return answers


# -- the loss ------------------------------------------------------------------------------------------------------------------------------


class FakeEngine:
    """The summed loss of a micro-batch is its first number; evaluation mode is remembered."""

    device = CPU
    evaluations = 0

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.evaluations += 1
        yield

    def sum_loss(self, batch: MicroBatch) -> torch.Tensor:
        assert self.evaluations == 1
        return batch.input_ids[0, 0].float()


def feed_of(*steps: tuple[int, list[float]]) -> Any:
    """Steps of (label tokens over all ranks, losses of this rank's micro-batches)."""

    def micro_batches(step: int) -> StepBatch:
        labels, losses = steps[step - 1]
        ids = [torch.tensor([[loss]]) for loss in losses]
        micro = [MicroBatch(0, np.arange(1), one, one, one, None, Work(1), padded_tokens=1) for one in ids]
        return StepBatch(step, 0, len(losses), labels, len(losses), micro)

    return SimpleNamespace(micro_batches=micro_batches)


def test_the_loss_is_the_sum_over_the_labels_of_the_whole_set() -> None:
    """A mean of the steps' means would be 1.05."""
    assert evaluate_loss(FakeEngine(), feed_of((10, [4.0, 16.0]), (100, [10.0])), 2) == {"loss": pytest.approx(30 / 110)}  # type: ignore[arg-type]


def test_sums_are_in_float64() -> None:
    many = feed_of((1, [2.0**24, *[1.0] * 1000]))
    assert evaluate_loss(FakeEngine(), many, 1)["loss"] == 2.0**24 + 1000  # type: ignore[arg-type]  # float32 would stay at 2**24


def test_a_nan_stays_a_nan_and_a_set_without_labels_has_no_loss() -> None:
    assert math.isnan(evaluate_loss(FakeEngine(), feed_of((1, [math.nan]), (1, [1.0])), 2)["loss"])  # type: ignore[arg-type]
    assert math.isnan(evaluate_loss(FakeEngine(), feed_of((0, [0.0])), 1)["loss"])  # type: ignore[arg-type]


# -- metrics -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["seq2seq", "causal", "classification"])
def test_answers_are_those_of_one_row_at_a_time(
    task: str, tmp_path: Path, tokenizer: Any, model_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "BATCH_ROWS", 4)
    arrays, model = arrays_of(tmp_path / "a", task), model_of(task)
    slow = slow_answers(model, task, arrays)
    answers = slow if task == "classification" else [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in slow]
    assert len(set(answers)) > (1 if task == "classification" else 3), "answers must differ for rows to be told apart"
    if task == "classification":
        values, examples = measured(model, task, arrays, tokenizer, ["accuracy", "f1"])
        assert values["accuracy"] == pytest.approx(np.mean([answer == row % 3 for row, answer in enumerate(answers)])) and "f1" in values
        assert [one["predicted"] for one in examples] == [NAMES[answer] for answer in answers[:3]]
        assert [one["expected"] for one in examples] == NAMES
    else:
        monkeypatch.setitem(
            evaluate.TEXT_METRICS,
            "exact_match",
            lambda got, wanted: {"right": np.mean([a == b for a, b in zip(got, answers, strict=True)])},
        )
        values, examples = measured(model, task, arrays, tokenizer, ["exact_match"])
        assert values == {"right": 1.0} and [one["predicted"] for one in examples] == answers[:3]
    assert len(examples) == 3 and model.training, "the model comes back in training mode"


@pytest.mark.parametrize("task", ["seq2seq", "causal"])
def test_expected_text_is_the_labelled_part_without_special_tokens(task: str, tmp_path: Path, tokenizer: Any, model_of: Any) -> None:
    values, examples = measured(model_of(task), task, arrays_of(tmp_path / "a", task), tokenizer, ["exact_match", "rouge"])
    same_rows = arrays_of(tmp_path / "b", "seq2seq")
    for row, one in enumerate(examples):
        source, target = (same_rows.by_column[name].row(row) for name in ("input_ids", "labels"))
        assert one["source"] == " ".join(f"w{number}" for number in source)
        assert one["expected"] == " ".join(f"w{number}" for number in target[:-1])
    assert set(values) == {"exact_match", "rouge1", "rouge2", "rougeL"}


def test_a_model_that_knows_the_answers_scores_one(tmp_path: Path, tokenizer: Any) -> None:
    """Padded at the left, stopped at EOS, decoded without it: the model answers with the next number, then EOS."""
    prompts = [[5, 6], [7, 8, 9, 10], [20]]
    answers = [[prompt[-1] + 1, 1] for prompt in prompts]
    with Writer(tmp_path / "known") as writer:
        rows = [a + b for a, b in zip(prompts, answers, strict=True)]
        labels = [[-100] * len(a) + b for a, b in zip(prompts, answers, strict=True)]
        writer.append({"input_ids": ragged(rows), "labels": ragged(labels)}, np.array([2] * 3))
        writer.finish()
    shape = SHAPE | {"hidden_size": 64, "num_key_value_heads": 4, "eos_token_id": 1, "bos_token_id": None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(64))
        for word in (6, 10, 20):
            model.lm_head.weight[word + 1, word] = model.lm_head.weight[1, word + 1] = 1.0
    values, examples = measured(model, "causal", TokenArrays.open(tmp_path / "known"), tokenizer, ["exact_match", "rouge"])
    assert values == {"exact_match": 1.0, "rouge1": 1.0, "rouge2": 0.0, "rougeL": 1.0}  # one word has no pairs
    assert examples[0] == {"source": "w5 w6", "expected": "w7", "predicted": "w7"}


def test_a_chat_is_asked_for_its_first_answer(tmp_path: Path, tokenizer: Any, model_of: Any) -> None:
    with Writer(tmp_path / "chat") as writer:
        rows, labels = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7]], [[-100, -100, 7, 8, -100, 10, 11], [5, 6, 7]]
        writer.append({"input_ids": ragged(rows), "labels": ragged(labels)}, np.array([4, 2]))
        writer.finish()
    _, examples = measured(model_of("causal"), "causal", TokenArrays.open(tmp_path / "chat"), tokenizer, ["exact_match"])
    assert [(one["source"], one["expected"]) for one in examples] == [("w5 w6", "w7 w8"), ("w5", "w6 w7")]


# -- ranks ---------------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=300), st.integers(1, 9), st.booleans(), st.integers(0, 2000))
def test_every_row_counts_once_and_ranks_in_step_run_equally_many_batches(
    lengths: list[int], world_size: int, in_step: bool, new: int
) -> None:
    shares = [list(batches(np.array(lengths), Rank(rank, world_size, CPU, in_step), new)) for rank in range(world_size)]
    counted = [row for share in shares for rows, counts in share if counts for row in rows.tolist()]
    assert sorted(counted) == list(range(len(lengths)))
    for rows, _ in (batch for share in shares for batch in share):
        assert len(rows) <= predict.BATCH_ROWS
        assert len(rows) == 1 or len(rows) * (max(lengths[row] for row in rows) + new) <= predict.BATCH_TOKENS
    if in_step:
        assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("task", ["seq2seq", "classification"])
def test_two_ranks_measure_what_one_does(task: str, tmp_path: Path, tokenizer: Any, model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks run here, one after the other: the first pass collects what each would send, the second hands it to both."""
    monkeypatch.setattr(predict, "BATCH_ROWS", 4)
    metrics = ["accuracy", "f1"] if task == "classification" else ["rouge"]
    arrays, model = arrays_of(tmp_path / "a", task), model_of(task)
    sent: list[Any] = []

    def collect(parts: list[Any], mine: Any) -> None:
        sent.append(mine)
        raise InterruptedError

    monkeypatch.setattr(dist, "all_gather_object", collect)
    for rank in range(2):
        with pytest.raises(InterruptedError):
            measured(model, task, arrays, tokenizer, metrics, rank, world_size=2)
    monkeypatch.setattr(dist, "all_gather_object", lambda parts, mine: parts.__setitem__(slice(None), sent))
    both = [measured(model, task, arrays, tokenizer, metrics, rank, world_size=2) for rank in range(2)]
    assert all(sent) and both[0] == both[1] == measured(model, task, arrays, tokenizer, metrics)
