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
        ("waits", "false", "true"),
        ("blocks", "blocks", "false"),
        ("both", "blocks", "true"),
    )
}
WAYS["bf16"] = [*WAYS["graphs"], "model.precision=bf16"]
WAYS["own kernels"] = WAYS["both"]
WAYS["selective"] = [*WAYS["both"], "model.gradient_checkpointing=selective"]
STAGES = ("zero0", "zero1", "zero2", "zero3")
COMPILED = {stage: ["blocks", "both"] for stage in STAGES}
COMPILED["zero1"] += ["selective", "own kernels"]
RECIPE = """
model: {{path: {model}, task: {task}, weights: random, precision: fp32}}
data: {{path: rows.jsonl, source: "{{a}}", target: "{{b}}", {lengths}}}
batch: {{samples: 8, samples_per_device: 8}}
optimizer: {{lr: 1.0e-3}}
train: {{max_steps: 12}}
scaling: {{num_workers: {workers}, use_gpu: true}}
"""


Results = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """With graphs, and of a model that cannot be captured."""
    cases = [(stage, way, dropout) for dropout in ("exact", "dropout") for stage in STAGES for way in ("plain", "graphs")]
    cases += [("zero1", "waits", "exact"), ("zero3", "waits", "exact")]
    cases += [(stage, way, rows) for rows in ("texts", "packed", "classes") for stage in STAGES for way in ("plain", "graphs")]
    cases += [("no", "torch", model) for model in ("exact", "texts", "packed", "classes")]
    return trained(tmp_path_factory.mktemp("uncompiled"), cases)


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return trained(tmp_path_factory.mktemp("bf16"), [(stage, "bf16", "dropout") for stage in STAGES])


@pytest.fixture(scope="module", params=STAGES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Results]:
    """Of each stage; the compiler takes up to two minutes for a first model, and some seconds for the same one again."""
    ways = ["plain", *COMPILED[request.param]]
    return request.param, trained(tmp_path_factory.mktemp("compiled"), [(request.param, way, "exact") for way in ways])


def trained(folder: Path, cases: list[tuple[str, str, str]]) -> Results:
    """Losses and gradient norms of each (stage, way, model), by all GPUs there are."""
    import transformers

    from trainkit.recipe.reader import read_recipe
    from trainkit.training.model import write_first_weights

    workers = torch.cuda.device_count()
    (folder / "rows.jsonl").write_text('{"a": "b", "b": "c"}\n' * 64)
    models = {}
    t5 = {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 320,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu",
    }  # smooth: at the bend of ReLU a last bit of difference becomes 1e-4 of a gradient
    llama = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    configs = {
        "exact": transformers.T5Config(**t5, dropout_rate=0.0),
        "dropout": transformers.T5Config(**t5, dropout_rate=0.1),
        "texts": transformers.LlamaConfig(**llama),
        "packed": transformers.LlamaConfig(**llama),
        "classes": transformers.BertConfig(**llama, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    }
    for model, config in configs.items():
        config.save_pretrained(folder / model)
        recipe, task = folder / f"{model}.yaml", {"t5": "seq2seq", "llama": "causal", "bert": "classification"}[config.model_type]
        lengths = "max_source_length: 64, max_target_length: 64" if task == "seq2seq" else "max_length: 64"
        lengths += ", packing: true" if model == "packed" else ""
        recipe.write_text(RECIPE.format(model=folder / model, workers=workers, task=task, lengths=lengths))
        weights = write_first_weights(read_recipe(recipe), folder / f"{model}.safetensors")
        rows_are = "pairs" if task == "seq2seq" else model
        models[model] = {"recipe": str(recipe), "first_weights": str(weights), "rows_are": rows_are}
    asked = [
        {
            "name": f"{stage} {way} {model}",
            "set": [] if way == "torch" else [f"zero={stage}", *WAYS[way]],
            "torch": way == "torch",
            "waits": way == "waits",
            "micro_batches": 1 if way == "bf16" else 2,
            "captured": way == "bf16",
            "own_kernels": 2 * (way == "own kernels"),
            **models[model],
        }
        for stage, way, model in cases
    ]
    (folder / "cases.json").write_text(json.dumps(asked))
    launch(Path(__file__).with_name("fast_worker.py"), [str(folder / "cases.json"), str(folder / "out.json")], workers, folder, 400)
    return {name: np.array(rows) for name, rows in json.loads((folder / "out.json").read_text()).items()}


def apart(results: Results, one: str, other: str) -> float:
    return float(np.abs(results[one] / results[other] - 1).max())


@pytest.mark.parametrize("model", ["exact", "texts", "packed", "classes"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_as_torch_alone_with_graphs_and_without(uncompiled: Results, stage: str, model: str) -> None:
    assert apart(uncompiled, f"{stage} plain {model}", f"no torch {model}") <= 1e-5
    assert apart(uncompiled, f"{stage} graphs {model}", f"no torch {model}") <= 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_a_graph_drops_what_the_seed_says(uncompiled: Results, stage: str) -> None:
    assert apart(uncompiled, f"{stage} graphs dropout", f"{stage} plain dropout") <= 1e-5
    assert apart(uncompiled, f"{stage} plain dropout", f"{stage} plain exact") > 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_stages_train_the_same_bits_in_bf16(in_bf16: Results, stage: str) -> None:
    """With one micro-batch on each of two ranks: the sums of more may be rounded in another order."""
    if torch.cuda.device_count() > 2:
        pytest.skip("more than two GPUs")
    assert np.array_equal(in_bf16[f"{stage} bf16 dropout"], in_bf16["zero1 bf16 dropout"])


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_a_model_that_waits_for_the_gpu_is_not_captured_and_says_so(uncompiled: Results, stage: str) -> None:
    assert apart(uncompiled, f"{stage} waits exact", f"{stage} plain exact") <= 1e-5


def test_compiled_blocks_give_the_plain_losses_and_norms(compiled: tuple[str, Results]) -> None:
    stage, results = compiled
    for way in COMPILED[stage]:
        assert apart(results, f"{stage} {way} exact", f"{stage} plain exact") <= 1e-5, way


def test_the_training_goes_somewhere(uncompiled: Results) -> None:
    losses = uncompiled["zero1 graphs exact"][:, 0]
    assert losses[-6:].mean() < losses[:6].mean() - 0.02
