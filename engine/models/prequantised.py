"""Checkpoints that are quantised already: GPTQ and AWQ weights become packed matrices as they are.

Both keep x = (code - zero) * scale with one zero point and one scale per output and group of inputs.
That is `Offset.ZERO` along rows, so codes, zero points and scales change places and nothing is rounded
again. The files hold a weight of b bits, [out, in] in the model, in words of 32 bits:

               GPTQ                  AWQ (gemm)
    X.qweight  [in * b/32, out]      [in, out * b/32]
    X.qzeros   [groups, out * b/32]  [groups, out * b/32]
    X.scales   [groups, out]         [groups, out]
    X.g_idx    [in], optional        -                     group of each input

Numbers fill a word from its lowest bits up, in AWQ eight numbers in the order 0 2 4 6 1 3 5 7. GPTQ's
first format subtracted a 1 in each number from every *word* of zero points, so that a zero point of 0
borrows from the next one; ``gptq_v2`` does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError, ModelError, PolicyError
from engine.kernels.calls import PackedMatrix
from engine.kernels.reference import to_planes as to_planes
from engine.models.formats.headers import HeaderEntry
from engine.models.formats.settings import pattern_of, quantisation_of, read_settings
from engine.spec.layout import CONVERT_VALUES
from engine.spec.quant import WHOLE_ROW, Offset, QuantSpec

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ each of eight numbers is, counted from the lowest bits."""

_PARTS = ("qweight", "qzeros", "scales")
_WORD_BITS = 32
_METHODS: dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]] = {
    "gptq": ("checkpoint_format", ("gptq", "gptq_v2"), (2, 4, 8)),
    "awq": ("version", ("gemm",), (4,)),
}
"""By method: which setting names its variant, the known ones, the first where none is named, and bits."""

_SUPPORTED = (
    "use GPTQ of 2, 4 or 8 bits (checkpoint_format gptq or gptq_v2), AWQ of 4 bits (version gemm), "
    "or the model's 16-bit weights"
)


@dataclass(frozen=True)
class Scheme:
    """How all quantised weights of one checkpoint are kept."""

    method: str
    """``gptq`` or ``awq``."""

    spec: QuantSpec

    subtracted: int = 0
    """What the files hold less than each zero point."""

    act_order: bool = False
    """Whether the config says that inputs were put into groups by their activations."""

    symmetric: bool = False
    """Whether the config says that every zero point is the middle of the codes."""

    modules: tuple[tuple[re.Pattern[str], Scheme | None], ...] = ()
    """Of modules whose name begins like this: another scheme, or None for those that are not quantised."""

    def of(self, module: str) -> Scheme | None:
        """The scheme of one module: of the first pattern that fits, as GPTQModel has it."""
        return next((scheme for pattern, scheme in self.modules if pattern.match(module)), self)


def scheme_of(settings: Mapping[str, Any], model: str) -> Scheme:
    """Read a ``quantization_config``; ``model`` is what errors name.

    Raises:
        ModelError: for a method, a variant of it or a number of bits that is not supported.
    """
    method = str(settings.get("quant_method")).lower()
    bits, group_size = settings.get("bits", 4), settings.get("group_size", 128)
    key, variants, widths = _METHODS.get(method, ("", (), ()))
    variant = str(settings.get(key) or settings.get("format") or next(iter(variants), "")).lower()
    refused = method
    if settings.get("is_marlin_format") or settings.get("pack_dtype", "int32") not in ("int32", torch.int32):
        refused += ", in words of another order"
        variants = ()
    if variant in variants and bits in widths:
        try:
            spec = QuantSpec(bits, WHOLE_ROW if group_size == -1 else int(group_size), Offset.ZERO)
            return Scheme(
                method,
                spec,
                int(variant == "gptq"),
                bool(settings.get("desc_act")),
                symmetric=method == "gptq" and settings.get("sym") is True,
                modules=_modules(settings, model) if method == "gptq" else (),
            )
        except (PolicyError, TypeError, ValueError, OverflowError):
            refused += f", groups of {group_size}"
    elif variants:
        refused += f", {variant}" if variant not in variants else f", {bits} bits"
    raise ModelError(f"model {model} is already quantised ({refused}), which is not supported: {_SUPPORTED}")


def _modules(settings: Mapping[str, Any], model: str) -> tuple[tuple[re.Pattern[str], Scheme | None], ...]:
    """GPTQModel's ``dynamic``: settings of modules by patterns of names, ``-:`` before those left out."""
    given = settings.get("dynamic") or {}
    if not isinstance(given, Mapping) or not all(isinstance(changes, Mapping) for changes in given.values()):
        raise ModelError(
            f"model {model}: dynamic in its quantisation settings does not map patterns to settings"
        )
    plain = {key: value for key, value in settings.items() if key != "dynamic"}
    found: list[tuple[re.Pattern[str], Scheme | None]] = []
    for text, changes in given.items():
        try:
            pattern = pattern_of(text.removeprefix("-:").removeprefix("+:"))
        except ValueError as error:
            raise ModelError(
                f"model {model}: dynamic has the pattern {text[:80]!r}, which cannot be used: {error}"
            ) from None
        found.append((pattern, None if text.startswith("-:") else scheme_of({**plain, **changes}, model)))
    return tuple(found)


@dataclass(frozen=True)
class QuantisedWeight:
    """One weight as the files hold it, in several tensors."""

    base: str
    """The module's name on disk: X of ``X.qweight``."""

    scheme: Scheme
    entries: Mapping[str, HeaderEntry]
    """What the headers say of the parts that there are, by ``qweight``, ``qzeros``, ``scales``, ``g_idx``."""

    @property
    def name(self) -> str:
        """What the weight would be called if it were not quantised."""
        return f"{self.base}.weight"

    @property
    def scales(self) -> str:
        """Name of the tensor that holds the scales."""
        return f"{self.base}.scales"

    @property
    def other_parts(self) -> list[str]:
        """Names of all its tensors but ``X.qweight``, which stands for it."""
        return [f"{self.base}.{part}" for part in self.entries if part != "qweight"]

    def check(self, rows: int, width: int, read: Callable[[str], Tensor]) -> None:
        """Make sure that it becomes a matrix [rows, width]; ``read`` is given names of tensors.

        Raises:
            CheckpointError: if a part has another shape or kind, or groups are not runs of inputs.
        """
        spec = self.scheme.spec
        groups = spec.groups(width)
        numbers = _WORD_BITS // spec.bits  # in one word
        packs_inputs = self.scheme.method == "gptq"
        if rows % numbers or width % (numbers if packs_inputs else spec.group(width)):
            raise self._error(
                "qweight",
                f"cannot hold a matrix of {rows} outputs and {width} inputs at {spec.bits} bits in groups of "
                f"{spec.group(width)}: its quantisation settings do not belong to these weights",
            )
        words = rows // numbers
        wanted = {
            "qweight": (width // numbers, rows) if packs_inputs else (width, words),
            "qzeros": (groups, words),
            "scales": (groups, rows),
            "g_idx": (width,),
        }
        for part, entry in self.entries.items():
            fits = entry.dtype.is_floating_point if part == "scales" else entry.dtype == torch.int32
            if entry.shape != wanted[part] or not fits:
                raise self._error(
                    part,
                    f"is {str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}, but {spec.bits} bits "
                    f"in groups of {spec.group(width)} ask for {'floats' if part == 'scales' else 'int32'} "
                    f"{list(wanted[part])}: config.json does not belong to these weights",
                )
        if "g_idx" in self.entries:
            self._check_order(read(f"{self.base}.g_idx"), width)

    def repack(self, rows: int, width: int, read: Callable[[str], Tensor]) -> PackedMatrix:
        """Bring the numbers of a matrix [rows, width] into our layout, some `CONVERT_VALUES` at a time.

        Raises:
            CheckpointError: see `check`; also if a scale is not finite, or no number of fp16.
        """
        self.check(rows, width, read)
        spec = self.scheme.spec
        groups, size, end = spec.groups(width), spec.group(width), spec.code_bytes(width)
        scales = _turned(self._in_half(read(self.scales)))  # [rows, groups]
        zeros = self._zero_points(read(f"{self.base}.qzeros")).half()
        words = read(f"{self.base}.qweight")
        data = torch.empty(rows, spec.block_bytes(width), dtype=torch.uint8)
        step = max(_WORD_BITS, CONVERT_VALUES // width // _WORD_BITS * _WORD_BITS)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            codes = nn.functional.pad(self._codes(words, part), (0, groups * size - width))
            data[part, :end] = to_planes(codes.view(-1, groups, size), spec)
            data[part, end : end + 2 * groups] = scales[part].view(torch.uint8)
            data[part, end + 2 * groups :] = zeros[part].view(torch.uint8)
        return PackedMatrix(data, spec, rows, width)

    def _codes(self, words: Tensor, rows: slice) -> Tensor:
        """uint8 [rows, in] of the words of ``X.qweight``."""
        bits = self.scheme.spec.bits
        if self.scheme.method == "gptq":
            return _unpack_inputs(words[:, rows], bits)
        numbers = _WORD_BITS // bits
        return _unpack_outputs(words[:, rows.start // numbers : rows.stop // numbers], bits, AWQ_PLACES)

    def _zero_points(self, words: Tensor) -> Tensor:
        """uint8 [out, groups] of the words of ``X.qzeros``."""
        given = self._zero_points_less(words, self.scheme.subtracted)
        middle = 1 << (self.scheme.spec.bits - 1)
        if not self.scheme.symmetric or bool((given == middle).all()):
            return given
        # Kernels for symmetric weights never look at them, so that some writers mix up the conventions.
        other = self._zero_points_less(words, 1 - self.scheme.subtracted)
        if bool((other == middle).all()):
            return other
        wrong = int(given[given != middle][0])
        raise self._error(
            "qzeros",
            f"holds a zero point of {wrong}, but sym in the quantisation settings says {middle} for all: "
            "use a checkpoint whose settings and weights agree, or the model's 16-bit weights",
        )

    def _zero_points_less(self, words: Tensor, subtracted: int) -> Tensor:
        """The same, if the words hold ``subtracted`` less in every number."""
        bits = self.scheme.spec.bits
        ones = sum(subtracted << low for low in range(0, _WORD_BITS, bits))
        places = AWQ_PLACES if self.scheme.method == "awq" else range(_WORD_BITS // bits)
        return _unpack_outputs((words.long() + ones).to(torch.int32), bits, places)

    def _in_half(self, scales: Tensor) -> Tensor:
        half = scales.half()
        if not torch.equal(half.to(scales.dtype), scales) or not bool(half.isfinite().all()):
            raise self._error("scales", "holds values that float16 cannot hold: download it again")
        return half

    def _check_order(self, order: Tensor, width: int) -> None:
        runs = torch.arange(width, dtype=order.dtype) // self.scheme.spec.group(width)
        unset = not self.scheme.act_order and not order.any()  # as writers leave it that know no order
        if not unset and not torch.equal(order, runs):
            raise self._error(
                "g_idx",
                "puts inputs into groups by their activations (desc_act), which is not supported: use a "
                "checkpoint made with desc_act false or static groups, or the model's 16-bit weights",
            )

    def _error(self, part: str, what: str) -> CheckpointError:
        return CheckpointError(f"tensor '{self.base}.{part}' ({self.scheme.method}) {what}")


def find_quantised(entries: Mapping[str, HeaderEntry], folder: Path) -> dict[str, QuantisedWeight]:
    """All quantised weights among the tensors of a checkpoint, by the name of their ``qweight``.

    Raises:
        CheckpointError: if config.json and the files do not agree, or a part is missing.
        ModelError: see `scheme_of`.
    """
    bases = {name.rpartition(".")[0] for name in entries if name.endswith((".qweight", ".qzeros"))}
    settings = quantisation_of(folder, read_settings(folder), bool(bases))
    if settings is None:
        if bases:
            raise CheckpointError(
                f"{folder} holds quantised weights, first '{min(bases)}.qweight', but nothing says how: its "
                "config.json has no quantization_config, and there is no quantize_config.json: put the one "
                "that its maker gave beside it"
            )
        return {}
    scheme = scheme_of(settings, str(folder))
    if not bases:
        raise CheckpointError(
            f"{folder} is quantised ({scheme.method}) as its config.json says, but holds no tensor "
            "named qweight: they do not belong together"
        )
    return {f"{base}.qweight": _weight(base, entries, scheme) for base in sorted(bases)}


def _weight(base: str, entries: Mapping[str, HeaderEntry], whole: Scheme) -> QuantisedWeight:
    scheme = whole.of(base)
    if scheme is None:
        raise CheckpointError(
            f"tensor '{base}.qweight' ({whole.method}) is quantised, but dynamic in the quantisation "
            "settings says that it is not: the settings do not belong to these weights"
        )
    for part in (*_PARTS, "g_idx") if scheme.act_order else _PARTS:
        if f"{base}.{part}" not in entries:
            raise CheckpointError(
                f"tensor '{base}.{part}' ({scheme.method}) is missing beside the other parts of {base!r}: "
                "download the checkpoint again"
            )
    if f"{base}.weight" in entries:
        raise CheckpointError(
            f"tensor '{base}.weight' stands beside '{base}.qweight' ({scheme.method}): only one can hold"
        )
    parts = {part: entries[f"{base}.{part}"] for part in (*_PARTS, "g_idx") if f"{base}.{part}" in entries}
    return QuantisedWeight(base, scheme, parts)


def _unpack_inputs(words: Tensor, bits: int) -> Tensor:
    """int32 [in / n, R] with n inputs in a word -> uint8 [R, in], the lowest bits of a word first."""
    packed = _turned(words).view(torch.uint8)
    fields = 8 // bits
    numbers = torch.empty(*packed.shape, fields, dtype=torch.uint8)
    for field in range(fields):
        torch.bitwise_and(packed >> (field * bits), 2**bits - 1, out=numbers[..., field])
    return numbers.view(len(packed), -1)


def _unpack_outputs(words: Tensor, bits: int, places: Sequence[int]) -> Tensor:
    """int32 [A, R / n] with n outputs in a word -> uint8 [R, A]; ``places`` as `AWQ_PLACES`."""
    packed = _turned(words).view(torch.uint8).view(words.shape[1], len(words), -1)
    numbers = torch.empty(words.shape[1], len(places), len(words), dtype=torch.uint8)
    for number, place in enumerate(places):
        byte, low = divmod(place * bits, 8)
        torch.bitwise_and(packed[..., byte] >> low, 2**bits - 1, out=numbers[:, number])
    return numbers.view(-1, len(words))


def _turned(matrix: Tensor) -> Tensor:
    """The transposed matrix in memory of its own; `Tensor.contiguous` leaves a single row as it is."""
    return matrix.t().clone(memory_format=torch.contiguous_format)
