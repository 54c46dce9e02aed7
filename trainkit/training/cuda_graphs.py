"""Forward and backward of a micro-batch as two CUDA graphs: two launches instead of thousands, where a GPU would wait for Python.

A graph belongs to one shape of micro-batches; their shapes come from a small set. A shape runs as it is when it is met first, and is
captured when it comes again. All graphs share one pool of memory, because only one of them runs at a time. Gradients are summed into
fixed tensors, outside of what watches the parameters; who holds the engine hands them on when the step's last backward is done.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainkit.data.feed import MicroBatch, tensors

SumLoss = Callable[[Any, MicroBatch], torch.Tensor]  # of a model, or what is called like it
MOST_GRAPHS = 256
Shape = tuple[tuple[str, tuple[int, ...]], ...]


class FixedGradients:
    """The gradients of a model's trained parameters in fixed tensors, summed over micro-batches until they are taken."""

    def __init__(self, model: torch.nn.Module):
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.twins = {name: torch.nn.Parameter(parameter.detach()) for name, parameter in self.parameters.items()}
        flat = torch.zeros(sum(p.numel() for p in self.parameters.values()), dtype=_only({p.dtype for p in self.parameters.values()}),
                           device=_only({p.device for p in self.parameters.values()}))  # fmt: skip
        self.flat, first = flat, 0
        for twin in self.twins.values():
            twin.grad = flat[first : first + twin.numel()].view_as(twin)
            first += twin.numel()
        self.taken = False

    def begin(self) -> None:
        """Before a micro-batch: those of a step's first one begin at zero."""
        if self.taken:
            self.flat.zero_()
            self.taken = False

    def hand_over(self) -> None:
        """They become the parameters' `grad`, until the next step begins."""
        for name, parameter in self.parameters.items():
            grad = self.twins[name].grad
            assert grad is not None
            parameter.grad = grad.detach()
        self.taken = True

    def check_in_place(self) -> None:
        """Whoever moves a parameter elsewhere would leave its twin behind."""
        moved = [name for name, parameter in self.parameters.items() if parameter.data_ptr() != self.twins[name].data_ptr()]
        assert not moved, f"parameters were moved: {moved[:3]}"


@dataclass(frozen=True)
class Twin:
    """Called like the model, on other parameters: the same weights in the same memory, without what watches the model's own."""

    module: torch.nn.Module
    parameters: Mapping[str, torch.nn.Parameter]

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return torch.func.functional_call(self.module, dict(self.parameters), (), inputs, tie_weights=True)


class Graphs:
    """The graphs of one rank, and the gradients that they sum. On a device without CUDA graphs every micro-batch runs as it is."""

    def __init__(self, model: torch.nn.Module, sum_loss: SumLoss, device: torch.device):
        self.gradients, self.device = FixedGradients(model), device
        self.sum_loss = functools.partial(sum_loss, Twin(model, self.gradients.twins))
        self.met: dict[Shape, _Graph | None] = {}
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        if device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """The sum of losses; its backward adds to the fixed gradients."""
        self.gradients.begin()
        if self.device.type != "cuda":
            return self.sum_loss(batch)
        shape = _shape(batch)
        graph = self.met.get(shape)
        if graph is None:
            if shape not in self.met or sum(graph is not None for graph in self.met.values()) >= MOST_GRAPHS:
                self.met[shape] = None
                return self.sum_loss(batch)
            graph = self.met[shape] = self._capture(batch)
        loss: torch.Tensor = _Replay.apply(self.anchor, graph, batch)
        return loss

    def _capture(self, batch: MicroBatch) -> _Graph:
        """Nothing runs while it is captured; the next replay does the work."""
        torch.cuda.empty_cache()  # what the first run of a shape left is better used by the graphs
        inputs = replace(batch, **{name: value.clone() for name, value in tensors(batch).items()})  # type: ignore[arg-type]
        forward, backward, weight = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), torch.ones((), device=self.device)
        with torch.compiler.set_stance("eager_on_recompile"):  # a compiler at work would break the capture
            with self._captured(forward):
                loss = self.sum_loss(inputs)
            with self._captured(backward):
                (loss * weight).backward()
        return _Graph(inputs, forward, backward, loss.detach(), weight)

    @contextlib.contextmanager
    def _captured(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")  # other threads copy the next batches meanwhile
            try:
                yield
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)


@dataclass(frozen=True)
class _Graph:
    inputs: MicroBatch
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    loss: torch.Tensor
    weight: torch.Tensor  # the gradient of the loss


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, graph: _Graph, batch: MicroBatch) -> torch.Tensor:
        fixed = tensors(graph.inputs)
        for name, value in tensors(batch).items():
            fixed[name].copy_(value, non_blocking=True)
        graph.forward.replay()
        ctx.graph = graph
        return graph.loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        ctx.graph.weight.copy_(gradients[0])
        ctx.graph.backward.replay()
        return None, None, None


def _shape(batch: MicroBatch) -> Shape:
    return tuple((name, tuple(value.shape)) for name, value in tensors(batch).items())


def _only(kinds: set[Any]) -> Any:
    (kind,) = kinds
    return kind
