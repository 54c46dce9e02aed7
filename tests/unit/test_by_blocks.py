"""ZeRO-2 and 3 by whole blocks in one process, on what DeepSpeed keeps there; tests/cluster/test_parity.py has two ranks and DeepSpeed."""

from __future__ import annotations

import contextlib
import enum
import functools
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from trainkit.errors import TrainingError
from trainkit.training.flat_zero2 import FlatZero2, pieces_of
from trainkit.training.flat_zero3 import FlatZero3

WIDTH = 6


class Status(enum.Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2


class Block(torch.nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.linear, self.norm, self.kind = torch.nn.Linear(WIDTH, WIDTH), torch.nn.LayerNorm(WIDTH), kind

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> Any:
        change = torch.tanh(self.linear(self.norm(hidden.clone() if self.kind == "in place" else hidden) + bias))
        bias = bias + change.mean(0) if self.kind == "two outputs" else bias
        hidden = hidden.add_(change) if self.kind == "in place" else hidden + change
        return {"hidden": hidden, "bias": [bias]} if self.kind == "a dictionary" else (hidden, bias)


class Model(torch.nn.Module):
    """Three blocks that hand a bias through; the head is tied to the embedding. kind: of the blocks."""

    def __init__(self, kind: str = "", calls: int = 1, used: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.bias = torch.nn.Embedding(11, WIDTH), torch.nn.Parameter(torch.randn(WIDTH))
        self.blocks = torch.nn.ModuleList(Block(kind) for _ in range(3))
        self.calls, self.used = calls, used

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden, bias = self.embedding(ids) + 0.0, self.bias * 2
        for block in list(self.blocks)[: self.used]:
            for _ in range(self.calls):
                outputs = block(hidden, bias)
                hidden, bias = (outputs["hidden"], *outputs["bias"]) if isinstance(outputs, dict) else outputs
        return torch.nn.functional.cross_entropy(hidden @ self.embedding.weight.T + bias.sum(), ids, reduction="sum")


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Model, groups: int = 1, max_norm: float = 1.0) -> FlatZero3:
    """The model with its parameters cut as DeepSpeed's stage 3 cuts them, for one rank, in so many sub groups."""
    parameters: list[Any] = list(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, shard in zip(parameters, flat.split(sizes), strict=True):
        parameter.ds_tensor, parameter.ds_shape, parameter.ds_numel = shard, parameter.shape, parameter.numel()
        parameter.ds_process_group, parameter.ds_status = dist.group.WORLD, Status.NOT_AVAILABLE
        parameter.partition_numel = functools.partial(int, parameter.numel())
        parameter.data = torch.empty(0)
    cut = [0, *(len(parameters) * part // groups for part in range(1, groups)), len(parameters)]
    lengths = [sum(sizes[a:b]) for a, b in itertools.pairwise(cut)]
    masters = [torch.nn.Parameter(part.clone()) for part in flat.split(lengths)]
    adamw = [torch.optim.AdamW([master], lr=0.01, weight_decay=0.0) for master in masters]
    optimizer = SimpleNamespace(
        fp16_groups=[parameters[a:b] for a, b in itertools.pairwise(cut)],
        fp16_partitioned_groups_flat=flat.split(lengths),
        fp32_partitioned_groups_flat=masters,
        grad_partitions_flat_buffer=torch.zeros_like(flat),
        dp_process_group=dist.group.WORLD,
        parameter_offload=Mock(),
        ipg_buckets={flat.dtype: SimpleNamespace(buffer=torch.empty(1000))},
        _grad_acc_hooks=[Mock()],
        _leaf_module_hooks=[Mock()],
        _optimizer_step=lambda group: adamw[group].step(),
    )
    return FlatZero3(model, optimizer, max_norm)


def partitioned(model: Model, groups: int = 1, max_norm: float = 1.0) -> FlatZero2:
    """The model with its parameters laid end to end as DeepSpeed's stage 2 lays them, for one rank, in so many parameter groups."""
    parameters = list(model.parameters())
    flats, masters = [], []
    for number in range(groups):
        own = parameters[number::groups]
        flat = torch.cat([torch.cat([parameter.detach().flatten(), torch.zeros(3)]) for parameter in own])  # padded for alignment
        for parameter, place in zip(own, flat.split([parameter.numel() + 3 for parameter in own]), strict=True):
            parameter.data = place[: parameter.numel()].view_as(parameter)
        flats.append(flat)
        masters.append(torch.nn.Parameter(flat.clone()))
    adamw = [torch.optim.AdamW([master], lr=0.01, weight_decay=0.0) for master in masters]
    optimizer = SimpleNamespace(
        bit16_groups_flat=flats,
        parallel_partitioned_bit16_groups=[[flat] for flat in flats],
        single_partition_of_fp32_groups=masters,
        real_dp_process_group=[dist.group.WORLD] * groups,
        dp_process_group=dist.group.WORLD,
        _optimizer_step=lambda group: adamw[group].step(),
    )
    return FlatZero2(model, optimizer, max_norm)


WAYS = {"zero2": partitioned, "zero3": sharded}


def whole(flat: FlatZero3) -> list[bool]:
    """Of each block, whether its memory is there."""
    return [unit.flat.untyped_storage().nbytes() > 0 for unit in flat.units]


def ids(step: int) -> torch.Tensor:
    return torch.randint(11, (5,), generator=torch.Generator().manual_seed(step))


def train(flat: FlatZero2 | FlatZero3, model: Model, step: int) -> float:
    """An optimizer step of two micro-batches; returns the gradients' norm."""
    for number in range(2):
        flat.begin()
        flat.watched(flat.called(ids=ids(2 * step + number))).backward()
    flat.taken = True
    return float(flat.step())


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("kind", ["", "in place", "two outputs", "a dictionary"])
@pytest.mark.parametrize("way", WAYS)
def test_it_trains_as_plain_torch_does(way: str, groups: int, kind: str) -> None:
    model, plain = Model(kind), Model(kind if kind == "two outputs" else "")
    flat, adamw = WAYS[way](model, groups), torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(4):
        adamw.zero_grad()
        for number in range(2):
            plain(ids(2 * step + number)).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        assert train(flat, model, step) == pytest.approx(float(norm), rel=1e-5)
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        with flat.whole(parameter) if isinstance(flat, FlatZero3) else contextlib.nullcontext(parameter) as value:
            assert torch.allclose(value, expected, rtol=1e-4, atol=1e-6)


@given(st.integers(1, 300), st.integers(0, 1000), st.integers(1, 200))
def test_every_element_belongs_to_the_rank_in_whose_partition_it_lies(elements: int, first: int, partition: int) -> None:
    pieces = pieces_of(elements, 7, first, partition)
    owned = [(piece.owner, piece.place + place) for piece in pieces for place in range(piece.end - piece.first)]
    assert owned == [divmod(first + element, partition) for element in range(elements)]
    assert [piece.first for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])] and pieces[-1].end == elements


def test_under_stage_2_gradients_of_a_block_are_gone_when_the_next_ones_begin() -> None:
    model = Model()
    flat = partitioned(model)
    held: list[list[bool]] = []
    for number in range(3):
        flat.called.parameters[f"blocks.{number}.norm.bias"].register_post_accumulate_grad_hook(
            lambda _: held.append([any(parameter.grad is not None for parameter in unit.parameters) for unit in flat.units])
        )
    flat.begin()
    flat.watched(flat.called(ids=ids(0))).backward()
    assert [own.index(True) for own in held] == [2, 1, 0] and all(sum(own) == 1 for own in held)
    assert all(parameter.grad is None for parameter in flat.called.parameters.values()) and flat.flats[0].abs().sum() > 0
    model.blocks[1].linear.weight.data = model.blocks[1].linear.weight.data.clone()
    with pytest.raises(AssertionError, match=r"were moved: \['blocks.1.linear.weight'\]"):
        flat.check_in_place()


def test_a_blocks_memory_is_there_only_while_it_runs() -> None:
    model = Model()
    flat = sharded(model)
    held: list[list[bool]] = []

    def look(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        held.append(whole(flat))
        if output.requires_grad:
            output.register_hook(lambda gradient: held.append(whole(flat)))

    for block in model.blocks:
        block.linear.register_forward_hook(look)
    loss = model(ids(0))
    assert held == [[True, True, False], [False, True, True], [False, False, True]], "a block, and the next one on its way"
    held.clear()
    flat.watched(loss).backward()
    assert held == [[False, True, True], [True, True, False], [True, False, False]], "a block, and the one before it"
    assert whole(flat) == [False, False, False] and flat.finish_sum is None
    assert all(parameter.numel() == 0 and parameter.grad is None for parameter in model.blocks.parameters())
    assert model.embedding.weight.shape == (11, WIDTH), "what is in no block stays"
    with torch.no_grad():
        assert float(model(ids(0))) == float(loss), "an evaluation follows"


def test_what_was_gathered_ahead_and_is_not_used_is_let_go_of() -> None:
    """A last block that is skipped, and a first one that no gradient reaches."""
    model = Model(used=2)
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), inputs[1]))
    flat = sharded(model)
    flat.begin()
    loss = model(ids(0))
    assert whole(flat) == [False, False, True]
    flat.watched(loss)
    assert whole(flat) == [False, False, False]
    loss.backward()
    assert whole(flat) == [False, False, False]


@pytest.mark.parametrize("way", WAYS)
def test_a_block_that_runs_twice_is_refused(way: str) -> None:
    model = Model(calls=2)
    WAYS[way](model)
    with pytest.raises(TrainingError, match=r"runs twice in a forward.*Write model.cuda_graphs: false"):
        model(ids(0))
    with torch.no_grad():
        model(ids(0))


@pytest.mark.parametrize("way", WAYS)
def test_a_block_whose_output_hides_its_tensors_is_refused(way: str) -> None:
    model = Model()
    WAYS[way](model)
    model.blocks[1].register_forward_hook(lambda module, inputs, outputs: SimpleNamespace(hidden=outputs[0]), prepend=True)
    with pytest.raises(TrainingError, match=r"returns a SimpleNamespace.*Write model.cuda_graphs: false"):
        model(ids(0))


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_after_the_backward_of_its_block_is_refused(way: str) -> None:
    model = Model()
    flat = WAYS[way](model)
    late = flat.units[2].parameters[0]

    def comes_late(gradient: torch.Tensor) -> None:
        late.grad = torch.zeros_like(late)

    model.blocks[0].register_forward_pre_hook(lambda module, inputs: inputs[0].register_hook(comes_late) and None)
    flat.begin()
    with pytest.raises(TrainingError, match=r"comes after the backward of its block.*Write model.cuda_graphs: false"):
        flat.watched(flat.called(ids=ids(0))).backward()


def test_a_block_that_hands_its_input_through_is_none_of_its_business() -> None:
    blocks = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    model = Model()
    model.handed_through = blocks
    flat = sharded(model)
    hidden = torch.ones(3, requires_grad=True)
    assert blocks[1](blocks[0](hidden)) is hidden and not flat.forwards


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_an_error_left_half_done_is_forgotten(way: str, inside: bool) -> None:
    """In the middle of a backward: when a block's begins, or when half of its gradients are there."""
    model, again = Model(), Model()
    flat, expected = WAYS[way](model), WAYS[way](again)

    def breaks(gradient: torch.Tensor) -> None:
        raise RuntimeError("in the middle of backward")

    if inside:
        handle = model.blocks[1].norm.register_forward_hook(lambda module, inputs, output: output.register_hook(breaks) and None)
    else:
        handle = model.blocks[0].register_forward_hook(lambda module, inputs, outputs: outputs[0].register_hook(breaks) and None)
    flat.begin()
    loss = flat.watched(flat.called(ids=ids(0)))
    with pytest.raises(RuntimeError, match="in the middle"):
        (loss * 64).backward()
    handle.remove()
    flat.taken = True
    flat.begin()
    assert isinstance(flat, FlatZero2) or whole(flat) == [False, False, False]
    flat.taken = True
    assert train(flat, model, 1) == train(expected, again, 1)


def test_under_stage_3_deepspeeds_hooks_and_buckets_are_gone() -> None:
    optimizer: Any = sharded(Model()).optimizer
    optimizer.parameter_offload.destroy.assert_called_once()
    for (hook,) in (optimizer._grad_acc_hooks, optimizer._leaf_module_hooks):
        hook.remove.assert_called_once()
    assert [bucket.buffer for bucket in optimizer.ipg_buckets.values()] == [None]


def test_a_shard_that_was_moved_is_noticed() -> None:
    model = Model()
    flat = sharded(model)
    flat.check_in_place()
    for parameter in (model.blocks[1].linear.weight, model.bias):
        parameter.ds_tensor.data = parameter.ds_tensor.data.clone()
    with pytest.raises(AssertionError, match="2 shards were moved"):
        flat.check_in_place()


def test_one_parameter_is_read_and_written_whole() -> None:
    model = Model()
    flat = sharded(model)
    weight, value = model.blocks[1].linear.weight, torch.arange(36.0).view(6, 6)
    flat.write(weight, value)
    with flat.whole(weight) as whole:
        assert torch.equal(whole, value)
    flat.write(model.embedding.weight, torch.ones(11, WIDTH))
    flat.written()
    assert torch.equal(model.embedding.weight, torch.ones(11, WIDTH))


def test_an_nccl_that_talks_during_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "1")
    with pytest.raises(TrainingError, match="NCCL_GRAPH_REGISTER"):
        sharded(Model())


def test_a_gradient_that_would_be_lost_ends_the_training() -> None:
    """Of a model whose parts run again in backward, on its own parameters, such as Reformer."""
    model = Model()
    partitioned(model)
    with pytest.raises(TrainingError, match=r"its gradients would be lost. Write model.cuda_graphs: false"):
        model(ids(0)).backward()
