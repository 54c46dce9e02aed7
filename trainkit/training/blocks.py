"""A model's repeated blocks: compiled once for all of them, and gathered whole under ZeRO-3. With them the loss.

Compiling one block takes seconds, a whole model minutes; and the blocks are where the time goes, beside the passes over the logits. Sizes
are dynamic, one compilation serves all shapes of micro-batches, unless there are so few of them that each can have its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config

from trainkit.errors import PlanMismatch
from trainkit.training.loss import IN_CHUNKS, Kernels, log_sums_and_losses, write_gradient

Function = Callable[..., Any]
BACKEND = "inductor"
_MOST_TOLD = 300  # letters of a compiler's message
KEPT_FOR_SPEED = (  # torch's rules of what is kept though it could be computed again from the rest, which random numbers cannot
    "ban_recompute_used_far_apart",
    "ban_recompute_long_fusible_chains",
    "ban_recompute_materialized_backward",
)
RECOMPILES = 64  # first and other layers, encoder and decoder, one row or several; torch's own limit is 8


def repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The children of every outermost list of at least two modules of one class, but of a list of lists those of its lists."""
    kinds = {type(child) for child in model} if isinstance(model, torch.nn.ModuleList) and len(model) > 1 else set()
    if len(kinds) == 1 and torch.nn.ModuleList not in kinds:
        return list(model.children())
    return [block for child in model.children() for block in repeated_blocks(child)]


def parameters_of_blocks(model: torch.nn.Module) -> list[tuple[torch.nn.Module, list[torch.nn.Parameter]]]:
    """Each repeated block with the parameters that are in it and nowhere else."""
    everywhere = _counted(model)
    return [
        (block, [parameter for parameter, count in _counted(block).items() if count == everywhere[parameter]])
        for block in repeated_blocks(model)
    ]


def _counted(module: torch.nn.Module) -> Counter[torch.nn.Parameter]:
    return Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))


@dataclass
class Sizes:
    """What the micro-batch at work is compiled for: its sizes as they are, or any."""

    exact: bool = False


def compile_blocks(model: torch.nn.Module, say: Callable[[str], None], sizes: Sizes, selective: bool = False) -> Kernels:
    """Compile the forward of each repeated block and the loss, at their first use; returns the loss's kernels.

    sizes: looked at in every forward. selective: nothing is kept for backward that takes no multiplication of matrices to compute again.

    Only `forward`: hooks around a block, such as those of ZeRO-3, stay outside. Without gradients, in evaluation and generation, whose
    shapes never end, a block runs as it is; so does one that does not compile, and `say` is told so once.

    Raises PlanMismatch for a model without repeated blocks, if it was to be selective.
    """
    if selective and not repeated_blocks(model):
        raise PlanMismatch("model.gradient_checkpointing: selective needs repeated blocks, and this model has none. Write true or false")
    torch._functorch.config.force_non_lazy_backward_lowering = True  # what does not compile shows in the forward, where there is a way back
    for name in KEPT_FOR_SPEED:
        setattr(torch._functorch.config, name, not selective)
    torch._dynamo.config.recompile_limit = max(RECOMPILES, torch._dynamo.config.recompile_limit)
    without = "slower and keeps more for backward" if selective else "only slower"
    blocks = _Fallback(f"the model's blocks, without which training is {without}", say, sizes)
    loss = _Fallback("the loss, without which training is only slower", say, sizes)
    for block in repeated_blocks(model):
        block.forward = blocks.guarded(block.forward, block.forward, when=torch.is_grad_enabled)
    return Kernels(loss.guarded(log_sums_and_losses, IN_CHUNKS.forward), loss.guarded(write_gradient, IN_CHUNKS.backward))


class _Fallback:
    """One for all functions of a kind: what one of them cannot, none can."""

    def __init__(self, what: str, say: Callable[[str], None], sizes: Sizes):
        self.what, self.say, self.sizes, self.failed = what, say, sizes, False

    def guarded(self, function: Function, otherwise: Function, when: Callable[[], bool] = lambda: True) -> Function:
        for_any, for_these = (torch.compile(function, dynamic=dynamic, backend=BACKEND) for dynamic in (True, False))

        def compiled_function(*args: Any, **kwargs: Any) -> Any:
            if self.failed or not when():
                return otherwise(*args, **kwargs)
            try:
                return for_these(*args, **kwargs) if self.sizes.exact else for_any(*args, **kwargs)
            except Exception as error:  # of whichever part of the compiler
                if not _is_compilers(error):
                    raise
                result = otherwise(*args, **kwargs)  # a fault of the model's own shows here, as what it is
                self.failed = True
                reason = " ".join(str(error).split())[:_MOST_TOLD]
                self.say(f"the compiler fails here on {self.what}: {reason}")
                return result

        return compiled_function


def _is_compilers(error: Exception) -> bool:
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor", "triton")) for kind in type(error).__mro__)
