"""Where the rest of the engine calls the kernels: the fastest form of each that this device has.

CPU tensors go to the C kernels, CUDA tensors to the Triton ones, and to plain torch where there is no
compiler, no Triton, or a case that they leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from engine.kernels import choice, reference, reference_attention
from engine.kernels.calls import AttentionOptions, CachedSequence, DecodeTable, HeadShape, PackedMatrix
from engine.kernels.cpu import native
from engine.kernels.cpu.native import work_alone as work_alone
from engine.kernels.cpu.prompts import attend_prompts as attend_prompts
from engine.kernels.cuda import gpu
from engine.spec.float_format import FloatSpec, MatrixForm
from engine.spec.kv_format import KVFormat
from engine.spec.layout import FUSED_ROWS
from engine.spec.precision import MatmulPrecision


def computes_packed(device: torch.device, rows: int | None = None) -> bool:
    """Whether products of so many rows, or of any number, are best computed straight from packed weights."""
    if device.type == "cuda":
        return rows is not None and rows <= FUSED_ROWS and gpu.available()
    return native.available()


def attends_exact(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are the fastest way for one query per sequence over exact keys and values, too.

    Torch's fused attention takes one call per sequence, whose cached lengths differ.
    """
    return device.type == "cpu" and dtype == torch.float32 and native.available()


def attends_prompts(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend_prompts` can be called for prompts that have no past, and is the fastest way."""
    return device.type == "cpu" and dtype == torch.float32 and native.gains_by_prompts()


def precision_of(wanted: MatmulPrecision, device: torch.device) -> MatmulPrecision:
    """The precision that a policy allows, where products gain by it on this device; float32's elsewhere."""
    return wanted if device.type == "cpu" and native.gains_by(wanted) else MatmulPrecision.HIGHEST


def describe(device: torch.device) -> str:
    """Which kernels compute with packed numbers on a device, or why the fast ones do not."""
    if device.type == "cuda":
        return "Triton" if gpu.available() else "torch (Triton is not installed)"
    if not native.available():
        return f"torch ({native.reason()})"
    faster = [precision for precision in MatmulPrecision if native.gains_by(precision)]
    return f"C, faster at {' and '.join(faster)}" if faster else "C"


def pack(values: Tensor, spec: MatrixForm, out: Tensor) -> Tensor:
    """See `reference.pack`."""
    return (_fast(values, spec) or reference).pack(values, spec, out)  # type: ignore[no-any-return]


def unpack(packed: Tensor, spec: MatrixForm, out: Tensor) -> Tensor:
    """See `reference.unpack`."""
    return (_fast(packed, spec) or reference).unpack(packed, spec, out)  # type: ignore[no-any-return]


def matmul(
    x: Tensor,
    matrix: PackedMatrix,
    bias: Tensor | None = None,
    precision: MatmulPrecision = MatmulPrecision.HIGHEST,
) -> Tensor:
    """x [..., width] times a packed matrix, transposed: [..., rows], as `F.linear`."""
    kernels = _fast(x)
    if kernels is native:
        return native.matmul(x, matrix, bias, precision=precision)
    product = (kernels or reference_attention).matmul(x.reshape(-1, x.shape[-1]), matrix, bias)
    return product.view(*x.shape[:-1], matrix.rows)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    precision: MatmulPrecision = MatmulPrecision.HIGHEST,
) -> Tensor:
    """`F.linear` by way of what is fastest here for float32 on a CPU: see `engine.kernels.choice`."""
    rows = x.numel() // x.shape[-1]
    suits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and weight.is_contiguous()
    if not (suits and rows):
        return nn.functional.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    if native.uses_bfloats(rows, precision):
        product = native.linear(flat, weight, bias, precision=precision)
    else:
        product = choice.fastest(rows, weight.numel())(flat, weight, bias)
    return product.view(*x.shape[:-1], -1)


def prepare(device: torch.device) -> None:
    """Measure now, where it was never measured, what the first product would otherwise wait for."""
    if device.type == "cpu":
        choice.fastest(1, 1)


def embedding(ids: Tensor, matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """Rows of a packed matrix: ids [...] -> [..., width]; only the blocks that hold them are unpacked."""
    if isinstance(matrix.spec, FloatSpec):
        table = reference.floats(matrix.data[: matrix.rows], matrix.spec)
        return nn.functional.embedding(ids, table).to(dtype)
    blocks, places = torch.unique(ids.reshape(-1) // matrix.spec.block_rows, return_inverse=True)
    rows = torch.empty(len(blocks) * matrix.spec.block_rows, matrix.width, dtype=dtype, device=ids.device)
    unpack(matrix.data[blocks], matrix.spec, rows)
    found = places * matrix.spec.block_rows + ids.reshape(-1) % matrix.spec.block_rows
    return nn.functional.embedding(found, rows).view(*ids.shape, matrix.width)


def summarise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What is asked of a head's rows: logits [R, V] -> first place of the highest [R], log(sum(exp)) [R].

    The second is float32, and no number where one of a row's logits is none.
    """
    if _fast(logits) is native:
        return native.summarise(logits)
    return logits.argmax(-1), torch.logsumexp(logits.float(), dim=-1)


def attention(
    query: Tensor,
    sequences: Sequence[CachedSequence],
    form: KVFormat,
    shape: HeadShape,
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor | None = None,
) -> Tensor:
    """See `reference_attention.attention`."""
    call = (_fast(query, form.keys, form.values) or reference_attention).attention
    return call(query, sequences, form, shape, options, out, lse=lse)  # type: ignore[no-any-return]


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: DecodeTable,
    form: KVFormat | None,
    shape: HeadShape,
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor | None = None,
) -> None:
    """See `native.decode`; only where `attends_exact` says so, for addresses are of no use to others."""
    native.decode(query, key, value, table, form, shape, options, out, lse=lse)


def pack_tokens(
    rows: Sequence[Tensor], form: KVFormat, keys: int, values: int, targets: Sequence[Tensor]
) -> None:
    """Pack full blocks of tokens of several sequences.

    Args:
        rows: per sequence [T, keys + values], T a multiple of ``form.block_tokens``.
        targets: per sequence uint8, flat, exactly its blocks.

    Raises:
        ValueError: if a value is not finite or a group exceeds the range of fp16.
    """
    if rows and _fast(rows[0]) is native:
        native.pack_tokens(rows, form, keys, values, targets)
        return
    size, key_bytes = form.block_bytes(keys, values), form.key_bytes(keys)
    for source, target in zip(rows, targets, strict=True):
        blocks = target.view(-1, size)
        parts = (
            (blocks[:, :key_bytes], form.keys, source[:, :keys]),
            (blocks[:, key_bytes:], form.values, source[:, keys:]),
        )
        for part, spec, values_ in parts:
            packed = pack(
                values_, spec, part.new_empty(spec.blocks(len(values_)), spec.block_bytes(values_.shape[1]))
            )
            part.copy_(packed.view(len(blocks), -1))


def _fast(tensor: Tensor, *forms: MatrixForm) -> ModuleType | None:
    """The kernels for a tensor's device; None for plain torch, which on a GPU also knows 16-bit floats."""
    if tensor.is_cpu:
        return native if native.available() else None
    if not tensor.is_cuda or any(isinstance(form, FloatSpec) for form in forms):
        return None
    return gpu if gpu.available() else None
