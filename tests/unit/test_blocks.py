"""Which modules are a model's blocks, and what happens where they do not compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from trainkit.errors import PlanMismatch
from trainkit.training import blocks
from trainkit.training.blocks import Sizes, compile_blocks, repeated_blocks

T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("auto_class", "config", "kinds"),
    [
        (transformers.AutoModelForSeq2SeqLM, transformers.T5Config(**T5), {"T5Block": 4}),
        (transformers.AutoModelForCausalLM, transformers.LlamaConfig(**TEXT), {"LlamaDecoderLayer": 3}),
        (transformers.AutoModelForCausalLM, transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2), {"GPT2Block": 2}),
        (transformers.AutoModelForSequenceClassification, transformers.BertConfig(**TEXT), {"BertLayer": 3}),
    ],
)  # fmt: skip
def test_a_models_blocks_are_found(auto_class: Any, config: Any, kinds: dict[str, int]) -> None:
    names = [type(block).__name__ for block in repeated_blocks(auto_class.from_config(config))]
    assert {name: names.count(name) for name in names} == kinds


def test_a_list_of_lists_has_the_blocks_of_its_lists() -> None:
    lists = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(3))
    assert repeated_blocks(lists) == [block for inner in lists for block in inner.children()]


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the compiler was given, with a backend that runs it as it is."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(blocks, "BACKEND", backend)
    return seen


def test_all_blocks_share_one_compilation_and_any_number_of_rows(compiled: list[str]) -> None:
    tower, said = Tower(), list[str]()
    before = tower(torch.ones(3, 4))
    compile_blocks(tower, said.append, Sizes())
    for rows in (3, 5, 8):
        tower(torch.ones(rows, 4, requires_grad=True)).sum().backward()
    assert torch.equal(tower(torch.ones(3, 4, requires_grad=True)), before)
    assert len(compiled) == 1 and said == []
    assert set(tower.state_dict()) == set(Tower().state_dict())


def test_some_shapes_are_compiled_for_their_sizes_and_the_others_for_any(compiled: list[str]) -> None:
    tower, sizes = Tower(), Sizes()
    expected = {rows: tower(torch.ones(rows, 4)) for rows in (3, 5, 8, 9)}
    compile_blocks(tower, pytest.fail, sizes)
    for rows in (8, 3, 5, 9, 3):
        sizes.exact = rows in (3, 5)
        assert torch.equal(tower(torch.ones(rows, 4, requires_grad=True)), expected[rows])
    assert ["Sym" in code for code in compiled] == [True, False, False]


def test_a_model_without_blocks_cannot_be_selective(compiled: list[str]) -> None:
    with pytest.raises(PlanMismatch, match="this model has none"):
        compile_blocks(nn.Linear(4, 4), pytest.fail, Sizes(), selective=True)


def test_selective_checkpointing_keeps_less_and_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BACKEND", "aot_eager_decomp_partition")  # the compiler's front end, which decides what is kept

    def kept_and_gradients(selective: bool | None) -> tuple[int, list[torch.Tensor]]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        tower = Tower()
        tower.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Sigmoid(), nn.Linear(16, 4)) for _ in range(2))
        if selective is not None:
            compile_blocks(tower, pytest.fail, Sizes(), selective)
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = tower(torch.linspace(-1, 1, 512).view(128, 4).requires_grad_()).square().sum()
        loss.backward()
        found = [parameter.grad for parameter in tower.parameters()]
        return sum(kept.values()), [gradient for gradient in found if gradient is not None]

    (_, plain), (compiled, _), (selective, gradients) = map(kept_and_gradients, (None, False, True))
    assert selective < 0.8 * compiled and len(gradients) == len(plain) == 8
    for one, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_selective_checkpointing_draws_no_mask_again() -> None:
    """With the real compiler, to which dropout is a seed and a comparison. The weights are unit matrices: what comes out is the mask."""
    torch._dynamo.reset()
    tower = Tower()
    tower.layers = nn.ModuleList(nn.Sequential(nn.Dropout(rate), nn.Linear(64, 64, bias=False)) for rate in (0.5, 0.0))
    for layer in tower.layers:
        nn.init.eye_(layer[1].weight)  # type: ignore[index]
    compile_blocks(tower, pytest.fail, Sizes(), selective=True)
    given = torch.ones(128, 64, requires_grad=True)
    out = tower(given)
    out.sum().backward()
    assert given.grad is not None and 0.4 < (out == 0).float().mean() < 0.6
    assert torch.equal(given.grad != 0, out != 0)


def test_without_gradients_nothing_is_compiled(compiled: list[str]) -> None:
    tower = Tower()
    compile_blocks(tower, pytest.fail, Sizes())
    with torch.no_grad():
        tower(torch.ones(3, 4))
    assert compiled == []


def test_blocks_that_do_not_compile_run_as_they_are_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        raise RuntimeError("no such chip")

    torch._dynamo.reset()
    monkeypatch.setattr(blocks, "BACKEND", backend)
    tower, said = Tower(), list[str]()
    before = tower(torch.ones(3, 4))
    compile_blocks(tower, said.append, Sizes())
    assert torch.equal(tower(torch.ones(3, 4)), before) and torch.equal(tower(torch.ones(3, 4)), before)
    assert len(said) == 1 and "the compiler fails here" in said[0] and "no such chip" in said[0]


def test_a_models_own_error_is_not_taken_for_the_compilers(compiled: list[str]) -> None:
    tower = Tower()
    compile_blocks(tower, pytest.fail, Sizes())
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
        tower(torch.ones(3, 5))
