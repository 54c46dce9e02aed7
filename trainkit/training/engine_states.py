"""The states of the built DeepSpeed engine, read and overwritten in place under every ZeRO stage.

They are read in the pieces that each rank holds, and overwritten from whole tensors, so that any layout can take over from any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist

from trainkit.planning.plan import Plan
from trainkit.training.flat_zero0 import fp32_weights
from trainkit.training.model import persistent_buffers
from trainkit.training.states import STATES, WEIGHT, Piece

_LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_NOTHING = torch.empty(0)


class Parameters(Protocol):
    """A model's parameters as forward and backward see them, of which a rank may hold a shard. All ranks must call each method together."""

    def settle(self) -> None:
        """Before reading: finish what is being prefetched."""

    def whole(self, parameter: torch.nn.Parameter) -> AbstractContextManager[torch.Tensor]:
        """One parameter on the device, in the training precision."""

    def write(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Overwrite one parameter with the whole value, in its own precision. `written` must follow the last one."""

    def written(self) -> None:
        """After the last write: forward sees them."""


class EngineStates:
    """One rank's fp32 weights, AdamW's moments, counters, and what is not trained."""

    def __init__(self, ds: Any, plan: Plan, parameters: Parameters, device: torch.device):
        """ds: DeepSpeed's engine. parameters: of its module."""
        self.ds, self.plan, self.parameters, self.device = ds, plan, parameters, device

    def pieces(self) -> Iterator[Piece]:
        """What this rank holds of every trained parameter's states, after a step: in the same order on all ranks, without communication."""
        stepped = self.counters()["optimizer_steps"] > 0  # fp16 may have skipped all steps so far, and then there are no moments
        for number, (name, parameter) in enumerate(self._trained()):
            for state in STATES if stepped else (WEIGHT,):
                shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
                if self._replicated:
                    mine = number % self.plan.world_size == dist.get_rank()
                    yield Piece(name, state, number, shape, 0, self._replica(parameter, state).flatten() if mine else _NOTHING)
                else:
                    yield Piece(name, state, number, shape, *_partition(parameter, state))

    def frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor on the device) of every parameter that is not trained. All ranks must iterate together."""
        self.parameters.settle()
        for name, parameter in self.ds.module.named_parameters():
            if not parameter.requires_grad:
                with self.parameters.whole(parameter) as value:
                    yield name, value

    def counters(self) -> dict[str, float]:
        """What the optimizer and fp16's search for a loss scale have counted: plain numbers, the same on all ranks."""
        states = self.ds.basic_optimizer.state.values()
        found = {"optimizer_steps": float(next((state["step"] for state in states if "step" in state), 0))}
        return found | {name: float(getattr(self._scaler, name)) for name in self._scaler_counters}

    def count_from(self, steps: int) -> None:
        """Set AdamW's number of steps, from which it corrects the bias of its moments."""
        for state in self.ds.basic_optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], steps) if torch.is_tensor(state["step"]) else steps
        if self.plan.offload_optimizer:
            _replay_cpu_adam(self.ds.basic_optimizer, steps)

    def restore(self, read: Callable[[str, str], torch.Tensor], counters: dict[str, float]) -> None:
        """Overwrite the trained parameters' states and the counters, after a step has made them. All ranks must call it.

        read(parameter's name, one of STATES) gives a whole fp32 tensor.
        """
        self.parameters.settle()
        for name, parameter in self._trained():
            values = {state: read(name, state).to(self.device) for state in (STATES if counters["optimizer_steps"] else (WEIGHT,))}
            for state, value in values.items():
                if self._replicated:
                    self._replica(parameter, state).copy_(value)
                else:
                    _write_partition(parameter, state, value)
            self.parameters.write(parameter, values[WEIGHT])
        self.parameters.written()
        self.count_from(int(counters["optimizer_steps"]))
        for name in self._scaler_counters & counters.keys():
            setattr(self._scaler, name, type(getattr(self._scaler, name))(counters[name]))

    def restore_frozen(self, read: Callable[[str], torch.Tensor]) -> None:
        """Overwrite the parameters that are not trained, and the persistent buffers, with whole tensors. All ranks must call it."""
        for name, parameter in self.ds.module.named_parameters():
            if not parameter.requires_grad:
                self.parameters.write(parameter, read(name))
        self.parameters.written()
        for name, buffer in persistent_buffers(self.ds.module).items():
            buffer.copy_(read(name))

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.ds.module.named_parameters() if parameter.requires_grad)

    @property
    def _replicated(self) -> bool:
        """Whether every rank holds all optimizer states, which DeepSpeed has no function to read then."""
        return self.plan.zero_stage == 0

    def _replica(self, parameter: torch.nn.Parameter, state: str) -> torch.Tensor:
        """A whole state: the fp32 weight, which is the parameter or lies in DeepSpeed's optimizer, or a moment beside it."""
        weight = parameter if self.plan.precision == "fp32" else self._masters[parameter]
        return weight.detach() if state == WEIGHT else self.ds.basic_optimizer.state[weight][state]

    @functools.cached_property
    def _masters(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The fp32 weight of each parameter of a lower precision, without partitioning."""
        return fp32_weights(self.ds.optimizer)

    @property
    def _scaler(self) -> Any:
        """The object that keeps fp16's loss scale, which depends on DeepSpeed's optimizer."""
        optimizer = self.ds.optimizer
        return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", optimizer)

    @property
    def _scaler_counters(self) -> set[str]:
        return {name for name in _LOSS_SCALER if self.plan.precision == "fp16" and hasattr(self._scaler, name)}


def _partition(parameter: torch.nn.Parameter, state: str) -> tuple[int, torch.Tensor]:
    """(first element, elements) of the flattened parameter's state that this rank holds."""
    if hasattr(parameter, "ds_id"):
        begin, end = _bounds(parameter)
        if state == WEIGHT:
            return begin, deepspeed.utils.safe_get_local_fp32_param(parameter)[: end - begin]
        return begin, deepspeed.utils.safe_get_local_optimizer_state(parameter, state)[: end - begin]
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # given by DeepSpeed: which part of its flat partition is the parameter's
    if mapping is None:
        return 0, _NOTHING
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(None if state == WEIGHT else state).detach()


def _write_partition(parameter: torch.nn.Parameter, state: str, value: torch.Tensor) -> None:
    """From the whole value. Under ZeRO-3 this rank's partition is cut here: DeepSpeed's own way fails where the last one is padded."""
    if hasattr(parameter, "ds_id"):
        begin, end = _bounds(parameter)
        padding = parameter.partition_numel() - (end - begin)  # type: ignore[attr-defined]  # given by DeepSpeed
        partition = torch.nn.functional.pad(value.flatten()[begin:end], (0, padding))
        if state == WEIGHT:
            deepspeed.utils.safe_set_local_fp32_param(parameter, partition)
        else:
            deepspeed.utils.safe_set_local_optimizer_state(parameter, partition, state)
    elif state == WEIGHT:
        deepspeed.utils.safe_set_full_fp32_param(parameter, value)
    else:
        deepspeed.utils.safe_set_full_optimizer_state(parameter, value, state)


def _bounds(parameter: torch.nn.Parameter) -> tuple[int, int]:
    """The elements of the flattened parameter that this rank holds under ZeRO-3; the last ranks' partitions are padded beyond it."""
    length, numel = parameter.partition_numel(), parameter.ds_numel  # type: ignore[attr-defined]  # given by DeepSpeed
    begin = min(dist.get_rank() * length, numel)
    return begin, min(begin + length, numel)


def _replay_cpu_adam(optimizer: Any, steps: int) -> None:
    """CPUAdam keeps beta^t in fp32, multiplied step by step; a jump computes it anew, and its last bits differ. So the steps are repeated,
    on a tensor that nobody needs."""
    group = optimizer.param_groups[0]
    nothing = [torch.zeros(16) for _ in range(4)]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"], *nothing
        )
