"""A model's repeated blocks: compiled once for all of them, and gathered whole under ZeRO-3. With them the loss.

Compiling one block takes seconds, a whole model minutes; and the blocks are where the time goes, beside the passes over the logits. Sizes
are dynamic, one compilation serves all shapes of micro-batches, unless there are so few of them that each can have its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config

from trainkit.training.loss import IN_CHUNKS, Kernels, log_sums_and_losses, write_gradient

Function = Callable[..., Any]
BACKEND = "inductor"
_MOST_TOLD = 300  # letters of a compiler's message
ALL_BUT_MATRICES = 0.99  # of what is kept for speed alone: the first that goes is what costs no multiplication of matrices
RECOMPILES = 64  # first and other layers, encoder and decoder, one row or several; torch's own limit is 8


def repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The children of every outermost list of at least two modules of one class."""
    if isinstance(model, torch.nn.ModuleList) and len(model) > 1 and len({type(child) for child in model}) == 1:
        return list(model)
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


def compile_blocks(model: torch.nn.Module, say: Callable[[str], None], exact: bool = False, selective: bool = False) -> Kernels:
    """Compile the forward of each repeated block and the loss, at their first use; returns the loss's kernels.

    exact: anew for each shape, as long as `let_compile` allows it. selective: backward has little kept for it but what matrices are
    multiplied with, and what cannot be computed again from that at little cost.

    Only `forward`: hooks around a block, such as those of ZeRO-3, stay outside. Without gradients, in evaluation and generation, whose
    shapes never end, a block runs as it is; so does one that does not compile, and `say` is told so once.
    """
    torch._functorch.config.force_non_lazy_backward_lowering = True  # what does not compile shows in the forward, where there is a way back
    torch._functorch.config.activation_memory_budget = ALL_BUT_MATRICES if selective else 1.0
    torch._dynamo.config.recompile_limit = max(RECOMPILES, torch._dynamo.config.recompile_limit)
    blocks, loss = _Fallback("the model's blocks", say, exact), _Fallback("the loss", say, exact)
    for block in repeated_blocks(model):
        block.forward = blocks.guarded(block.forward, block.forward, when=torch.is_grad_enabled)
    return Kernels(loss.guarded(log_sums_and_losses, IN_CHUNKS.forward), loss.guarded(write_gradient, IN_CHUNKS.backward))


def let_compile(allowed: bool) -> None:
    """Whether this process may still compile. What has been compiled stays in use; other shapes run as they are, and no step waits."""
    torch.compiler.set_stance("default" if allowed else "eager_on_recompile")


class _Fallback:
    """One for all functions of a kind: what one of them cannot, none can."""

    def __init__(self, what: str, say: Callable[[str], None], exact: bool):
        self.what, self.say, self.exact, self.failed = what, say, exact, False

    def guarded(self, function: Function, otherwise: Function, when: Callable[[], bool] = lambda: True) -> Function:
        compiled = torch.compile(function, dynamic=not self.exact, backend=BACKEND)

        def compiled_function(*args: Any, **kwargs: Any) -> Any:
            if self.failed or not when():
                return otherwise(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except Exception as error:  # of whichever part of the compiler
                if not _is_compilers(error):
                    raise
                result = otherwise(*args, **kwargs)  # a fault of the model's own shows here, as what it is
                self.failed = True
                reason = " ".join(str(error).split())[:_MOST_TOLD]
                self.say(f"the compiler fails here on {self.what}, without which training is only slower: {reason}")
                return result

        return compiled_function


def _is_compilers(error: Exception) -> bool:
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor", "triton")) for kind in type(error).__mro__)
