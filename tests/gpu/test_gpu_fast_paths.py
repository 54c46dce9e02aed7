"""CUDA graphs and compiled blocks train what the plain path trains, on all GPUs there are: the same losses and gradient norms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import launch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600), pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
WAYS = {
    way: [f"model.compile={compiled}", f"model.cuda_graphs={graphs}"]
    for way, compiled, graphs in (
        ("plain", "false", "false"),
        ("graphs", "false", "true"),
        ("blocks", "blocks", "false"),
        ("both", "blocks", "true"),
    )
}
STAGES = ("zero0", "zero1", "zero3")
CASES = {stage: tuple(WAYS) for stage in STAGES}
RECIPE = """
model: {{path: {model}, task: seq2seq, weights: random, precision: fp32}}
data: {{path: rows.jsonl, source: "{{a}}", target: "{{b}}", max_source_length: 64, max_target_length: 64}}
batch: {{samples: 8, samples_per_device: 8}}
optimizer: {{lr: 1.0e-3}}
train: {{max_steps: 12}}
scaling: {{num_workers: {workers}, use_gpu: true}}
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    import transformers

    from trainkit.recipe.reader import read_recipe
    from trainkit.training.model import write_first_weights

    folder, workers = tmp_path_factory.mktemp("fast"), torch.cuda.device_count()
    (folder / "rows.jsonl").write_text('{"a": "b", "b": "c"}\n' * 64)
    asked = []
    for dropout, rate in (("exact", 0.0), ("dropout", 0.1)):
        shape = {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 320,
            "dropout_rate": rate,
            "feed_forward_proj": "gated-gelu",
        }  # smooth: at the bend of ReLU a last bit of difference becomes 1e-4 of a gradient
        transformers.T5Config(**shape, decoder_start_token_id=0).save_pretrained(folder / dropout)
        recipe = folder / f"{dropout}.yaml"
        recipe.write_text(RECIPE.format(model=folder / dropout, workers=workers))
        weights = str(write_first_weights(read_recipe(recipe), folder / f"{dropout}.safetensors"))
        asked += [
            {"name": f"{stage} {way} {dropout}", "recipe": str(recipe), "first_weights": weights, "set": [f"zero={stage}", *WAYS[way]]}
            for stage, ways in (CASES if dropout == "exact" else dict.fromkeys(STAGES, ("plain", "graphs"))).items()
            for way in ways
        ]
    for stage in ("zero1", "zero3"):
        graphs = next(case for case in asked if case["name"] == f"{stage} graphs exact")
        asked.append(graphs | {"name": f"{stage} waits", "waits": True})
    (folder / "cases.json").write_text(json.dumps(asked))
    launch(Path(__file__).with_name("fast_worker.py"), [str(folder / "cases.json"), str(folder / "out.json")], workers, folder, 400)
    return {name: np.array(rows) for name, rows in json.loads((folder / "out.json").read_text()).items()}


def apart(results: dict[str, np.ndarray], one: str, other: str) -> float:
    return float(np.abs(results[one] / results[other] - 1).max())


@pytest.mark.parametrize(("stage", "way"), [(stage, way) for stage, ways in CASES.items() for way in ways if way != "plain"])
def test_a_fast_path_gives_the_plain_losses_and_norms(results: dict[str, np.ndarray], stage: str, way: str) -> None:
    assert apart(results, f"{stage} {way} exact", "zero1 plain exact") <= 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_stages_agree(results: dict[str, np.ndarray], stage: str) -> None:
    assert apart(results, f"{stage} plain exact", "zero1 plain exact") <= 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_a_graph_drops_what_the_seed_says(results: dict[str, np.ndarray], stage: str) -> None:
    assert apart(results, f"{stage} graphs dropout", f"{stage} plain dropout") <= 1e-5
    assert apart(results, f"{stage} plain dropout", f"{stage} plain exact") > 1e-3


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_a_model_that_waits_for_the_gpu_is_not_captured_and_says_so(results: dict[str, np.ndarray], stage: str) -> None:
    assert apart(results, f"{stage} waits", "zero1 plain exact") <= 1e-5


def test_the_training_goes_somewhere(results: dict[str, np.ndarray]) -> None:
    losses = results["zero1 both exact"][:, 0]
    assert losses[-6:].mean() < losses[:6].mean() - 0.02
