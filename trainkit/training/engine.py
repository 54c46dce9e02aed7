"""DeepSpeed, behind the few verbs that the loop needs. The only room that knows it.

The plan owns the batch arithmetic: DeepSpeed gets placeholder batch sizes and never scales a loss; the loop says which micro-batch ends
an optimizer step. After building, the engine is asked back what it applies; anything else than the plan is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from trainkit.data.feed import MicroBatch
from trainkit.errors import PlanMismatch
from trainkit.planning.planner import Plan
from trainkit.training.model import DTYPES, TASKS


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

    def __init__(self, model: Any, plan: Plan, task: str, device: torch.device):
        self.plan, self.task, self.device = plan, TASKS[task], device
        self.world_size = plan.world_size
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.ds, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=plan.ds_config, dist_init_required=False)
        self.trainable = trainable
        self._own_norm: torch.Tensor | None = None
        _check_applied(self.ds, plan)

    @property
    def model(self) -> Any:
        """The model as it was given (with LoRA's wrapper, if any); under ZeRO-3 its parameters are partitioned."""
        return self.ds.module

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        return self.task.logits(self.ds, batch)

    def sum_loss(self, batch: MicroBatch) -> torch.Tensor:
        """Sum of the cross-entropies over the labels that count, a scalar in fp32."""
        return self.task.sum_loss(self.logits(batch), batch.labels)

    def backward(self, sum_loss: torch.Tensor, label_tokens: int, last: bool) -> None:
        """Backward of one micro-batch: DeepSpeed averages over ranks, so the sum over N is multiplied by the world size.

        label_tokens: N of the whole optimizer step over all ranks. last: this micro-batch ends the step on this rank.
        """
        self.ds.set_gradient_accumulation_boundary(last)
        self.ds.backward(sum_loss * (self.world_size / max(1, label_tokens)), scale_wrt_gas=False)
        if last and self.plan.zero_stage == 0 and self.plan.precision == "fp32":  # DeepSpeed knows no norm here
            gradients = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
            self._own_norm = torch.nn.utils.get_total_norm(gradients)

    def step(self, lr: float) -> tuple[torch.Tensor | float, bool]:
        """The optimizer step at this learning rate. Returns (global gradient norm before clipping, whether it was applied)."""
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
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
        self.ds.empty_partition_cache()  # stage 3 may have fetched ahead; what is on its way can be neither read nor let go
        for name, parameter in self.ds.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                whole = parameter.detach().to("cpu", DTYPES[self.plan.precision], copy=True) if rank == 0 else None
            yield name, whole

    def close(self) -> None:
        """Free what DeepSpeed holds."""
        self.ds.destroy()


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
