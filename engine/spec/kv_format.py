"""How the KV cache is kept in fewer bits: keys, values, and how many of the newest tokens stay exact.

Tokens are packed in *blocks*: one token each, or as many as a group holds where groups lie along
columns (one channel over consecutive tokens, as KIVI does for keys). A block holds the keys of its
tokens, then their values. Tokens that are not packed yet are kept as *tail* rows of exact numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from engine.errors import PolicyError
from engine.spec.float_format import FLOAT_KINDS, FloatSpec, MatrixForm
from engine.spec.quant import FORMATS, Along, QuantSpec

_LARGEST_RESIDUAL = 1 << 20
_USUAL = QuantSpec()


@dataclass(frozen=True)
class KVFormat:
    """Formats of keys and values, ``keys/values+residual``: ``4``, ``2-channel/2+64``, ``float16``."""

    keys: MatrixForm = _USUAL
    values: MatrixForm = _USUAL

    residual: int = 0
    """Newest tokens that are kept exact at all times."""

    def __post_init__(self) -> None:
        for form in (self.keys, self.values):
            if form.activation_bits != 16:
                raise PolicyError("a8 concerns matrix products: the KV cache has no such option")
        columns = {form.block_rows for form in (self.keys, self.values) if form.along is Along.COLUMN}
        if len(columns) > 1:
            raise PolicyError(f"keys and values per channel want one group size, not {sorted(columns)}")
        if not 0 <= self.residual <= _LARGEST_RESIDUAL:
            raise PolicyError(f"a residual of {self.residual} tokens is not in 0 to {_LARGEST_RESIDUAL:,}")

    @cached_property
    def block_tokens(self) -> int:
        """Tokens of one packed block."""
        return max(self.keys.block_rows, self.values.block_rows)

    @property
    def token_by_token(self) -> bool:
        """Whether every token is packed at once and by itself, wherever it stands."""
        return self.block_tokens == 1 and not self.residual

    @property
    def tail_tokens(self) -> int:
        """Most tokens that are not packed, between passes."""
        return self.residual + self.block_tokens - 1

    def key_bytes(self, width: int) -> int:
        """Bytes of the keys of one block, ``width`` values per token."""
        return self.keys.nbytes(self.block_tokens, width)

    def block_bytes(self, key_width: int, value_width: int) -> int:
        """Bytes of one block: keys, then values."""
        return self.key_bytes(key_width) + self.values.nbytes(self.block_tokens, value_width)

    def packed_tokens(self, tokens: int) -> int:
        """How many of ``tokens`` are packed: all full blocks outside of the residual."""
        return max(0, tokens - self.residual) // self.block_tokens * self.block_tokens

    def __str__(self) -> str:
        text = str(self.keys) if self.keys == self.values else f"{self.keys}/{self.values}"
        return f"{text}+{self.residual}" if self.residual else text

    @classmethod
    def parse(cls, text: str) -> KVFormat:
        """Read what ``str`` writes, ``flexgen``, or ``kivi``, ``kivi2``, ``kivi3`` (4 bits without a number).

        Raises:
            PolicyError: naming the word that is not understood.
        """
        if text == "flexgen":
            return cls()
        named = re.fullmatch(r"kivi(\d?)", text)
        if named:
            bits = int(named[1] or 4)
            return cls(QuantSpec(bits, along=Along.COLUMN), QuantSpec(bits), residual=64)
        forms, plus, residual = text.partition("+")
        keys, slash, values = forms.partition("/")
        if (plus and not re.fullmatch(r"\d{1,9}", residual)) or (slash and not values):
            raise _unknown(text)
        first = _parse(keys)
        return cls(first, _parse(values) if slash else first, int(residual or 0))


def _parse(text: str) -> MatrixForm:
    if text in FLOAT_KINDS:
        return FloatSpec(text)
    if not (text[:1].isdecimal() or text in FORMATS):  # of whose words the formats of weights know nothing
        raise _unknown(text)
    return QuantSpec.parse(text)


def _unknown(text: str) -> PolicyError:
    return PolicyError(
        f"{text!r} is not a format of the KV cache: write float16, 4, 4-channel/4+64, flexgen or kivi"
    )
