"""Every shipped recipe is read and planned, with its counts asserted. Published model shapes stand here, so no hub is needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from trainkit.planning.facts import DataFacts, Hardware
from trainkit.planning.plan import Plan
from trainkit.planning.planner import make_plan
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.zero import read_zero
from trainkit.training.model import model_facts
from trainkit.units import GIB

RECIPES = Path(__file__).parents[2] / "recipes"
WIKISQL = DataFacts(56_344, 8_419)
T5 = {"vocab_size": 32128, "decoder_start_token_id": 0, "dropout_rate": 0.1}
SHAPES: dict[str, Any] = {
    "google-t5/t5-small": transformers.T5Config(**T5, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8),
    "google-t5/t5-large": transformers.T5Config(**T5, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16),
    "google-t5/t5-3b": transformers.T5Config(**T5, d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32),
    "google-bert/bert-base-cased": transformers.BertConfig(vocab_size=28996),
    "meta-llama/Llama-3.2-1B": transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
# recipe: (data, millions of parameters, millions trained, stage, workers, steps an epoch, samples of its last step, total steps)
EXPECTED: dict[str, tuple[DataFacts, float, float, int, int, int, int, int]] = {
    "t5_small_zero1": (WIKISQL, 60.5, 60.5, 1, 3, 587, 88, 1761),
    "t5_large_zero1": (WIKISQL, 737.7, 737.7, 1, 3, 587, 88, 1761),
    "t5_large_zero3": (WIKISQL, 737.7, 737.7, 3, 3, 587, 88, 1761),
    "t5_large_zero3_offload": (WIKISQL, 737.7, 737.7, 3, 3, 587, 88, 1761),
    "t5_3b_zero3_offload": (WIKISQL, 2851.6, 2851.6, 3, 3, 587, 88, 1761),
    "bert_mrpc_zero3": (DataFacts(3668, 408), 108.3, 108.3, 3, 2, 115, 20, 345),
    "llama_lora_zero2": (DataFacts(3558, 73), 1241.4, 5.6, 2, 2, 112, 6, 336),
    "quickstart": (DataFacts(6000, 300), 1.25, 1.25, 2, 2, 94, 48, 470),
}


def planned(name: str, folder: Path) -> tuple[Plan, float, float]:
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    if recipe.model.path in SHAPES:
        SHAPES[recipe.model.path].save_pretrained(folder)
        recipe = read_recipe(RECIPES / f"{name}.yaml", [f"model.path={folder}"])
    facts = model_facts(recipe)
    hardware = Hardware("cuda", "NVIDIA H200", 139 * GIB) if recipe.scaling.use_gpu else Hardware("cpu", "CPU", None)
    plan = make_plan(recipe, read_zero(recipe.zero), facts, EXPECTED[name][0], hardware)
    return plan, facts.num_parameters / 1e6, facts.num_trainable / 1e6


def test_every_recipe_is_in_the_table() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_shipped_recipe_is_planned_as_it_says(name: str, tmp_path: Path) -> None:
    _, parameters, trained, stage, workers, steps, last, total = EXPECTED[name]
    plan, got_parameters, got_trained = planned(name, tmp_path)
    assert got_parameters == pytest.approx(parameters, abs=0.06) and got_trained == pytest.approx(trained, abs=0.06)
    assert (plan.zero_stage, plan.world_size, plan.steps_per_epoch, plan.last_step_samples, plan.total_steps) == (
        stage,
        workers,
        steps,
        last,
        total,
    )
    assert plan.offload_param == ("offload" in name) and plan.offload_optimizer == ("offload" in name)
    assert plan.micro_batches_per_step % workers == 0 and plan.micro_batches_per_step >= workers


def test_the_reference_experiment_is_three_workers_of_32_samples() -> None:
    for name in EXPECTED:
        recipe = read_recipe(RECIPES / f"{name}.yaml")
        if name.startswith("t5_"):
            assert recipe.batch.samples == 3 * 32 and (recipe.data.max_source_length, recipe.data.max_target_length) == (96, 96)


def test_recipes_are_read_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """quickstart's model and data stand beside the recipe, wherever the command is started."""
    shutil.copytree(RECIPES / "quickstart", tmp_path / "copy" / "quickstart")
    shutil.copy(RECIPES / "quickstart.yaml", tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    assert read_recipe("copy/quickstart.yaml").model.path == str(tmp_path / "copy" / "quickstart" / "model")
