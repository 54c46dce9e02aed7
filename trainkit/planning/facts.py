"""What the plan is computed from: plain numbers about the model, the data and the machines.

Facts are read elsewhere (training/model.py reads the model's on the meta device, data/source.py counts rows, cluster/launch.py asks
the cluster) and passed in, so that planning stays arithmetic without torch, ray or deepspeed.
"""

from __future__ import annotations

from dataclasses import dataclass

LENGTH_STEP = 8  # padded lengths are rounded up to this: few shapes, and matrix sizes that tensor cores like
DEFAULT_LENGTH = 512  # tokens of a row, where the recipe has no limit


@dataclass(frozen=True)
class Parameter:
    """One entry of `model.named_parameters()`: a tied weight appears once."""

    name: str
    numel: int
    trainable: bool
    block: int | None = None  # number of the repeated block that alone has it


@dataclass(frozen=True)
class Matrices:
    """Weights of the linear layers, counted by the tokens that they multiply: in an encoder-decoder those of the source (the encoder, and
    keys and values of cross-attention) and of the target; elsewhere all are `source`."""

    source: int
    target: int
    source_trained: int
    target_trained: int
    decoder_layers: int  # of an encoder-decoder, else 0
    attention_width: int  # heads × width of a head


@dataclass(frozen=True)
class ModelFacts:
    """Of the model as it is trained: with its head, and with LoRA's matrices if the recipe asks for them."""

    model_type: str  # config.model_type: "t5", "llama", ...
    parameters: tuple[Parameter, ...]  # in the order of named_parameters()
    buffer_bytes: int  # persistent and other buffers, never partitioned
    hidden_size: int
    num_layers: int  # encoder plus decoder blocks
    vocab_size: int
    attn_implementation: str
    matrices: Matrices | None = None  # None: other weights work as well, or not all on every token
    decides_on_host: bool = False  # which experts or layers see a token, in the middle of a forward
    waits_for_device: bool = False  # in a forward, which reads values of tensors

    @property
    def num_parameters(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def num_trainable(self) -> int:
        return sum(p.numel for p in self.parameters if p.trainable)


@dataclass(frozen=True)
class DataFacts:
    """Rows after slicing and holding out; None where the data cannot be reached."""

    train_rows: int | None
    eval_rows: int | None


@dataclass(frozen=True)
class Hardware:
    """The device of one worker. `memory_bytes` is None where it is not known (a plan made without a cluster)."""

    device: str  # "cuda" | "cpu"
    name: str  # "NVIDIA H200", "CPU"
    memory_bytes: int | None
    has_bf16: bool = True  # in its matrix units: NVIDIA's have from compute capability 8.0 on
    has_nvlink: bool = False  # to the others of its machine
