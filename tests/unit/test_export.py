"""The export is the trained model, and its check catches what is not: one process, no DeepSpeed, an engine of a few lines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from trainkit.data.padding import MicroBatch
from trainkit.errors import DataError, ExportMismatch, TrainingError, UsageError
from trainkit.inference import export
from trainkit.inference.export import compare_logits, compare_tensors, export_model, link_model, merge_adapter, move_model
from trainkit.inference.predict import load_plain, predict
from trainkit.planning.flops import Work
from trainkit.recipe.reader import recipe_to_yaml
from trainkit.recipe.schema import Recipe
from trainkit.training.model import DTYPES, build_model, write_first_weights
from trainkit.training.tasks import TASKS

T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, "dropout_rate": 0.1}
BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = BERT | {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
CONFIGS: dict[str, Any] = {
    "t5": transformers.T5Config(**T5, vocab_size=64, pad_token_id=0, eos_token_id=1),
    "bart": transformers.BartConfig(
        **BART, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=2, eos_token_id=1, forced_eos_token_id=None, decoder_start_token_id=1,
    ),
    "bert": transformers.BertConfig(**BERT, vocab_size=64, pad_token_id=0),
    "llama": transformers.LlamaConfig(**LLAMA),
    "llama-tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
}  # fmt: skip
TASK_OF = {"t5": "seq2seq", "bart": "seq2seq", "bert": "classification", "llama": "causal", "llama-tied": "causal"}
NAMES = ["no", "yes", "maybe"]


class FakeEngine:
    """A model on the CPU in the training precision."""

    device = torch.device("cpu")
    plan = SimpleNamespace(zero_stage=0)

    def __init__(self, model: Any, recipe: Recipe):
        self.model, self.task = model.to(DTYPES[recipe.model.precision]), TASKS[recipe.model.task]

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        return self.task.logits(self.model, batch)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.train()

    def whole_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach().clone()


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save_tokenizer(folder: Path) -> Any:
    words = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return fast


def batch_of(task: str) -> MicroBatch:
    """Six rows of 16 positions; the last two rows are padding from position 5 on."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(3, 63, (6, 16), generator=generator), torch.ones(6, 16, dtype=torch.long)
    ids[2:, 5:], mask[2:, 5:] = 0, 0
    labels = torch.arange(6) % 3 if task == "classification" else torch.where(mask.bool(), ids, -100)
    return MicroBatch(0, np.arange(6), ids, mask, labels, None, Work(int(mask.sum())), padded_tokens=ids.numel())


class Run:
    """A run folder with recipe.yaml, a model and its engine; weights are drawn at random unless told otherwise."""

    def __init__(self, folder: Path, kind: str, **model: Any):
        self.folder, self.base, self.task = folder / "run", folder / "base", TASK_OF[kind]
        self.folder.mkdir(parents=True)
        CONFIGS[kind].save_pretrained(self.base)
        self.tokenizer = save_tokenizer(self.base)
        if model.get("weights") == "pretrained":
            torch.manual_seed(1)
            base_class = transformers.AutoModel if self.task == "classification" else TASKS[self.task].auto_class
            base_class.from_config(CONFIGS[kind]).save_pretrained(self.base)
        keys = {"path": str(self.base), "task": self.task, "weights": "random", "precision": "fp32"} | model
        data = {"path": str(folder), "source": "say {a}", "target": "{b}"}
        sections = {"batch": {"samples": 4}, "optimizer": {"lr": 1e-3}, "train": {"max_steps": 1, "seed": 7}}
        self.recipe = Recipe.model_validate({"name": "x", "model": keys, "data": data, **sections})
        (self.folder / "recipe.yaml").write_text(recipe_to_yaml(self.recipe))
        names = NAMES if self.task == "classification" else None
        first = write_first_weights(self.recipe, folder / "first.safetensors", names)
        self.model = build_model(self.recipe, None if first is None else str(first), lambda _: contextlib.nullcontext(True), names)
        torch.manual_seed(2)
        with torch.no_grad():  # training changed what can be trained
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        self.engine: Any = FakeEngine(self.model, self.recipe)

    def export(self, name: str = "model") -> Path:
        export_model(self.engine, self.tokenizer, self.folder / name, self.recipe, batch_of(self.task))
        return self.folder / name


@pytest.mark.parametrize("kind", ["t5", "bart", "bert", "llama", "llama-tied"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_transformers_loads_the_trained_model_bit_for_bit(kind: str, precision: str, tmp_path: Path) -> None:
    run = Run(tmp_path, kind, precision=precision)
    run.model.config.use_cache = False  # as somebody's own config may say
    folder = run.export()
    loaded = TASKS[run.task].auto_class.from_pretrained(folder, dtype=DTYPES[precision])
    trained = dict(run.model.named_parameters())
    assert set(trained) == {name for name, _ in loaded.named_parameters()}
    assert all(torch.equal(parameter, trained[name]) for name, parameter in loaded.named_parameters())
    assert loaded.config.architectures == [type(run.model).__name__] and loaded.config.dtype == DTYPES[precision]
    assert loaded.config.use_cache is False
    assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab() == run.tokenizer.get_vocab()
    assert (folder / "generation_config.json").is_file() == (run.task != "classification")
    assert run.model.training and sorted(path.name for path in run.folder.iterdir()) == ["model", "recipe.yaml"]


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    tied, untied = (load_file(Run(tmp_path / kind, kind).export() / "model.safetensors") for kind in ("llama-tied", "llama"))
    assert "lm_head.weight" not in tied and "lm_head.weight" in untied


def test_buffers_that_belong_to_the_weights_are_exported(tmp_path: Path) -> None:
    run = Run(tmp_path, "bart")
    run.model.final_logits_bias += torch.arange(64.0)
    assert torch.equal(TASKS["seq2seq"].auto_class.from_pretrained(run.export()).final_logits_bias[0], torch.arange(64.0))


def test_the_names_of_the_classes_survive(tmp_path: Path) -> None:
    run = Run(tmp_path, "bert", weights="pretrained")
    config = transformers.AutoModelForSequenceClassification.from_pretrained(run.export()).config
    assert config.id2label == dict(enumerate(NAMES)) and config.label2id["maybe"] == 2


def test_a_new_export_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    run = Run(tmp_path, "llama")
    (run.export() / "left over").touch()
    with torch.no_grad():
        run.model.lm_head.weight.add_(1)
    stored = load_file(run.export() / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], run.model.lm_head.weight) and not (run.folder / "model" / "left over").exists()


# -- planted faults ----------------------------------------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """`change` gets at the tensors of the file after they were written."""
    right = export.write_model

    def write_model(model: Any, whole: Any, tokenizer: Any, folder: Path, recipe: Recipe) -> None:
        right(model, whole, tokenizer, folder, recipe)
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    monkeypatch.setattr(export, "write_model", write_model)


@pytest.mark.parametrize("kind, lora", [("t5", None), ("bert", None), ("llama", {"r": 2})])
def test_one_changed_bit_is_caught_and_named(kind: str, lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, kind, lora=lora)
    name = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad][-1]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name.replace(".default", "")].view(torch.int32).flatten()[0] ^= 1

    plant(monkeypatch, change)
    with pytest.raises(ExportMismatch) as caught:
        run.export()
    assert caught.value.facts == {"what": name} and name in caught.value.message
    assert not (run.folder / "model").exists(), "a wrong model must not lie where the right one is looked for"


def test_a_tensor_that_is_not_written_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, "llama")
    plant(monkeypatch, lambda tensors: tensors.__delitem__("lm_head.weight"))
    with pytest.raises(ExportMismatch, match="tensor lm_head"):
        run.export()


@pytest.mark.parametrize("kind, tied, words", [("llama-tied", False, "which was not trained"), ("llama", True, "no tensor lm_head")])
def test_a_wrong_tie_is_caught(kind: str, tied: bool, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, kind)
    right = export.write_model

    def write_model(model: Any, whole: Any, tokenizer: Any, folder: Path, recipe: Recipe) -> None:
        written = {name: tensor for name, tensor in whole.items() if not tied or name != "lm_head.weight"}
        right(model, written, tokenizer, folder, recipe)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))

    monkeypatch.setattr(export, "write_model", write_model)
    with pytest.raises(ExportMismatch, match=words) as caught:
        run.export()
    assert caught.value.facts == {"what": "lm_head.weight"}


def test_a_model_that_computes_something_else_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are right, the config is not."""
    run = Run(tmp_path, "llama")
    right = export.write_model

    def write_model(model: Any, whole: Any, tokenizer: Any, folder: Path, recipe: Recipe) -> None:
        right(model, whole, tokenizer, folder, recipe)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))

    monkeypatch.setattr(export, "write_model", write_model)
    with pytest.raises(ExportMismatch, match="logits differ"):
        run.export()


@pytest.mark.parametrize("precision, allowed, refused", [("fp32", 0.9e-5, 1.2e-5), ("bf16", 1.9e-2, 2.1e-2)])
def test_logits_are_compared_with_the_largest_one(precision: str, allowed: float, refused: float) -> None:
    logits, tolerance = torch.tensor([[-10.0, 0.0]]), export.LOGIT_TOLERANCE[precision]
    compare_logits(Path("x"), logits + 10 * allowed, logits, tolerance)
    for wrong in (logits + 10 * refused, logits * float("nan")):
        with pytest.raises(ExportMismatch, match="logits"):
            compare_logits(Path("x"), wrong, logits, tolerance)


def test_zeros_of_different_sign_are_different_bits() -> None:
    with pytest.raises(ExportMismatch, match="tensor a"):
        compare_tensors(Path("x"), {"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])})


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    run = Run(tmp_path, "llama")
    with pytest.raises(TrainingError, match="cannot be written"):
        run.export("recipe.yaml/model")


# -- LoRA ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, lora",
    [
        ("llama", {"r": 2, "lora_dropout": 0.1}),
        ("llama", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("t5", {"r": 2}),
        ("bert", {"r": 2}),  # peft trains the new head in full
    ],
)
@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_an_adapter_and_its_merged_model_compute_what_was_trained(kind: str, lora: Any, weights: str, tmp_path: Path) -> None:
    run = Run(tmp_path, kind, lora=lora, weights=weights)
    folder, batch = run.export(), batch_of(run.task)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "base" if weights == "random" else run.base)
    assert (folder / "base").is_dir() == (weights == "random")
    merged = TASKS[run.task].auto_class.from_pretrained(merge_adapter(run.folder)).eval()
    assert not any("lora_" in name for name in merged.state_dict())
    modes = {path.stat().st_mode for path in (run.folder / "model-merged").glob("*.json")}
    assert {(run.folder / "model-merged/model.safetensors").stat().st_mode} == modes
    assert transformers.AutoTokenizer.from_pretrained(run.folder / "model-merged").get_vocab() == run.tokenizer.get_vocab()
    with run.engine.evaluating():
        trained, again = run.engine.logits(batch), TASKS[run.task].logits(merged, batch)
        own = TASKS[run.task].logits(load_plain(folder, run.task, "fp32"), batch)
    torch.testing.assert_close(own, trained, rtol=0, atol=1e-5 * trained.abs().max().item())
    torch.testing.assert_close(again, trained, rtol=0, atol=1e-4 * trained.abs().max().item())
    if run.task == "classification":
        assert merged.config.id2label == dict(enumerate(NAMES))


def test_an_adapter_has_the_training_precision(tmp_path: Path) -> None:
    stored = load_file(Run(tmp_path, "llama", lora={"r": 2}, precision="bf16").export() / "adapter_model.safetensors")
    assert stored and {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_peft_alone_loads_the_adapter(tmp_path: Path) -> None:
    run = Run(tmp_path, "llama", lora={"r": 2})
    loaded, batch = peft.AutoPeftModelForCausalLM.from_pretrained(run.export()).eval(), batch_of("causal")
    with run.engine.evaluating():
        torch.testing.assert_close(TASKS["causal"].logits(loaded, batch), run.engine.logits(batch))


def test_a_moved_adapter_names_its_base_in_the_new_place(tmp_path: Path) -> None:
    run = Run(tmp_path, "llama", lora={"r": 2})
    move_model(run.export(".best"), run.folder / "model")
    assert peft.PeftConfig.from_pretrained(run.folder / "model").base_model_name_or_path == str(run.folder / "model" / "base")


def test_the_best_model_is_put_there_as_often_as_asked(tmp_path: Path) -> None:
    """A restart after it, or a longer horizon without a better evaluation, finds it again."""
    run = Run(tmp_path, "llama", lora={"r": 2})
    best, model = run.export(".best-3"), run.folder / "model"
    for _ in range(2):
        link_model(best, model)
        assert peft.PeftConfig.from_pretrained(model).base_model_name_or_path == str(model / "base")
        assert peft.PeftConfig.from_pretrained(best).base_model_name_or_path == str(best / "base")
    assert (best / "adapter_model.safetensors").samefile(model / "adapter_model.safetensors"), "no disk is spent twice"


def test_a_merge_writes_over_nothing_and_needs_an_adapter(tmp_path: Path) -> None:
    whole, adapter = Run(tmp_path / "a", "llama"), Run(tmp_path / "b", "llama", lora={"r": 2})
    with pytest.raises(UsageError, match="no model/ lies here"):
        merge_adapter(whole.folder)
    whole.export()
    with pytest.raises(UsageError, match="no LoRA adapter"):
        merge_adapter(whole.folder)
    adapter.export()
    assert merge_adapter(adapter.folder) == merge_adapter(adapter.folder), "a second merge takes the first one's place"


def test_an_adapter_whose_base_is_gone_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, "llama", lora={"r": 2}, weights="pretrained")
    run.export()
    (run.base / "model.safetensors").unlink()
    with pytest.raises(DataError, match="base of its adapter"):
        merge_adapter(run.folder)


# -- loading and asking --------------------------------------------------------------------------------------------------------------------


def test_a_living_zero3_engine_does_not_partition_what_is_loaded(tmp_path: Path) -> None:
    run = Run(tmp_path, "llama")
    living = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    folder = run.export()
    loaded = load_plain(folder, "causal", "fp32")
    assert is_deepspeed_zero3_enabled() and living.is_zero3(), "the engine's own setting must come back"
    assert all(not hasattr(parameter, "ds_id") and parameter.numel() for parameter in loaded.parameters())


@pytest.mark.parametrize("kind, lora", [("t5", None), ("llama", None), ("llama", {"r": 2}), ("bert", None)])
def test_a_finished_run_answers_texts_and_rows_alike(kind: str, lora: Any, tmp_path: Path) -> None:
    run = Run(tmp_path, kind, lora=lora)
    run.export()
    answers = predict(run.folder, ["say w1 w2", {"a": "w1 w2"}, "w30", {"a": "w1 w2 w3"}], max_new_tokens=4, device=torch.device("cpu"))
    assert len(answers) == 4 and answers[0] == answers[1]
    if kind == "bert":
        assert set(answers) <= set(NAMES)
    with pytest.raises(DataError, match="no column 'a'"):
        predict(run.folder, [{"b": "w1"}])
