"""Whole runs on two CPU workers: the quickstart as a newcomer starts it, and real data where it lies beside the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def run(runs: Path, recipe: str, *overrides: str, limit_seconds: int = 600) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """(what was printed, summary.json, steps.jsonl) of a completed run."""
    sets = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "trainkit.run", str(ROOT / "recipes" / recipe), "--runs", str(runs), "--name", "it", *sets]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    steps = [json.loads(line) for line in (runs / "it" / "steps.jsonl").read_text().splitlines()]
    return ended.stdout, json.loads((runs / "it" / "summary.json").read_text()), steps


def falls(steps: list[dict[str, Any]]) -> bool:
    losses = [step["loss"] for step in steps]
    return bool(np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1)


def test_the_quickstart_learns_and_shows_it(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    printed, summary, steps = run(tmp_path, "quickstart.yaml")
    assert summary["status"] == "completed" and summary["eval"]["exact_match"] >= 0.8 and len(steps) == summary["steps"] == 470
    assert (
        printed.count("predicted") == 3
        and printed.count("expected") == 3
        and f"tensorboard --logdir {tmp_path}" in " ".join(printed.split())
    )
    board = EventAccumulator(str(tmp_path / "it" / "tensorboard"))
    board.Reload()
    tags = {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss", "eval/exact_match", "memory/peak_rss_gib/rank_0",
            "memory/peak_rss_gib/rank_1", "throughput/samples_per_second", "throughput/tokens_per_second", "time/step_seconds",
            "time/data_wait_fraction"}  # fmt: skip
    assert tags <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("train/loss")] == [step["step"] for step in steps]
    model, tokenizer = (kind.from_pretrained(tmp_path / "it" / "model") for kind in (AutoModelForSeq2SeqLM, AutoTokenizer))
    question = tokenizer("show all players where team is lions", return_tensors="pt")
    answer = model.generate(input_ids=question["input_ids"], max_new_tokens=40, do_sample=False)
    assert tokenizer.decode(answer[0], skip_special_tokens=True).startswith("SELECT * FROM players WHERE team")


@pytest.mark.slow  # two minutes each; parity tables hold every stage to torch with a smaller T5, and the quickstart learns
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_t5_small_learns_wikisql(shared: Path, tmp_path: Path, stage: str) -> None:
    sets = [f"zero={stage}", f"model.path={shared}/models/t5-small", "model.weights=random", "model.precision=fp32", "batch.samples=16"]
    sets += [f"data.path={shared}/data/wikisql", "data.train=train[:2000]", "data.eval=validation[:16]", "train.max_steps=20"]
    sets += ["scaling={num_workers: 2, use_gpu: false, resources_per_worker: {CPU: 1}}", "optimizer.lr=1e-3"]
    _, summary, steps = run(tmp_path, "t5_small_zero1.yaml", *sets)
    assert falls(steps) and summary["zero_stage"] == int(stage[-1]) and len(steps) == 20 and summary["eval"]["loss"] < steps[0]["loss"]


def test_a_classifier_learns_mrpc_and_keeps_its_best_model(shared: Path, tmp_path: Path) -> None:
    import transformers

    from trainkit.training.model import load_exported

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path / "bert"
    transformers.BertConfig(vocab_size=32128, pad_token_id=0, **shape).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((shared / "models" / "t5-small" / name).read_bytes())
    sets = [f"model.path={folder}", "model.weights=random", "model.precision=fp32", f"data.path={shared}/data/mrpc", "data.name=null"]
    sets += ["data.eval=test[:200]", "train.max_steps=30", "train.eval_steps=10", "optimizer.lr=5e-4"]
    sets += ["scaling={num_workers: 2, use_gpu: false, resources_per_worker: {CPU: 1}}"]
    _, summary, steps = run(tmp_path, "bert_mrpc_zero3.yaml", *sets)
    assert len(steps) == 30 and summary["eval"]["accuracy"] > 0.5 and summary["best_step"] in (10, 20, 30)
    assert summary["eval"]["step"] == summary["best_step"]
    assert load_exported(tmp_path / "it" / "model", "classification", "fp32").config.id2label == {0: "0", 1: "1"}
    assert not (tmp_path / "it" / ".best").exists()


def test_a_causal_model_learns_dialogue_with_lora_and_merges(shared: Path, tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "llama"
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    transformers.LlamaConfig(vocab_size=32000, pad_token_id=0, eos_token_id=1, bos_token_id=None, **shape).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((shared / "models" / "llama-1b" / name).read_bytes())
    sets = [
        f"model.path={folder}",
        "model.weights=random",
        "model.precision=fp32",
        f"data.path={shared}/data/huanhuan",
        "data.max_length=128",
    ]
    sets += ["train.max_steps=30", "optimizer.lr=5e-2", "scaling={num_workers: 2, use_gpu: false, resources_per_worker: {CPU: 1}}"]
    _, summary, steps = run(tmp_path, "llama_lora_zero2.yaml", *sets)
    assert falls(steps) and summary["eval"]["loss"] < steps[0]["loss"]
    merge = [str(Path(sys.executable).with_name("trainkit")), "export", str(tmp_path / "it"), "--merge"]
    merged = subprocess.run(merge, capture_output=True, text=True, timeout=100, check=False)
    assert merged.returncode == 0, merged.stderr
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "it" / "model-merged")
    assert not any("lora_" in name for name, _ in plain.named_parameters())
