"""A model's repeated blocks as units of ZeRO stages 2 and 3, with nothing in forward and backward that waits for Python, so that CUDA
graphs can hold them.

DeepSpeed works parameter by parameter, in hooks that count in Python and wait for events, so a GPU waits for Python. Here a block is a
unit. Under stage 3 its parameters are gathered for its forward and again for its backward, while the block before it is at work. Its
gradients are summed over the ranks while the next block's come about.

Which collectives run, and in which order, depends on the model alone: ranks may have other shapes, and one may run as it is while another
replays a graph.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch

from trainkit.errors import TrainingError
from trainkit.training.blocks import parameters_of_blocks


class Unit:
    """Parameters that are gathered, released and summed together: here of a stage that has them whole. All ranks must call each method."""

    def __init__(self, parameters: Sequence[Any]):
        self.parameters = list(parameters)
        self.trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.awaits_backward = self.expects_backward = False
        self.given: dict[int, int] = {}  # tensors that came into forward, and how often they had been written to

    def begin_gather(self) -> None:
        """They will be needed soon."""

    def gather(self) -> None:
        """They are needed now."""

    def release(self) -> None:
        """They are not needed until they are gathered again."""

    def begin_sum(self) -> Callable[[], None]:
        """Take the gradients and begin to sum them over the ranks; to be called when the sums are to be added to this rank's flat
        gradients. A parameter without a gradient counts as zero, since all ranks take part for all of them."""
        raise NotImplementedError

    def forget_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = None


U = TypeVar("U", bound=Unit)


class ByBlocks(Generic[U]):
    """A model whose blocks are watched in forward and backward; what is in no block (embeddings, last norms, a head) is whole."""

    def __init__(self, model: torch.nn.Module, stage: int, unit_of: Callable[[Sequence[Any]], U], flats: Sequence[torch.Tensor]):
        """unit_of: made for each block's parameters, and for the rest. flats: where this rank's gradients are summed."""
        if os.environ.setdefault("NCCL_GRAPH_REGISTER", "0") != "0":
            raise TrainingError(
                "NCCL_GRAPH_REGISTER has all ranks talk while a CUDA graph is captured, and under "
                f"ZeRO-{stage} one rank may capture alone. Take it out of the environment, or write model.cuda_graphs: false"
            )
        self.stage, self.flats = stage, flats
        blocks = parameters_of_blocks(model)
        inside = {parameter for _, parameters in blocks for parameter in parameters}
        self.rest = unit_of([parameter for parameter in model.parameters() if parameter not in inside])
        self.units = [unit_of(parameters) for _, parameters in blocks]
        for number, (block, _) in enumerate(blocks):
            block.register_forward_pre_hook(functools.partial(self._before_forward, number), with_kwargs=True)
            block.register_forward_hook(functools.partial(self._after_forward, number))
        self.taken = False
        self.forwards: list[U] = []  # that have begun, and whose backward has not
        self.in_backward: U | None = None
        self.finish_sum: Callable[[], None] | None = None

    def begin(self) -> None:
        """Before a micro-batch; the gradients of a step's first one begin at zero. What an error left half done is let go of; what it had
        summed stays."""
        for unit in (self.rest, *self.units):
            unit.forget_gradients()
        for unit in self.units:
            unit.release()
            unit.awaits_backward = False
        self.forwards, self.in_backward, self.finish_sum = [], None, None
        if self.taken:
            for flat in self.flats:
                flat.zero_()
            self.taken = False

    def watched(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, whose backward has the gradients summed, those of what is in no block at its end."""
        for unit in self.units:
            unit.release()  # what was gathered ahead and then not needed
        if loss.requires_grad:
            loss.register_hook(lambda gradient: torch.autograd.Variable._execution_engine.queue_callback(self._end_backward))
        return loss

    def reduce(self) -> None:
        """Nothing is left to do at a step's end."""

    def _before_forward(self, number: int, block: torch.nn.Module, inputs: Any, named_inputs: dict[str, Any]) -> None:
        unit = self.units[number]
        if unit is self.in_backward:  # computed again, by gradient checkpointing
            return
        if torch.is_grad_enabled():
            if unit.awaits_backward:
                raise self._not_known("a block of this model runs twice in a forward, which {graphs} do not know")
            given = list(_tensors((*inputs, *named_inputs.values())))
            unit.given = {id(tensor): tensor._version for tensor in given}
            unit.expects_backward = bool(unit.trained) or (bool(unit.parameters) and any(t.requires_grad for t in given))
        unit.gather()
        if number + 1 < len(self.units):
            self.units[number + 1].begin_gather()

    def _after_forward(self, number: int, block: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        unit = self.units[number]
        if unit is self.in_backward:
            return
        if torch.is_grad_enabled():
            found = list(_tensors(outputs))
            for tensor in found:
                if tensor.requires_grad and unit.given.get(id(tensor)) != tensor._version:  # what is handed through is another block's
                    tensor.register_hook(lambda gradient: self._before_backward(unit))
                    unit.awaits_backward = True
            if unit.awaits_backward:
                self.forwards.append(unit)
            if unit.expects_backward and not found:
                raise self._not_known(f"a block of this model returns a {type(outputs).__name__}, in which {{graphs}} find no tensors")
        unit.release()

    def _before_backward(self, unit: U) -> None:
        if unit.awaits_backward:  # it has one hook for each of its outputs
            unit.awaits_backward = False
            self._close()
            unit.gather()
            self.forwards.remove(unit)
            if self.forwards:
                self.forwards[-1].begin_gather()
            self.in_backward = unit

    def _close(self) -> None:
        """The unit whose backward was the last is done: the autograd engine runs what came about later in forward first."""
        if self.in_backward is not None:
            self._sum(self.in_backward)
            self.in_backward.release()
            self.in_backward = None

    def _sum(self, unit: U) -> None:
        """One unit's gradients are on their way at a time."""
        self._finish_sum()
        self.finish_sum = unit.begin_sum()

    def _finish_sum(self) -> None:
        if self.finish_sum is not None:
            self.finish_sum()
            self.finish_sum = None  # which holds what was sent

    def _end_backward(self) -> None:
        self._close()
        self._sum(self.rest)
        self._finish_sum()
        for unit in self.units:
            unit.release()
        if any(parameter.grad is not None for unit in self.units for parameter in unit.parameters):
            raise self._not_known("a gradient of this model comes after the backward of its block, which {graphs} do not know")

    def _not_known(self, what: str) -> TrainingError:
        return TrainingError(f"{what.format(graphs=f'sums by blocks under ZeRO-{self.stage}')}. Write model.cuda_graphs: false")


def _tensors(values: Any) -> Iterable[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
