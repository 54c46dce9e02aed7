"""DeepSpeed, behind the few verbs that the loop needs. No other room knows it; flat_zero1.py and flat_zero3.py are this one's.

The plan owns the batch arithmetic: DeepSpeed gets placeholder batch sizes and never scales a loss; the loop says which micro-batch ends
an optimizer step. After building, the engine is asked back what it applies; anything else than the plan is an error.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from trainkit.data.feed import MicroBatch, StepBatch
from trainkit.errors import PlanMismatch
from trainkit.planning.planner import Plan
from trainkit.training.blocks import Sizes, compile_blocks, repeated_blocks
from trainkit.training.cuda_graphs import FixedGradients, Gradients, Graphs, Twin
from trainkit.training.flat_zero1 import FlatZero1
from trainkit.training.flat_zero3 import FlatZero3
from trainkit.training.loss import IN_CHUNKS
from trainkit.training.model import DTYPES, TASKS, persistent_buffers
from trainkit.training.states import STATES, WEIGHT, Held, Piece, storage_bytes

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


_NOTHING = torch.empty(0)


class Partitioning:
    """Where parameters live from birth: whole on each rank, or partitioned (ZeRO-3). Keep it alive as long as the model.

    transformers builds and loads a model partitioned when an HfDeepSpeedConfig of stage 3 exists and the process group is up.
    """

    def __init__(self, plan: Plan):
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
        self.partitioned = plan.zero_stage == 3
        self._config = HfDeepSpeedConfig(plan.ds_config) if self.partitioned else None

    @contextlib.contextmanager
    def gathered(self, parameter: torch.nn.Parameter) -> Iterator[bool]:
        """One parameter whole, to be written; yields whether this rank writes (under ZeRO-3 rank 0 does and the others receive)."""
        if not hasattr(parameter, "ds_id"):
            yield True
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            yield dist.get_rank() == 0


class Engine:
    """One rank's model, gradients and optimizer."""

    def __init__(self, model: Any, plan: Plan, task: str, device: torch.device, say: Callable[[str], None] = warnings.warn):
        """say: told of what was planned for speed and does not work with this model."""
        self.plan, self.task, self.device = plan, TASKS[task], device
        self.world_size = plan.world_size
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if plan.zero_stage == 3 and plan.compile_blocks and not plan.cuda_graphs:
            for block in repeated_blocks(model):  # one hook and one collective for its parameters, instead of one for each layer in it
                deepspeed.utils.set_z3_leaf_module(block, True)
        self.ds, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=plan.ds_config, dist_init_required=False)
        self.trainable = trainable
        self.loss_kernels, self.sizes = IN_CHUNKS, Sizes()
        if plan.compile_blocks:
            self.loss_kernels = compile_blocks(self.ds.module, say, self.sizes, plan.selective_checkpointing)
        self.called = self.ds  # to run forward
        self.graphs: Graphs | None = None
        self.flat: FlatZero1 | FlatZero3 | None = None
        if plan.cuda_graphs:
            self._prepare_graphs(say)
        self._own_norm: torch.Tensor | None = None
        if self._optimizer_state:  # stages 0 and 3 make the states by a step on zeros, which must not count in the bias correction
            self._count_from(0)
        _check_applied(self.ds, plan)

    @property
    def model(self) -> Any:
        """The model as it was given (with LoRA's wrapper, if any); under ZeRO-3 its parameters are partitioned."""
        return self.ds.module

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        return self.task.logits(self.called, batch)

    def sum_loss(self, batch: MicroBatch) -> torch.Tensor:
        """Sum of the cross-entropies over the labels that count, a scalar in fp32."""
        if self.graphs is not None and torch.is_grad_enabled():
            return self.graphs(batch)
        return self._sum_loss(self.called, batch)

    def warm_up(self, batch: MicroBatch, capture: bool) -> None:
        """Forward and backward of a micro-batch without labels that count, so with gradients of 0, outside of any step: for what is made at
        a shape's first use. capture: as a CUDA graph, too, where the plan has them. All ranks must call it with the same shape."""
        self.backward(self.sum_loss(batch), 1, last=False)
        if self.graphs is not None:
            self.graphs.find_out(batch)
            if capture:
                self.graphs.capture(batch)
            self.graphs.gradients.taken = True  # whatever came of it

    def backward(self, sum_loss: torch.Tensor, label_tokens: int, last: bool) -> None:
        """Backward of one micro-batch. Where DeepSpeed averages over ranks, the sum over N is multiplied by the world size.

        label_tokens: N of the whole optimizer step over all ranks. last: this micro-batch ends the step on this rank.
        """
        averaged = 1 if self.flat is not None else self.world_size
        weighted = sum_loss * (averaged / max(1, label_tokens))
        if self.graphs is None:
            self.ds.set_gradient_accumulation_boundary(last)
            self.ds.backward(weighted, scale_wrt_gas=False)
        else:
            weighted.backward()
            if last:
                self._reduce(self.graphs.gradients)
        if last and self.plan.zero_stage == 0 and self.plan.precision == "fp32":  # DeepSpeed knows no norm here
            gradients = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
            self._own_norm = torch.nn.utils.get_total_norm(gradients)

    def step(self, lr: float) -> tuple[torch.Tensor | float, bool]:
        """The optimizer step at this learning rate. Returns (global gradient norm before clipping, whether it was applied)."""
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        if self.flat is not None:
            return self.flat.step(), True
        self.ds.step()
        norm = self._own_norm if self._own_norm is not None else self.ds.get_global_grad_norm()
        return (float("nan") if norm is None else norm), self.ds.was_step_applied()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off, no graph; training mode comes back afterwards."""
        self.ds.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.ds.train()

    def whole_parameters(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, whole tensor on the CPU in the training precision) of every parameter; the tensor is None on ranks other than 0.

        All ranks must walk through it together. One parameter at a time is whole on the device.
        """
        rank = dist.get_rank()
        self._settle()
        for name, parameter in self.ds.module.named_parameters():
            with self._whole(parameter) as value:
                whole = value.to("cpu", DTYPES[self.plan.precision], copy=True) if rank == 0 else None
            yield name, whole

    def pieces(self) -> Iterator[Piece]:
        """What this rank holds of every trained parameter's states, after a step: in the same order on all ranks, without any talk."""
        stepped = self.counters()["optimizer_steps"] > 0  # fp16 may have skipped all steps so far, and then there are no moments
        for owner, (name, parameter) in enumerate(self._trained()):
            for state in STATES if stepped else (WEIGHT,):
                shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
                if self._holds_all:
                    mine = owner % self.world_size == dist.get_rank()
                    yield Piece(name, state, owner, shape, 0, self._own(parameter, state).flatten() if mine else _NOTHING)
                else:
                    yield Piece(name, state, owner, shape, *_held(parameter, state))

    def frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor on the device) of every parameter that is not trained. All ranks must walk through it together."""
        self._settle()
        for name, parameter in self.ds.module.named_parameters():
            if not parameter.requires_grad:
                with self._whole(parameter) as value:
                    yield name, value

    def counters(self) -> dict[str, float]:
        """What the optimizer and fp16's search for a loss scale have counted: plain numbers, the same on all ranks."""
        found = {"optimizer_steps": float(next((state["step"] for state in self._optimizer_state.values() if "step" in state), 0))}
        return found | {name: float(getattr(self._scaler, name)) for name in self._scaler_counters}

    def restore(self, read: Callable[[str, str], torch.Tensor], counters: dict[str, float], batch: StepBatch) -> None:
        """Take over the states of another engine, whatever its layout. All ranks must call it.

        read(parameter's name, one of STATES) gives a whole fp32 tensor. DeepSpeed makes its states in the first step, so `batch`, any
        step's, is trained first, with a loss of 0 and a learning rate of 0.
        """
        for micro in batch.micro_batches:
            self.backward(self.sum_loss(micro) * 0.0, batch.label_tokens, last=micro is batch.micro_batches[-1])
        self.step(0.0)
        self._settle()
        for name, parameter in self._trained():
            values = {state: read(name, state).to(self.device) for state in (STATES if counters["optimizer_steps"] else (WEIGHT,))}
            for state, value in values.items():
                if self._holds_all:
                    self._own(parameter, state).copy_(value)
                else:
                    _set_whole(parameter, state, value)
            self._write(parameter, values[WEIGHT])
        self._written()
        self._count_from(int(counters["optimizer_steps"]))
        for name in self._scaler_counters & counters.keys():
            setattr(self._scaler, name, type(getattr(self._scaler, name))(counters[name]))

    def restore_frozen(self, read: Callable[[str], torch.Tensor]) -> None:
        """Write the parameters that are not trained, and the persistent buffers, from whole tensors. All ranks must call it."""
        for name, parameter in self.ds.module.named_parameters():
            if not parameter.requires_grad:
                self._write(parameter, read(name))
        self._written()
        for name, buffer in persistent_buffers(self.ds.module).items():
            buffer.copy_(read(name))

    def held(self) -> Held:
        """What of this rank's device stays taken from step to step, once a step was applied."""
        parameters = [getattr(p, "ds_tensor", p).detach() for p in self.ds.module.parameters()] + list(self.ds.module.parameters())
        groups = (p for group in self.ds.basic_optimizer.param_groups for p in group["params"])
        states = (value for state in self._optimizer_state.values() for value in state.values() if torch.is_tensor(value))
        seen: set[int] = set()
        gradients = [] if self.graphs is None else list(self.graphs.gradients.flats)
        if self.plan.zero_stage == 3 and self.graphs is None:
            gradients.append(self.ds.optimizer.grad_partitions_flat_buffer)
        held = (storage_bytes(tensors, seen) for tensors in (parameters, [*groups, *states, *self._fp32_partitions], gradients))
        return Held(*(sizes[self.device.type] for sizes in held))

    def close(self) -> None:
        """Free what DeepSpeed holds, and the graphs."""
        self.close_graphs()
        self.ds.destroy()

    def close_graphs(self) -> None:
        """Before the process group ends, also after an error."""
        if self.graphs is not None:
            self.graphs.close()

    def _prepare_graphs(self, say: Callable[[str], None]) -> None:
        """Gradients in fixed places, beside DeepSpeed's hooks under stages 0 and 1, instead of them under stage 3."""
        optimizer, module, max_norm = self.ds.optimizer, self.ds.module, self.plan.ds_config["gradient_clipping"]
        if self.plan.zero_stage == 3:
            for hook in (self.ds.module_forward_pre_hook, self.ds.module_forward_post_hook):  # they watch who reads which parameter
                hook.remove()
            self.flat = by_blocks = FlatZero3(module, optimizer, max_norm)
            self.called = module
            self.graphs = Graphs(by_blocks, module, lambda *asked: by_blocks.watched(self._sum_loss(*asked)), self.device, say)
            return
        gradients = FixedGradients(module, optimizer.bit16_groups_flat if self.plan.zero_stage == 1 else ())
        self.graphs = Graphs(gradients, Twin(module, gradients.twins), self._sum_loss, self.device, say)
        if self.plan.zero_stage == 1:
            self.flat = FlatZero1(optimizer, gradients.flats, max_norm)

    def _sum_loss(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        kernels = self.loss_kernels if torch.is_grad_enabled() else IN_CHUNKS
        self.sizes.exact = self._shape(batch) in self.plan.compiled_shapes
        loss: torch.Tensor = self.task.sum_loss(self.task.logits(model, batch), batch.labels, kernels)
        return loss

    def _shape(self, batch: MicroBatch) -> tuple[int, int, int]:
        """Rows, source and target, as the plan counts them."""
        rows, source = batch.input_ids.shape
        return rows, source, batch.labels.shape[1] if self.task is TASKS["seq2seq"] else 0

    def _reduce(self, gradients: Gradients) -> None:
        """Over ranks, of gradients that came about outside of DeepSpeed's hooks."""
        gradients.check_in_place()
        if self.flat is not None:
            self.flat.reduce()
        elif isinstance(gradients, FixedGradients):
            gradients.hand_over()
            self.ds.set_gradient_accumulation_boundary(True)
            self.ds.allreduce_gradients()
        gradients.taken = True

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.ds.module.named_parameters() if parameter.requires_grad)

    @property
    def _holds_all(self) -> bool:
        """Whether every rank holds the optimizer's whole state, and DeepSpeed has no verb for it."""
        return self.plan.zero_stage == 0

    @property
    def _optimizer_state(self) -> Any:
        return self.ds.basic_optimizer.state

    @property
    def _fp32_partitions(self) -> list[torch.Tensor]:
        """Weights in fp32 that the optimizer sees in pieces, one at a time: stage 3's."""
        return list(getattr(self.ds.optimizer, "fp32_partitioned_groups_flat", []))

    @property
    def _scaler(self) -> Any:
        """Who keeps fp16's loss scale: it depends on DeepSpeed's optimizer."""
        optimizer = self.ds.optimizer
        return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", optimizer)

    @property
    def _scaler_counters(self) -> set[str]:
        return {name for name in _SCALER if self.plan.precision == "fp16" and hasattr(self._scaler, name)}

    def _own(self, parameter: torch.nn.Parameter, state: str) -> torch.Tensor:
        """A state where this rank holds it whole: beside the fp32 weight, which is the parameter or lies in DeepSpeed's optimizer."""
        weight = parameter if self.plan.precision == "fp32" else self._masters[parameter]
        return weight.detach() if state == WEIGHT else self._optimizer_state[weight][state]

    @functools.cached_property
    def _masters(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The fp32 weight of each parameter of a lower precision, without partitioning."""
        optimizer = self.ds.optimizer
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {parameter: master for own, masters in groups for parameter, master in zip(own, masters, strict=True)}

    def _settle(self) -> None:
        """Stage 3 may have fetched ahead, and what is on its way can be neither read nor let go."""
        if not isinstance(self.flat, FlatZero3):
            self.ds.empty_partition_cache()

    @contextlib.contextmanager
    def _whole(self, parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
        """A parameter, of which each rank may hold a shard, on the device. All ranks must call it."""
        if isinstance(self.flat, FlatZero3):
            yield self.flat.whole(parameter)
            return
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            yield parameter.detach()

    def _write(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """The parameter that forward and backward see, in its own precision; `_written` ends it. All ranks must call both."""
        if isinstance(self.flat, FlatZero3):
            self.flat.write(parameter, value)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")), torch.no_grad():
            if not hasattr(parameter, "ds_id") or dist.get_rank() == 0:
                parameter.copy_(value)

    def _written(self) -> None:
        if isinstance(self.flat, FlatZero3):
            self.flat.gather_rest()

    def _count_from(self, steps: int) -> None:
        """Set AdamW's count of steps, from which it corrects its moments' bias."""
        for state in self._optimizer_state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], steps) if torch.is_tensor(state["step"]) else steps
        if self.plan.offload_optimizer:
            _replay_cpu_adam(self.ds.basic_optimizer, steps)


def _held(parameter: torch.nn.Parameter, state: str) -> tuple[int, torch.Tensor]:
    """(first element, elements) of the flattened parameter's state that this rank holds."""
    if hasattr(parameter, "ds_id"):
        begin, end = _span(parameter)
        if state == WEIGHT:
            return begin, deepspeed.utils.safe_get_local_fp32_param(parameter)[: end - begin]
        return begin, deepspeed.utils.safe_get_local_optimizer_state(parameter, state)[: end - begin]
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # given by DeepSpeed: which part of its flat partition is the parameter's
    if mapping is None:
        return 0, _NOTHING
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(None if state == WEIGHT else state).detach()


def _span(parameter: torch.nn.Parameter) -> tuple[int, int]:
    """The elements of the flattened parameter that this rank holds under ZeRO-3; the last ranks' pieces are padded beyond it."""
    length, numel = parameter.partition_numel(), parameter.ds_numel  # type: ignore[attr-defined]  # given by DeepSpeed
    begin = min(dist.get_rank() * length, numel)
    return begin, min(begin + length, numel)


def _set_whole(parameter: torch.nn.Parameter, state: str, value: torch.Tensor) -> None:
    """The counterpart of _held. Under ZeRO-3 this rank's piece is cut here: DeepSpeed's own way fails where the last piece is padded."""
    if hasattr(parameter, "ds_id"):
        begin, end = _span(parameter)
        padding = parameter.partition_numel() - (end - begin)  # type: ignore[attr-defined]  # given by DeepSpeed
        piece = torch.nn.functional.pad(value.flatten()[begin:end], (0, padding))
        if state == WEIGHT:
            deepspeed.utils.safe_set_local_fp32_param(parameter, piece)
        else:
            deepspeed.utils.safe_set_local_optimizer_state(parameter, piece, state)
    elif state == WEIGHT:
        deepspeed.utils.safe_set_full_fp32_param(parameter, value)
    else:
        deepspeed.utils.safe_set_full_optimizer_state(parameter, value, state)


def _replay_cpu_adam(optimizer: Any, steps: int) -> None:
    """CPUAdam keeps beta^t in fp32, multiplied step by step; a jump computes it anew, and its last bits differ. So the steps are repeated,
    on a tensor that nobody needs."""
    group = optimizer.param_groups[0]
    nothing = [torch.zeros(16) for _ in range(4)]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"], *nothing
        )


def _check_applied(ds: Any, plan: Plan) -> None:
    """Raises PlanMismatch naming the first thing that the built engine does otherwise than planned."""
    precision = "bf16" if ds.bfloat16_enabled() else "fp16" if ds.fp16_enabled() else "fp32"
    offload = ds._config.zero_config.offload_optimizer, ds._config.zero_config.offload_param
    on_cpu = [part is not None and str(getattr(part.device, "value", part.device)) == "cpu" for part in offload]
    keys, group = plan.ds_config["optimizer"]["params"], ds.optimizer.param_groups[0]
    widths = {str(parameter.dtype) for parameter in ds.module.parameters()}
    applied = {
        "ZeRO stage": (plan.zero_stage, int(ds.zero_optimization_stage())),
        "precision": (plan.precision, precision),
        "gradient clipping": (float(plan.ds_config["gradient_clipping"]), float(ds.gradient_clipping())),
        "optimizer offload": (plan.offload_optimizer, on_cpu[0]),
        "parameter offload": (plan.offload_param, on_cpu[1]),
        "world size": (plan.world_size, dist.get_world_size()),
        "gradient accumulation in DeepSpeed": (1, ds.gradient_accumulation_steps()),
        "optimizer": ("DeepSpeedCPUAdam" if plan.offload_optimizer else "AdamW", type(ds.basic_optimizer).__name__),
        **{key: (_plain(keys[key]), _plain(group[key])) for key in ("betas", "eps", "weight_decay")},
        "type of the parameters": ({str(DTYPES[plan.precision])}, widths),
    }
    for what, (planned, got) in applied.items():
        if planned != got:
            raise PlanMismatch(
                f"{what}: the plan says {planned}, the built DeepSpeed engine applies {got}", what=what, planned=planned, applied=got
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
