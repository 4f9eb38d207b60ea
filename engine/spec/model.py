"""A model as the planner sees it: its tensors, its stages, the width of its KV cache, its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from engine.spec.quant import QuantSpec

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


class Shaped:
    """What has a shape and a type: counts of values and bytes."""

    shape: tuple[int, ...]
    dtype: str

    @cached_property
    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values as they are computed with, not as they are packed."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorSpec(Shaped):
    """One weight as the model holds it."""

    name: str
    """Name in the model's state dict; a tied tensor has one name only."""

    shape: tuple[int, ...]

    dtype: str
    """Kind of number it is kept in while uncompressed, for instance ``float16``."""

    compressible: bool
    """Whether weight compression applies by default: matrices of transformer blocks, no norms and biases."""

    fused: bool = False
    """Whether every module that reads it can compute straight from its packed form."""

    transposed: bool = False
    """Whether it is kept as [inputs, outputs]; it is packed the other way round, as every other weight."""

    table: bool = False
    """Whether all that reads it before the layers reads single rows: an input embedding."""

    in_file: bool = False
    """Whether a file of the checkpoint holds it byte by byte as the model wants it."""

    packed: QuantSpec | None = None
    """The format in which the checkpoint itself keeps it (GPTQ, AWQ)."""

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows: a matrix, or several of one shape."""
        return len(self.shape) > 1

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and values of a row as it is packed: outputs of all its matrices, inputs."""
        if self.transposed:
            return self.shape[1], self.shape[0]
        return self.numel // self.shape[-1], self.shape[-1]


@dataclass(frozen=True)
class StateTensor(Shaped):
    """What a recurrent module of a layer keeps of every sequence, whatever its length."""

    module: int
    """Which of the layer's recurrent modules."""

    kind: str
    """``conv`` or ``recurrent``."""

    index: int
    """Which of its module's states of this kind."""

    shape: tuple[int, ...]
    """Of one sequence."""

    dtype: str
    """What it is computed in."""


@dataclass(frozen=True)
class ModelSpec:
    """A causal language model as data.

    Stage 0 is the input embedding, stages 1 .. num_layers are the layers, the last one is the head.
    """

    architecture: str
    """Class in transformers, for instance ``OPTForCausalLM``."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Widest inner row of one token: of the MLP, or of all experts that a token visits together."""

    experts_per_token: int
    """Experts that a token visits; 0 where there are none."""

    num_heads: int
    vocab_size: int

    max_positions: int | None
    """Most tokens of one sequence, or None where the model sets no limit."""

    query_width: int
    """Values of all heads' queries of one token."""

    plain_scores: bool
    """Whether attention scores go into the softmax as they are, so that fused kernels take them: nothing caps
    them, and no sink is added."""

    kv_widths: tuple[tuple[int, int], ...]
    """Per layer the number of key values and of value values that one token adds to the KV cache."""

    tensors: Mapping[str, TensorSpec]
    """Every stored tensor once, in the order of the stages."""

    stages: tuple[tuple[str, ...], ...]
    """Names of the tensors that each stage reads; a tied one appears in two stages."""

    dtype: str
    """What the checkpoint's weights are kept in."""

    compute_dtype: str
    """What is computed in, and what an uncompressed KV cache is kept in."""

    identify: Callable[[], str] = field(compare=False, repr=False)
    """Finds `digest`, for which the weights of a checkpoint are read."""

    weights: str
    """``trained`` (read from a checkpoint) or ``random``."""

    path: str
    """The folder or hub name as the user gave it."""

    own_attention: bool = False
    """Whether attention is transformers' own code, run for one sequence after the other with all its scores
    written out."""

    left_out: Mapping[str, int] = field(default_factory=dict)
    """Tensors of the checkpoint that text does not need: how many, by the first parts of their names."""

    states: tuple[tuple[StateTensor, ...], ...] = ()
    """Per layer what it keeps of a sequence besides keys and values; empty where no layer keeps anything."""

    state_workspace: tuple[int, int] = (0, 0)
    """Most bytes that a recurrent module takes while it computes: for a chunk of a prompt, and for each
    sequence that decodes."""

    @cached_property
    def digest(self) -> str:
        """Identifies config and weights."""
        return self.identify()

    @cached_property
    def num_parameters(self) -> int:
        """Values of all stored tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def num_stages(self) -> int:
        """Stages that a pass visits: embedding, layers, head."""
        return self.num_layers + 2

    @property
    def has_state(self) -> bool:
        """Whether any layer is recurrent."""
        return any(self.states)

    @property
    def compute_bytes(self) -> int:
        """Bytes of one value in the precision that is computed in."""
        return DTYPE_BYTES[self.compute_dtype]
