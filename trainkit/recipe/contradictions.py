"""Literals of a ZeRO configuration that the recipe owns: each must be the recipe's own value.

The messages show the line to write in the recipe, because the recipe is where the value belongs; `"auto"` in the JSON is the other way out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainkit.errors import Fault
from trainkit.recipe.document import Place, shown
from trainkit.recipe.schema import Recipe

if TYPE_CHECKING:
    from trainkit.recipe.zero import ZeroConfig

_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_UNKNOWN: Any = object()


def contradictions(zero: ZeroConfig, recipe: Recipe) -> list[Fault]:
    """Literals that differ from what the recipe says, each with the recipe line to write."""

    def value(key: str) -> Any:
        found: Any = recipe
        for part in key.split("."):
            found = getattr(found, part)
        return found

    return contradictions_with(zero, value)


class _Literals:
    """The literals of a configuration, beside the recipe's values."""

    def __init__(self, zero: ZeroConfig, value: Callable[[str], Any]):
        self.zero, self.recipe_value = zero, value
        self.faults: list[Fault] = []

    def get(self, *path: str) -> Any:
        """The literal, or None where the key is absent, null or "auto"."""
        found: Any = self.zero.json
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return None if found == "auto" else found

    def recipe(self, key: str) -> Any:
        """The recipe's value; _UNKNOWN where the recipe itself is wrong there, so that nothing is compared with it."""
        found = self.recipe_value(key)
        return found if found is None or isinstance(found, str | int | float | list) else _UNKNOWN

    def add(self, path: tuple[str, ...], message: str) -> None:
        known = [self.zero.places[path[:length]] for length in range(len(path), -1, -1) if path[:length] in self.zero.places]
        place = known[0] if known else Place(self.zero.name)
        prefix = self.zero.places.get(("",), Place("")).file
        self.faults.append(Fault(place.file, place.line, ".".join([*([prefix] if prefix else []), *path]), message))

    def same(self, path: tuple[str, ...], key: str, wanted: Any = None) -> None:
        """The literal at `path`, or `wanted` made of it, must be the recipe's value of `key`."""
        literal = self.get(*path)
        if literal is None:
            return
        wanted, found = literal if wanted is None else wanted, self.recipe(key)
        if found is not _UNKNOWN and not _equal(wanted, found):
            said = f"whose {key} is {shown(found)}" if found is not None else f"which has no {key}"
            self.add(path, f'{shown(literal)} contradicts the recipe, {said}: write {key}: {_yaml(wanted)} there, or "auto" here')


def contradictions_with(zero: ZeroConfig, value: Callable[[str], Any]) -> list[Fault]:
    """As `contradictions`, for a recipe that may be wrong elsewhere: `value` gives a key's value, or any other object where it is wrong."""
    literals = _Literals(zero, value)
    _batch(literals)
    literals.same(("gradient_clipping",), "optimizer.max_grad_norm")
    _precision(literals)
    _optimizer(literals)
    _scheduler(literals)
    return literals.faults


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is not bool and one == other


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _batch(literals: _Literals) -> None:
    samples, workers, rows = (literals.recipe(key) for key in ("batch.samples", "scaling.num_workers", "batch.samples_per_device"))
    literals.same(("train_batch_size",), "batch.samples")
    literals.same(("train_micro_batch_size_per_gpu",), "batch.samples_per_device")
    accumulation = literals.get("gradient_accumulation_steps")
    if accumulation is None or not isinstance(samples, int) or not isinstance(workers, int) or rows is _UNKNOWN:
        return
    micro = literals.get("train_micro_batch_size_per_gpu") or rows
    path = ("gradient_accumulation_steps",)
    if micro is None and accumulation == 1:  # DeepSpeed's own default: how often gradients accumulate follows from the token budget
        return
    if micro is None and samples % (accumulation * workers) == 0:
        wanted = int(samples // (accumulation * workers))
        said = f"the recipe has no batch.samples_per_device: write batch.samples_per_device: {wanted} there"
        literals.add(path, f'{shown(accumulation)} is not what the recipe says, {said}, or "auto" here')
    elif micro is None:
        literals.add(path, f'{samples} samples do not divide into {shown(accumulation)} × {workers} workers: write "auto" here')
    elif accumulation != -(-samples // (micro * workers)):
        made = f"{shown(accumulation)} accumulation × {shown(micro)} rows × {workers} workers"
        write = f"write batch.samples: {int(accumulation * micro * workers)} there ({made})"
        literals.add(path, f'contradicts the recipe, whose batch.samples is {samples}: {write}, or "auto" here')


def _precision(literals: _Literals) -> None:
    precision = literals.recipe("model.precision")
    for name, other in (("bf16", "fp16"), ("fp16", "bf16")):
        enabled = literals.get(name, "enabled")
        if enabled is True:
            literals.same((name, "enabled"), "model.precision", name)
        elif enabled is False and precision == name:
            instead = other if literals.get(other, "enabled") is True else "fp32"
            literals.same((name, "enabled"), "model.precision", instead)
    literals.same(("data_types", "param_dtype"), "model.precision")
    summed = literals.get("data_types", "grad_accum_dtype")
    if summed is not None and literals.zero.stage == 0 and isinstance(precision, str) and summed != precision:
        literals.add(
            ("data_types", "grad_accum_dtype"), f'stage 0 adds gradients up in {precision}: write zero_optimization.stage 1, or "auto" here'
        )


def _optimizer(literals: _Literals) -> None:
    kind = literals.get("optimizer", "type")
    if kind is not None and str(kind).lower() not in ("adam", "adamw"):
        literals.add(
            ("optimizer", "type"), f'{shown(kind)} contradicts the recipe, whose optimizer.name is adamw: write "AdamW" or "auto" here'
        )
    if literals.get("optimizer", "params", "adam_w_mode") is False:
        literals.add(
            ("optimizer", "params", "adam_w_mode"),
            "false is Adam with L2 in the gradient; the recipe's optimizer.name is adamw: delete the key",
        )
    for unlike, default in (("bias_correction", True), ("amsgrad", False), ("fp32_optimizer_states", True)):
        if literals.get("optimizer", "params", unlike) is (not default):
            literals.add(("optimizer", "params", unlike), f"{shown(not default)} is not the recipe's adamw: delete the key")
    if literals.get("optimizer", "params", "torch_adam") is literals.zero.offload_optimizer:
        made = "DeepSpeed's CPUAdam, as the optimizer's states lie on the CPU" if literals.zero.offload_optimizer else "torch's own"
        literals.add(("optimizer", "params", "torch_adam"), f"the recipe's adamw is {made}: delete the key")
    if literals.get("zero_optimization", "compute_grad_norm") is False:
        literals.add(("zero_optimization", "compute_grad_norm"), "a run clips by the norm and ends at a NaN: delete the key")
    for name in ("lr", "betas", "eps", "weight_decay"):
        literals.same(("optimizer", "params", name), f"optimizer.{name}")
    literals.same(("optimizer", "params", "max_grad_norm"), "optimizer.max_grad_norm")


def _scheduler(literals: _Literals) -> None:
    kind = literals.get("scheduler", "type")
    if kind in _SCHEDULES:
        literals.same(("scheduler", "type"), "optimizer.lr_scheduler_type", _SCHEDULES[kind])
    elif kind is not None:
        literals.add(
            ("scheduler", "type"), f'{shown(kind)} is not available: write {", ".join(_SCHEDULES)} (constant, linear, cosine) or "auto"'
        )
    literals.same(("scheduler", "params", "warmup_max_lr"), "optimizer.lr")
    warmup, most = literals.recipe("optimizer.warmup_steps"), literals.recipe("train.max_steps")
    share = isinstance(warmup, float) and isinstance(most, int)
    if not (share and literals.get("scheduler", "params", "warmup_num_steps") == round(warmup * most)):
        literals.same(("scheduler", "params", "warmup_num_steps"), "optimizer.warmup_steps")
    literals.same(("scheduler", "params", "total_num_steps"), "train.max_steps")
    for name in ("warmup_min_lr", "warmup_min_ratio", "cos_min_ratio"):
        if literals.get("scheduler", "params", name):
            literals.add(("scheduler", "params", name), 'the recipe\'s schedules start and end at 0: write 0 or "auto" here')
    if literals.get("scheduler", "params", "warmup_type") not in (None, "linear"):
        literals.add(("scheduler", "params", "warmup_type"), 'the recipe\'s warm-up is linear: write "linear" or "auto" here')
