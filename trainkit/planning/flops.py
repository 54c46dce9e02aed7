"""Model FLOPs of a training step, and what the device could do: together the MFU (model FLOPs utilization).

The count follows PaLM (Chowdhery et al. 2022, appendix B), applied to each stream of tokens by itself: a weight that multiplies a token
costs 2 FLOPs forward, 2 for the gradient of its input and, if it is trained, 2 for its own gradient; so 6 per trained and 4 per frozen
parameter and token. Attention costs 4 FLOPs per layer, query, key and unit of width forward, three times that with the backward; causal
masks are not taken off, as there. Lookups, norms and the loss count nothing. Tokens are real ones: padding is work, but of no use.
Recomputed activations (gradient checkpointing) are not counted either.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from trainkit.planning.facts import ModelFacts

_TERA = 1e12
# Dense bf16 with fp32 accumulation, without sparsity and at boost clocks, from NVIDIA's data sheets. The first that stands in the name as
# a word counts.
_PEAK_TFLOPS = (
    ("B300", 2250.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("H800 PCIe", 756.0),
    ("H800", 989.4),
    ("A100", 311.9),
    ("A800", 311.9),
    ("L40S", 362.1),
    ("L40", 181.1),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("RTX A6000", 154.8),
    ("RTX 6000 Ada", 364.2),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


_OTHER_CHIPS = re.compile(r"\b(MIG|Laptop|Max-Q|Ti|SUPER|D)\b")  # parts of a GPU, and chips that share a name


@dataclass(frozen=True)
class Work:
    """Real tokens of some rows, and what attention sees of them: sums over the rows of products of their lengths.

    Models with one stream (causal, classification) have source tokens only.
    """

    source_tokens: int = 0
    target_tokens: int = 0
    source_pairs: int = 0
    target_pairs: int = 0
    cross_pairs: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.source_tokens + other.source_tokens,
            self.target_tokens + other.target_tokens,
            self.source_pairs + other.source_pairs,
            self.target_pairs + other.target_pairs,
            self.cross_pairs + other.cross_pairs,
        )

    @property
    def tokens(self) -> int:
        return self.source_tokens + self.target_tokens


def works(source: np.ndarray, target: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The fields of Work for groups of rows that follow each other, int64 [groups, 5].

    source, target: lengths in tokens, int64, one per row. counts: rows of each group.
    """
    of_rows = np.stack([source, target, source * source, target * target, source * target], axis=1)
    before = np.concatenate([np.zeros((1, 5), np.int64), np.cumsum(of_rows, axis=0)])
    ends = np.cumsum(counts)
    sums: np.ndarray = before[ends] - before[ends - counts]
    return sums


@dataclass(frozen=True)
class TrainingFlops:
    """Model FLOPs of forward and backward, for each unit of work."""

    per_source_token: int
    per_target_token: int
    per_source_pair: int
    per_target_pair: int
    per_cross_pair: int

    def of(self, work: Work) -> int:
        return (
            self.per_source_token * work.source_tokens
            + self.per_target_token * work.target_tokens
            + self.per_source_pair * work.source_pairs
            + self.per_target_pair * work.target_pairs
            + self.per_cross_pair * work.cross_pairs
        )


def training_flops(facts: ModelFacts) -> TrainingFlops | None:
    """None where the count would mislead: a model in which weights other than plain matrices work, or not all on every token."""
    matrices = facts.matrices
    if matrices is None:
        return None
    layer = 12 * matrices.attention_width
    encoder, decoder = facts.num_layers - matrices.decoder_layers, matrices.decoder_layers
    return TrainingFlops(
        per_source_token=4 * matrices.source + 2 * matrices.source_trained,
        per_target_token=4 * matrices.target + 2 * matrices.target_trained,
        per_source_pair=layer * encoder,
        per_target_pair=layer * decoder,
        per_cross_pair=layer * decoder,
    )


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of one device in dense matrix products. None where it is not known, and in fp32, whose products torch may round to TF32."""
    if precision not in ("bf16", "fp16"):
        return None
    if _OTHER_CHIPS.search(device_name):
        return None
    return next((tera * _TERA for name, tera in _PEAK_TFLOPS if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", device_name)), None)


def mfu(flops: float, seconds: float, num_devices: int, peak: float | None) -> float | None:
    """Model FLOPs of all devices in `seconds` over what they could do at their peak; None without one."""
    return flops / (seconds * num_devices * peak) if peak and seconds > 0 else None
