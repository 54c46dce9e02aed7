"""Forward and backward of a micro-batch as two CUDA graphs: two launches instead of thousands, where a GPU would wait for Python.

A graph belongs to one shape of micro-batches; their shapes come from a small set. A shape runs as it is when it is met first, and is
captured when it has come some times, or when it is asked for. All graphs share one pool of memory, because only one of them runs at a
time. Gradients are summed into fixed tensors, outside of what watches the parameters; who holds the engine hands them on when the step's
last backward is done. A model that waits for the GPU, or draws numbers on the host (to skip layers), cannot be captured, and runs as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from trainkit.data.arrays import IGNORED_LABEL
from trainkit.data.padding import MicroBatch, tensors
from trainkit.errors import CaptureError, TrainingError

SumLoss = Callable[[Any, MicroBatch], torch.Tensor]  # of a model, or what is called like it
MOST_GRAPHS = 256
LITTLE_MEMORY = 8 << 30  # free bytes of a device
MEETINGS = 5  # of a shape before it is captured, which takes as long as a graph saves in about so many
_MOST_TOLD = 300  # letters of CUDA's message
Shape = tuple[tuple[str, tuple[int, ...]], ...]


class Gradients(Protocol):
    """Where backward sums them until they are taken."""

    taken: bool

    @property
    def flats(self) -> Sequence[torch.Tensor]: ...

    def begin(self) -> None: ...

    def check_in_place(self) -> None: ...


class Twin:
    """Called like the model, on other trained parameters: the same weights in the same memory, without what watches the model's own."""

    def __init__(self, model: torch.nn.Module):
        self.module = model
        self.own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.parameters = {name: torch.nn.Parameter(parameter.detach()) for name, parameter in self.own.items()}
        for parameter in self.own.values():
            parameter.register_hook(_refuse)

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return torch.func.functional_call(self.module, dict(self.parameters), (), inputs, tie_weights=True)

    def check_in_place(self) -> None:
        """Whoever moves a parameter elsewhere would leave its twin behind."""
        moved = [name for name, parameter in self.own.items() if parameter.data_ptr() != self.parameters[name].data_ptr()]
        assert not moved, f"parameters were moved: {moved[:3]}"


class FixedGradients:
    """The gradients of a twin's parameters in fixed tensors, summed over micro-batches until they are taken."""

    def __init__(self, twin: Twin, weights: Sequence[torch.Tensor] = ()):
        """weights: flat tensors in which the parameters lie. The gradients lie alike in `flats`; without any, in one, end to end."""
        self.twin, parameters = twin, list(twin.parameters.values())
        self.flats = [torch.zeros_like(flat, requires_grad=False) for flat in weights] or [_end_to_end(parameters)]
        for parameter, (number, first) in zip(parameters, places(parameters, weights), strict=True):
            parameter.grad = self.flats[number][first : first + parameter.numel()].view_as(parameter)
        self.taken = False

    def begin(self) -> None:
        """Before a micro-batch: those of a step's first one begin at zero."""
        if self.taken:
            for flat in self.flats:
                flat.zero_()
            self.taken = False

    def check_in_place(self) -> None:
        self.twin.check_in_place()


class Graphs:
    """The graphs of one rank, and the gradients that they sum. On a device without CUDA graphs every micro-batch runs as it is."""

    def __init__(
        self,
        gradients: Gradients,
        model: Callable[..., Any],
        sum_loss: SumLoss,
        device: torch.device,
        say: Callable[[str], None],
        captures: bool = True,
    ):
        """model: whose gradients come to lie in `gradients`. say: told once why it cannot be captured. captures: else all runs as it is."""
        self.gradients, self.device, self.say = gradients, device, say
        self.sum_loss = functools.partial(sum_loss, model)
        self.made: dict[Shape, _Graph] = {}
        self.met: Counter[Shape] = Counter()
        self.activation_bytes = 0  # at most, that a captured forward left for its backward
        self.capturable = None if captures else False  # None: not known yet, and so nothing is captured
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        if device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """The sum of losses; its backward adds to the fixed gradients."""
        self.gradients.begin()
        if self.device.type != "cuda":
            return self.sum_loss(batch)
        shape = _shape(batch)
        graph = self.made.get(shape)
        if graph is None:
            self.met[shape] += 1
            if self.met[shape] <= MEETINGS or not self.capture(batch):
                return self.sum_loss(batch)
            graph = self.made[shape]
        loss: torch.Tensor = _Replay.apply(self.anchor, graph, batch)
        return loss

    def capture(self, batch: MicroBatch) -> bool:
        """Make the graph of a shape that has run; returns whether there is one. Raises CaptureError where CUDA cannot."""
        shape = _shape(batch)
        if shape not in self.made and self.capturable and len(self.made) < MOST_GRAPHS:
            try:
                self.made[shape] = self._capture(batch)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # CUDA is in disorder now: this process can only end
                reason = " ".join(str(error).split())[:_MOST_TOLD]
                raise CaptureError(
                    f"no CUDA graph can be made of forward and backward: {reason}. Write model.cuda_graphs: false"
                ) from error
        return shape in self.made

    def close(self) -> None:
        """Let go of them: NCCL does not end while a graph holds one of its calls."""
        self.capturable = False
        for graph in self.made.values():
            graph.forward.reset()
            graph.backward.reset()
        self.made.clear()

    def find_out(self, batch: MicroBatch) -> None:
        """Whether forward and backward can be captured. Once, because a capture that fails leaves CUDA in disorder; and on all ranks at the
        same time, because there may be collectives in them.

        Without labels that count, so that the gradients stay as they are, as does the state of the generators of random numbers.
        """
        if self.capturable is None and self.device.type == "cuda":
            reason = self._what_cannot_be_captured(replace(batch, labels=torch.full_like(batch.labels, IGNORED_LABEL)))
            self.capturable = reason is None
            if reason is not None:
                self.say(f"the model {reason}, so no CUDA graph can be made of it, and it runs as it is")

    def _what_cannot_be_captured(self, batch: MicroBatch) -> str | None:
        self.gradients.begin()
        mode, before = torch.cuda.get_sync_debug_mode(), torch.get_rng_state()
        with torch.random.fork_rng([self.device]):
            torch.cuda.set_sync_debug_mode("error")
            try:
                self.sum_loss(batch).backward()
            except RuntimeError as error:
                if "synchronizing" not in str(error):
                    raise
                return "waits for the GPU in its forward or backward"
            finally:
                torch.cuda.set_sync_debug_mode(mode)
            return None if torch.equal(torch.get_rng_state(), before) else "draws random numbers on the host"

    def _capture(self, batch: MicroBatch) -> _Graph:
        """Nothing runs while it is captured; the next replay does the work."""
        if not self.made or torch.cuda.mem_get_info(self.device)[0] < LITTLE_MEMORY:
            torch.cuda.empty_cache()  # what runs without graphs left is better used by the graphs
        inputs = replace(batch, **{name: value.clone() for name, value in tensors(batch).items()})  # type: ignore[arg-type]
        forward, backward, weight = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), torch.ones((), device=self.device)
        with torch.compiler.set_stance("eager_on_recompile"):  # a compiler at work would break the capture
            before = torch.cuda.memory_allocated(self.device)
            with self._captured(forward):
                loss = self.sum_loss(inputs)
            self.activation_bytes = max(self.activation_bytes, torch.cuda.memory_allocated(self.device) - before)
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
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what went wrong first says more
                    graph.capture_end()
                raise
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


def _refuse(gradient: torch.Tensor) -> None:
    """Of a parameter that has a twin, whose gradient nobody would see."""
    raise TrainingError(
        "a part of this model runs in backward, as of a model that reverses its layers, and its gradients would be lost. "
        "Write model.cuda_graphs: false"
    )


def _shape(batch: MicroBatch) -> Shape:
    return tuple((name, tuple(value.shape)) for name, value in tensors(batch).items())


def _end_to_end(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Zeros for as many elements."""
    dtype, device = _only({tensor.dtype for tensor in tensors}), _only({tensor.device for tensor in tensors})
    return torch.zeros(sum(tensor.numel() for tensor in tensors), dtype=dtype, device=device)


def places(tensors: Sequence[torch.Tensor], flats: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """(number of the flat tensor, first element there) of each tensor: where it lies, or, without flat tensors, end to end in the first."""
    end = 0
    for tensor in tensors:
        beyond = [tensor.data_ptr() - flat.data_ptr() for flat in flats]
        inside = [(number, far // tensor.itemsize) for number, far in enumerate(beyond) if 0 <= far < flats[number].nbytes]
        yield _only(set(inside)) if flats else (0, end)
        end += tensor.numel()


def _only(kinds: set[Any]) -> Any:
    (kind,) = kinds
    return kind
