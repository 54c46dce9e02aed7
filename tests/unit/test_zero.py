"""ZeRO configurations: people's own files are read as they stand, and anything that DeepSpeed would not do as written is refused."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from trainkit.errors import RecipeError
from trainkit.recipe import zero_keys as keys
from trainkit.recipe.document import read_json
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Recipe
from trainkit.recipe.zero import FOLDER, SHIPPED, contradictions, read_zero

STYLES = sorted((Path(__file__).parent / "zero_styles").glob("*.json"))


def recipe(**changes: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        "name": "a",
        "model": {"path": "m", "task": "causal"},
        "data": {"path": "d", "target": "{text}"},
        "batch": {"samples": 96},
        "optimizer": {"lr": 1e-4},
        "train": {"epochs": 1},
        "scaling": {"num_workers": 3},
    }
    return Recipe.model_validate(
        {key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in values.items()}
    )


def faults(zero: Any, where: Path | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        read_zero(zero, where)
    return caught.value.message


def against(zero: dict[str, Any], **changes: dict[str, Any]) -> list[str]:
    return [str(fault) for fault in contradictions(read_zero(zero), recipe(**changes))]


def test_ten_styles_are_there() -> None:
    assert len(STYLES) >= 10


@pytest.mark.parametrize("path", STYLES, ids=lambda path: path.stem)
def test_a_file_in_the_style_of_another_tool_is_read_unchanged(path: Path) -> None:
    written = json.loads(path.read_text())
    config = read_zero(str(path))
    assert config.json == written and config.name == path.stem
    assert config.stage == written["zero_optimization"]["stage"]
    assert config.offload_param == (written["zero_optimization"].get("offload_param", {}).get("device") == "cpu")
    assert set(config.unused) == set(written) & {"steps_per_print", "wall_clock_breakdown", "compile"}
    schedule = {"WarmupLR": "constant"}.get(written.get("scheduler", {}).get("type"), "linear")
    precision = "fp16" if written.get("fp16", {}).get("enabled") is True else "bf16"
    assert contradictions(config, recipe(model={"precision": precision}, optimizer={"lr_scheduler_type": schedule})) == []


def test_the_precision_of_a_template_is_the_recipes_to_say() -> None:
    """accelerate's own file: accumulation 1, which the token budget decides, and fp16 enabled."""
    (said,) = map(str, contradictions(read_zero(str(STYLES[0].with_name("accelerate_zero2_literal.json"))), recipe()))
    assert ':3: fp16.enabled: true contradicts the recipe, whose model.precision is "bf16": write model.precision: fp16 there' in said


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_name_says_what_it_shards(name: str) -> None:
    config = read_zero(name)
    assert config.stage == int(name[4]) and config.name == name and config.unused == ()
    assert config.offload_optimizer == name.endswith("offload") and config.offload_param == (name == "zero3_offload")
    for precision in ("bf16", "fp32", "fp16"):
        assert contradictions(config, recipe(model={"precision": precision})) == []
    assert not any("bucket" in key or "threshold" in key for key in config.json["zero_optimization"]), "the plan sizes these"


def test_the_shipped_files_are_the_shipped_names() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(SHIPPED)
    text = (FOLDER / "README.md").read_text()
    for path in FOLDER.glob("*.json"):
        for key in json.loads(path.read_text())["zero_optimization"]:
            assert key in text and path.stem in text, f"README.md says nothing of {key}"


def test_none_is_zero0() -> None:
    assert read_zero(None) == read_zero("zero0")


def test_a_misspelt_key_has_its_line_and_nearest_spelling(tmp_path: Path) -> None:
    file = tmp_path / "z.json"
    file.write_text('{\n  "train_bach_size": "auto",\n  "zero_optimization": {\n    "stage": 2,\n    "overlap_com": true\n  }\n}\n')
    said = faults("z.json", tmp_path / "recipe.yaml")
    assert f"{file}:2: train_bach_size: DeepSpeed does not know this key (did you mean train_batch_size?)" in said
    assert f"{file}:5: zero_optimization.overlap_com: DeepSpeed does not know this key (did you mean overlap_comm?)" in said


def test_a_duplicate_key_is_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "z.json"
    file.write_text('{"bf16": {"enabled": "auto"},\n "zero_optimization": {"stage": 1},\n "zero_optimization": {"stage": 3}}')
    assert f"{file}:3: zero_optimization: stands twice (first on line 2)" in faults(str(file))
    file.write_text('{"zero_optimization": {"stage": 1,\n "stage": 2}, "leaf": [{"a": 1}, {"a": 2}]}')
    assert f"{file}:2: zero_optimization.stage: stands twice" in faults(str(file))


@pytest.mark.parametrize(
    "zero, said",
    [
        ({"nebula": {}}, "removed Nebula"),
        ({"amp": {"enabled": True}}, "removed Apex AMP"),
        ({"elasticity": {}}, "removed elastic training"),
        ({"sparse_gradients": True}, "removed sparse gradients"),
        ({"sparse_attention": {}}, "removed sparse attention"),
        ({"curriculum_learning": {}}, "removed"),
        ({"compression_training": {}}, "removed compression"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "removed MiCS"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, '"offload_optimizer": {"device": "cpu"}'),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "only with stage 3; this is stage 2"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "only with stages 1, 2 and 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "not supported yet"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "gpu"}}}, 'expected "cpu" or "none"'),
        ({"zero_optimization": {"stage": 4}}, "expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "auto"}}, "expected 0, 1, 2 or 3"),
        ({"zero_optimization": True}, "expected an object"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": "yes"}}, 'expected true or false or "auto"'),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1.5}}, "expected a whole number"),
        ({"bf16": True}, "expected an object"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "both enabled"),
        ({"bf16": {"enable": True}}, "did you mean enabled?"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "keeps fp32 weights"),
        ({"gradient_allreduce_op": "sum"}, "not available"),
        ({"torch_autocast": {"enabled": True}}, "not available"),
        ({"gradient_accumulation_steps": 0}, "expected a whole number of at least 1"),
        ({"train_batch_size": -1}, "expected a whole number of at least 1"),
        ({"train_micro_batch_size_per_gpu": 0}, "expected a whole number of at least 1"),
        ({"train_batch_size": True}, "expected a whole number of at least 1"),
        ({"gradient_clipping": -1}, "expected a number of at least 0"),
        ({"gradient_predivide_factor": 0}, "expected a number above 0"),
        ({"data_types": "fp32"}, "expected an object with grad_accum_dtype"),
        ({"data_types": {"grad_accum_dtype": ["fp32"]}}, 'expected "fp32", "fp16" or "bf16"'),
        ({"data_types": {"grad_accum_dtype": "fp99"}}, 'expected "fp32", "fp16" or "bf16"'),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "did you mean grad_accum_dtype?"),
        ({"communication_data_type": "int7"}, 'expected "fp32", "fp16" or "bf16"'),
        ({"compile": True}, "expected an object with deepcompile"),
        ({"compile": {"deepcompil": True}}, "did you mean deepcompile?"),
        ({"compile": {"deepcompile": True}}, "not available"),
        ({"checkpoint": {"tag_validation": "Maybe"}}, 'expected "Ignore", "Warn" or "Fail"'),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -5000000}}, "expected a whole number of at least 1"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, "expected a whole number of at least 1"),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": -1}}, "expected a whole number of at least 0"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 1.5}}}, "expected a number from 0 to 1"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "with stage 3 only"),
    ],
)
def test_what_deepspeed_would_not_do_as_written_is_refused(zero: dict[str, Any], said: str) -> None:
    assert said in faults(zero)


@pytest.mark.parametrize(
    "zero",
    [
        {"data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": "auto"}, "zero_optimization": {"stage": 2}},
        {"data_types": {"grad_accum_dtype": None, "param_dtype": "bf16"}},
        {"communication_data_type": "bf16", "checkpoint": {"tag_validation": "WARN"}},
        {"zero_optimization": {"stage": 3, "sub_group_size": 0, "stage3_max_live_parameters": 0, "reduce_bucket_size": 5e8}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
    ],
)
def test_what_deepspeed_knows_is_read(zero: dict[str, Any]) -> None:
    assert against(zero) == []


def test_a_compile_section_is_checked_and_not_applied() -> None:
    """DeepSpeed refuses backend, which Axolotl's file has; the loop compiles nothing."""
    assert read_zero({"compile": {"backend": "inductor", "disable": False}}).unused == ("compile",)


def test_all_faults_come_at_once() -> None:
    said = faults({"amp": {}, "stepsperprint": 1, "zero_optimization": {"stage": 9, "overlap": True}})
    assert len(said.splitlines()) == 4


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1,}', "", "3", "[" * 100000])
def test_a_file_that_is_no_object_is_one_readable_fault(tmp_path: Path, text: str) -> None:
    file = tmp_path / "z.json"
    file.write_text(text)
    assert str(file) in faults(str(file)) and len(faults(str(file)).splitlines()) == 1


def test_objects_of_a_list_may_have_the_same_keys() -> None:
    assert read_json('{"autotuning": {"x": [{"a": 1}, {"a": [2]}], "y": 1}}', "z.json").faults == []


def test_a_name_that_is_nothing_has_its_nearest() -> None:
    assert "(did you mean zero3_offload?)" in faults("zero3_ofload")
    assert "neither a shipped configuration" in faults("no/such.json")


def test_telemetry_is_named_as_unused() -> None:
    config = read_zero({"steps_per_print": 10, "tensorboard": {"enabled": True}, "flops_profiler": {}, "zero_optimization": {"stage": 1}})
    assert config.unused == ("steps_per_print", "tensorboard", "flops_profiler")


@pytest.mark.parametrize(
    "zero, write",
    [
        ({"train_batch_size": 32}, "write batch.samples: 32 "),
        ({"train_micro_batch_size_per_gpu": 8}, "write batch.samples_per_device: 8 "),
        ({"gradient_accumulation_steps": 4}, "write batch.samples_per_device: 8 "),
        ({"gradient_accumulation_steps": 5}, "do not divide"),
        ({"gradient_clipping": 0.5}, "write optimizer.max_grad_norm: 0.5 "),
        ({"bf16": {"enabled": False}}, "write model.precision: fp32 "),
        ({"fp16": {"enabled": True}}, "write model.precision: fp16 "),
        ({"optimizer": {"type": "Lamb"}}, "whose optimizer.name is adamw"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}, "write optimizer.lr: 3e-05 "),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "L2"),
        ({"optimizer": {"type": "Adam", "params": {"torch_adam": False}}}, "torch's own: delete the key"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "clips by the norm"),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.8, 0.999]}}}, "write optimizer.betas: [0.8, 0.999] "),
        ({"optimizer": {"type": "Adam", "params": {"weight_decay": 0.01}}}, "write optimizer.weight_decay: 0.01 "),
        ({"scheduler": {"type": "WarmupLR"}}, "write optimizer.lr_scheduler_type: constant "),
        ({"scheduler": {"type": "OneCycle"}}, "not available"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 100}}}, "write optimizer.warmup_steps: 100 "),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 1000}}}, "write train.max_steps: 1000 "),
        ({"data_types": {"param_dtype": "fp32"}}, "write model.precision: fp32 "),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "stage 0 adds gradients up in bf16"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 1e-6}}}, "start and end at 0"),
    ],
)
def test_a_literal_that_contradicts_the_recipe_shows_the_line_to_write(zero: dict[str, Any], write: str) -> None:
    found = against(zero)
    assert len(found) == 1 and write in found[0]


def test_literals_equal_to_the_recipe_are_no_contradiction() -> None:
    zero = {
        "train_batch_size": 96,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0001, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-4, "warmup_num_steps": 0}},
    }
    assert against(zero, batch={"samples_per_device": 8}) == []
    assert "write batch.samples: 96" in against(zero, batch={"samples_per_device": 8, "samples": 48})[0]


@pytest.mark.parametrize(
    "zero, changes",
    [
        ({"gradient_accumulation_steps": 1}, {}),
        ({"gradient_accumulation_steps": 1}, {"batch": {"samples_per_device": 32}}),
        ({"gradient_accumulation_steps": 5}, {"batch": {"samples": 100, "samples_per_device": 8}}),
        ({"scheduler": {"params": {"total_num_steps": 1000}}}, {"train": {"max_steps": 1000}}),
        ({"scheduler": {"params": {"warmup_num_steps": 100}}}, {"train": {"max_steps": 1000}, "optimizer": {"warmup_steps": 0.1}}),
    ],
)
def test_literals_equal_to_the_plan_are_no_contradiction(zero: dict[str, Any], changes: dict[str, Any]) -> None:
    assert against(zero, **changes) == []


@pytest.mark.parametrize(
    "zero, changes, write",
    [
        ({"gradient_accumulation_steps": 1}, {"batch": {"samples_per_device": 8}}, "write batch.samples: 24 "),
        (
            {"scheduler": {"params": {"warmup_num_steps": 99}}},
            {"train": {"max_steps": 1000}, "optimizer": {"warmup_steps": 0.1}},
            "write optimizer.warmup_steps: 99 ",
        ),
    ],
)
def test_literals_unlike_the_plan_are_a_contradiction(zero: dict[str, Any], changes: dict[str, Any], write: str) -> None:
    (said,) = against(zero, **changes)
    assert write in said


def test_recipe_and_zero_faults_come_in_one_error(tmp_path: Path) -> None:
    (tmp_path / "z.json").write_text('{\n"train_batch_size": 32,\n"bf16": {"enabled": false}}')
    (tmp_path / "r.yaml").write_text(
        "model: {path: m, task: causal, precision: bf16}\ndata: {path: d, target: '{t}'}\n"
        "batch: {samples: 96}\noptimizer: {lr: fast}\ntrain: {epochs: 1}\nzero: z.json\n"
    )
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path / "r.yaml")
    places = [(Path(fault.file).name, fault.line, fault.key) for fault in caught.value.faults]
    assert places == [("r.yaml", 4, "optimizer.lr"), ("z.json", 2, "train_batch_size"), ("z.json", 3, "bf16.enabled")]


def test_a_mapping_in_the_recipe_has_the_recipes_lines(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: {path: m, task: causal}\ndata: {path: d, target: '{t}'}\nbatch: {samples: 96}\noptimizer: {lr: 1e-4}\ntrain: {epochs: 1}\n"
        "zero:\n  gradient_clipping: 0.3\n  zero_optimization: {stage: 1}\n"
    )
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path / "r.yaml")
    (fault,) = caught.value.faults
    assert (fault.line, fault.key) == (7, "zero.gradient_clipping")


@pytest.mark.parametrize(
    "file, kind, known",
    [
        ("zero/config.py", "DeepSpeedZeroConfig", {**keys.ZERO_OPTIMIZATION, **keys.REMOVED_ZERO}),
        ("zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig", keys.OFFLOAD_PARAM),
        ("zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig", keys.OFFLOAD_OPTIMIZER),
        ("precision_config.py", "DeepSpeedBF16Config", keys.BF16),
        ("precision_config.py", "DeepSpeedFP16Config", keys.FP16),
        ("../compile/config.py", "CompileConfig", {key: kind for key, kind in keys.COMPILE.items() if key not in ("disable", "backend")}),
    ],
)
def test_the_known_keys_are_those_of_the_installed_deepspeed(file: str, kind: str, known: dict[str, object]) -> None:
    found = importlib.util.find_spec("deepspeed")  # read as text: importing it takes seconds
    assert found is not None and found.submodule_search_locations is not None
    source = (Path(found.submodule_search_locations[0]) / "runtime" / file).read_text()
    (body,) = [node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == kind]
    fields = {node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    assert fields and fields <= set(known)
    assert {key.removeprefix("stage3_") for key in known} - set(keys.REMOVED_ZERO) <= {name.removeprefix("stage3_") for name in fields}
