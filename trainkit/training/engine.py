"""DeepSpeed, behind the few verbs that the loop needs; engine_states.py, by_blocks.py and flat_zero*.py belong to it.

The plan owns the batch arithmetic: DeepSpeed gets placeholder batch sizes and never scales a loss; the loop says which micro-batch ends
an optimizer step. After building, the engine is asked back what it applies; anything else than the plan is an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from trainkit.data.padding import MicroBatch, StepBatch
from trainkit.errors import PlanMismatch
from trainkit.planning.plan import Plan
from trainkit.training.blocks import Sizes, compile_blocks, repeated_blocks
from trainkit.training.cuda_graphs import FixedGradients, Graphs, Twin
from trainkit.training.engine_states import EngineStates, Parameters
from trainkit.training.flat_zero0 import FlatZero0
from trainkit.training.flat_zero1 import FlatZero1
from trainkit.training.flat_zero2 import FlatZero2
from trainkit.training.flat_zero3 import FlatZero3
from trainkit.training.loss import IN_CHUNKS
from trainkit.training.model import DTYPES
from trainkit.training.states import Held, storage_bytes
from trainkit.training.tasks import TASKS

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


class Partitioning:
    """Where parameters live from birth: whole on each rank, or partitioned (ZeRO-3). Keep it alive as long as the model.

    transformers builds and loads a model partitioned when an HfDeepSpeedConfig of stage 3 exists and the process group is up.
    """

    def __init__(self, plan: Plan):
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
        self.partitioned = plan.zero_stage == 3
        self._config = HfDeepSpeedConfig(plan.ds_config) if self.partitioned else None

    @staticmethod
    @contextlib.contextmanager
    def gathered(parameter: torch.nn.Parameter) -> Iterator[bool]:
        """One parameter whole, to be written; yields whether this rank writes (under ZeRO-3 rank 0 does and the others receive)."""
        if not hasattr(parameter, "ds_id"):
            yield True
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            yield dist.get_rank() == 0


class DeepSpeedParameters:
    """The model's parameters where DeepSpeed keeps them whole, or gathers and partitions them."""

    def __init__(self, ds: Any):
        self.ds = ds

    def settle(self) -> None:
        """Stage 3 may have prefetched, and what is on its way can be neither read nor released."""
        self.ds.empty_partition_cache()

    @contextlib.contextmanager
    def whole(self, parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            yield parameter.detach()

    def write(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        with Partitioning.gathered(parameter) as writes, torch.no_grad():
            if writes:
                parameter.copy_(value)

    def written(self) -> None:
        """Nothing is left to do: each write has partitioned the parameter again."""


class Engine:
    """One rank's model, gradients and optimizer."""

    def __init__(self, model: Any, plan: Plan, task: str, device: torch.device, say: Callable[[str], None] = warnings.warn):
        """say: told of what was planned for speed and does not work with this model."""
        self.plan, self.task, self.device = plan, TASKS[task], device
        self.world_size = plan.world_size
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if plan.zero_stage == 3 and plan.compile_blocks and not plan.flat:
            for block in repeated_blocks(model):  # one hook and one collective for its parameters, instead of one for each layer in it
                deepspeed.utils.set_z3_leaf_module(block, True)
        _import_muon()
        self.ds, *_ = deepspeed.initialize(
            model=model, model_parameters=trainable, config=_without_learning_rate(plan.ds_config), dist_init_required=False
        )
        self.trainable = trainable
        self.loss_kernels, self.sizes = IN_CHUNKS, Sizes()
        if plan.compile_blocks:
            self.loss_kernels = compile_blocks(self.ds.module, say, self.sizes, plan.selective_checkpointing)
        self.called = self.ds  # to run forward
        self.graphs: Graphs | None = None
        self.flat: FlatZero0 | FlatZero1 | FlatZero2 | FlatZero3 | None = None
        self.parameters: Parameters = DeepSpeedParameters(self.ds)
        if plan.flat:
            self._make_flat(say)
        self._own_norm: torch.Tensor | None = None
        self.states = EngineStates(self.ds, plan, self.parameters, device)
        self.states.count_from(0)  # stages 0 and 3 make the states by a step on zeros, which must not count in the bias correction
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
        if self.graphs is None or self.flat is None:
            self.ds.set_gradient_accumulation_boundary(last)
            self.ds.backward(weighted, scale_wrt_gas=False)
        else:
            weighted.backward()
            if last:
                self.graphs.gradients.check_in_place()
                self.flat.reduce()
                self.graphs.gradients.taken = True
        if last and self.flat is None and self.plan.zero_stage == 0 and self.plan.precision == "fp32":  # DeepSpeed knows no norm here
            gradients = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
            self._own_norm = torch.nn.utils.get_total_norm(gradients)

    def step(self, lr: float) -> tuple[torch.Tensor | float, bool]:
        """The optimizer step at this learning rate. Returns (global gradient norm before clipping, whether it was applied).

        A step that fp16's search for a loss scale skips has an infinite norm. Raises PlanMismatch when the norm is missing: DeepSpeed
        computes none under stages 1 and 2 with `compute_grad_norm: false`.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        if self.flat is not None:
            return self.flat.step(), True
        self.ds.step()
        norm = self._own_norm if self._own_norm is not None else self.ds.get_global_grad_norm()
        if norm is None:
            raise PlanMismatch(
                "gradient norm: every step reports it, and DeepSpeed computes none. Take compute_grad_norm out of the ZeRO configuration",
                what="gradient norm", planned="computed", applied="not computed",
            )  # fmt: skip
        return norm, self.ds.was_step_applied()

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
        self.parameters.settle()
        for name, parameter in self.ds.module.named_parameters():
            with self.parameters.whole(parameter) as value:
                whole = value.to("cpu", DTYPES[self.plan.precision], copy=True) if rank == 0 else None
            yield name, whole

    def restore(self, read: Callable[[str, str], torch.Tensor], counters: dict[str, float], batch: StepBatch) -> None:
        """Take over the states of another engine, whatever its layout, as EngineStates.restore does. All ranks must call it.

        DeepSpeed makes its states in the first step, so `batch`, any step's, is trained first, with a loss of 0 and a learning rate of 0.
        """
        for micro in batch.micro_batches:
            self.backward(self.sum_loss(micro) * 0.0, batch.label_tokens, last=micro is batch.micro_batches[-1])
        self.step(0.0)
        self.states.restore(read, counters)

    def held(self) -> Held:
        """What of this rank's device stays taken from step to step, once a step was applied."""
        parameters = [getattr(p, "ds_tensor", p).detach() for p in self.ds.module.parameters()] + list(self.ds.module.parameters())
        groups = (p for group in self.ds.basic_optimizer.param_groups for p in group["params"])
        states = (value for state in self.ds.basic_optimizer.state.values() for value in state.values() if torch.is_tensor(value))
        partitions = getattr(self.ds.optimizer, "fp32_partitioned_groups_flat", ())  # stage 3's, which the optimizer sees one at a time
        seen: set[int] = set()
        gradients = [] if self.graphs is None else list(self.graphs.gradients.flats)
        if self.plan.zero_stage == 3 and self.graphs is None:
            gradients.append(self.ds.optimizer.grad_partitions_flat_buffer)
        held = (storage_bytes(tensors, seen) for tensors in (parameters, [*groups, *states, *partitions], gradients))
        found = Held(*(sizes[self.device.type] for sizes in held))
        return found if self.graphs is None else replace(found, activations=self.graphs.activation_bytes)

    def free_bytes(self) -> int:
        """Of the GPU, for tensors beside the engine: what nobody holds, and what torch's allocator keeps, if no graph runs in that."""
        free, _ = torch.cuda.mem_get_info(self.device)
        if self.graphs is not None and self.graphs.made:
            return free
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def close(self) -> None:
        """Free what DeepSpeed holds, and the graphs."""
        self.close_graphs()
        self.ds.destroy()

    def close_graphs(self) -> None:
        """Before the process group ends, also after an error."""
        if self.graphs is not None:
            self.graphs.close()

    def _make_flat(self, say: Callable[[str], None]) -> None:
        """Gradients in fixed places, beside DeepSpeed's hooks, or under stage 3 instead of them; and CUDA graphs, if they are planned."""
        optimizer, module, max_norm = self.ds.optimizer, self.ds.module, self.plan.ds_config["gradient_clipping"]
        graphs = functools.partial(Graphs, device=self.device, say=say, captures=self.plan.cuda_graphs)
        if self.plan.zero_stage >= 2:
            by_blocks: FlatZero2 | FlatZero3
            if self.plan.zero_stage == 2:
                by_blocks = FlatZero2(module, optimizer, max_norm)
            else:
                for hook in (self.ds.module_forward_pre_hook, self.ds.module_forward_post_hook):  # they watch who reads which parameter
                    hook.remove()
                by_blocks = self.parameters = FlatZero3(module, optimizer, max_norm)
                self.called = module
            self.flat = by_blocks
            self.graphs = graphs(by_blocks, by_blocks.called, lambda *asked: by_blocks.watched(self._sum_loss(*asked)))
            return
        twin = Twin(module)
        gradients = FixedGradients(twin, optimizer.bit16_groups_flat if self.plan.zero_stage == 1 else ())
        self.graphs = graphs(gradients, twin, self._sum_loss)
        if self.plan.zero_stage == 1:
            self.flat = FlatZero1(optimizer, gradients.flats, max_norm)
        else:
            self.flat = FlatZero0(optimizer, gradients, max_norm)

    def _sum_loss(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        kernels = self.loss_kernels if torch.is_grad_enabled() else IN_CHUNKS
        self.sizes.exact = self._shape(batch) in self.plan.compiled_shapes
        loss: torch.Tensor = self.task.sum_loss(self.task.logits(model, batch), batch.labels, kernels)
        return loss

    def _shape(self, batch: MicroBatch) -> tuple[int, int, int]:
        """Rows, source and target, as the plan counts them."""
        rows, source = batch.input_ids.shape
        return rows, source, batch.labels.shape[1] if self.task is TASKS["seq2seq"] else 0


def _import_muon() -> None:
    """As initialize does, to ask whether the optimizer is DeepSpeed's Muon: its module is decorated with torch.compile, which loads the
    whole compiler, in seconds, for functions that nobody calls here.
    """
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        del os.environ[_NO_COMPILER]
        if before is not None:
            os.environ[_NO_COMPILER] = before


def _without_learning_rate(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Each step brings its own. Stage 0 makes the states by a step on zeros, in which the weights would decay."""
    optimizer = ds_config["optimizer"]
    return ds_config | {"optimizer": optimizer | {"params": optimizer["params"] | {"lr": 0.0}}}


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
