"""From any layout to any other: workers, ZeRO stage, offload. Without Ray, in three launches of torch processes.

Every case trains 8 steps with dropout and saves after 4; another case goes on from there, and its last 4 steps and the evaluation after
them are compared with those of the case that was never interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ranks import launch
from test_parity import RECIPE, STAGES, Results, save_model, train_all, write_rows

pytestmark = pytest.mark.timeout(1200)  # all cases train in one fixture, in minutes on two quiet cores
APART = ("apart zero0", "apart zero1", "apart zero2", "apart zero3")  # as with CUDA graphs
SAME = [(stage, precision) for stage in (*STAGES, *APART) for precision in ("fp32", "bf16")]
LORA = "model.lora={r: 4, lora_alpha: 8}"
# (from stage, from workers, to stage, to workers); with a model that ties its embeddings
CONVERSIONS = [
    ("zero1", 2, "zero3", 2), ("zero3", 2, "zero2", 2), ("zero0", 2, "zero3", 2), ("zero3", 2, "zero2_offload", 2),
    ("zero2_offload", 2, "zero1", 2), ("zero1", 2, "zero1", 1), ("zero2", 2, "zero3", 1), ("zero3", 2, "zero1", 1),
    ("zero3", 2, "zero3_offload", 1), ("zero3_offload", 2, "zero1", 1), ("zero2_offload", 2, "zero0", 1), ("zero1", 1, "zero3", 2),
    ("zero3", 1, "zero2", 2), ("zero3", 1, "zero3_offload", 2), ("lora zero2", 2, "lora zero3", 1), ("lora zero3", 2, "lora zero1", 2),
    ("apart zero1", 2, "zero3", 1), ("zero3", 2, "apart zero1", 2),
    ("apart zero3", 2, "zero1", 1), ("zero1", 1, "apart zero3", 2), ("lora zero2", 2, "apart lora zero3", 2),
    ("apart lora zero3", 2, "lora zero1", 2), ("apart zero2", 2, "zero3", 1), ("zero1", 1, "apart zero2", 2),
]  # fmt: skip


def name_of(case: str, world_size: int, precision: str = "fp32") -> str:
    return f"{case} {world_size} {precision}"


def resumed(conversion: tuple[str, int, str, int]) -> str:
    return "{} {} to {} {}".format(*conversion)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    from trainkit.recipe.reader import read_recipe
    from trainkit.training.model import write_first_weights

    folder = tmp_path_factory.mktemp("checkpoints")
    write_rows(folder / "rows.jsonl")
    files: dict[str, dict[str, str]] = {}
    for task, limits, over in (
        ("seq2seq", ", max_source_length: 64, max_target_length: 64", []),
        ("causal", ", max_length: 128", [LORA.replace("}", ", lora_dropout: 0.1}")]),
    ):
        save_model(folder / task, task)
        config = folder / task / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | ({"dropout_rate": 0.1, "d_model": 33} if task == "seq2seq" else {})))
        recipe = folder / f"{task}.yaml"
        recipe.write_text(RECIPE.format(model=folder / task, task=task, rows=folder / "rows.jsonl", limits=limits, runs=folder / "runs"))
        weights = write_first_weights(read_recipe(recipe, over), folder / f"{task}.safetensors")
        files[task] = {"recipe": str(recipe), "first_weights": str(weights)}

    def case(stage: str, precision: str = "fp32", **more: object) -> dict[str, object]:
        """Two micro-batches of 5 rows, whatever the workers, so that dropout falls alike."""
        lora = "lora " in stage
        keys = [
            f"zero={stage.split()[-1]}",
            f"model.precision={precision}",
            "batch.samples=10",
            "batch.samples_per_device=5",
            "train.save_steps=4",
        ]
        keys += [LORA.replace("}", ", lora_dropout: 0.1}")] if lora else []
        apart = stage.startswith("apart ")
        return {"set": keys, "plain": False, "fault": None, "export": None, "apart": apart} | files["causal" if lora else "seq2seq"] | more

    def place(name: str) -> str:
        return str(folder / "saved" / name.replace(" ", "-"))

    def whole(stage: str, world_size: int, precision: str = "fp32") -> dict[str, object]:
        name = name_of(stage, world_size, precision)
        return case(stage, precision, name=name, checkpoints=place(name))

    def going_on(name: str, stage: str, source: str, precision: str = "fp32") -> dict[str, object]:
        return case(stage, precision, name=name, resume=f"{place(source)}/checkpoints/step-000004")

    def conversions(source: int, target: int) -> list[dict[str, object]]:
        wanted = [it for it in CONVERSIONS if (it[1], it[3]) == (source, target)]
        return [going_on(resumed(it), it[2], name_of(it[0], it[1])) for it in wanted]

    two = [whole(stage, 2, precision) for stage, precision in SAME] + [
        whole(stage, 2) for stage in ("lora zero2", "lora zero3", "apart lora zero3")
    ]
    two += [going_on(f"{stage} {precision} resumed", stage, name_of(stage, 2, precision), precision) for stage, precision in SAME]
    found = train_all(folder, 2, two + conversions(2, 2))
    found |= train_all(folder, 1, [whole("zero1", 1), whole("zero3", 1), *conversions(2, 1)])
    return found | train_all(folder, 2, conversions(1, 2))


@pytest.mark.parametrize(("stage", "precision"), SAME)
def test_the_same_layout_goes_on_bit_for_bit(results: Results, stage: str, precision: str) -> None:
    whole = results[name_of(stage, 2, precision)]
    assert whole.shape == (9, 3) and np.array_equal(results[f"{stage} {precision} resumed"], whole[4:])


@pytest.mark.parametrize("conversion", CONVERSIONS, ids=resumed)
def test_another_layout_goes_on(results: Results, conversion: tuple[str, int, str, int]) -> None:
    """Within 1e-6, and 1e-5 to or from CPUAdam."""
    whole = results[name_of(conversion[0], conversion[1])]
    loss, norm = np.abs(results[resumed(conversion)][:, :2] / whole[4:, :2] - 1).max(axis=0)
    assert loss <= (1e-5 if "offload" in resumed(conversion) else 1e-6) and norm <= 1e-4


def test_a_state_that_is_not_restored_would_be_seen(results: Results) -> None:
    """What the comparison can tell apart: 4 steps of training, and AdamW's count of steps."""
    whole = results[name_of("zero1", 2)]
    assert np.abs(whole[4:8, 0] / whole[:4, 0] - 1).max() > 1e-3


def test_three_ranks_put_together_what_deepspeed_itself_gathers(results: Results, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With parameters that three do not divide, and ranks that hold nothing of some."""
    folder = next(tmp_path_factory.getbasetemp().glob("checkpoints*"))
    arguments = [str(folder / "seq2seq.yaml"), str(folder / "seq2seq.safetensors"), "zero1", "zero2", "zero3", "zero2_offload"]
    launch(Path(__file__).with_name("pieces_worker.py"), arguments, 3, folder, timeout=250, OMP_NUM_THREADS="1")
